"""The missing cells of a run, from the plan to the last cell."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from trace_bench.evaluate.cells import evaluate_plan, start_engine, summary
from trace_bench.evaluate.external import refuse_answers_only
from trace_bench.evaluate.plan import make_plan
from trace_bench.evaluate.tasks import load_tasks
from trace_bench.run import WRITTEN, Run, Stage, locked
from trace_tasks.data.files import refuse_links


def fill(
    run: Run, chosen: Iterable[Stage], lm: Any = None, *, data_path: str | None = None, **asked: Any
) -> tuple[int, Any]:
    """Makes the missing cells of trained stages, see `evaluate`.

    Returns:
        The number of cells made now, and the engine, which may go on with later stages: `lm` if it was given; None if
        nothing was missing.
    """
    refuse_answers_only(run)
    refuse_links(run.path, *WRITTEN)
    chosen = list(chosen)
    with ExitStack() as locks:
        for stage in chosen:
            locks.enter_context(locked(stage.path, "evaluate"))
        plan = make_plan(run, chosen, data_path=data_path, **asked)
        if plan.cells:
            tasks = load_tasks(plan, data_path)
            began = time.perf_counter()
            lm = start_engine(plan, tasks, lm)
            ready = time.perf_counter()
            evaluate_plan(plan, tasks, lm)
            print(summary(plan, lm, time.perf_counter() - began, ready - began), flush=True)
        return plan.cells, lm
