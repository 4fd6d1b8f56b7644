"""`trace-bench check`: what a run has lost, held against limits.

Only JSON is read. A limit is one for the mean over tasks or suites. Each of them is held against it as well: a single
one can make the check fail, and need not prove itself (`Check.verdict`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from trace_bench.measures.gate import MOST_ROWS, UNKNOWN, WITHIN, WORSE, rows_needed, verdicts
from trace_bench.metrics import Estimate
from trace_bench.report import drops
from trace_bench.report.drops import Group, Part
from trace_bench.report.entry import entries_of
from trace_bench.report.results import Results
from trace_bench.run import Run, RunError
from trace_bench.text import one_line


@dataclass(frozen=True)
class Line:
    """A drop that is held against its limit, and the verdict."""

    what: str
    since: str
    """What the drop is measured from."""
    part: Part
    """Its task or suite; a mean has no name."""
    limit: float
    """In points, or the unit of the task's metric."""
    weight: int
    """Its share of the level of the test: a mean has as much as all of its parts together."""
    decides: bool
    """Whether the check passes only if this one is within its limit."""
    verdict: str = UNKNOWN
    rows_needed: int | None = None
    """Where it cannot be told; None elsewhere, or if no number of rows would tell."""

    @property
    def drop(self) -> Estimate:
        """Positive = worse; as the metric gives scores."""
        return Estimate(*(x + 0.0 for x in -self.part.gain))  # no "-0.0"

    def texts(self) -> list[str]:
        """The columns of the line."""
        number = self.part.unit.with_interval(self.drop, sign=True)
        columns = [self.what, self.part.name or "mean", f"since {self.since}", number, f"limit {self.limit:g}"]
        return [*map(one_line, columns), self.verdict + self._why()]

    def _why(self) -> str:
        if self.verdict != UNKNOWN:
            return ""
        if math.isnan(self.drop.low):
            return (
                " (no interval: its samples are missing or do not match its score, or all rows have the same drop, "
                "which says nothing about other rows)"
            )
        needed = f"more than {MOST_ROWS:,}" if self.rows_needed is None else f"about {self.rows_needed:,}"
        return f" (needs {needed} rows; there are {self.part.rows:,})"

    def json(self) -> dict[str, Any]:
        """The line as JSON."""
        numbers = zip(("drop", "low", "high"), self.drop, strict=True)
        return {
            "what": self.what,
            "name": self.part.name or None,
            "since": self.since,
            **{key: None if math.isnan(x) else self.part.unit.factor * x for key, x in numbers},
            "unit": self.part.unit.of_changes,
            "limit": self.limit,
            "decides": self.decides,
            "verdict": self.verdict,
            "rows": self.part.rows,
            "rows_needed": self.rows_needed,
        }


@dataclass(frozen=True)
class Check:
    """The lines of a check and its verdict."""

    run: Run
    against: Run | None
    lines: list[Line]

    @property
    def verdict(self) -> str:
        """Worse if any line is; within if all lines that decide are; else it cannot be told."""
        if any(line.verdict == WORSE for line in self.lines):
            return WORSE
        return WITHIN if all(line.verdict == WITHIN for line in self.lines if line.decides) else UNKNOWN

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""
        return {WITHIN: 0, WORSE: 1, UNKNOWN: 3}[self.verdict]

    @property
    def text(self) -> str:
        """The lines, and the verdict as the last one."""
        rows = [line.texts() for line in self.lines]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{one_line(f'{self.run.path}, {self.run.stages[-1].name}')}: {self.verdict}"])

    def json(self) -> dict[str, Any]:
        """The check as JSON."""
        return {
            "run": str(self.run.path),
            "stage": self.run.stages[-1].name,
            "against": str(self.against.path) if self.against else None,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "lines": [line.json() for line in self.lines],
        }


def check(
    run: Run,
    *,
    max_forgetting: float | None = None,
    max_general_drop: float | None = None,
    against: Run | None = None,
    each: bool = False,
) -> Check:
    """Holds what the last stage of a run has lost against limits.

    Args:
        run: The run.
        max_forgetting: The most that the tasks may have lost, in points or the unit of their metric; None = any.
        max_general_drop: The same of the general-ability suites.
        against: A run whose last stage the drops are measured from, on the same test rows. None: each task's own
            stage, and the base model; of checkpoints from elsewhere the base model, and the checkpoint before.
        each: Whether every task and suite decides, and not their mean alone.

    Raises:
        RunError: if something is not measured, and how to measure it; or if the runs do not share rows, settings or
            tasks.
    """
    if max_forgetting is None and max_general_drop is None:
        raise RunError("No limit is given, so nothing is checked: add --max-forgetting, --max-general-drop, or both.")
    if against is not None and against.path.resolve() == run.path.resolve():
        raise RunError(
            f"--against {against.path} is the run itself. Give a different run to compare with; or leave --against out "
            "to measure drops since each task's own stage."
        )
    runs = [Results(one) for one in (run, against) if one is not None]
    results, *others = (entry.results for entry in entries_of(runs))
    lines: list[Line] = []
    if max_forgetting is not None:
        groups = [drops.of_tasks_against(results, *others)] if others else drops.of_tasks(results)
        lines += [line for group in groups for line in _held("forgetting", group, max_forgetting, each)]
    if max_general_drop is not None:
        group = drops.of_suites_against(results, *others) if others else drops.of_suites(results)
        lines += _held("general drop", group, max_general_drop, each)
    limits = [line.limit / line.part.unit.factor for line in lines]
    weights = [line.weight for line in lines]
    found = verdicts([line.drop for line in lines], limits, [line.part.rows for line in lines], weights)
    for i, (line, verdict) in enumerate(zip(lines, found, strict=True)):
        share = line.weight / sum(weights)
        needed = rows_needed(line.drop, limits[i], line.part.rows, share) if verdict == UNKNOWN else None
        lines[i] = replace(line, verdict=verdict, rows_needed=needed)
    return Check(run, against, lines)


def _held(what: str, group: Group, limit: float, each: bool) -> Iterable[Line]:
    """The drops of a group: the mean, which decides, and its parts; without a mean of several all of them decide."""
    if not group.parts:
        raise RunError(f"There is no {what} to measure since {group.since}: no stage or task comes after it.")
    mean = group.mean if len(group.averaged) > 1 else None
    if mean is not None:
        yield Line(what, group.since, mean, limit, weight=len(group.averaged), decides=True)
    for part in group.parts:
        alone = part.name in group.averaged and mean is None
        yield Line(what, group.since, part, limit, weight=1, decides=each or alone or not group.averaged)
