"""Several runs side by side: their numbers, against a baseline, and what keeps them from being comparable.

A comparison is plain tables and notes, of which Markdown, CSV, LaTeX and a page are made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trace_bench import metrics
from trace_bench.metrics import Estimate
from trace_bench.report import choices, distance, notes, paper, transitions
from trace_bench.report.differences import paired_differences
from trace_bench.report.entry import NUMBERS, SCORES, TEXTS, Entry, entries_of
from trace_bench.report.results import UNKNOWN, Results
from trace_bench.report.seeds import (
    Group,
    Marks,
    SeedDifferences,
    deviation_between_seeds,
    deviation_of_test_rows,
    groups_of,
    interval_over_seeds,
    lines_of,
    marks_of,
    mean_and_deviation,
)
from trace_bench.report.tables import (
    DASH,
    PERCENT,
    Table,
    Unit,
    arrow,
    csv_text,
    latex,
    latex_text,
    markdown,
    shared_unit,
)
from trace_bench.run import Run
from trace_bench.text import cell as csv_cell
from trace_bench.text import markdown_text, one_line


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    entries: list[Entry]
    groups: list[Group]
    """Those of the entries that differ by their seeds alone."""
    against: Entry
    """The baseline."""
    versus: dict[str, dict[str, Estimate]]
    """Name of each other run -> one of `entry.SCORES` -> its difference to the baseline."""
    references: list[dict[str, str]]
    """The paper's numbers for methods that are among the runs, as texts: percent."""
    tables: list[Table]
    warnings: list[str]
    """What keeps the runs from being comparable; Markdown."""
    notes: list[str]
    """What the numbers are."""
    lines: list[dict[str, Any]]
    """The CSV: percent, or the unit of a run's tasks, not rounded; what is not known is missing or NaN."""

    def final_ends(self) -> list[tuple[float, float] | None]:
        """Of each task the worst and the best final score that is shown, for colours; None without a common unit."""

        def ends(task: str, unit: Unit) -> tuple[float, float]:
            worst, best = unit.ends([e.finals[task] / unit.factor for e in self.entries if task in e.finals])
            return unit.factor * worst, unit.factor * best

        return [ends(task, unit) if unit else None for task, unit in _column_units(self.entries).items()]

    def markdown(self) -> str:
        """The comparison as Markdown; rows of the paper in italics."""
        parts = [f"{markdown_text(t.caption)}:\n\n{markdown(t)}" for t in self.tables]
        listed = [f"- {markdown_text(note)}" for note in (*self.warnings, *self.notes)]
        return "\n\n".join([*parts, "\n".join(listed)]) + "\n"

    def latex(self) -> str:
        """The comparison as LaTeX, for the packages booktabs and xcolor; rows of the paper in grey."""
        items = [rf"\item {latex_text(note)}" for note in (*self.warnings, *self.notes)]
        listed = "\n".join([r"\begin{itemize}", *items, r"\end{itemize}"])
        return "\n\n".join([r"% \usepackage{booktabs,xcolor}", *map(latex, self.tables), listed]) + "\n"

    def csv(self) -> str:
        """All numbers as one CSV, a line a run; columns of which nothing is known are left out."""
        lines = [{k: v for k, v in line.items() if v != DASH and v == v} for line in self.lines]
        always = ("run", *TEXTS, *NUMBERS)
        columns = dict.fromkeys([*always, *(key for line in self.lines for key in line)])
        known = [c for c in columns if c in always or any(c in line for line in lines)]
        # The paper's numbers are texts.
        rows = ([line.get(c, "") if c in NUMBERS else csv_cell(line.get(c, "")) for c in known] for line in lines)
        return csv_text([map(csv_cell, known), *rows])


