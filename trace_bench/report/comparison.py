"""Compares several runs: their numbers, differences to a baseline, and why they may not be comparable.

A comparison consists of tables and notes, from which Markdown, CSV, LaTeX and a page are made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trace_bench.measures.seeds import seed_interval
from trace_bench.metrics import Estimate
from trace_bench.report import choices, distance, notes, orders, paper, seeds, transitions
from trace_bench.report.differences import paired_differences
from trace_bench.report.entry import NUMBERS, SCORES, TEXTS, Entry, entries_of
from trace_bench.report.orders import Family
from trace_bench.report.results import UNKNOWN, Results
from trace_bench.report.seeds import Group, Marks, SeedDifferences
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
from trace_bench.text import markdown_text, one_line


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    entries: list[Entry]
    groups: list[Group]
    """Groups of entries that differ only in the seed."""
    against: Entry
    """The baseline."""
    versus: dict[str, dict[str, Estimate]]
    """Name of each other run -> one of `entry.SCORES` -> its difference to the baseline."""
    references: list[dict[str, str]]
    """The paper's numbers for methods that are among the runs, as texts: percent."""
    tables: list[Table]
    warnings: list[str]
    """Why runs are not comparable, as Markdown."""
    notes: list[str]
    """What the numbers mean."""
    lines: list[dict[str, Any]]
    """The lines of the CSV: not rounded, in percent or the unit of a run's tasks; unknown = missing or NaN."""

    def final_ends(self) -> list[tuple[float, float] | None]:
        """The worst and the best final score of each task, for colours; None without a common unit."""

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
        """All numbers as one CSV, one line per run, without empty columns."""
        lines = [{k: v for k, v in line.items() if v != DASH and v == v} for line in self.lines]
        always = ("run", *TEXTS, *NUMBERS)
        columns = dict.fromkeys([*always, *(key for line in self.lines for key in line)])
        known = [c for c in columns if c in always or any(c in line for line in lines)]
        return csv_text(known, lines, NUMBERS)  # the paper's are texts


def compare(runs: Sequence[Run | Results], baseline: Run | None = None) -> Comparison:
    """Compares runs: their numbers, differences to a baseline, final scores by task, and warnings.

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
    groups = seeds.groups_of(entries)
    lines = seeds.lines_of(entries, groups)
    families = orders.families_of(lines)
    home = next(line for line in lines if against in line.entries)
    over_orders = orders.differences_to(families, home)
    reference = home if home in groups else next(iter(groups), None)
    to_baseline, others = _over_seeds(groups, reference, families)
    marks = seeds.marks_of(to_baseline)
    columns = list(dict.fromkeys(task for e in entries for task in e.finals))
    versus = {e.name: paired_differences(e, against) for e in entries if e is not against}
    of_paper = paper.table(name for e in entries if (name := paper.name_of(e.run)))
    # One model for orientation; the reports of the runs have all.
    references = [dict(zip(of_paper.header, r, strict=True)) for r in of_paper.rows if "LLaMA-2-7B-Chat" in r]
    tables = [
        *_numbers_tables(entries, groups, references),
        *orders.tables(families, home, over_orders, _all_percent(entries)),
        *_difference_tables(versus, against, reference, to_baseline, others, marks),
        *_finals_tables(entries, groups, columns, marks, reference),
        _spread_table(groups, columns),
        distance.table_of_runs(entries),
        transitions.table_of_runs(entries),
        choices.table_of_runs(entries),
    ]
    numbers = [_line(e, versus.get(e.name, {})) for e in entries]
    for group in groups:
        numbers += _seed_lines(group, columns)
    for d in (*to_baseline, *others):
        numbers += seeds.csv_lines("difference of seed means", d.both, d.group.entries[0], d.estimates)
    numbers += orders.lines(families, over_orders)
    return Comparison(
        entries,
        groups,
        against,
        versus,
        references,
        [table for table in tables if len(table.header) > 1],  # else there is nothing to say but names
        list(map(one_line, notes.warnings(entries, groups))),
        list(map(one_line, notes.notes(entries, groups, families, to_baseline, references))),
        [*numbers, *map(_reference_line, references)],
    )


def _over_seeds(
    groups: list[Group], reference: Group | None, families: list[Family]
) -> tuple[list[SeedDifferences], list[SeedDifferences]]:
    """The differences of seed means: to the baseline, and between the others unless method and order both differ."""
    if reference is None:
        return [], []
    others = [group for group in groups if group is not reference]
    held = {group.name: orders.held_against(group, reference, families) for group in others}
    between = [
        SeedDifferences.between(a, b)
        for a, b in itertools.combinations(others, 2)
        if a is not held[b.name] and b is not held[a.name] and not orders.are_mixed(a, b, families)
    ]
    return [SeedDifferences.between(group, held[group.name]) for group in others], between


# -------------------------------------------------------------------------------------------------------------- tables


def _numbers_tables(entries: list[Entry], groups: list[Group], references: list[dict[str, str]]) -> list[Table]:
    """The tables of methods over their seeds and of runs, with the paper's numbers. What all share is said once."""
    texts = [k for k in TEXTS if len(entries) == 1 or len({e.texts[k] for e in entries}) > 1]
    same = [f"{k} {entries[0].texts[k]}" for k in TEXTS if k not in texts]
    about = "scores in percent" if _all_percent(entries) else "scores in percent or the unit of the run's tasks"
    about += f" (in all: {', '.join(same)})" if same else ""

    def table(title: str, lines: list[Group], columns: list[str], about: str, apart: list[dict[str, Any]]) -> Table:
        rows = []
        for line in lines:
            of_line = line.entries[0].texts | {"seeds": str(len(line.entries))}
            rows.append([line.name, *(of_line[k] for k in columns), *_cells(line)])
        for reference in apart:
            numbers = _reference_line(reference)
            rows.append([f"paper: {reference['method']}", *(numbers.get(k, DASH) for k in (*columns, *NUMBERS))])
        return Table(["run", *columns, *NUMBERS], rows, title, about, len(apart)).without_empty_columns()

    runs = [Group(e.name, [e]) for e in entries]
    if not groups:
        return [table("Runs", runs, texts, about, references)]
    lines = seeds.lines_of(entries, groups)
    named = all(line.name == line.entries[0].texts["method"] for line in lines)
    columns = ["seeds", *(k for k in texts if not (k == "method" and named))]
    over = "mean ± standard deviation over the seeds [95 % interval over the seeds], "
    over += "single runs: score [95 % interval over test rows], " * any(len(g.entries) == 1 for g in lines)
    methods = table("Methods", lines, columns, over + about, references)
    return [methods, replace(table("Runs", runs, texts, about, []), detail=True)]


