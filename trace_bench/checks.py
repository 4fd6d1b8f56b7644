"""Is it still what the run began with? Asked here by training, evaluation, judging and reports.

`verify` is called by whoever is about to spend time. What each file of a run says about its origin is compared with
where it lies and with what else is there: a stage with the configuration and the stage before that it was trained on, a
cell with its stage, task and weights, samples with their score.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trace_bench import models
from trace_bench.checkpoints import check_own
from trace_bench.run import Run, RunError, Stage, differences, package_versions, read_json
from trace_bench.tasks import load_tasks, rows_fingerprint
from trace_tasks import data
from trace_tasks.data.files import fingerprint

log = logging.getLogger(__name__)

#: Fields of a task's config that decide prompts, answers and scores; its rows have a fingerprint of their own.
_DECIDING = (
    *("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_image", "doc_to_audio", "description", "gen_prefix"),
    *("target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "output_type", "generation_kwargs"),
    *("filter_list", "metric_list", "process_docs", "process_results", "repeats", "use_prompt", "custom_dataset"),
)
#: Packages that scores depend on; those of training are in the manifest.
_OF_SCORES = ("torch", "transformers", "peft", "lm-eval", "datasets", "vllm", "sacrebleu")


def verify(
    run: Run, stages: Iterable[Stage] = (), data_path: str | Path | None = None, tasks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Makes sure that a run, and what it is made from, is what it was when it began.

    Args:
        run: The run.
        stages: The stages that are about to be used: trained upon, evaluated or judged.
        data_path: Where the data is; None = where the manifest says.
        tasks: The tasks that are about to be used. None = answers and scores alone are read: neither the data nor the
            base model nor weights have to be there.

    Returns:
        The tasks by name, as lm-eval makes them.

    Raises:
        RunError: naming what is another, with both values, and what to do.
        data.DataError: if the data is not there.
    """
    stages = list(stages)
    for stage in run.stages:
        check_origin(run, stage)
    why = stale(run)
    for stage in stages:
        if stage.index in why:
            raise RunError(f"Stage {stage.name} is stale: {why[stage.index]}")
    if tasks is None:
        return {}
    use_data(run, None if data_path is None else str(data_path))
    check_base(run)
    for stage in stages:
        if stage.external is None and stage.is_trained:
            check_own(stage)
    loaded = load_tasks(tasks)
    check_tasks(run, loaded)
    return loaded


# ------------------------------------------------------------------------------------------------ where stages are from


def origin(run: Run, stage: Stage) -> dict[str, Any]:
    """What a stage is trained from, for its train.json: configuration, base model, and the stage before.

    Args:
        run: The run.
        stage: A stage that is about to be trained.
    """
    return {
        "run": run.identity,
        "date": run.manifest.get("date"),
        "model": run.manifest["model"].get("revision"),
        "parent": _parent(run, stage),
    }


def _parent(run: Run, stage: Stage) -> dict[str, Any] | None:
    """The fingerprints of what a stage is trained upon, as they are now; None = the base model alone."""
    if stage.index < 2 or run.manifest["method"] == "single":
        return None
    before = run.stages[stage.index - 1]
    trained = read_json(before.train_file) if before.train_file.exists() else {}
    return {key: trained.get(key) for key in ("checkpoint", "method_state")}


def check_origin(run: Run, stage: Stage) -> None:
    """Makes sure that the training of a stage belongs to the run and lies where it belongs.

    Raises:
        RunError: if its train.json is that of another stage or of another configuration.
    """
    if stage.external is not None or not stage.train_file.exists():
        return
    trained = read_json(stage.train_file)
    here = {"stage": stage.index, "task": stage.task}
    if wrong := {key: trained[key] for key in here if trained.get(key, here[key]) != here[key]}:
        raise RunError(
            f"{stage.train_file} says {wrong}, and lies at stage {stage.index} ({stage.task}): it was moved or copied "
            "from elsewhere. Put each stage back to where it was trained, or delete this file to train the stage anew."
        )
    if trained.get("run", run.identity) != run.identity:
        raise RunError(
            f"{stage.train_file} was made with another configuration than {run.path}/manifest.json has (fingerprint "
            f"{trained['run']}, now {run.identity}). Restore the manifest, or begin a new run in another folder."
        )


