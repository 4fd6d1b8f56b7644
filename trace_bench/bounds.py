"""What bounds a run: runs beside it that show what the base model, and what all tasks at once, can reach."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trace_bench.metrics import Matrix
from trace_bench.results import Cells, Results
from trace_bench.run import Run
from trace_bench.tables import value_text
from trace_tasks.errors import TraceError

log = logging.getLogger(__name__)

#: Methods whose runs bound what continual learning can reach, and what a report calls them.
BOUNDS = {
    "icl": "ICL, {num_fewshot} demonstrations",
    "single": "single (a model per task)",
    "joint": "joint (multi-task)",
}
#: Tokens of a prompt in the official ICL code.
ICL_PROMPT_LENGTH = 3584
#: Settings under which a score is measured: scores of other ones are other numbers.
_MEASURED = ("test_rows", "max_prompt_length", "max_new_tokens", "chat_template", "chat_template_args")
#: Settings of the training. A bound with others is still a bound, and the report says so.
_TRAINED = (
    "train_rows",
    "epochs",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_answer_length",
    "seed",
    "bf16",
    "dtype",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
)


@dataclass(frozen=True)
class Bound:
    """A run that bounds another one."""

    method: str
    label: str
    run: Run
    scores: Matrix
    """Its final scores, in the order of the other run's tasks."""
    cells: Cells
    """What they are from."""
    other_training: list[str]
    """The settings of the training in which it differs, each with its value there and here."""


def bounds(run: Run) -> list[Bound]:
    """The runs beside a run that bound it, one of each method of `BOUNDS` that is there, in that order.

    Of several the one with the fewest other settings of the training, and of several such the most complete one.
    """
    found: dict[str, list[Bound]] = {method: [] for method in BOUNDS}
    for file in sorted(run.path.resolve().parent.glob("*/manifest.json")):
        if file.parent.resolve() == run.path.resolve():
            continue
        try:
            sibling = replace(Run.open(file.parent), left_out=run.left_out)  # the same data, so the same rows
            method, config = sibling.manifest["method"], sibling.manifest["config"]
            if method not in BOUNDS or not same_conditions(run, sibling):
                continue
            if method == "icl" and not config.get("num_fewshot"):
                continue  # the base model alone
            results = Results(sibling)
            scores = results.final
            other = _other_training(run, sibling)
        except (TraceError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            log.warning("%s is left out of the bounds of %s: %s: %s", file.parent, run.path, type(e).__name__, e)
            continue
        if not np.isnan(scores).all():
            ordered = scores[[sibling.tasks.index(t) for t in run.tasks]]
            label = BOUNDS[method].format_map(config)
            found[method].append(Bound(method, label, sibling, ordered, results.cells, other))
    return [
        min(candidates, key=lambda b: (len(b.other_training), np.isnan(b.scores).sum()))
        for candidates in found.values()
        if candidates
    ]


def demonstrations(run: Run) -> str:
    """How the base model of an icl run was shown what to do, and where that is not the official way."""
    config = run.manifest["config"]
    limit = config.get("max_prompt_length")
    length = f"; prompts have at most {limit} tokens (officially {ICL_PROMPT_LENGTH})"
    return (
        f"with {config['num_fewshot']} demonstrations, which are training rows (officially test rows) and none on "
        "MeetingBank" + (length if limit and limit != ICL_PROMPT_LENGTH else "")
    )


def conditions(run: Run) -> dict[str, Any]:
    """What the scores of the matrices of two runs have to share to be compared."""
    m = run.manifest
    return {
        "base model": m["model"]["name"],
        "revision": m["model"].get("revision"),
        "tasks": sorted(m["tasks"]),
        "data": m["data"]["fingerprint"],
        "task versions": m["task_versions"],
        "task definitions": m.get("task_definitions"),
        **{key: m["config"].get(key) or None for key in _MEASURED},  # false and not given are one
    }


def same_conditions(run: Run, other: Run) -> bool:
    """Whether the scores of two runs can be compared, row by row."""
    one, two = conditions(run), conditions(other)
    if "icl" in (run.manifest["method"], other.manifest["method"]):  # demonstrations need room
        one["max_prompt_length"] = two["max_prompt_length"]
    known = None not in (one["task definitions"], two["task definitions"])  # older runs do not say them
    return all(one[key] == two[key] for key in one if known or key != "task definitions")


def _other_training(run: Run, sibling: Run) -> list[str]:
    """The settings of the training in which a sibling differs, each with its value there and here."""
    if len(sibling.stages) == 1:
        return []  # nothing was trained

    def training(run: Run) -> dict[str, Any]:
        config = {key: run.manifest["config"].get(key) for key in _TRAINED}
        if config["epochs"]:  # by task, since the order of the tasks may differ; num_train_epochs is not used
            config["epochs"] = dict(sorted(zip(run.tasks, config["epochs"], strict=True)))
            config["num_train_epochs"] = None
        return config

    there, here = training(sibling), training(run)
    return [f"{k} {value_text(there[k])}, {value_text(here[k])}" for k in _TRAINED if there[k] != here[k]]
