"""Loads and checks the lm-eval tasks of an evaluation, sets the run's limits in them, and runs them on an engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from trace_bench import checks
from trace_bench.engine import models
from trace_bench.engine.architecture import context_length
from trace_bench.engine.checkpoints import check_checkpoints, warn_of_tokenizers
from trace_bench.engine.start import faithful_context
from trace_bench.evaluate.plan import Plan, base_of, check_one_definition, other_versions
from trace_bench.run import RunError
from trace_bench.tasks import load_suites
from trace_tasks.data import SUITES
from trace_tasks.data.files import digest
from trace_tasks.tokens import check_room

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tasks:
    """The tasks of a plan, by name."""

    single: dict[str, Any]
    """Tasks of the matrix and judged sets, by the names of their cells: one task may have several (`given`)."""
    suites: dict[str, Any]
    """General-ability suites: groups of lm-eval's tasks."""
    defined: dict[str, str]
    """The fingerprint of the task's definition, for the cells of `single`."""


def load_tasks(plan: Plan) -> Tasks:
    """Loads the tasks of a plan. Checks first that the data, the base model and the checkpoints are those of the run.

    Raises:
        RunError, data.DataError, models.ModelError: naming what has changed, or cannot be evaluated.
    """
    trusted = plan.engine_args.get("trust_remote_code", False)
    loaded, definitions = checks.verify(
        plan.run, plan.stages, plan.data_path, list(dict.fromkeys(plan.owners.values()))
    )
    if plan.in_chat:
        chat = plan.chat(models.load_tokenizer(**base_of(plan.run), trust_remote_code=trusted))
        if plan.matrix["chat_template"]:
            check_room(chat, plan.matrix["max_prompt_length"])
    check_checkpoints(plan.run, plan.stages, plan.backend, trusted)
    warn_of_tokenizers(plan.run, plan.stages, trusted)
    for line in other_versions(plan):
        log.warning("Cells of the run were made with different versions of what decides a score: %s.", line)
    return prepare(plan, loaded, definitions)


def prepare(plan: Plan, loaded: dict[str, Any], definitions: dict[str, dict[str, Any]]) -> Tasks:
    """Gives the tasks, loaded and with their `checks.definitions`, the limits of the plan, and adds its suites."""
    defined = {name: digest(definitions[task]) for name, task in plan.owners.items()}
    check_one_definition(plan, defined)
    for name, task in loaded.items():
        settings = plan.settings[name]
        if (limit := settings.get("max_new_tokens")) is not None:
            kwargs = task.config.generation_kwargs
            kwargs["max_gen_toks"] = min(kwargs.get("max_gen_toks", 256), limit)
        # Training makes prompts without demonstrations, so a foreign task's num_fewshot is overridden.
        _prepare(task, settings.get("num_fewshot") or 0, plan.config.get("seed", 1234))
    suites = load_suites([name for name in plan.missing if name in SUITES])
    for suite in suites.values():
        for task in suite.get_all_tasks():
            _prepare(task)
    return Tasks({name: loaded[task] for name, task in plan.owners.items()}, suites, defined)


#: How to enlarge the context of an engine, for messages.
WIDER = "In --engine-args, raise max_model_len (vllm) or max_length (hf); or"


def check_context(plan: Plan, tasks: Tasks, context: int | None, wider: str = WIDER) -> None:
    """Refuses prompts and answers that do not fit into the engine's context: they would fail, or be cut differently."""
    if context is not None and context < 1:  # vLLM's -1: as long as fits into the memory
        raise RunError(
            f"--engine-args: a context of {context} is not allowed, since prompts are cut to it. Use a number of "
            "tokens, or leave max_model_len (vllm) or max_length (hf) out."
        )
    for name in plan.missing:
        if name not in tasks.suites:
            continue
        subtasks = tasks.suites[name].get_all_tasks()
        longest = max(map(answer_tokens, subtasks), default=0)
        if context is not None and longest >= context:
            raise RunError(
                f"{name} generates up to {longest} tokens, but the engine's context has {context}, with the prompt. "
                f"{wider} leave the suite out."
            )
        if plan.backend == "vllm" and any(task.OUTPUT_TYPE == "multiple_choice" for task in subtasks):
            for stage, names in plan.todo.items():
                if name in names and models.soft_prompt(stage.checkpoint) is not None:
                    raise RunError(
                        f"{name} needs likelihoods, which vLLM does not give after the soft prompt of "
                        f"{stage.name}. Leave the suite out, or evaluate the whole run with --backend hf."
                    )
    soft = [models.soft_prompt(stage.external) for stage in plan.stages if stage.external]
    taken = max((len(prompt) for prompt in soft if prompt is not None), default=0)
    for name in plan.missing:
        if name in tasks.single and context is not None:
            prompt, answer = plan.settings[name]["max_prompt_length"] or 1, answer_tokens(tasks.single[name])
            if prompt + answer + taken > context:
                more = f", after {taken} tokens of a soft prompt," if taken else ""
                raise RunError(
                    f"{name}: {prompt} tokens of a prompt and {answer} of an answer{more} do not fit into the engine's "
                    f"context of {context}, so prompts would be shorter than the run says. {wider} begin a run with a "
                    "smaller max_prompt_length or max_new_tokens."
                )