def compare(runs: Sequence[Run | Results], baseline: Run | None = None) -> Comparison:
    """Compares runs: one row each, against a baseline, their final scores by task, and what keeps them apart.

    The baseline is the first run, if none is named; it need not be among the others. Of results that are there already
    nothing is computed again.
    """
    loaded = [run if isinstance(run, Results) else Results(run) for run in runs]
    baseline = baseline or loaded[0].run
    paths = [results.run.path.resolve() for results in loaded]
    if baseline.path.resolve() not in paths:
        loaded, paths = [Results(baseline), *loaded], [baseline.path.resolve(), *paths]
    entries = entries_of(loaded)
    against = entries[paths.index(baseline.path.resolve())]
    groups = groups_of(entries)
    reference = next((g for g in groups if against in g.entries), groups[0] if groups else None)
    seeds = [SeedDifferences.between(g, reference) for g in groups if reference and g is not reference]
    others = [SeedDifferences.between(a.group, b.group) for a, b in itertools.combinations(seeds, 2)]
    marks = marks_of(seeds)
    columns = list(dict.fromkeys(task for e in entries for task in e.finals))
    versus = {e.name: paired_differences(e, against) for e in entries if e is not against}
    of_paper = paper.table(name for e in entries if (name := paper.name_of(e.run)))
    # One model for orientation; the reports of the runs have all.
    references = [dict(zip(of_paper.header, r, strict=True)) for r in of_paper.rows if "LLaMA-2-7B-Chat" in r]
    tables = [
        *([_methods_table(entries, groups, references)] if groups else []),
        _runs_table(entries, [] if groups else references, detail=bool(groups)),
        *_difference_tables(versus, against, seeds, others, marks, detail=bool(groups)),
        *_finals_tables(entries, groups, columns, marks, seeds),
        _spread_table(groups, columns),
        distance.table_of_runs(entries),
        transitions.table_of_runs(entries),
        choices.table_of_runs(entries),
    ]
    lines = [_line(e, versus.get(e.name, {})) for e in entries]
    for group in groups:
        lines += _seed_lines(group, columns)
    for difference in (*seeds, *others):
        lines += _difference_lines(difference)
    return Comparison(
        entries,
        groups,
        against,
        versus,
        references,
        [table for table in tables if len(table.header) > 1],  # else there is nothing to say but names
        list(map(one_line, notes.warnings(entries, groups))),
        list(map(one_line, notes.notes(entries, groups, seeds, references))),
        [*lines, *map(_reference_line, references)],
    )


# -------------------------------------------------------------------------------------------------------------- tables


def _methods_table(entries: list[Entry], groups: list[Group], references: list[dict[str, str]]) -> Table:
    """Each method over its seeds, the runs without others of their kind, and the paper's numbers."""
    texts, same = _common(entries)
    lines = lines_of(entries, groups)
    if "method" in texts and all(line.name == line.entries[0].texts["method"] for line in lines):
        texts.remove("method")
    rows = []
    for line in lines:
        first = line.entries[0]
        cells = _cells_of_run(first) if len(line.entries) == 1 else _cells_over_seeds(line)
        rows.append([line.name, str(len(line.entries)), *(first.texts[k] for k in texts), *cells])
    rows += [[name, DASH, *cells] for name, *cells in _reference_rows(references, texts)]
    about = "mean ± standard deviation over the seeds [95 % interval over the seeds], "
    if any(len(line.entries) == 1 for line in lines):
        about += "of a single run its score [95 % interval over test rows], "
    about += _what(entries, same)
    return Table(["run", "seeds", *texts, *NUMBERS], rows, "Methods", about, len(references)).without_empty_columns()


def _runs_table(entries: list[Entry], references: list[dict[str, str]], detail: bool) -> Table:
    """The runs' numbers, and the paper's; what is the same in all runs is said once."""
    texts, same = _common(entries)
    rows = [[e.name, *(e.texts[k] for k in texts), *_cells_of_run(e)] for e in entries]
    rows += _reference_rows(references, texts)
    table = Table(["run", *texts, *NUMBERS], rows, "Runs", _what(entries, same), len(references), detail)
    return table.without_empty_columns()


def _cells_of_run(entry: Entry) -> list[str]:
    """The `NUMBERS` of a run, scores with their intervals over test rows."""
    numbers = {k: entry.writer(k)(entry.numbers[k]) for k in NUMBERS}
    numbers |= {k: entry.unit(k).with_interval(entry.scores[k], sign) for k, sign in SCORES.items()}
    return list(numbers.values())


