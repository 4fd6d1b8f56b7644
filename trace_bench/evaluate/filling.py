"""Makes the missing cells of a run, from the plan to the last cell. Several processes can share a run by stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from trace_bench.engine import importing
from trace_bench.evaluate import distance
from trace_bench.evaluate.cells import evaluate_plan, start_engine, summary
from trace_bench.evaluate.external import refuse_answers_only
from trace_bench.evaluate.plan import Plan, make_plan
from trace_bench.evaluate.tasks import load_tasks
from trace_bench.run import WRITTEN, Run, Stage
from trace_bench.waiting import InUse, in_use, locked
from trace_tasks.data.files import check_writable, refuse_links

#: Seconds between two looks at the base model's stage, while another process measures what distances need.
POLL = 1.0


def fill(run: Run, chosen: Iterable[Stage], lm: Any = None, *, share: bool = False, **asked: Any) -> tuple[int, Any]:
    """Makes the missing cells of trained stages.

    Args:
        run: The run.
        chosen: The stages.
        lm: The engine of an earlier call for the same run, to be used again.
        share: Whether to take one stage at a time, each time one that no other process has.
        **asked: See `make_plan`.

    Returns:
        The number of cells made now, and the engine for a next call: None if `lm` is None and nothing was missing.
    """
    refuse_answers_only(run)
    refuse_links(run.path, *WRITTEN)
    chosen = list(chosen)
    if distance.lacks_base(run, asked.get("extra")) and run.stages[0] not in chosen:
        chosen.insert(0, run.stages[0])

    def planned(stages: list[Stage]) -> Plan:
        return make_plan(run, stages, **asked)

    with ExitStack() as locks:
        for stage in [] if share else chosen:
            locks.enter_context(locked(stage.path, "evaluate"))
        plan = planned(chosen)
        parts = _claimed(plan, planned) if share else iter([(plan, None)] if plan.cells else [])
        cells, stages, began, ready, tasks = 0, set[Stage](), 0.0, 0.0, None
        for part, next_stage in parts:
            if tasks is None:  # start an engine only if there is a stage for this process
                check_writable(part.stages[0].path)
                with importing() if lm is None else nullcontext():
                    tasks = load_tasks(plan)
                began = time.perf_counter()
                lm = start_engine(plan, tasks, lm)
                ready = time.perf_counter()
            evaluate_plan(part, tasks, lm, next_stage, quiet=share)
            cells, stages = cells + part.cells, stages.union(part.stages)
        if tasks is not None:
            print(summary(cells, len(stages), lm, time.perf_counter() - began, ready - began), flush=True)
        return cells, lm


def _claimed(plan: Plan, planned: Callable[[list[Stage]], Plan]) -> Iterator[tuple[Plan, Stage | None]]:
    """Yields the plan of one stage at a time that no other process has, and the stage that may come next.

    A stage is claimed by its lock, which the system releases when a process dies, so its stage is taken over. Stages
    with many cells come first, so that all processes end at about the same time.
    """
    left = sorted(plan.stages, key=lambda stage: -sum(len(part.get(stage, ())) for part in plan.parts))
    took = True
    while left and took:
        again, took = [], False
        for i, stage in enumerate(left):
            try:
                with locked(stage.path, "evaluate"):
                    part = planned([stage])  # another process may have made its cells since
                    if part.distances and stage.index and distance.lacks_base(plan.run, {"distance": True}):
                        part = replace(part, distances={})  # not yet: they need the base model's answers
                        again.append(stage)
                    if part.cells:
                        took = True
                        yield part, next((s for s in left[i + 1 :] if not in_use(s.path, "evaluate")), None)
            except InUse:
                again.append(stage)  # its process may end without finishing it
        left = again
        base = plan.run.stages[0]
        if not took and plan.distances and base in left and in_use(base.path, "evaluate"):
            took = True
            time.sleep(POLL)
