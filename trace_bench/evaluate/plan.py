"""Which cells are missing, and under which settings they are made."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from trace_bench import checks, records
from trace_bench.engine import SPEED_ONLY_ARGS, models, with_dtype
from trace_bench.evaluate import distance
from trace_bench.evaluate.given import given_cells, given_settings, task_of
from trace_bench.keys import refuse_secrets
from trace_bench.manifest import ALLOWED, differences
from trace_bench.measures.likelihood import LIKELIHOOD
from trace_bench.run import Run, RunError, Stage
from trace_tasks import data
from trace_tasks.tokens import Chat

log = logging.getLogger(__name__)

#: The settings (of `CLConfig`) for what is measured in addition to the matrix. A manifest has those that were set.
EXTRA_SETTINGS = (
    "general",
    "general_stages",
    "general_rows",
    "judged",
    "judged_rows",
    "judged_max_new_tokens",
    "distance",
)
_DEFAULTS = {"backend": "vllm", "cells": "seen", "general_stages": "last", "general": (), "judged": ()}


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated.

    Attributes:
        config: The run's configuration, with the settings that replace its own.
        engine_args: All arguments of the engine.
        matrix: The settings of the matrix.
        settings: Name of a task, judged set or general suite -> the settings of its cells.
        existing: The cells that exist: (stage, name) -> content.
        todo: Stage -> the names of its missing cells.
        add_likelihood: Stage -> the names of its existing cells that get their likelihoods now.
        likelihood: Whether new cells get their likelihoods.
        distance: The settings of distances from the base model; empty if none are asked for.
        distances: Stage -> the sets of prompts on which its distance is missing.
        data_path: Where the data is now, if it was moved.
    """

    run: Run
    config: dict[str, Any]
    engine_args: dict[str, Any]
    matrix: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    existing: dict[tuple[Stage, str], dict[str, Any]]
    todo: dict[Stage, list[str]] = field(default_factory=dict)
    add_likelihood: dict[Stage, list[str]] = field(default_factory=dict)
    likelihood: bool = False
    distance: dict[str, Any] = field(default_factory=dict)
    distances: dict[Stage, list[str]] = field(default_factory=dict)
    data_path: str | None = None

    @property
    def cells(self) -> int:
        """The number of missing cells, likelihoods and distances."""
        return sum(len(names) for part in self.parts for names in part.values())

    @property
    def parts(self) -> tuple[dict[Stage, list[str]], ...]:
        """All that is missing: cells, likelihoods and distances."""
        return self.todo, self.add_likelihood, self.distances

    @property
    def stages(self) -> list[Stage]:
        """The stages that the engine is needed for, in their order."""
        return sorted({stage for part in self.parts for stage in part}, key=lambda stage: stage.index)

    @property
    def missing(self) -> list[str]:
        """The names of all missing cells, and of those that get their likelihoods."""
        return list(dict.fromkeys(name for part in self.parts[:2] for names in part.values() for name in names))

    @cached_property
    def owners(self) -> dict[str, str]:
        """Name of a cell that is not of a suite -> its task: one task may have several cells (`given`)."""
        return {name: task_of(name, settings) for name, settings in self.settings.items() if name not in data.SUITES}

    @property
    def in_chat(self) -> bool:
        """Whether something is asked in the chat template: tasks, sets to be judged or neutral questions."""
        neutral = bool(self.distances) and self.distance["neutral_chat_template"]
        return neutral or any(self.settings[name].get("chat_template") for name in self.missing)

    @property
    def max_answer(self) -> int | None:
        """The most tokens of a reference answer, as the run trains them."""
        return self.config.get("max_answer_length")

    @property
    def backend(self) -> str:
        """Either vllm or hf."""
        return self.config["backend"]

    def chat(self, tokenizer: Any) -> Chat:
        """Renders the chat prompts as the training of the run did."""
        return Chat(tokenizer, self.config.get("chat_template_args"), self.run.manifest.get("date"))


def base_of(run: Run) -> dict[str, Any]:
    """The arguments with which functions of `models` load a run's base model or its tokenizer."""
    model = run.manifest["model"]
    return {"model": models.base_of_run(model), "revision": model.get("revision")}