def _cells_over_seeds(group: Group) -> list[str]:
    """The `NUMBERS` of a method, scores with their intervals over the seeds."""
    cells = []
    for name in NUMBERS:
        values, write = group.numbers(name), group.entries[0].writer(name)
        interval = interval_over_seeds(values, write) if name in SCORES else DASH
        text = mean_and_deviation(values, write, cost=name not in SCORES)
        cells.append(text + f" {interval}" * (interval != DASH))
    return cells


def _common(entries: list[Entry]) -> tuple[list[str], list[str]]:
    """The descriptions that differ between runs, and what is the same in all of them."""
    texts = [k for k in TEXTS if len(entries) == 1 or len({e.texts[k] for e in entries}) > 1]
    return texts, [f"{k} {entries[0].texts[k]}" for k in TEXTS if k not in texts]


def _what(entries: list[Entry], same: list[str]) -> str:
    about = "scores in percent" if _all_percent(entries) else "scores in percent or the unit of the run's tasks"
    return about + (f" (in all: {', '.join(same)})" if same else "")


def _reference_rows(references: list[dict[str, str]], texts: list[str]) -> list[list[str]]:
    lines = [(f"paper: {reference['method']}", _reference_line(reference)) for reference in references]
    return [[name, *(line.get(k, DASH) for k in (*texts, *NUMBERS))] for name, line in lines]


def _all_percent(entries: Iterable[Entry]) -> bool:
    return not any(e.results.not_percent for e in entries)


def _difference_tables(
    versus: dict[str, dict[str, Estimate]],
    against: Entry,
    seeds: Sequence[SeedDifferences],
    others: Sequence[SeedDifferences],
    marks: Marks,
    detail: bool,
) -> list[Table]:
    """To the baseline's seeds, between the other groups, and run by run to the baseline."""

    def table(title: str, rows: list[list[str]], entries: Iterable[Entry], arrows: str = "") -> Table:
        about = "in points" if _all_percent(entries) else "gains, in points or the unit of the tasks"
        return Table(["run", *SCORES], rows, title, about + arrows).without_empty_columns()

    def of_both(differences: Sequence[SeedDifferences]) -> list[Entry]:
        return [e for d in differences for e in (*d.group.entries, *d.reference.entries)]

    runs = [[n, *(against.unit(k).with_interval(e, sign=True) for k, e in v.items())] for n, v in versus.items()]
    to_seeds = [[d.group.name, *d.texts(marks)] for d in seeds]
    between = [[f"{d.group.name} against {d.reference.name}", *d.texts({})] for d in others]
    reference = seeds[0].reference.name if seeds else ""
    return [
        table(f"Difference of seed means to `{reference}`", to_seeds, of_both(seeds)),
        table("Differences of seed means between the others", between, of_both(others), "; no arrows"),
        replace(table(f"Difference to `{against.name}`", runs, [against]), detail=detail),
    ]


def _column_units(entries: list[Entry]) -> dict[str, Unit | None]:
    """Column of a task -> its unit; None if its headline is another in some runs, and in another unit."""
    columns = dict.fromkeys(task for e in entries for task in e.units)
    return {task: shared_unit(e.units[task] for e in entries if task in e.units) for task in columns}


def _finals_tables(
    entries: list[Entry], groups: list[Group], columns: list[str], marks: Marks, seeds: Sequence[SeedDifferences]
) -> list[Table]:
    """The final scores of each method over its seeds, and of each run."""
    in_percent = _all_percent(entries)
    names = {task: unit.name if unit else "different units" for task, unit in _column_units(entries).items()}
    head = ["run", *(columns if in_percent else [f"{task}<br>{names[task]}" for task in columns])]
    about = "percent of its headline metric" if in_percent else "in the unit of its headline metric"

    def write(e: Entry, task: str) -> Callable[[float | None], str]:
        return e.units.get(task, PERCENT).shown

    title, tables = "Final score of each task", []
    single = [[e.name, *(write(e, task)(e.finals.get(task)) for task in columns)] for e in entries]
    if groups:
        rows = []
        for line in lines_of(entries, groups):
            first = line.entries[0]
            if len(line.entries) == 1:
                rows.append(single[entries.index(first)])
                continue
            texts = {task: mean_and_deviation(line.numbers(task), write(first, task)) for task in columns}
            rows.append([line.name, *(text + arrow(marks.get((line.name, task), 0)) for task, text in texts.items())])
        over = f"{about}, mean ± standard deviation over the seeds"
        if any(text.endswith(("↑", "↓")) for row in rows for text in row):
            over += f" (↓, ↑: worse or better than `{seeds[0].reference.name}` over the seeds)"
        tables.append(Table(head, rows, title, over))
        title += ", run by run"
    return [*tables, Table(head, single, title, about, detail=bool(groups))]