def _cells(line: Group) -> list[str]:
    """The `NUMBERS` of a run with intervals over test rows, or of a method with intervals over its seeds."""
    cells, entry = [], line.entries[0]
    for name in NUMBERS:
        values, write = line.numbers(name), entry.writer(name)
        if len(values) > 1:
            interval = seeds.interval_over_seeds(values, write) if name in SCORES else ""
            text = seeds.mean_and_deviation(values, write, cost=name not in SCORES)
            cells.append(f"{text} {interval}".strip())
        elif name in SCORES:
            cells.append(entry.unit(name).with_interval(entry.scores[name], SCORES[name]))
        else:
            cells.append(write(values[0]))
    return cells


def _all_percent(entries: Iterable[Entry]) -> bool:
    return not any(e.results.not_percent for e in entries)


def _difference_tables(
    versus: dict[str, dict[str, Estimate]],
    against: Entry,
    reference: Group | None,
    to_baseline: Sequence[SeedDifferences],
    others: Sequence[SeedDifferences],
    marks: Marks,
) -> list[Table]:
    """The tables of differences: to the baseline's seeds, between other groups, and of runs to the baseline."""

    def table(title: str, rows: list[list[str]], entries: Iterable[Entry], arrows: str = "") -> Table:
        about = "in points" if _all_percent(entries) else "gains, in points or the unit of the tasks"
        return Table(["run", *SCORES], rows, title, about + arrows).without_empty_columns()

    def of_both(differences: Sequence[SeedDifferences]) -> list[Entry]:
        return [e for d in differences for e in (*d.group.entries, *d.reference.entries)]

    runs = [[n, *(against.unit(k).with_interval(e, sign=True) for k, e in v.items())] for n, v in versus.items()]
    names = [d.group.name if d.reference is reference else d.both for d in to_baseline]
    to_seeds = [[name, *d.texts(marks)] for name, d in zip(names, to_baseline, strict=True)]
    between = [[d.both, *d.texts({})] for d in others]
    title = f"Difference of seed means to `{reference.name}`" if reference else ""
    return [
        table(title, to_seeds, of_both(to_baseline)),
        table("Differences of seed means between the others", between, of_both(others), "; no arrows"),
        replace(table(f"Difference to `{against.name}`", runs, [against]), detail=reference is not None),
    ]


