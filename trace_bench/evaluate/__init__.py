"""Evaluation: fills the missing cells of a run, stage x task, with one engine for all stages.

A cell is done when its file `eval/<task>.json` exists and was made from the checkpoint that the stage has now. Done
cells are skipped, so an interrupted evaluation goes on where it was. Nothing here asks which method trained a stage.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from trace_bench.evaluate.devices import evaluate_on, find_devices
from trace_bench.evaluate.external import drop, external_run, measured_run
from trace_bench.evaluate.filling import fill
from trace_bench.evaluate.following import follow
from trace_bench.evaluate.plan import EXTRA_SETTINGS, check_trained
from trace_bench.evaluate.tasks import answer_tokens
from trace_bench.run import Run

__all__ = [
    "EXTRA_SETTINGS",
    "answer_tokens",
    "drop",
    "evaluate",
    "evaluate_on",
    "external_run",
    "find_devices",
    "follow",
    "measured_run",
]

log = logging.getLogger(__name__)


def evaluate(run: Run, *, stages: Collection[int] | None = None, **asked: Any) -> int:
    """Evaluates every missing cell of a run: of its matrix, and the extra ones (suites, judged sets, distances).

    The run's configuration decides how many rows, how long answers and which backend.

    Args:
        run: The run.
        stages: The numbers of stages; None = all that are trained.
        **asked: Settings that replace those of the run, see `make_plan`. With `share=True` several processes evaluate
            the run together: each takes the stages that no other process has.

    Returns:
        The number of cells that were made, or got their likelihoods, now.

    Raises:
        RunError: if a named stage is not trained, a cell was made with other settings, the data, the base model or a
            checkpoint has changed, or another process evaluates one of the stages.
        data.DataError: if a suite or a set is unknown, or its data is missing.
    """
    chosen = run.chosen(stages)
    check_trained(chosen, stages)
    for stage in chosen:
        if not stage.is_trained:
            log.warning("Left out stage %s: it is not trained yet.", stage.name)
    return fill(run, [stage for stage in chosen if stage.is_trained], **asked)[0]
