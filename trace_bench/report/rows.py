"""The scores of individual test rows, for intervals and tests, and the options that the answers choose."""

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
from trace_tasks.answers import extract_answer, options_of, read_choice

#: (stage index, name of the task, suite or set) -> the content of its eval file.
Cells = dict[tuple[int, str], dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """The scores of the test rows of a task or suite: the same rows at all stages."""

    ids: list[tuple[str, Any]]
    """(subtask of a suite, doc_id) of each row."""
    scores: dict[str, Matrix]
    """Metric -> scores, shape (rows, stages); NaN at stages whose score is not the mean of its rows."""
    parts: list[NDArray[np.intp]]
    """The score is the mean over parts of the mean over a part's rows. One part, or one for each equal subtask."""

    def estimates(self, rows: Matrix, interval: Callable[[Matrix], tuple[Matrix, Matrix]]) -> list[Estimate]:
        """The mean of each column of `rows` (rows, columns), with an interval function of `metrics`."""
        parts = [np.stack([rows[part].mean(axis=0), *interval(rows[part])], axis=1) for part in self.parts]
        return [metrics.mean_of([Estimate(*part[column]) for part in parts]) for column in range(rows.shape[1])]

    def changes(self, unit: Unit, later: list[int], earlier: int) -> list[Estimate]:
        """The gains of the unit's metric from the earlier stage to each later one."""
        interval = partial(metrics.difference_interval, fractions=unit.scale == 1)
        return self.estimates(self._gains(unit, later, earlier), interval)

    def p_values(self, unit: Unit, later: list[int], earlier: int) -> Matrix:
        """How likely these gains are if nothing changed: see `metrics.difference_p`."""
        rows = self._gains(unit, later, earlier)
        return metrics.difference_p([rows[part] for part in self.parts], fractions=unit.scale == 1)

    def _gains(self, unit: Unit, later: list[int], earlier: int) -> Matrix:
        x = self.scores[unit.metric]
        return unit.sign * (x[:, later] - x[:, [earlier]])


def load_rows(run: Run, name: str, cells: Cells) -> Rows | None:
    """Reads the rows of a task or suite from the samples of all stages; None if there are none.

    A score has to be the mean of its rows, or of its subtasks' means. If its metric is no mean (corpus BLEU), the rows
    say nothing about its uncertainty, and their scores are NaN.

    Raises:
        RunError: if samples are damaged, do not give their score, or have other rows than those of another stage.
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
                f"{files[i]} and {first} have different rows, or a different order, so no change between them can be "
                "measured. Delete both and their scores, and evaluate again."
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
                    f"{files[i]} does not match the {metric} of its score: one of the two was changed. Delete both and "
                    "evaluate again."
                )
            x[:, i] = np.nan
    return Rows(ids, scores, parts)


def _parts(ids: list[tuple[str, Any]], scores: dict[str, Matrix], cells: dict[int, Any]) -> list[NDArray[np.intp]]:
    """Finds out whether scores are means over all rows, or over subtasks' means: whichever fits more headlines."""
    labels = np.unique([subtask for subtask, _ in ids], return_inverse=True)[1]
    subtasks = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]

    def fitting(parts: list[NDArray[np.intp]]) -> int:
        return sum(_fits(scores[cell["headline"]], parts, i, cell, cell["headline"]) for i, cell in cells.items())

    return max(([np.arange(len(ids))], subtasks), key=fitting)


def _fits(x: Matrix, parts: list[NDArray[np.intp]], i: int, cell: dict[str, Any], metric: str) -> bool:
    value = cell["metrics"].get(metric, {}).get("value")
    return value is not None and abs(np.mean([x[part, i].mean() for part in parts]) - value) < 1e-6


@dataclass(frozen=True)
class Choices:
    """The options that the test rows of a task or suite offer, and the one chosen at each stage."""

    labels: list[str]
    """The names of the options: their texts if all rows have the same ones, else letters."""
    options: NDArray[np.intp]
    """The number of options of each row, shape (rows,)."""
    gold: NDArray[np.intp]
    """The index of the right option of each row."""
    chosen: dict[int, NDArray[np.intp]]
    """Stage -> the index of the chosen option of each row; -1 = the answer names none."""

    def right(self, stage: int) -> NDArray[np.bool_]:
        """Whether each row's answer names the right option, in any form."""
        return self.chosen[stage] == self.gold


def load_choices(run: Run, name: str, cells: Cells) -> Choices | None:
    """Reads the options and choices of a task or suite (checked by `load_rows`); None if a row has no options.

    In a suite's samples the likeliest option is chosen. For generated answers the options are read from the prompt, and
    the letter as for the form-tolerant accuracy.
    """
    found: Choices | None = None
    for stage in run.stages:
        if (stage.index, name) not in cells or not stage.samples_file(name).exists():
            continue
        rows = [r for r in read_jsonl(stage.samples_file(name)) if r["doc_id"] not in run.left_out.get(name, ())]
        found = found or _offered(rows)
        if found is None:
            return None
        found.chosen[stage.index] = np.array([_chosen(row, int(k)) for row, k in zip(rows, found.options, strict=True)])
    return found


def _offered(rows: list[dict[str, Any]]) -> Choices | None:
    """The options and right options of all rows, without choices yet; None if a row has no options."""
    texts: list[list[str]] = []
    gold = []
    for row in rows:
        prompt, target = row.get("prompt", ""), row.get("target")
        if isinstance(row.get("choices"), list) and isinstance(target, int):
            options, right = [str(text).strip() for text in row["choices"]], target
        elif isinstance(prompt, str) and isinstance(target, str):
            options = [f"{letter} {text}" for letter, text in options_of(prompt).items()]
            right = _number(read_choice(target.partition("\n")[0], prompt))
        else:
            return None
        if not 0 <= right < len(options) or len(options) < 2:
            return None
        texts.append(options)
        gold.append(right)
    if not texts:
        return None
    counts = np.array([len(options) for options in texts])
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(counts.max())]
    return Choices(texts[0] if all(t == texts[0] for t in texts) else letters, counts, np.array(gold), {})


def _chosen(row: dict[str, Any], options: int) -> int:
    response = row.get("response")
    if isinstance(response, str):
        text = extract_answer("line", response) if "extracted" in row else response
        response = _number(read_choice(text, row.get("prompt", ""))) if text else -1
    return response if isinstance(response, int) and 0 <= response < options else -1


def _number(letter: str | None) -> int:
    return -1 if letter is None else ord(letter) - ord("A")
