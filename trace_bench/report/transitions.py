"""The section about single test rows: which were lost, gained and kept, when, and how much of it is chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from trace_bench.measures import transitions as measures
from trace_bench.measures.transitions import GAINED, LOST, NAMES
from trace_bench.metrics import wilson_interval
from trace_bench.report.entry import Entry
from trace_bench.report.results import Results
from trace_bench.report.samples import SAMPLE_STAGES
from trace_bench.report.tables import DASH, Block, Table, Unit, percent, percent_with_interval, shade, stage_label
from trace_bench.run import Stage
from trace_tasks.data import SUITES, task_name

#: The part of its scale by which a graded score has to change before a row counts as lost or gained.
GRADED = 0.1
_ABOUT = (
    "## Lost and gained, row by row\n\nHow the test rows changed since {since}, at the last stage that measured them, "
    "in percent of the rows. Kept: right then and at every stage since. Came back: right then, lost at a later stage, "
    "right again. Lost: right then, wrong now. Gained: wrong then, right now. Never: wrong at both. The change of a "
    "score is gained minus lost, so the same change can hide few such rows or many."
)
_CHANCE = (
    "### Beyond chance\n\nA model that guesses is sometimes right, and its next guess may differ. The table shows, in "
    "percent of the rows with options: how many went from right to wrong and from wrong to right (the option in any "
    "form), how many would by guessing alone, and the rest, which is forgetting and backward transfer (arXiv "
    "2510.17776). Around zero: only guesses changed. Below zero: guesses stayed the same, as in a model that always "
    "chooses one option."
)


@dataclass(frozen=True)
class History:
    """What became of the test rows of a task or suite."""

    name: str
    reference: int
    """The stage that rows are compared with."""
    stages: list[int]
    """Those after it that measured them."""
    graded: bool
    """Whether scores are more than right or wrong."""
    fates: NDArray[np.int8]
    """See `measures.transitions.fates`, shape (rows, all stages)."""
    had: float
    """The share of rows that were right at the reference stage."""

    @property
    def title(self) -> str:
        """What a report calls it."""
        return title(self.name)

    def shares(self, stage: int) -> NDArray[np.float64]:
        """The share of the rows of each fate."""
        return np.bincount(self.fates[:, stage], minlength=len(NAMES)) / len(self.fates)


def title(name: str) -> str:
    """What the sections about rows call a task or suite."""
    return task_name(name).removeprefix("general_")


def histories(results: Results) -> list[History]:
    """Tasks since their own stage in a sequence, else since the base model; suites since the base model."""
    found, tasks = [], results.run.tasks
    for name in (name for name in (*tasks, *SUITES) if name in results.rows):
        reference = tasks.index(name) + 1 if name in tasks and results.is_sequential else 0
        unit = results.units.get(name) or Unit(results.headlines[name])
        scores = results.rows[name].scores[results.headlines[name]]
        graded = not np.isin(scores[~np.isnan(scores)], (0, 1)).all()
        tolerance = GRADED if graded else 0.0
        x = shade(scores, unit.ends(scores))
        fates = measures.fates(x, reference, tolerance)
        stages = [int(t) for t in np.flatnonzero((fates != measures.UNKNOWN).all(axis=0))]
        if stages:
            had = float((x[:, reference] > tolerance + 1e-9).mean())
            found.append(History(name, reference, stages, graded, fates, had))
    return found


def sections(results: Results) -> Iterable[Block]:
    """What became of the rows by task, by stage, at which stage they were lost first, and beyond chance."""
    found = results.once(histories)
    if not found:
        return
    bases = {h.reference == 0 for h in found}
    since = "the task's own stage" + ("; of a suite since the base model" if True in bases else "")
    yield _ABOUT.format(since="the base model" if bases == {True} else since)
    if graded := [h.title for h in found if h.graded]:
        yield (
            f"{', '.join(graded)}: the scores are graded. A row is lost or gained if its score is worse or better by "
            f"more than {100 * GRADED:.0f} % of the scale, and never if it had no more to lose."
        )
    rows = [[h.title, str(len(h.fates)), *map(percent, h.shares(h.stages[-1]))] for h in found]
    yield Table(["", "rows", *NAMES], rows)
    stages = [s for s in results.run.stages if any(s.index in h.stages for h in found)]

    def text(history: History, stage: int) -> str:
        return " / ".join(percent(history.shares(stage)[f]) for f in (LOST, GAINED))

    if any(len(h.stages) > 1 for h in found):
        yield "### Lost and gained by stage\n\nLost / gained at each stage, in percent of the rows."
        rows = [[s.name, *(text(h, s.index) if s.index in h.stages else DASH for h in found)] for s in stages]
        yield Table(["stage", *(h.title for h in found)], rows)
    yield from _first_lost(results, stages, found)
    yield from _chance(results, found)


def _first_lost(results: Results, stages: Sequence[Stage], found: Sequence[History]) -> Iterable[Block]:
    rows, links = [], {}
    few = len(results.run.stages) > SAMPLE_STAGES  # then the page has not the answers of all stages
    for row, history in enumerate(h for h in found if (h.fates == LOST).any()):
        first, last = measures.first_lost(history.fates), history.fates[:, history.stages[-1]]
        cells = []
        for column, s in enumerate(stages, 1):
            lost = first == s.index
            back = int((lost & (last != LOST)).sum())
            cells.append((f"{lost.sum()}" + f" ({back})" * (back > 0)) if s.index in history.stages else DASH)
            if lost.any() and not few:
                links[row, column] = _browse(history, s.index, "first")
        back = int(((first >= 0) & (last != LOST)).sum())
        if back and not few:
            links[row, len(stages) + 1] = _browse(history, history.stages[-1], "back")
        rows.append([history.title, *cells, str(back)])
    if rows:
        yield (
            "### Where rows were lost first\n\nRows that were lost for the first time at each stage. In brackets: how "
            "many of them are back at the last stage. The last column counts all rows that are back."
        )
        yield Table(["", *(f"{s.number}<br>{stage_label(s)}" for s in stages), "back"], rows, links=links)


def _browse(history: History, after: int, show: str) -> str:
    """Where the page shows the rows of a group: its script reads what its browser of samples is to be set to."""
    return "#" + urlencode({"task": history.name, "before": history.reference, "after": after, "show": show})


def _corrected(results: Results, history: History, stage: int) -> tuple[measures.Corrected, measures.Corrected] | None:
    """Forgetting and backward transfer beyond chance; None for rows without options."""
    choices = results.choices.get(history.name)
    if choices is None or not {history.reference, stage} <= choices.chosen.keys():
        return None
    pair = (history.reference, stage)
    before, after = (choices.right(t) for t in pair)
    named_before, named_after = (choices.chosen[t] >= 0 for t in pair)
    return measures.beyond_chance(before, after, named_before, named_after, choices.options)


def _chance(results: Results, found: Sequence[History]) -> Iterable[Block]:
    rows = []
    for history in found:
        pair = _corrected(results, history, history.stages[-1])
        if pair:
            k = results.choices[history.name].options
            cells = [history.title, str(k.min()) if k.min() == k.max() else f"{k.min()} to {k.max()}"]
            for rate in pair:
                cells += [percent(rate.observed), percent(rate.by_chance)]
                cells.append(percent_with_interval(rate.corrected, sign=True))
            rows.append(cells)
    if rows:
        yield _CHANCE
        head = ["right to wrong", "by chance", "forgetting", "wrong to right", "by chance", "backward transfer"]
        yield Table(["", "options", *head], rows)


def table_of_runs(entries: Iterable[Entry]) -> Table:
    """What became of the rows of several runs, a mean over the tasks of each."""
    rows = []
    for entry in entries:
        found = [h for h in entry.results.once(histories) if h.name in entry.run.tasks]
        if found and entry.results.has_mean:
            means = np.mean([h.shares(h.stages[-1]) for h in found], axis=0)
            rows.append([entry.name, str(len(found)), *map(percent, means)])
    about = (
        "percent of the test rows since the task's own stage (without a sequence: since the base model); mean over the "
        "tasks that were measured later"
    )
    return Table(["run", "tasks", *NAMES] if rows else ["run"], rows, "Lost and gained, row by row", about)


def scores(results: Results) -> Iterable[list[Any]]:
    """The lines of scores.csv: the shares of the fates, and what is beyond chance."""
    for history in results.once(histories):
        n = len(history.fates)
        for t in history.stages:
            head = [results.run.stages[t].name, history.name]
            for name, count in zip(NAMES, np.bincount(history.fates[:, t], minlength=len(NAMES)), strict=True):
                yield [*head, name.replace(" ", "_"), count / n, None, n, 0, *wilson_interval(int(count), n)]
            rates = _corrected(results, history, t)
            for name, rate in zip(("forgetting", "backward_transfer"), rates, strict=True) if rates else ():
                low, high = (None if np.isnan(end) else end for end in rate.corrected[1:])
                yield [*head, f"{name}_beyond_chance", rate.corrected.value, None, n, 0, low, high]