def _column_units(entries: list[Entry]) -> dict[str, Unit | None]:
    """Column of a task -> its unit; None if runs have different headline metrics with different units."""
    columns = dict.fromkeys(task for e in entries for task in e.units)
    return {task: shared_unit(e.units[task] for e in entries if task in e.units) for task in columns}


def _finals_tables(
    entries: list[Entry], groups: list[Group], columns: list[str], marks: Marks, reference: Group | None
) -> list[Table]:
    """The final scores of each method over its seeds, and of each run."""
    in_percent = _all_percent(entries)
    names = {task: unit.name if unit else "different units" for task, unit in _column_units(entries).items()}
    head = ["run", *(columns if in_percent else [f"{task}<br>{names[task]}" for task in columns])]
    about = "percent of its headline metric" if in_percent else "in the unit of its headline metric"

    def write(e: Entry, task: str) -> Callable[[float | None], str]:
        return e.units.get(task, PERCENT).shown

    title = "Final score of each task"
    single = [[e.name, *(write(e, task)(e.finals.get(task)) for task in columns)] for e in entries]
    if not groups:
        return [Table(head, single, title, about)]
    rows = []
    for line in seeds.lines_of(entries, groups):
        first = line.entries[0]
        if len(line.entries) == 1:
            rows.append(single[entries.index(first)])
            continue
        texts = {task: seeds.mean_and_deviation(line.numbers(task), write(first, task)) for task in columns}
        rows.append([line.name, *(text + arrow(marks.get((line.name, task), 0)) for task, text in texts.items())])
    over = f"{about}, mean ± standard deviation over the seeds"
    if reference and any(text.endswith(("↑", "↓")) for row in rows for text in row):
        over += f" (↓, ↑: worse or better than `{reference.name}` over the seeds)"
    return [Table(head, rows, title, over), Table(head, single, f"{title}, run by run", about, detail=True)]


def _spread_table(groups: Sequence[Group], columns: list[str]) -> Table:
    """The components of the variance of a run's score."""
    names = ["OP", "BWT", *columns]
    deviations = {"between seeds": seeds.deviation_between_seeds, "test rows": seeds.deviation_of_test_rows}
    rows = []
    for group in groups:
        first = group.entries[0]
        units = {name: first.unit(name) for name in ("OP", "BWT")} | first.units
        for label, deviation in deviations.items():
            found = deviation(group, columns)
            texts = (units[name].shown(found[name]) if found[name] > 0 else DASH for name in names)
            rows.append([f"{group.name}: {label}", *texts])
    about = (
        "standard deviations of a run's score: between seeds (a new training, the same test rows) and of test rows "
        "(new test rows, the same training)"
    )
    return Table(["run", *names], rows, "Spread", about).without_empty_columns()


# ----------------------------------------------------------------------------------------------------------------- CSV


def _line(entry: Entry, versus: dict[str, Estimate]) -> dict[str, Any]:
    bounds: dict[str, float] = {}
    for name in SCORES:
        factor, own, difference = entry.unit(name).factor, entry.scores[name], versus.get(name, UNKNOWN)
        numbers = {"low": own.low, "high": own.high, "difference": difference.value}
        numbers |= {"difference low": difference.low, "difference high": difference.high}
        bounds |= {f"{name} {what}": factor * x for what, x in numbers.items()}
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
        seeds.ENDS[0]: lambda v: seed_interval(v)[0],
        seeds.ENDS[1]: lambda v: seed_interval(v)[1],
    }
    over = f"over {len(group.entries)} seeds"
    found = {f"{name} {over}": {k: of(v) for k, v in values.items()} for name, of in statistics.items()}
    found[f"standard error over test rows, mean {over}"] = seeds.deviation_of_test_rows(group, columns)
    return [{"run": f"{group.name}: {name}", **texts, **numbers} for name, numbers in found.items()]


def _reference_line(row: dict[str, str]) -> dict[str, Any]:
    numbers = {k: v for k, v in row.items() if k in NUMBERS}
    texts = {"method": row["method"], "tasks": "8 (order1)", "train rows": row.get("train rows", DASH)}
    return {"run": f"paper: {row['method']}, {row['model']}", **texts, **numbers}
