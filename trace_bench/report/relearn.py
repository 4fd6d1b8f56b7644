"""The section "Gone or hidden": what a few rows of training, or a few given tokens, bring back of what was lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_bench import metrics, records
from trace_bench.manifest import differences
from trace_bench.measures.hidden import share_interval, share_recovered
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.differences import same_rows
from trace_bench.report.results import Results, headline
from trace_bench.report.rows import load_rows
from trace_bench.report.tables import DASH, Block, Table, Unit, percent_with_interval
from trace_bench.run import Run
from trace_bench.text import one_line
from trace_tasks.data import task_name

#: What a task was trained again from: the folders of a relearning.
_STARTS = ("last", "base")


def sections(results: Results) -> Iterable[Block]:
    """What `trace-bench relearn` and `trace-bench evaluate --given` measured, of a run with all of its stages."""
    if not results.is_sequential or results.last_stage < len(results.run.tasks):
        return
    blocks = [block for folder in sorted(results.run.path.glob("relearn/*")) for block in _relearned(results, folder)]
    if not results.run.left_out:  # with rows left out the scores with given tokens would be those of other rows
        blocks += _given(results)
    if blocks:
        yield "## Gone or hidden"
        yield from blocks


# ----------------------------------------------------------------------------------------------------------- relearned


def _relearned(results: Results, folder: Path) -> Iterable[Block]:
    """The table of one relearning: from the last stage, and from the base model."""
    runs = {name: Run.open(folder / name) for name in _STARTS if (folder / name / "manifest.json").exists()}
    there = {name: Results(replace(run, left_out=results.run.left_out)) for name, run in runs.items()}
    if any(_is_stale(results, name, relearned) for name, relearned in there.items()):
        yield (
            f"> **Left out**: `relearn/{one_line(folder.name)}` was made from different weights, or measured with "
            "different settings, than the run has now. Remove it and run `trace-bench relearn` again."
        )
        return
    if not any(relearned.cells for relearned in there.values()):
        return
    config, last = next(iter(there.values())).run.manifest["config"], len(results.run.tasks)
    rows = f"{config.get('train_rows')} rows"
    yield (
        f"Each old task was trained again on {rows} ({config.get('max_steps')} steps), from stage {last} and, as a "
        "control, from the base model, and then measured on the same test rows. What comes back beyond the control was "
        "hidden, not gone (arXiv 2501.13453). Shares are relative to the loss from the own stage to stage "
        f"{last}, if this loss is certain."
    )
    shares = ["came back", "control: came back", "beyond the control"]
    head = ["task", "own stage", f"stage {last}", f"after {rows}", "control", *shares]
    yield Table(head, [_row(results, there, i, task) for i, task in enumerate(results.run.tasks[:-1])])


def _is_stale(results: Results, name: str, relearned: Results) -> bool:
    """Whether a relearning began with other weights than the run has now, or was measured in another way."""
    last = len(results.run.tasks)
    start = results.run.stages[last if name == "last" else 0]
    if relearned.run.manifest.get("begins_with") != {"stage": start.name, "checkpoint": start.fingerprint()}:
        return True
    pairs = [(cell, results.cells.get((last, task))) for (_, task), cell in relearned.cells.items()]
    return any(own is None or differences(own["settings"], cell["settings"]) for cell, own in pairs)


def _row(results: Results, there: dict[str, Results], i: int, task: str) -> list[str]:
    unit, own, last = results.units[task], i + 1, len(results.run.tasks)
    x = results.task_rows(task)
    scores, columns = [results.R[own, i], results.R[last, i]], [x[:, own], x[:, last]]
    for name in _STARTS:
        score, column = _after(results, there.get(name), task)
        scores.append(score)
        columns.append(column)
    rows = np.stack(columns, axis=1)
    beyond = _change(rows[:, 2] - rows[:, 3], unit)._replace(value=unit.sign * (scores[2] - scores[3]))
    lost, shares = results.change(i, own, last), [DASH, DASH]
    if lost.value < 0 and not lost.high >= 0:  # certain, or nothing is known of single rows
        those = ([0, 1, 2], [0, 1, 3])
        values = [Estimate(share_recovered([scores[k] for k in t]), *share_interval(rows[:, t])) for t in those]
        shares = [percent_with_interval(value) for value in values]
    return [task_name(task), *map(unit.text, scores), *shares, unit.with_interval(beyond, sign=True)]


def _after(results: Results, relearned: Results | None, task: str) -> tuple[float, Matrix]:
    """The score of a task after relearning, and those of its test rows; NaN where there are none, or other rows."""
    unknown = np.full(len(results.task_rows(task)), np.nan)
    if relearned is None or task not in relearned.run.tasks:
        return np.nan, unknown
    column = relearned.run.tasks.index(task)
    rows = relearned.task_rows(task)[:, column + 1] if same_rows(results, relearned, task) else unknown
    return relearned.R[column + 1, column], rows


def _change(rows: Matrix, unit: Unit) -> Estimate:
    """The mean of differences of test rows, as a gain, with its interval."""
    return metrics.mean_difference(unit.sign * rows, fractions=unit.scale == 1)


# -------------------------------------------------------------------------------------------------------- given tokens


def _given(results: Results) -> Iterable[Block]:
    """A table for each number of tokens that were given."""
    run = results.run
    known: dict[int, dict[str, dict[int, Any]]] = {}
    for i, task in enumerate(run.tasks[:-1]):
        for stage in (run.stages[0], run.stages[i + 1], run.stages[-1]):
            for file in stage.path.glob(f"eval/{task}.given*.json"):
                cell = records.read_cell(stage, file.stem)
                if cell["checkpoint"] == stage.fingerprint():
                    known.setdefault(cell["settings"]["given"], {}).setdefault(task, {})[stage.index] = cell
    for tokens, by_task in sorted(known.items()):
        yield from _given_table(results, tokens, by_task)


def _given_table(results: Results, tokens: int, by_task: dict[str, dict[int, Any]]) -> Iterable[Block]:
    last, given = len(results.run.tasks), f"{tokens} token" + "s" * (tokens > 1)
    short = [task_name(task) for task, cells in by_task.items() if not any(cell["n"] for cell in cells.values())]
    yield (
        f"The prompt is followed by the first {given} of the reference. The model generates the rest, and the whole "
        "answer is scored. Each cell has the score without → with them, on the test rows whose reference is longer. "
        "What is lost without them but not with them was hidden: the model could no longer begin the answer, but still "
        "continue it. They are a part of the answer, so they also raise the base model's score."
        + (f" No score for {', '.join(short)}: no reference is longer than {given}." if short else "")
    )
    scored = [i for i, task in enumerate(results.run.tasks) if task in by_task and task_name(task) not in short]
    rows = [_given_row(results, i, tokens, by_task[results.run.tasks[i]]) for i in scored]
    if rows:
        yield Table(["task", "rows", "base", "own stage", f"stage {last}", "since then", "since then, with them"], rows)


def _given_row(results: Results, i: int, tokens: int, cells: dict[int, Any]) -> list[str]:
    task, last = results.run.tasks[i], len(results.run.tasks)
    unit, name = results.units[task], records.given_cell(task, tokens)
    rows = load_rows(results.run, name, {(index, name): cell for index, cell in cells.items()})
    place = {key: n for n, key in enumerate(results.rows[task].ids)} if task in results.rows else {}
    before = after = np.full((2, last + 1), np.nan)
    if rows is not None and set(rows.ids) <= place.keys():
        after = rows.scores[results.headlines[task]]
        before = results.task_rows(task)[[place[key] for key in rows.ids]]
    scores = {index: headline(cell) for index, cell in cells.items()}
    stages = (0, i + 1, last)
    texts = [f"{unit.text(before[:, t].mean())} → {unit.text(scores.get(t, np.nan))}" for t in stages]
    changes = [_change(x[:, last] - x[:, i + 1], unit) for x in (before, after)]
    one = next(iter(cells.values()))
    count = f"{one['n']} of {one['n'] + one.get('n_short', 0)}"
    return [task_name(task), count, *texts, *(unit.with_interval(change, sign=True) for change in changes)]