def stale(run: Run) -> dict[int, str]:
    """Stages that were trained upon another stage before than is there now: index -> why and what to do."""
    found: dict[int, str] = {}
    trained = [s for s in run.stages if s.external is None and s.train_file.exists()]
    for stage in trained:
        recorded = read_json(stage.train_file)
        before = run.stages[stage.index - 1]
        if recorded.get("parent") is None or not before.train_file.exists():
            continue
        now = _parent(run, stage)
        if recorded["parent"] != now or before.index in found:
            later = " ".join(str(s.train_file) for s in trained if s.index >= stage.index)
            found[stage.index] = (
                f"stage {before.name} was trained again since, or is not the one that it was trained upon. Delete "
                f"{later} to train from there on anew, or restore the older {before.path}."
            )
    return found


# ------------------------------------------------------------------------------------------- base model, data and tasks


def check_base(run: Run) -> None:
    """Makes sure that a base model in a local folder is the one that the run began with.

    Raises:
        RunError: if the files of the folder have another fingerprint.
    """
    base, expected = models.resolve_model(run.manifest["model"]["name"]), run.manifest["model"].get("revision")
    if expected and Path(base).is_dir() and models.pinned_revision(base) != expected:
        raise RunError(
            f"{base} holds another base model than the run began with (its fingerprint is not {expected}). Restore it, "
            "or begin a new run."
        )


def use_data(run: Run, path: str | None = None) -> None:
    """Points TRACE_DATA to the run's data and makes sure that it is the same data.

    Raises:
        RunError: if the data behind the path has another fingerprint than the run began with.
    """
    expected = {k: v for k, v in run.manifest["data"]["fingerprint"].items() if data.needs_data([k])}
    if not expected:
        return
    source = path or run.manifest["data"]["path"]
    if path is None and run.manifest["data"]["demo"] and not data.is_demo(Path(source)):
        source = "demo"  # the run was made on another machine: this one makes the same rows
    if path is None and "reasoning" in run.manifest["data"] and not run.manifest["data"]["demo"]:
        os.environ.setdefault("TRACE_REASONING", run.manifest["data"]["reasoning"])
    rows = data.open_data(expected, source)
    rows.check(data.SPLITS if run.manifest["config"].get("num_fewshot") else ["test"])
    changed = rows.changed(run.manifest["data"])
    if changed:
        unknown = not run.manifest["data"].get("test") and len(rows.check(["test"])[changed[0]]) < 3
        raise RunError(
            f"{rows.root} holds other data than the run began with, in: {', '.join(changed)}."
            + " Files are missing there, and the run was begun by an older program, which did not note its test rows "
            "alone: add train.json and eval.json." * unknown
        )
    rows.use()


def check_rows(run: Run, tasks: dict[str, Any]) -> None:
    """Makes sure that tasks from elsewhere have the rows that they had when the run began.

    Raises:
        RunError: naming those whose rows changed.
    """
    expected = run.manifest["data"]["fingerprint"]
    changed = [name for name, digest in rows_fingerprint(tasks).items() if digest != expected.get(name, digest)]
    if changed:
        raise RunError(
            f"The rows of {', '.join(changed)} are not those that the run began with. Restore them, or begin a new run."
        )


def check_tasks(run: Run, tasks: dict[str, Any]) -> None:
    """Makes sure that tasks ask, answer and score as they did when the run began, on the same rows.

    Raises:
        RunError: naming the task and what is another.
    """
    check_rows(run, tasks)
    for name, task in tasks.items():
        version = run.manifest["task_versions"].get(name, task.VERSION)
        if version != task.VERSION:
            raise RunError(
                f"{name} has version {task.VERSION} now, the run was begun with {version}: their scores cannot be "
                "compared. Use the program's older version, or begin a new run."
            )
    began = {name: d for name, d in run.manifest.get("task_definitions", {}).items() if name in tasks}
    lines = differences(began, definitions({name: tasks[name] for name in began}))
    if lines:
        raise RunError(
            "A task is another than the run began with (then -> now):\n"
            + "\n".join(lines)
            + "\nRestore its YAML and its functions, or begin a new run."
        )


