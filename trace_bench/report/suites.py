"""The sections about the general-ability suites and about the answers that are there for judges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from trace_bench.report.results import UNKNOWN, Results, measured
from trace_bench.report.rows import Cells
from trace_bench.report.tables import DASH, Block, Table, arrow, legend, length, percent, percent_with_interval
from trace_bench.report.transitions import title
from trace_tasks.data import GROUPS, JUDGED, SUITES


def general(results: Results) -> Iterable[Block]:
    """The general-ability suites, stage by stage, and their delta."""
    run, cells = results.run, results.cells_of(SUITES)
    if not cells:
        return
    there = [s for s in SUITES if s in results.headlines]
    suites, others = ([s for s in there if (s in GROUPS["general"]) is own] for own in (True, False))
    further = f" Not part of the mean and delta: {', '.join(map(title, others))}." if others else ""
    yield (
        "## General ability\n\nlm-eval's own tasks in the paper's settings, in percent. Delta: the change since stage "
        f"0, as a mean over the suites (TRACE, section 3.3).{further}"
    )
    if limits := _limits(cells, "general_rows"):
        yield (
            f"> **Limited rows** (at least {limits} of each suite, the first ones of each subtask). Not comparable "
            "with results on the full suites."
        )
    if local := {name for (_, name), cell in cells.items() if cell["settings"]["data"] != "hub"}:
        yield (
            f"> **Local copy** of the data of {', '.join(title(s) for s in SUITES if s in local)}: comparable with "
            "the hub's only if it is complete. The head of the table has the numbers of rows."
        )
    rows = []
    for stage in measured(run, cells):
        scores = {s: results.score(stage.index, s).value for s in there}
        texts = {s: percent(v) + arrow(results.mark(s, 0, stage.index)) for s, v in scores.items()}
        mean = float(np.mean([scores[s] for s in suites])) if suites else math.nan
        delta = percent_with_interval(results.general.get(stage.index, UNKNOWN), sign=True)
        rows.append([stage.name, *(texts[s] for s in suites), percent(mean), delta, *(texts[s] for s in others)])
    if text := legend(rows, " since the base model"):
        yield text.strip()

    def head(suite: str) -> str:
        of_suite = list(results.cells_of([suite]).values())
        sizes = " or ".join(map(str, sorted({cell["n"] for cell in of_suite})))
        return f"{title(suite)}<br>{of_suite[0]['headline']}<br>{sizes} rows"

    yield Table(["stage", *map(head, suites), "mean", "delta", *map(head, others)], rows)
    cut = {key: f"{cell['n_cut']} of {cell['n']}" for key, cell in cells.items() if cell["n_cut"]}
    if listed := "; ".join(f"{title(name)} at {run.stages[i].name} {n}" for (i, name), n in cut.items()):
        yield (
            "> **Prompts cut on the left**: they were longer than the engine's context, so examples are missing: "
            f"{listed}. A larger context (`--engine-args`) gives different scores."
        )


def answers(results: Results) -> Iterable[Block]:
    """What there is for the judges: how long the answers are, and how many are empty."""
    cells = results.cells_of(JUDGED)
    if not cells:
        return
    yield (
        "## Answers for the judges\n\nMean characters of an answer. In brackets: percent of empty answers, if there "
        "are any. This shows if there is something to judge, not how good it is."
    )
    if limits := _limits(cells, "test_rows"):
        yield f"> **Limited rows** (first {limits} of each set)."

    def text(cell: dict[str, Any] | None) -> str:
        return length(*(cell["metrics"][m]["value"] for m in ("characters", "empty"))) if cell else DASH

    prompts = {name: cell["n"] for (_, name), cell in reversed(cells.items())}
    names = [name for name in JUDGED if name in prompts]
    rows = [[s.name, *(text(cells.get((s.index, name))) for name in names)] for s in measured(results.run, cells)]
    yield Table(["stage", *(f"{name}<br>{prompts[name]} prompts" for name in names)], rows)


def _limits(cells: Cells, key: str) -> str:
    return " or ".join(map(str, sorted({cell["settings"][key] for cell in cells.values()} - {None})))