def make_plan(
    run: Run,
    chosen: Sequence[Stage],
    *,
    cells: str | None = None,
    backend: str | None = None,
    engine_args: dict[str, Any] | None = None,
    data_path: str | None = None,
    extra: dict[str, Any] | None = None,
    likelihood: bool | None = None,
    given: int | None = None,
) -> Plan:
    """Finds the missing cells of the chosen stages. Arguments that are given replace the run's settings.

    Args:
        run: The run.
        chosen: The stages.
        cells: The tasks of each stage: "seen", "all", or "own" (only the stage's own). The base model and checkpoints
            that belong to no task are always evaluated on all tasks.
        backend: "vllm" or "hf".
        engine_args: Added to the run's own. They win, and None removes an argument.
        data_path: Where the data is now, if it was moved. It must have the run's fingerprint.
        extra: Settings of `EXTRA_SETTINGS`.
        likelihood: Which cells of the matrix get the likelihoods of reference answers: None = new ones, True = all.
        given: If set, old tasks are also measured with the first `given` tokens of their reference answers given.

    Raises:
        RunError: if a value is not allowed, or cells of the run were made with other settings.
    """
    if unknown := sorted({*(extra or {})} - {*EXTRA_SETTINGS}):
        raise RunError(f"extra has {', '.join(unknown)}: use only {', '.join(EXTRA_SETTINGS)}.")
    config = {**_DEFAULTS, **run.manifest["config"], **(extra or {})}
    config |= {k: v for k, v in {"cells": cells, "backend": backend}.items() if v is not None}
    for name, allowed in ALLOWED.items():  # the command line checks its own; this is for calls from Python
        if config[name] not in allowed:
            raise RunError(f"{name}={config[name]!r}: use {' or '.join(allowed)}.")
    engine_args = {**(config.get("engine_args") or {}), **(engine_args or {})}
    engine_args = with_dtype({k: v for k, v in engine_args.items() if v is not None})
    refuse_secrets(engine_args, "engine_args")
    if config.get("trust_remote_code"):
        engine_args.setdefault("trust_remote_code", True)
    suites, judged = data.expand(config["general"], data.SUITES), data.expand(config["judged"], data.JUDGED)
    records.check_stages(run, chosen)
    matrix = matrix_settings(config, engine_args)
    settings = dict.fromkeys(run.tasks, matrix) | given_settings(run, given, matrix)
    settings |= suite_settings(suites, config, matrix)
    chat = _chat_of_base(run, config, matrix) if judged or config.get("distance") else {}
    settings |= _settings_of_judged(run, judged, config, chat, matrix, data_path)
    plan = Plan(
        *(run, config, engine_args, matrix, settings, _read_cells(run, settings)),
        likelihood=likelihood is not False,
        distance=distance.settings_of(chat, matrix) if config.get("distance") else {},
        data_path=data_path,
    )
    for stage in [stage for stage in chosen if stage.is_trained]:
        both_ends = stage.index in (0, len(run.stages) - 1)
        more = [*judged, *suites] if both_ends or config["general_stages"] == "all" else []
        seen = run.seen_tasks(stage, config["cells"])  # a set may be a column as well
        _add_stage(plan, stage, dict.fromkeys([*seen, *given_cells(run, stage, given), *more]), bool(likelihood))
    return plan


def check_trained(chosen: Iterable[Stage], named: Collection[int] | None) -> None:
    """Refuses stages that are not trained if they were asked for by number. Otherwise they are just left out.

    Raises:
        RunError: naming these stages.
    """
    untrained = " ".join(str(stage.number) for stage in chosen if not stage.is_trained)
    if untrained and named is not None:
        raise RunError(f"--stages {untrained}: not trained yet. Leave them out, or wait for them with --follow.")


def _add_stage(plan: Plan, stage: Stage, wanted: Iterable[str], add_likelihood: bool) -> None:
    """Adds to the plan what a stage lacks: cells, distances and, if asked, the likelihoods of existing cells."""
    missing, sets = _missing(stage, wanted, plan.existing), distance.missing(plan.run, stage, plan.distance)
    cells = {name: plan.existing[stage, name] for name in plan.run.tasks if (stage, name) in plan.existing}
    without = [name for name, cell in cells.items() if cell["metrics"].get(LIKELIHOOD, {}).get("value") is None]
    lacking = [name for name in without if add_likelihood and name not in missing and has_likelihood(name)]
    lacks = list(zip(plan.parts, (missing, lacking, sets), strict=True))
    number = sum(len(names) for _, names in lacks)
    if number and stage.external is not None and not stage.external.is_dir():
        log.warning(
            "%s: its checkpoint %s is missing, so %d cells are left out. Give its new place with --checkpoint "
            "NAME=PATH.",
            *(stage.name, stage.external, number),
        )
        return
    for part, names in lacks:
        if names:
            part[stage] = names


def has_likelihood(name: str) -> bool:
    """Whether the cells of a task get the likelihoods of its reference answers: answers to be judged have none."""
    return name not in data.JUDGED


