"""Cells of old tasks whose answers begin with the first tokens of the reference: `trace-bench evaluate --given K`.

A model that answers in a lost form may still know how to go on. The tokens stand behind the prompt as in training, the
rest is generated, and the whole answer is scored by the task's own metric.
"""

from __future__ import annotations

from typing import Any

from trace_bench.records import given_cell
from trace_bench.run import Run, RunError, Stage
from trace_bench.tasks import target_text


def given_settings(run: Run, tokens: int | None, matrix: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a cell -> its settings, of all old tasks; empty where no tokens are to be given.

    Raises:
        RunError: if the run has no old task.
    """
    if tokens is None:
        return {}
    if not run.is_sequence() or len(run.stages) < 3 or run.manifest["method"] == "single":
        raise RunError(f"--given {tokens}: {run.path} has no task after which another one was trained.")
    return {given_cell(task, tokens): {**matrix, "given": tokens} for task in run.tasks[: len(run.stages) - 2]}


def given_cells(run: Run, stage: Stage, tokens: int | None) -> list[str]:
    """The names of such cells at a stage: at the base model and the last stage all, else that of the own task."""
    if tokens is None:
        return []
    old = run.tasks[: len(run.stages) - 2]
    return [given_cell(t, tokens) for t in old if stage.index in (0, len(run.stages) - 1) or stage.task == t]


def task_of(name: str, settings: dict[str, Any]) -> str:
    """The task of a cell by the cell's name and settings."""
    return name.removesuffix(given_cell("", settings.get("given", 0)))


class FirstTokens:
    """The first so many token ids of the reference of a row, as training has them behind the prompt.

    A reference has to go on behind them, or the row counts as short and has none.
    """

    def __init__(self, lm: Any, tasks: dict[str, Any], tokens: int) -> None:
        self.lm, self.tasks, self.tokens = lm, tasks, tokens
        #: (task, doc_id) of the rows that are not short.
        self.rows: set[tuple[str, int]] = set()

    def __call__(self, request: Any) -> tuple[int, ...]:
        """The tokens for a request of lm-eval's; none if its row is short."""
        answer = target_text(self.tasks[request.task_name], request.doc)
        reference = self.lm.reference_ids(request.args[0], answer, None)[:-1]  # without EOS
        if len(reference) <= self.tokens:
            return ()
        self.rows.add((request.task_name, request.doc_id))
        return reference[: self.tokens]

    def kept(self, name: str, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """lm-eval's samples of a task without those of short rows, and its results for these."""
        rows = [row for row in samples if (name, row["doc_id"]) in self.rows]
        results = {}
        for metric, aggregate in self.tasks[name].aggregation().items():
            for used in {row["filter"] for row in rows if metric in row}:
                values = [row[metric] for row in rows if row["filter"] == used]
                results[f"{metric},{used}"] = aggregate(values)
        return rows, results


def nothing_to_score(task: Any) -> dict[str, Any]:
    """The scores of a cell all of whose rows are short, such as that of a task whose answers are one token."""
    metric = next(iter(task.aggregation()))
    return {"version": task.VERSION, "n": 0, "headline": metric, "metrics": {metric: {"value": None, "stderr": None}}}
