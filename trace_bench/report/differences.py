"""A run against a baseline: differences of their numbers, with intervals where the test rows can be paired.

Differences are gains: positive where the run is better (of Forgetting, where it forgot more). Rows are paired where
both runs have the same ones: of tasks under the same conditions (`same_conditions`), of suites and judged sets whatever
was trained. A paired interval is that of the mean over the rows of the differences that the runs make of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from trace_bench import judgements, metrics
from trace_bench.measures.likelihood import LIKELIHOOD
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.conditions import delta_conditions, same_conditions
from trace_bench.report.entry import OF_TASKS, SCORES, Entry, column_of
from trace_bench.report.results import UNKNOWN, Results
from trace_bench.report.tables import shared_unit
from trace_tasks.data import GROUPS

#: Scores that leave a task of the order out -> the tasks that they are means over.
_PARTS = {"BWT": slice(None, -1), "soft BWT": slice(None, -1), "Forgetting": slice(None, -1), "FWT": slice(1, None)}


def gain(entry: Entry, name: str) -> float:
    """One of a run's `SCORES`, or a final score as it is shown, with its unit's sign: differences are gains."""
    if name not in SCORES:
        return entry.units[name].sign * entry.finals[name]
    return entry.scores[name].value * (entry.unit("OP").sign if name == "OP" else 1)


def defined(entry: Entry, against: Entry) -> list[str]:
    """The `SCORES` that two runs can be compared in: means over the same tasks, measured with the same settings."""
    names = set(SCORES)
    if entry.finals.keys() != against.finals.keys() or shared_unit([entry.unit("OP"), against.unit("OP")]) is None:
        names -= {*OF_TASKS, "soft BWT"}  # a mean over others is another number
    settings = delta_conditions(against.results)
    names -= {name for name, own in delta_conditions(entry.results).items() if own != settings[name]}
    return [name for name in SCORES if name in names]


def over_the_same_tasks(one: Entry, two: Entry, name: str) -> bool:
    """Whether one of `SCORES` is a mean over the same tasks in both runs, in any order."""
    part = _PARTS.get(name, slice(0))
    tasks = [sorted(column_of(task, e.run) for task in e.run.tasks[part]) for e in (one, two)]
    return tasks[0] == tasks[1]


def paired_differences(entry: Entry, against: Entry) -> dict[str, Estimate]:
    """Score -> its difference to the baseline, with an interval if the rows can be paired."""
    one, two = entry.results, against.results
    paired = {"general": _of_suites(one, two)}
    paired |= {kind.name: _of_verdicts(one, two, kind.name) for kind in judgements.KINDS}
    if same_conditions(one, two):
        paired["OP"] = metrics.mean_of([task_difference(one, two, task, final_gains) for task in one.run.tasks])
        paired["BWT"] = _of_changes(entry, against, "BWT", Results.rows_since_own)
        paired["soft BWT"] = _of_changes(entry, against, "soft BWT", partial(Results.rows_since_own, metric=LIKELIHOOD))
        paired["FWT"] = _of_changes(entry, against, "FWT", Results.rows_ahead)
    found = dict.fromkeys(SCORES, UNKNOWN)
    for name in defined(entry, against):
        value = gain(entry, name) - gain(against, name)
        found[name] = Estimate(value, *(paired.get(name, UNKNOWN)[1:] if not math.isnan(value) else ()))
    return found


def final_gains(results: Results, task: str) -> Matrix:
    """The final scores of a task's rows with the sign of its unit, so that differences are gains."""
    return results.units[task].sign * results.final_rows(task)


def task_difference(one: Results, two: Results, task: str, of_rows: Callable[[Results, str], Matrix]) -> Estimate:
    """The mean difference of a task's rows between two runs; NaN if the rows or the unit are not the same."""
    if not same_rows(one, two, task) or shared_unit([one.units[task], two.units[task]]) is None:
        return UNKNOWN
    differences = of_rows(one, task) - of_rows(two, task)
    return metrics.mean_difference(differences, fractions=one.units[task].scale == 1)


def same_rows(one: Results, two: Results, name: str) -> bool:
    """Whether both runs have the samples of a task or suite, of the same rows."""
    return name in one.rows and name in two.rows and one.rows[name].ids == two.rows[name].ids


def _of_changes(entry: Entry, against: Entry, name: str, of_rows: Callable[[Results, str], Matrix]) -> Estimate:
    """The paired difference of one of `_PARTS`, if it is a mean over the same tasks in both runs."""
    one, two = entry.results, against.results
    if not (one.is_sequential and two.is_sequential and over_the_same_tasks(entry, against, name)):
        return UNKNOWN
    return metrics.mean_of([task_difference(one, two, task, of_rows) for task in one.run.tasks[_PARTS[name]]])


def _of_suites(one: Results, two: Results) -> Estimate:
    found = []
    for suite in GROUPS["general"]:
        if all((0, suite) in results.cells for results in (one, two)):
            if not same_rows(one, two, suite):
                return UNKNOWN
            x, y = (results.task_rows(suite) for results in (one, two))
            changes = (x[:, -1] - x[:, 0]) - (y[:, -1] - y[:, 0])
            found += one.rows[suite].estimates(changes[:, None], metrics.difference_interval)
    return metrics.mean_of(found)


def _of_verdicts(one: Results, two: Results, kind: str) -> Estimate:
    """The paired difference of a net win rate, if the same rows were scored in both runs."""
    won = {"win": 1, "tie": 0, "lose": -1}

    def scored(results: Results) -> dict[tuple[str, object], int]:
        last = results.run.stages[-1]
        suites = [suite for index, suite in results.judged[kind] if index == last.index]
        pairs = ((s, doc_id, v) for s in suites for doc_id, v in judgements.verdicts(last, s).items())
        return {(suite, doc_id): won[verdict] for suite, doc_id, verdict in pairs if verdict in won}

    a, b = scored(one), scored(two)
    if not a or a.keys() != b.keys():
        return UNKNOWN
    return metrics.mean_difference(np.array([a[row] - b[row] for row in a], dtype=float))