def matrix_settings(config: dict[str, Any], engine_args: dict[str, Any]) -> dict[str, Any]:
    """The settings of the cells of the matrix."""
    settings = {name: config.get(name) for name in ("backend", "test_rows", "max_prompt_length", "max_new_tokens")}
    settings |= {"chat_template": config.get("chat_template", False), "num_fewshot": config.get("num_fewshot")}
    if config.get("chat_template_args") and settings["chat_template"]:
        settings["chat_template_args"] = config["chat_template_args"]
    if settings["num_fewshot"]:  # then the seed and the way of drawing decide the prompts
        from trace_tasks.utils import ICL_VERSION

        settings["icl"] = {"version": ICL_VERSION, "seed": config.get("seed", 1234)}
    deciding = {k: v for k, v in engine_args.items() if k not in SPEED_ONLY_ARGS and (k, v) != ("dtype", "auto")}
    return settings | {"engine": deciding}


def suite_settings(suites: Iterable[str], config: dict[str, Any], matrix: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of the suites' cells. Prompts and lengths are those of the installed lm-eval."""
    own = {name: matrix[name] for name in ("backend", "engine")}
    own |= {"general_rows": config.get("general_rows"), "lm_eval": version("lm-eval")}
    return {name: {**own, "data": data.source_fingerprint(name)} for name in suites}


def _chat_of_base(run: Run, config: dict[str, Any], matrix: dict[str, Any]) -> dict[str, Any]:
    """The settings of what is asked in the chat template if the base model has one: judged sets, neutral questions."""
    trusted = matrix["engine"].get("trust_remote_code", False)
    chat = bool(models.load_tokenizer(**base_of(run), trust_remote_code=trusted).chat_template)
    arguments = config.get("chat_template_args") if chat else None
    return {"chat_template": chat, **({"chat_template_args": arguments} if arguments else {})}


def _settings_of_judged(
    run: Run,
    names: list[str],
    config: dict[str, Any],
    chat: dict[str, Any],
    matrix: dict[str, Any],
    data_path: str | None,
) -> dict[str, dict[str, Any]]:
    """The settings of the judged sets' cells: their own limits, and the model's chat template if it has one."""
    if not names:
        return {}
    checks.locate_data(run, data_path)  # demo data has its own prompts
    shared = {
        **{name: matrix[name] for name in ("backend", "engine")},
        "test_rows": config.get("judged_rows"),
        "max_prompt_length": None,
        "max_new_tokens": config.get("judged_max_new_tokens"),
        **chat,
        "num_fewshot": None,
    }
    return {name: {**shared, "data": data.source_fingerprint(name)} for name in names}


def _read_cells(run: Run, wanted: dict[str, dict[str, Any]]) -> dict[tuple[Stage, str], dict[str, Any]]:
    """Reads the existing cells of all stages; refuses cells that were made with other settings than the wanted ones."""
    existing = {}
    for stage in run.stages:
        for name, settings in wanted.items():
            file = stage.eval_file(name)
            if not file.exists():
                continue
            existing[stage, name] = cell = records.read_cell(stage, name)
            if lines := differences(cell.get("settings", {}), settings):
                hint = " (dtype auto for an absent dtype)" * any("dtype: 'absent'" in line for line in lines)
                where = f"{run.path}/stages/*/eval" + (f"/{name}.json" if "data" in settings else "")
                raise RunError(
                    f"{file} was made with different settings (in the file -> asked for):\n"
                    + "\n".join(lines)
                    + f"\nAll cells of a matrix need the same. Use the settings of the file{hint}, or delete {where}."
                )
    return existing


def _missing(stage: Stage, wanted: Iterable[str], existing: dict[tuple[Stage, str], dict[str, Any]]) -> list[str]:
    """The wanted cells that do not exist, or were made from other weights than the stage has now."""
    current = stage.fingerprint()
    todo = [name for name in wanted if (stage, name) not in existing or existing[stage, name]["checkpoint"] != current]
    for name in todo:
        if (stage, name) in existing:
            log.warning("%s is from an older checkpoint, so it is measured again.", stage.eval_file(name))
    return todo


def other_versions(plan: Plan) -> list[str]:
    """Lines about libraries and scoring code that differ between existing cells and now."""
    now, found = checks.made_with(), dict[str, set[str]]()
    for cell in plan.existing.values():
        for key, value in cell.get("made_with", {}).items():
            # Older programs noted the text of the scoring code, with its comments, which cannot be compared.
            if key not in ("device", "scoring code") and now.get(key) != value:
                found.setdefault(key, set()).add(str(value))
    return [f"{key} {', '.join(sorted(values))} then, {now.get(key, 'none')} now" for key, values in found.items()]


def check_one_definition(plan: Plan, defined: dict[str, str]) -> None:
    """Makes sure that the existing cells of a column were asked and scored as its task does now."""
    for (stage, name), cell in plan.existing.items():
        if name in defined and cell.get("definition", defined[name]) != defined[name]:
            raise RunError(
                f"{stage.eval_file(name)} was made before the prompts or the scoring of {name} changed. Restore its "
                f"YAML and its functions, or delete {plan.run.path}/stages/*/eval/{name}.json."
            )
