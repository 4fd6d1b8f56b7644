"""The numbers of runs in a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from trace_bench import judgements
from trace_bench.metrics import Estimate
from trace_bench.report.likelihood import NATS, soft_bwt
from trace_bench.report.results import DELTAS, UNKNOWN, Results, unit_of
from trace_bench.report.tables import DASH, PERCENT, Unit, count, number
from trace_bench.run import Run
from trace_bench.text import one_line
from trace_tasks.data import ORDERS, REASONING, task_name

#: Numbers that are means over a run's tasks -> whether they are shown with a sign.
OF_TASKS = {"OP": False, "BWT": True, "FWT": True, "Forgetting": False}
#: Numbers that are scores. All but Forgetting have intervals and differences to the baseline.
SCORES = {**OF_TASKS, "soft BWT": True, **dict.fromkeys(DELTAS, True)}
#: Numbers that are no scores -> how they are formatted.
COSTS = {"training min": number, "evaluation min": number, "trained tokens": count, "judge tokens": count}
NUMBERS = (*SCORES, "base", *COSTS)
TEXTS = ("method", "trains", "tasks", "train rows")


@dataclass(frozen=True)
class Entry:
    """The numbers of one run in a comparison."""

    name: str
    results: Results

    @property
    def run(self) -> Run:
        """The run."""
        return self.results.run

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Column of a task -> its unit."""
        return {column_of(task, self.run): self.results.units[task] for task in self.run.tasks}

    def unit(self, name: str) -> Unit:
        """The unit of one of `SCORES`. A mean without a common unit, which is NaN, counts as percent."""
        if name == "soft BWT":
            return NATS
        return (self.results.unit or PERCENT) if name in OF_TASKS else PERCENT

    @property
    def unit_name(self) -> str:
        """The unit of the means over the tasks."""
        return self.results.unit.name if self.results.unit else "different units"

    def writer(self, name: str) -> Callable[[float], str]:
        """The function that formats one of `NUMBERS`."""
        if name in COSTS:
            return COSTS[name]
        return partial(self.unit("OP" if name == "base" else name).shown, sign=SCORES.get(name, False))

    @cached_property
    def finals(self) -> dict[str, float]:
        """Column of a task -> its final score, as it is shown."""
        pairs = zip(self.units.items(), self.results.final, strict=True)
        return {name: unit.factor * float(value) for (name, unit), value in pairs}

    @cached_property
    def scores(self) -> dict[str, Estimate]:
        """The `SCORES` as the metrics give them; NaN = unknown, or not defined for the run."""
        results, last = self.results, self.run.stages[-1]
        found = dict.fromkeys(SCORES, UNKNOWN) | {"general": results.general.get(last.index, UNKNOWN)}
        found |= {name: judgements.net_win_rate(counts, last) for name, counts in results.judged.items()}
        if results.is_sequential:
            found |= {name: results.sequence[name][-1] for name in OF_TASKS}
            found["soft BWT"] = soft_bwt(results, len(self.run.tasks))
        elif results.has_mean:
            found["OP"] = results.mean
        return found

    @cached_property
    def numbers(self) -> dict[str, float]:
        """All `NUMBERS`, with scores as they are shown; NaN = unknown, or not defined for the run."""
        results, run = self.results, self.run
        done = results.training.values()
        complete = len(done) == len(run.stages) - 1
        replies = judgements.judge_tokens(results.judged.values())
        cells = results.cells.values()
        zero_shot = run.tasks and not run.manifest["config"].get("num_fewshot")
        base = self.unit("OP").factor * float(results.R[0].mean()) if zero_shot and results.unit else math.nan
        return {
            **{name: self.unit(name).factor * estimate.value for name, estimate in self.scores.items()},
            "base": base,
            "training min": sum(t["seconds"] for t in done) / 60 if complete else math.nan,
            "evaluation min": sum(cell["seconds"] for cell in cells) / 60 if cells else math.nan,
            "trained tokens": sum(t["tokens"] for t in done) if complete else math.nan,
            "judge tokens": sum(replies.values()) if replies else math.nan,
        }

    @cached_property
    def texts(self) -> dict[str, str]:
        """The `TEXTS` of the run."""
        manifest, tasks = one_line(self.run.manifest), self.run.tasks
        trained, rows = len(self.run.stages) > 1, manifest["config"].get("train_rows")
        order = next((name for name, those in ORDERS.items() if tasks == those), None)
        names = [*map(task_name, tasks)] if len(tasks) <= 4 else [*map(task_name, tasks[:3]), "…"]
        return {
            "method": manifest["method"],
            "trains": manifest.get("trains", DASH) if trained else DASH,
            "tasks": f"{len(tasks)} ({order or ', '.join(names)})" if tasks else "none",
            "train rows": (f"first {rows}" if rows else "all") if trained and "checkpoints" not in manifest else DASH,
        }


def column_of(task: str, run: Run) -> str:
    """The name of a task's column. The reasoning variant of a task shares the column of the plain one."""
    plain = task.replace("reasoning_", "trace_", 1) if task in REASONING else task
    # A run that trains both variants of a task keeps them apart.
    name = task_name(task if plain in run.tasks else plain)
    taken = name in ("run", *TEXTS, *NUMBERS) or any(task_name(other) == name for other in run.tasks if other != task)
    return f"task {task}" if taken else name


def entries_of(loaded: Sequence[Results]) -> list[Entry]:
    """The entries of runs, with units that all share. Runs with the same name are told apart by their paths."""
    runs = [results.run for results in loaded]
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}  # (column, headline) -> its cells
    for results in loaded:
        for (_, task), cell in results.cells_of(results.run.tasks).items():
            together.setdefault((column_of(task, results.run), cell["headline"]), []).append(cell)

    def unit(results: Results, task: str) -> Unit:
        column = column_of(task, results.run)
        metric = results.headlines.get(task) or next((m for c, m in together if c == column), "")
        return unit_of(metric, together.get((column, metric), []))

    names = [one_line(run.path.name) for run in runs]
    names = [name if names.count(name) == 1 else one_line(str(r.path)) for name, r in zip(names, runs, strict=True)]
    units = [{task: unit(results, task) for task in results.run.tasks} for results in loaded]
    shared = (r if r.units == of_run else Results(r.run, of_run) for r, of_run in zip(loaded, units, strict=True))
    return [Entry(name, results) for name, results in zip(names, shared, strict=True)]
