"""Runs that bound another run: what the base model, a model per task, and all tasks at once reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trace_bench.report.conditions import same_conditions
from trace_bench.report.results import Results
from trace_bench.report.tables import value_text
from trace_bench.run import Run

#: Methods whose runs bound what continual learning can reach, and what a report calls them.
BOUNDS = {
    "icl": "ICL, {num_fewshot} demonstrations",
    "single": "single (a model per task)",
    "joint": "joint (multi-task)",
}
#: Tokens of a prompt in the official ICL code.
ICL_PROMPT_LENGTH = 3584
#: Settings of the training. A bound with others is still a bound, and the report says so.
_TRAINED = (
    *("train_rows", "epochs", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "optim", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_answer_length", "seed", "bf16", "dtype"),
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
)


def bounds(bounded: Results, others: Iterable[Results]) -> dict[str, Results]:
    """Method of `BOUNDS` -> the run that bounds a run: of several the one trained most alike and most complete."""
    found: dict[str, list[Results]] = {method: [] for method in BOUNDS}
    for other in others:
        method, config = other.run.manifest["method"], other.run.manifest["config"]
        shows_nothing = method == "icl" and not config.get("num_fewshot")  # the base model alone
        if method not in BOUNDS or shows_nothing or not same_conditions(bounded, other):
            continue
        if not np.isnan(other.final).all():
            found[method].append(other)

    def rank(other: Results) -> tuple[int, int]:
        return len(other_training(bounded.run, other.run)), int(np.isnan(other.final).sum())

    return {method: min(runs, key=rank) for method, runs in found.items() if runs}


def demonstrations(run: Run) -> str:
    """How the base model of an icl run was shown what to do, and where that is not the official way."""
    config = run.manifest["config"]
    shots, limit = config["num_fewshot"], config.get("max_prompt_length")
    text = f"with {shots} demonstrations from the training rows (official code: test rows), none on MeetingBank"
    if limit and limit != ICL_PROMPT_LENGTH:
        text += f"; prompts have at most {limit} tokens (official code: {ICL_PROMPT_LENGTH})"
    return text


def other_training(run: Run, other: Run) -> list[str]:
    """The settings of the training in which another run differs, each with its value there and here."""
    if len(other.stages) == 1:
        return []  # nothing was trained

    def training(run: Run) -> dict[str, Any]:
        config = {key: run.manifest["config"].get(key) for key in _TRAINED}
        if config["epochs"]:  # by task, since the order of the tasks may differ; num_train_epochs is not used
            config["epochs"] = dict(sorted(zip(run.tasks, config["epochs"], strict=True)))
            config["num_train_epochs"] = None
        return config

    there, here = training(other), training(run)
    return [f"{k} {value_text(there[k])}, {value_text(here[k])}" for k in _TRAINED if there[k] != here[k]]