def contexts_of(model: str | Path, revision: str | None, trusted: bool, vllm: bool) -> list[int | None]:
    """The context of a model by its config.json, and that in which vLLM computes as training did; None = no limit."""
    config = models.load_config(model, revision, trusted).get_text_config(decoder=True)
    faithful = faithful_context(config) if vllm else None
    return [context_length(config.to_dict()), faithful[0] if faithful else None]


def shortest(limits: Iterable[int | None]) -> int | None:
    """The smallest of several limits; None = no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def check_shorter_contexts(plan: Plan, tasks: Tasks, asked: int | None) -> None:
    """Refuses full models from elsewhere whose config.json has a context that is too short.

    The engine takes the context of each model unless one is asked for, so it would cut the prompts of these stages
    shorter than those of the others. vLLM does not start with a context that is longer than the model's, or computes
    something else beyond (`faithful_context`).
    """
    trusted, base = plan.engine_args.get("trust_remote_code", False), base_of(plan.run)
    vllm = plan.backend == "vllm"
    # A checkpoint may be gone once everything of it is measured.
    external = [(stage, stage.external) for stage in plan.stages if plan.todo.get(stage) and stage.external]
    full = [(stage, folder) for stage, folder in external if not models.is_adapter(folder)]
    of_base = contexts_of(base["model"], base["revision"], trusted, vllm) if full else [None, None]
    usual, asked = shortest(of_base), asked or of_base[1]  # the engine keeps the base's limit (`bound_context`)
    for stage, folder in full:
        own = shortest(contexts_of(folder, None, trusted, vllm))
        if own is None or (usual is not None and own >= usual):
            continue
        wider = f"Correct {folder}/config.json if the model reads more, or" if vllm else WIDER
        if asked is None:
            alone = replace(plan, todo={stage: plan.todo[stage]}, add_likelihood={}, distances={})
            check_context(alone, tasks, own, f"Its config.json says so for {stage.name}. {wider}")
        elif vllm and asked > own:
            raise RunError(
                f"max_model_len={asked}: {stage.name} reads {own} tokens by its config.json, and vLLM serves no more "
                f"as it was trained. {wider} use at most {own}."
            )


def answer_tokens(task: Any) -> int:
    """The most tokens that a task generates for an answer; 0 if it compares likelihoods."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    return task.config.generation_kwargs.get("max_gen_toks", 256)  # lm-eval's own default


def _prepare(task: Any, num_fewshot: int | None = None, seed: int = 1234) -> None:
    """Prepares a task as lm-eval's `simple_evaluate` does, and makes it build its prompts only once for all stages.

    `simple_evaluate` itself would describe the machine at every stage, which takes most of a second. `num_fewshot`
    overrides the task's own number of demonstrations unless that is 0; None keeps the task's own.
    """
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed)
    build = task.build_all_requests
    built: list[bool] = []

    def once(**kwargs: Any) -> None:
        if not built:
            with _without_bars():
                build(**kwargs)
            built.append(True)
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = once


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides lm-eval's progress bars for making prompts: it shows one for each task, and MMLU has 57."""
    from lm_eval.api import task

    original = task.tqdm
    task.tqdm = partial(original, disable=True)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        task.tqdm = original  # type: ignore[misc]


def run_tasks(lm: Any, tasks: list[Any], max_prompt_length: int | None, **kwargs: Any) -> tuple[Any, float]:
    """Runs tasks with lm-eval; returns its results and the seconds they took."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    lm.max_prompt_length = max_prompt_length
    started = time.perf_counter()
    given = TaskManager(include_defaults=False).load(tasks)  # task objects: no index is needed
    results = lm_eval.evaluate(lm, given, bootstrap_iters=0, log_samples=True, **kwargs)
    return results, time.perf_counter() - started


def scale_of(aggregation: Any, values: Iterable[Any]) -> int | None:
    """The scale of a metric, as in `tables.Unit`: 100, 1 (fractions), or None (unknown).

    It is 100 for lm-eval's BLEU, chrF and TER, known by their aggregation. Other metrics do not declare a scale: their
    scores count as fractions of 1 if all values, of rows and task, are between 0 and 1.
    """
    from lm_eval.api.registry import get_aggregation

    if aggregation in [get_aggregation(name) for name in ("bleu", "chrf", "chrf++", "ter")]:
        return 100
    return 1 if all(-1e-6 <= float(v) <= 1 + 1e-6 for v in values if isinstance(v, Real)) else None