def definitions(tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each task is, for a manifest: how it asks, generates and scores, its functions by their code.

    Args:
        tasks: lm-eval's tasks as they are loaded, before an evaluation sets limits.
    """
    return {name: definition(task) for name, task in tasks.items()}


def definition(task: Any) -> dict[str, Any]:
    """What a task is: see `definitions`."""
    from lm_eval.api.task import ConfigurableTask

    config = task.config.to_dict(keep_callable=True)
    found = {key: _plain(config[key]) for key in _DECIDING if config.get(key) is not None}
    found["icl"] = _plain((config.get("metadata") or {}).get("icl"))
    found["class"] = None if type(task) is ConfigurableTask else _plain(type(task))
    # What functions and templates read besides shows in what they make of the first rows.
    docs = task.eval_docs
    rows = [docs[i] for i in range(min(8, len(docs)))]
    found["examples"] = _digest(
        json.dumps([[str(task.doc_to_text(row)), str(task.doc_to_target(row))] for row in rows])
    )
    return json.loads(json.dumps({key: value for key, value in found.items() if value is not None}))


def _plain(value: Any) -> Any:
    """A part of a config as JSON holds it, without what is not set: functions are their name and code."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value):
        return _function(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _function(function: Any) -> str:
    """A function or class: where it is from, and of those of tasks from elsewhere a fingerprint of their code.

    This program's own have versions, and their code is on record in each cell (`made_with`).
    """
    inner = inspect.unwrap(getattr(function, "func", function))  # a partial
    name = getattr(inner, "__qualname__", type(inner).__qualname__).rpartition(".")[2]
    code = next((c for f in (inner, *vars(inner).values()) if (c := getattr(f, "__code__", None))), None)
    if code is None:
        return name
    file = Path(code.co_filename)
    if file.resolve().parent == data.TASKS_PATH.resolve():
        return f"trace_tasks.{file.stem}.{name}"
    return f"{file.stem}.{name} {_digest(_code(file))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _code(file: Path, seen: set[Path] | None = None) -> str:
    """The code of a file without its comments and layout, with that of the files beside it that it imports."""
    seen = set() if seen is None else seen
    seen.add(file)
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    parts = [ast.unparse(tree)]
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else names
        for name in names:
            beside = file.parent / f"{str(name).partition('.')[0]}.py"
            if beside not in seen and beside.is_file():
                parts.append(_code(beside, seen))
    return "\n".join(parts)


@cache
def made_with() -> dict[str, str]:
    """What makes scores besides the model and the task: the scoring code and libraries, for the record of a cell."""
    packages = package_versions(_OF_SCORES)
    scoring = "".join(_digest(file.read_text(encoding="utf-8")) for file in sorted(data.TASKS_PATH.glob("*.py")))
    return {"scoring code": _digest(scoring), "python": platform.python_version(), **packages}


# -------------------------------------------------------------------------------------------------------------- cells


def read_cell(stage: Stage, name: str) -> dict[str, Any]:
    """The score file of a cell, checked to be what it says.

    Args:
        stage: The stage where it lies.
        name: The task, suite or set.

    Raises:
        RunError: if it is that of another stage or task, or holds numbers that cannot be.
    """
    file = stage.eval_file(name)
    cell = read_json(file)
    here = {"stage": stage.name, "task": name}
    if wrong := {key: cell[key] for key in here if cell.get(key, here[key]) != here[key]}:
        raise RunError(
            f"{file} says {wrong}, and lies at {stage.name}: it was moved, copied from elsewhere, or the stages were "
            f"renamed. {_REDO}"
        )
    problem = _cell_problem(cell, name in data.JUDGED)
    if problem:
        raise RunError(f"{file} is damaged: {problem}. {_REDO}")
    return cell


_REDO = "Delete it and evaluate again."


def _cell_problem(cell: dict[str, Any], judged: bool) -> str | None:
    """What cannot be in a cell, whose types were checked when it was read; None if all of it can."""
    metrics, scale, n = cell["metrics"], cell.get("scale", {}), cell["n"]
    if cell["headline"] not in metrics:
        return "it lacks its headline"
    if n < 1:
        return f"n={n!r} is no number of rows"
    for key in ("n_cut", "n_unfinished"):
        if cell.get(key, 0) > n:
            return f"{key}={cell[key]!r} of {n} rows"
    parts = cell.get("subtasks", {})
    if parts and sum(part.get("n", 0) for part in parts.values()) != n:
        return f"its {len(parts)} subtasks do not have the {n} rows together"
    for name, score in metrics.items():
        value, stderr = score["value"], score.get("stderr")
        fraction = scale.get(name, None if judged else 1) == 1  # older cells of tasks do not say it
        if value is not None and fraction and not -1e-6 <= value <= 1 + 1e-6:
            return f"{name} is {value!r}, no fraction of 1"
        if stderr is not None and stderr < 0:
            return f"the standard error of {name} is {stderr!r}"
    return None


def check_samples(stage: Stage, name: str, ids: Sequence[Any]) -> None:
    """Makes sure that the samples of a cell are those that its score was made from.

    Args:
        stage: The stage.
        name: The name of the cell.
        ids: What identifies each row, in their order.

    Raises:
        RunError: if lines were lost, doubled or changed.
    """
    file, scored = stage.samples_file(name), stage.eval_file(name)
    if not scored.exists():
        return
    cell = read_cell(stage, name)
    redo = f"{scored} was made from other samples. Delete both and evaluate again."
    if len(ids) != cell["n"]:
        raise RunError(f"{file} holds {len(ids)} rows, and its score was made from {cell['n']}: {redo}")
    seen: set[Any] = set()
    for one in ids:
        if one in seen:
            raise RunError(f"{file} holds the row {one!r} twice: {redo}")
        seen.add(one)
    if cell.get("samples") not in (None, fingerprint(file)):
        raise RunError(f"{file} was changed since it was written (its fingerprint differs): {redo}")


def check_one_setting(run: Run, wanted: dict[str, dict[str, Any]]) -> None:
    """Makes sure that all cells of a run, at whatever stage, were made with the settings that are asked for now.

    Args:
        run: The run.
        wanted: Name of the cell -> the settings.

    Raises:
        RunError: listing the differing keys with both values.
    """
    for stage in run.stages:
        for name, settings in wanted.items():
            file = stage.eval_file(name)
            lines = differences(read_cell(stage, name).get("settings", {}), settings) if file.exists() else []
            if lines:
                where = f"{run.path}/stages/*/eval" + (f"/{name}.json" if "data" in settings else "")
                raise RunError(
                    f"{file} was made with other settings (there -> asked for):\n"
                    + "\n".join(lines)
                    + f"\nOne matrix needs one setting. Use the old one, or delete {where}."
                )


def check_one_definition(run: Run, defined: dict[str, str]) -> None:
    """Makes sure that all cells of a column were asked and scored in one way, also where no manifest says which.

    Args:
        run: The run.
        defined: Name of a cell -> what `defined_as` says of its task now.

    Raises:
        RunError: naming the cell that was made from another definition.
    """
    for stage in run.stages:
        for name, now in defined.items():
            if stage.eval_file(name).exists() and read_cell(stage, name).get("definition", now) != now:
                raise RunError(
                    f"{stage.eval_file(name)} was made when {name} asked or scored in another way than now. Restore "
                    f"its YAML and its functions, or delete {run.path}/stages/*/eval/{name}.json."
                )


def defined_as(task: Any) -> str:
    """The fingerprint of a task's definition, for its cells."""
    return _digest(json.dumps(definition(task), sort_keys=True))


def other_versions(run: Run) -> list[str]:
    """Libraries and scoring code that cells of the run were made with, where they are others than now."""
    now, found = made_with(), dict[str, set[str]]()
    for stage in run.stages:
        for file in stage.path.glob("eval/*.json"):
            made = read_cell(stage, file.stem).get("made_with", {})
            for key, value in made.items():
                if key != "device" and now.get(key) != value:
                    found.setdefault(key, set()).add(str(value))
    return [f"{key} {', '.join(sorted(values))} then, {now.get(key, 'none')} now" for key, values in found.items()]