def _spread_table(groups: Sequence[Group], columns: list[str]) -> Table:
    """The components of the variance of a run's score."""
    names = ["OP", "BWT", *columns]
    rows = []
    for group in groups:
        first = group.entries[0]
        units = {name: first.unit(name) for name in ("OP", "BWT")} | first.units
        for label, deviation in (("between seeds", deviation_between_seeds), ("test rows", deviation_of_test_rows)):
            found = deviation(group, columns)
            texts = (units[name].shown(found[name]) if found[name] > 0 else DASH for name in names)
            rows.append([f"{group.name}: {label}", *texts])
    about = (
        "standard deviations of a run's score: between seeds (what another training changes, on the same test rows) "
        "and of test rows (what other test rows change, for the same training)"
    )
    return Table(["run", *names], rows, "Spread", about).without_empty_columns()


# ----------------------------------------------------------------------------------------------------------------- CSV


def _line(entry: Entry, versus: dict[str, Estimate]) -> dict[str, Any]:
    bounds: dict[str, float] = {}
    for name in SCORES:
        factor, difference = entry.unit(name).factor, versus.get(name, UNKNOWN)
        bounds |= {f"{name} {end}": factor * x for end, x in zip(("low", "high"), entry.scores[name][1:], strict=True)}
        ends = ("", " low", " high")
        bounds |= {f"{name} difference{end}": factor * x for end, x in zip(ends, difference, strict=True)}
    return {
        "run": entry.name,
        **entry.texts,
        **entry.numbers,
        **{name: bound for name, bound in bounds.items() if not math.isnan(bound)},
        **entry.finals,
        **({"unit of OP": entry.unit_name} if entry.results.not_percent else {}),
    }


def _seed_lines(group: Group, columns: list[str]) -> list[dict[str, Any]]:
    values = {name: group.numbers(name) for name in (*NUMBERS, *columns)}
    texts = group.entries[0].texts
    statistics: dict[str, Callable[[list[float]], Any]] = {
        "mean": np.mean,
        "standard deviation": partial(np.std, ddof=1),
        "low end of the 95 % interval": lambda v: metrics.seed_interval(v)[0],
        "high end of the 95 % interval": lambda v: metrics.seed_interval(v)[1],
    }
    over = f"over {len(group.entries)} seeds"
    found = {f"{name} {over}": {k: of(v) for k, v in values.items()} for name, of in statistics.items()}
    found[f"standard error over test rows, mean {over}"] = deviation_of_test_rows(group, columns)
    return [{"run": f"{group.name}: {name}", **texts, **numbers} for name, numbers in found.items()]


def _difference_lines(difference: SeedDifferences) -> list[dict[str, Any]]:
    unit = difference.group.entries[0].unit
    factors = {name: unit(name).factor for name in SCORES}  # tasks are as they are shown already
    texts = ("difference of seed means", "low end of the 95 % interval", "high end of the 95 % interval")
    return [
        {
            "run": f"{text}, {difference.group.name} against {difference.reference.name}",
            **{name: factors.get(name, 1) * estimate[i] for name, estimate in difference.estimates.items()},
        }
        for i, text in enumerate(texts)
    ]


def _reference_line(row: dict[str, str]) -> dict[str, Any]:
    numbers = {k: v for k, v in row.items() if k in NUMBERS}
    texts = {"method": row["method"], "tasks": "8 (order1)", "train rows": row.get("train rows", DASH)}
    return {"run": f"paper: {row['method']}, {row['model']}", **texts, **numbers}
