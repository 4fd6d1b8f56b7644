"""Cells of old tasks whose answers begin with K tokens of the reference: `trace-bench evaluate --given K`.

A model that has lost the form of the answers may still know how to continue one. The given tokens follow the prompt as
in training, the rest is generated, and the whole answer is scored by the task's own metric.
"""

from __future__ import annotations

from typing import Any

from trace_bench.records import given_cell
from trace_bench.run import Run, RunError, Stage
from trace_bench.tasks import target_text


def given_settings(run: Run, tokens: int | None, matrix: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a cell -> its settings, for all old tasks; empty if no tokens are given.

    Raises:
        RunError: if the run has no old task.
    """
    if tokens is None:
        return {}
    if not run.old_tasks:
        raise RunError(f"--given {tokens}: {run.path} has no old tasks, which this measures. Leave it out.")
    return {given_cell(task, tokens): {**matrix, "given": tokens} for task in run.old_tasks}


def given_cells(run: Run, stage: Stage, tokens: int | None) -> list[str]:
    """The names of these cells at a stage: all at the base model and the last stage, else that of its own task."""
    if tokens is None:
        return []
    return [given_cell(t, tokens) for t in run.old_tasks if stage.index in (0, len(run.stages) - 1) or stage.task == t]


def task_of(name: str, settings: dict[str, Any]) -> str:
    """The task of a cell with this name and these settings."""
    return name.removesuffix(given_cell("", settings.get("given", 0)))


class FirstTokens:
    """Request -> the first `tokens` token ids of its reference, as in training (`SwapLM.given`).

    A row whose reference is not longer than that counts as short: it gets no tokens and is not asked.
    """

    def __init__(self, lm: Any, tasks: dict[str, Any], tokens: int) -> None:
        self.lm, self.tasks, self.tokens = lm, tasks, tokens
        #: (task, doc_id) of the rows that are not short.
        self.rows: set[tuple[str, int]] = set()

    def __call__(self, request: Any) -> tuple[int, ...]:
        """The tokens for a request of lm-eval; empty if its row is short."""
        answer = target_text(self.tasks[request.task_name], request.doc)
        reference = self.lm.reference_ids(request.args[0], answer, None)[:-1]  # without EOS
        if len(reference) <= self.tokens:
            return ()
        self.rows.add((request.task_name, request.doc_id))
        return reference[: self.tokens]

    def kept(self, name: str, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """lm-eval's samples of a task without short rows, and the task's results for the others."""
        rows = [row for row in samples if (name, row["doc_id"]) in self.rows]
        results = {}
        for metric, aggregate in self.tasks[name].aggregation().items():
            for used in {row["filter"] for row in rows if metric in row}:
                values = [row[metric] for row in rows if row["filter"] == used]
                results[f"{metric},{used}"] = aggregate(values)
        return rows, results


def nothing_to_score(task: Any) -> dict[str, Any]:
    """The scores of a cell whose rows are all short, such as those of a task with answers of one token."""
    metric = next(iter(task.aggregation()))
    return {"version": task.VERSION, "n": 0, "headline": metric, "metrics": {metric: {"value": None, "stderr": None}}}
