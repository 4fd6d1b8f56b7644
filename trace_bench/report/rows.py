"""The scores of single test rows, from the samples: what intervals and tests are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_bench import metrics, records
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.tables import Unit
from trace_bench.run import Run, RunError, read_jsonl

#: (stage index, name of the task, suite or set) -> the content of its eval file.
Cells = dict[tuple[int, str], dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """The scores of a task's test rows, or of a suite's: the same rows at all stages."""

    ids: list[tuple[str, Any]]
    """(subtask of a suite, doc_id) of each row."""
    scores: dict[str, Matrix]
    """Metric -> scores, shape (rows, stages); NaN at stages whose score is not the mean of these rows."""
    parts: list[NDArray[np.intp]]
    """The score is the mean of these parts' means: all rows, or each subtask's where subtasks count the same."""

    def estimates(self, rows: Matrix, interval: Callable[[Matrix], tuple[Matrix, Matrix]]) -> list[Estimate]:
        """The mean of each column of shape (rows, columns), with the interval of `metrics` for means or differences."""
        parts = [np.stack([rows[part].mean(axis=0), *interval(rows[part])], axis=1) for part in self.parts]
        return [metrics.mean_of([Estimate(*part[column]) for part in parts]) for column in range(rows.shape[1])]

    def changes(self, unit: Unit, later: list[int], earlier: int) -> list[Estimate]:
        """What the scores of a metric gained from the earlier stage to the later ones."""
        interval = partial(metrics.difference_interval, fractions=unit.scale == 1)
        return self.estimates(self._gains(unit, later, earlier), interval)

    def p_values(self, unit: Unit, later: list[int], earlier: int) -> Matrix:
        """How likely such gains are where nothing changed: see `metrics.difference_p`."""
        rows = self._gains(unit, later, earlier)
        return metrics.difference_p([rows[part] for part in self.parts], fractions=unit.scale == 1)

    def _gains(self, unit: Unit, later: list[int], earlier: int) -> Matrix:
        x = self.scores[unit.metric]
        return unit.sign * (x[:, later] - x[:, [earlier]])


def load_rows(run: Run, name: str, cells: Cells) -> Rows | None:
    """The rows of a task or suite from the samples of all stages; None if there are none.

    A score is checked to be the mean of its rows, or the mean of its subtasks' means. Where it is neither and never was
    (corpus BLEU), the rows do not say how certain it is, and those of the stage are NaN.

    Raises:
        RunError: if samples are damaged, are not those that their score was made from, or are of other rows than those
            of another stage.
    """
    files = {stage.index: stage.samples_file(name) for stage in run.stages}
    own = {i: cell for (i, n), cell in cells.items() if n == name and files[i].exists()}
    scores = {metric: np.full((0, len(run.stages)), np.nan) for cell in own.values() for metric in cell["metrics"]}
    ids: list[tuple[str, Any]] = []
    first = None
    for i, cell in own.items():
        rows = read_jsonl(files[i])
        records.check_samples(run.stages[i], name, [(row.get("task", ""), row["doc_id"]) for row in rows])
        rows = [row for row in rows if row["doc_id"] not in run.left_out.get(name, ())]
        here = [(row.get("task", ""), row["doc_id"]) for row in rows]
        if first is None and here:
            first, ids = files[i], here
            scores = {metric: np.full((len(ids), len(run.stages)), np.nan) for metric in scores}
        if here != ids:
            raise RunError(
                f"{files[i]} and {first} are not of the same rows, or not in the same order: no change between them "
                "can be measured. Delete both and their scores, and evaluate again."
            )
        for metric in cell["metrics"] if ids else ():
            values = [row.get(metric) for row in rows]
            scores[metric][:, i] = values if all(isinstance(v, int | float) for v in values) else math.nan
    if not ids:
        return None
    parts = _parts(ids, scores, own)
    for i, cell in own.items():
        for metric, x in scores.items():
            if _fits(x, parts, i, cell, metric):
                continue
            if cell["metrics"].get(metric, {}).get("stderr") is not None and not np.isnan(x[:, i]).any():
                raise RunError(
                    f"{files[i]} does not give the {metric} of its score: one of both was changed. Delete both and "
                    "evaluate again."
                )
            x[:, i] = np.nan
    return Rows(ids, scores, parts)


def _parts(ids: list[tuple[str, Any]], scores: dict[str, Matrix], cells: dict[int, Any]) -> list[NDArray[np.intp]]:
    """Whether scores are means of all rows or of subtasks' means: what more of the headlines are."""
    labels = np.unique([subtask for subtask, _ in ids], return_inverse=True)[1]
    subtasks = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]

    def fitting(parts: list[NDArray[np.intp]]) -> int:
        return sum(_fits(scores[cell["headline"]], parts, i, cell, cell["headline"]) for i, cell in cells.items())

    return max(([np.arange(len(ids))], subtasks), key=fitting)


def _fits(x: Matrix, parts: list[NDArray[np.intp]], i: int, cell: dict[str, Any], metric: str) -> bool:
    value = cell["metrics"].get(metric, {}).get("value")
    return value is not None and abs(np.mean([x[part, i].mean() for part in parts]) - value) < 1e-6
