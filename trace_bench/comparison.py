"""Several runs beside each other: their numbers, against a baseline, and what keeps them from being comparable.

A comparison is plain tables and notes, of which Markdown, CSV and LaTeX are made.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from judges.judging import KINDS
from judges.report import judge_tokens, net_win_rate, verdicts
from trace_bench import metrics, paper
from trace_bench.bounds import conditions, same_conditions
from trace_bench.metrics import Estimate, Matrix
from trace_bench.results import DELTAS, Results, unit_of
from trace_bench.run import Run, RunError, differences
from trace_bench.tables import (
    DASH,
    PERCENT,
    Table,
    Unit,
    arrow,
    count,
    latex,
    latex_text,
    left_out_text,
    markdown,
    number,
    shared_unit,
    task_name,
    value_text,
    without_empty_columns,
)
from trace_bench.text import cell as csv_cell
from trace_bench.text import markdown_text, one_line
from trace_tasks.data import GROUPS, ORDERS, REASONING, SUITES
from trace_tasks.data.files import write_text

#: Those numbers of a run that are scores, and whether they have a sign. All but forgetting have intervals, and
#: differences to the baseline as well.
SCORES = {
    "OP": False,
    "BWT": True,
    "FWT": True,
    "Forgetting": False,
    **dict.fromkeys(DELTAS, True),
}
#: Those that are means over the tasks, and have their unit.
_OF_TASKS = ("OP", "BWT", "FWT", "Forgetting")
#: All numbers, and how they are written, in percent where they are scores.
_NUMBERS: dict[str, Callable[[float], str]] = {
    **{name: partial(number, sign=sign) for name, sign in SCORES.items()},
    "base": number,
    "training min": number,
    "evaluation min": number,
    "trained tokens": count,
    "judge tokens": count,
}
#: Those that are no scores.
_COSTS = [name for name in _NUMBERS if name not in (*SCORES, "base")]
_TEXTS = ("method", "trains", "tasks", "train rows")


@dataclass(frozen=True)
class Entry:
    """What a comparison shows of a run."""

    name: str
    results: Results
    texts: dict[str, str]
    scores: dict[str, Estimate]
    """Those of `SCORES`, as the metrics give them; NaN = not known, or not defined for the run."""
    numbers: dict[str, float]
    """All numbers; scores as they are shown, most of them in percent."""
    finals: dict[str, float]
    """The final score of each task, as it is shown."""
    units: dict[str, Unit]
    """The unit of each task."""

    @property
    def run(self) -> Run:
        """The run."""
        return self.results.run

    def unit(self, name: str) -> Unit:
        """The unit of one of `SCORES`; of a mean over tasks without a common unit, which is NaN, percent."""
        return (self.results.unit or PERCENT) if name in _OF_TASKS else PERCENT


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, two or more."""

    name: str
    entries: list[Entry]

    def by_seed(self, number: Callable[[Entry], float]) -> dict[Any, float]:
        """Seed -> a number of its run."""
        return {e.run.manifest.get("seed"): number(e) for e in self.entries}


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other."""

    entries: list[Entry]
    against: Entry
    """The baseline."""
    versus: dict[str, Versus]
    """Of each other run, by its name."""
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
        found: list[tuple[float, float] | None] = []
        for task, unit in _column_units(self.entries).items():
            if unit is None:
                found.append(None)
                continue
            finals = [e.finals[task] / unit.factor for e in self.entries if task in e.finals]
            worst, best = unit.ends(finals)
            found.append((unit.factor * worst, unit.factor * best))
        return found

    def markdown(self) -> str:
        """The comparison as Markdown; rows of the paper in italics."""
        parts = [f"{markdown_text(t.caption)}:\n\n{markdown(t)}" for t in self.tables]
        notes = [f"- {markdown_text(note)}" for note in (*self.warnings, *self.notes)]
        return "\n\n".join([*parts, "\n".join(notes)]) + "\n"

    def latex(self) -> str:
        """The comparison as LaTeX, for the packages booktabs and xcolor; rows of the paper in grey."""
        notes = [rf"\item {latex_text(note)}" for note in (*self.warnings, *self.notes)]
        listed = "\n".join([r"\begin{itemize}", *notes, r"\end{itemize}"])
        return "\n\n".join([r"% \usepackage{booktabs,xcolor}", *map(latex, self.tables), listed]) + "\n"

    def csv(self) -> str:
        """All numbers as one CSV, a line a run; columns of which nothing is known are left out."""
        lines = [{k: v for k, v in line.items() if v != DASH and v == v} for line in self.lines]
        columns = list(dict.fromkeys(["run", *_TEXTS, *_NUMBERS, *(key for line in self.lines for key in line)]))
        known = [c for c in columns if c in ("run", *_TEXTS, *_NUMBERS) or any(c in line for line in lines)]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(map(csv_cell, known))
        for line in lines:  # the paper's numbers are texts
            writer.writerow([line.get(c, "") if c in _NUMBERS else csv_cell(line.get(c, "")) for c in known])
        return out.getvalue()


def compare(runs: Sequence[Run], baseline: Run | None = None) -> Comparison:
    """Compares runs: one row each, against a baseline, their final scores by task, and what keeps them apart.

    Args:
        runs: The runs.
        baseline: The run that the others are set against; None = the first one.
    """
    runs = list(runs)
    paths = [run.path.resolve() for run in runs]
    if baseline is not None and baseline.path.resolve() not in paths:
        runs.insert(0, baseline)
        paths.insert(0, baseline.path.resolve())
    names = [one_line(run.path.name) for run in runs]
    loaded = [Results(run) for run in runs]
    units = _units(loaded)
    entries = [
        _entry(n if names.count(n) == 1 else one_line(str(r.path)), Results(r, u))
        for n, r, u in zip(names, runs, units, strict=True)
    ]
    against = entries[paths.index(baseline.path.resolve()) if baseline is not None else 0]
    groups = _named(_seed_groups(entries), names)
    reference_group = next((g for g in groups if against in g.entries), groups[0] if groups else None)
    seeds = [SeedDifferences(g, reference_group) for g in groups if reference_group and g is not reference_group]
    marks = _marks(seeds)
    columns = list(dict.fromkeys(task for e in entries for task in e.finals))
    versus = {e.name: Versus(e, against) for e in entries if e is not against}
    reference = paper.table(name for e in entries if (name := paper.name_of(e.run)))
    # One model for orientation; the reports of the runs have all.
    references = [dict(zip(reference.header, r, strict=True)) for r in reference.rows if "LLaMA-2-7B-Chat" in r]
    tables = [
        without_empty_columns(_runs_table(entries, groups, references)),
        without_empty_columns(_versus_table(versus, against)),
        without_empty_columns(_seeds_table(seeds, marks)),
        without_empty_columns(_others_table(seeds)),
        _finals_table(entries, groups, columns, marks, seeds),
        without_empty_columns(_spread_table(groups, columns)),
    ]
    lines = [_line(e, versus.get(e.name)) for e in entries]
    for group in groups:
        lines += _seed_lines(group, columns, len(groups) > 1)
    for difference in (*seeds, *_between_others(seeds)):
        lines += _seed_difference_lines(difference, columns)
    return Comparison(
        entries,
        against,
        versus,
        references,
        [table for table in tables if len(table.header) > 1],  # else there is nothing to say but names
        list(map(one_line, [*_comparability(entries), *_budgets(entries, groups)])),
        list(map(one_line, [*_definitions(entries, groups, seeds), *_set_ups(references)])),
        [*lines, *map(_reference_line, references)],
    )


def write_comparison(runs: Sequence[Run], output: str | Path | None = None, baseline: Run | None = None) -> str:
    """Compares runs and, if asked, writes the comparison.

    Args:
        runs: The runs.
        output: A file whose name ends in .md, .csv, .tex or .html, and is written in that form; beside a page its
            figures.
        baseline: See `compare`.

    Returns:
        The comparison as Markdown.

    Raises:
        RunError: if `output` has another ending.
    """
    check_output(output)
    comparison = compare(runs, baseline)
    if output is not None and Path(output).suffix == ".html":
        from trace_bench.comparison_page import write_page

        write_page(comparison, Path(output))
    elif output is not None:
        write_text(Path(output), _FORMS[Path(output).suffix](comparison))
    return comparison.markdown()


_FORMS = {".md": Comparison.markdown, ".csv": Comparison.csv, ".tex": Comparison.latex}
ENDINGS = (*_FORMS, ".html")


def check_output(output: str | Path | None) -> None:
    """Refuses a file that cannot be written as a comparison.

    Raises:
        RunError: if its name does not end in one of `ENDINGS`.
    """
    if output is not None and Path(output).suffix not in ENDINGS:
        raise RunError(f"--output {output}: name a file that ends in {', '.join(ENDINGS)}; the ending is the form.")


# ------------------------------------------------------------------------------------------------------------- one run


def _units(loaded: list[Results]) -> list[dict[str, Unit]]:
    """The units of each run's tasks, as the cells of all runs show them together."""
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}  # (column, headline) -> its cells
    for results in loaded:
        for (_, task), cell in results.cells.items():
            together.setdefault((_plain(task, results.run), cell["headline"]), []).append(cell)

    def unit(results: Results, task: str) -> Unit:
        column = _plain(task, results.run)
        metric = results.headlines.get(task) or next((m for c, m in together if c == column), "")
        return unit_of(metric, together.get((column, metric), []))

    return [{task: unit(results, task) for task in results.run.tasks} for results in loaded]


def _entry(name: str, results: Results) -> Entry:
    run = results.run
    units = {_plain(task, run): results.units[task] for task in run.tasks}
    finals = {n: u.factor * float(v) for (n, u), v in zip(units.items(), results.final, strict=True)}
    scores = dict.fromkeys(SCORES, _UNKNOWN) | _scores(results)
    return Entry(name, results, _texts(run), scores, _numbers(results, scores), finals, units)


_UNKNOWN = Estimate(math.nan)


def _scores(results: Results) -> dict[str, Estimate]:
    last = results.run.stages[-1]
    found = {"general": results.general.get(last.index, _UNKNOWN)}
    found |= {name: net_win_rate(counts, last) for name, counts in results.judged.items()}
    if results.is_sequential:
        found |= {name: results.sequence[name][-1] for name in ("OP", "BWT", "FWT", "Forgetting")}
    elif results.has_mean:
        found["OP"] = results.mean
    return found


def _texts(run: Run) -> dict[str, str]:
    manifest = one_line(run.manifest)
    trains = manifest.get("trains", DASH) if len(run.stages) > 1 else DASH
    rows = manifest["config"].get("train_rows")
    known = len(run.stages) > 1 and "checkpoints" not in run.manifest
    texts = (
        manifest["method"],
        trains,
        _list_of_tasks(run),
        (f"first {rows}" if rows else "all") if known else DASH,
    )
    return dict(zip(_TEXTS, texts, strict=True))


def _list_of_tasks(run: Run) -> str:
    for name, order in ORDERS.items():
        if run.tasks == order:
            return f"{len(order)} ({name})"
    tasks = [task_name(t) for t in run.tasks]
    if not tasks:
        return "none"
    return f"{len(tasks)} ({', '.join(tasks if len(tasks) <= 4 else [*tasks[:3], '…'])})"


def _numbers(results: Results, scores: dict[str, Estimate]) -> dict[str, float]:
    """The numbers of a run: scores as they are shown; NaN = not known, or not defined for the method."""
    run = results.run
    factors = {name: results.unit.factor if name in _OF_TASKS and results.unit else 100 for name in SCORES}
    done = results.training.values()
    complete = len(done) == len(run.stages) - 1
    replies = judge_tokens(results.judged.values())
    measured = [*results.cells.values(), *results.besides.values()]
    zero_shot = run.tasks and not run.manifest["config"].get("num_fewshot")
    return {
        **{name: factors[name] * estimate.value for name, estimate in scores.items()},
        "base": factors["OP"] * float(results.R[0].mean()) if zero_shot and results.unit else math.nan,
        "training min": sum(t["seconds"] for t in done) / 60 if complete else math.nan,
        "evaluation min": sum(cell["seconds"] for cell in measured) / 60 if measured else math.nan,
        "trained tokens": sum(t["tokens"] for t in done) if complete else math.nan,
        "judge tokens": sum(replies.values()) if replies else math.nan,
    }


def _plain(task: str, run: Run) -> str:
    """The name of a task that the reasoning variant shares with the plain one."""
    plain = task.replace("reasoning_", "trace_", 1) if task in REASONING else task
    # A run that trains both variants of a task keeps them apart.
    name = task_name(task if plain in run.tasks else plain)
    taken = name in ("run", *_TEXTS, *_NUMBERS) or any(task_name(other) == name for other in run.tasks if other != task)
    return f"task {task}" if taken else name


# ------------------------------------------------------------------------------------------------- against a baseline


class Versus:
    """A run against the baseline.

    Attributes:
        scores: Those of `SCORES` -> the difference, with an interval where rows can be paired.

    Differences are gains: positive where the run is better (of Forgetting, where it forgot more). Rows are paired
    where both runs have the same ones: of tasks under the same conditions (`same_conditions`), of suites and judged
    sets whatever was trained. A paired interval is that of the mean over the rows of what one run makes of a row minus
    what the other does.
    """

    def __init__(self, entry: Entry, against: Entry) -> None:
        self.mine, self.theirs = entry.results, against.results
        self.shared = same_conditions(self.mine.run, self.theirs.run)
        values = dict.fromkeys(SCORES, math.nan)
        values |= {name: _gain(entry, name) - _gain(against, name) for name in _defined(entry, against)}
        tasks = self.mine.run.tasks
        finals = [self._of_task(task, _final_rows) for task in tasks]
        paired = {
            "OP": metrics.mean_of(finals),
            "BWT": self._of_changes(slice(None, -1), Results.rows_since_own),
            "FWT": self._of_changes(slice(1, None), Results.rows_ahead),
            "general": self._of_suites(),
            **{kind.name: self._of_verdicts(kind.name) for kind in KINDS},
        }
        self.scores = {
            name: Estimate(value, *(paired[name][1:] if name in paired and not math.isnan(value) else ()))
            for name, value in values.items()
        }

    def _of_task(self, task: str, of_rows: Callable[[Results, str], Matrix]) -> Estimate:
        one, two = self.mine.rows.get(task), self.theirs.rows.get(task)
        if not self.shared or one is None or two is None or one.ids != two.ids:
            return _UNKNOWN
        if shared_unit(results.units[task] for results in (self.mine, self.theirs)) is None:
            return _UNKNOWN
        differences = of_rows(self.mine, task) - of_rows(self.theirs, task)
        return _mean(differences, fractions=self.mine.units[task].scale == 1)

    def _of_changes(self, part: slice, of_rows: Callable[[Results, str], Matrix]) -> Estimate:
        """Of the mean over a part of the tasks, if it is the same tasks in both runs, whatever their order."""
        mine, theirs = (sorted(results.run.tasks[part]) for results in (self.mine, self.theirs))
        if mine != theirs or not (self.mine.is_sequential and self.theirs.is_sequential):
            return _UNKNOWN
        return metrics.mean_of([self._of_task(task, of_rows) for task in mine])

    def _of_suites(self) -> Estimate:
        """Of the general-ability delta."""
        found = []
        for suite in GROUPS["general"]:
            if all((0, suite) in results.besides for results in (self.mine, self.theirs)):
                one, two = self.mine.rows_besides.get(suite), self.theirs.rows_besides.get(suite)
                if one is None or two is None or one.ids != two.ids:
                    return _UNKNOWN
                x, y = (
                    rows.scores[results.headlines[suite]] for rows, results in ((one, self.mine), (two, self.theirs))
                )
                changes = (x[:, -1] - x[:, 0]) - (y[:, -1] - y[:, 0])
                found += one.estimates(changes[:, None], metrics.difference_interval)
        return metrics.mean_of(found)

    def _of_verdicts(self, kind: str) -> Estimate:
        """Of a net win rate, if the pairs that were scored are those of the same rows."""
        won = {"win": 1, "tie": 0, "lose": -1}
        found = []
        for results in (self.mine, self.theirs):
            last = results.run.stages[-1]
            found.append(
                {
                    (suite, doc_id): won[verdict]
                    for index, suite in results.judged[kind]
                    if index == last.index
                    for doc_id, verdict in verdicts(last, suite).items()
                    if verdict in won
                }
            )
        one, two = found
        if not one or one.keys() != two.keys():
            return _UNKNOWN
        return _mean(np.array([one[row] - two[row] for row in one], dtype=float))


def _gain(entry: Entry, name: str) -> float:
    """A number of a run, so that a difference of two is a gain."""
    return entry.scores[name].value * (entry.unit("OP").sign if name == "OP" else 1)


def _final_gain(entry: Entry, task: str) -> float:
    """A final score as it is shown, so that a difference of two is a gain."""
    return entry.units[task].sign * entry.finals[task]


def _defined(entry: Entry, against: Entry) -> set[str]:
    """Those of `SCORES` of which two runs have a difference: means over the same, measured under the same settings."""
    names = set(SCORES)
    if entry.finals.keys() != against.finals.keys() or shared_unit([entry.unit("OP"), against.unit("OP")]) is None:
        names -= set(_OF_TASKS)  # a mean over others is another number
    settings = _conditions_besides(against)
    return names - {name for name, mine in _conditions_besides(entry).items() if mine != settings[name]}


def _final_rows(results: Results, task: str) -> Matrix:
    """The final scores of a task's rows, so that their difference is a gain."""
    return results.units[task].sign * results.final_rows(task)


def _mean(differences: Matrix, fractions: bool = True) -> Estimate:
    low, high = metrics.difference_interval(differences[:, None], fractions=fractions)
    return Estimate(float(differences.mean()), float(low[0]), float(high[0]))


# --------------------------------------------------------------------------------------------- methods over their seeds


class SeedDifferences:
    """The differences of the seed means of two groups, as gains; of Forgetting, how much more was forgotten.

    Attributes:
        estimates: Those of `SCORES` and the names of tasks -> the difference of the means with its interval
            (`metrics.seed_difference`); tasks as they are shown, most of them in percent.
        p: The same -> the p-value; only of what may be marked.
    """

    def __init__(self, group: Group, reference: Group) -> None:
        self.group, self.reference = group, reference
        one, two = group.entries[0], reference.entries[0]
        self.estimates: dict[str, Estimate] = {}
        self.p: dict[str, float] = {}
        for name in [name for name in SCORES if name in _defined(one, two)]:
            self._add(name, partial(_gain, name=name))
        for task, unit in one.units.items():
            if task in two.units and shared_unit([unit, two.units[task]]) is not None:
                self._add(task, partial(_final_gain, task=task))
        comparable = same_conditions(one.run, two.run)
        self.p = {n: p for n, p in self.p.items() if n != "Forgetting" and (comparable or n in DELTAS)}

    def _add(self, name: str, number: Callable[[Entry], float]) -> None:
        found = metrics.seed_difference(self.group.by_seed(number), self.reference.by_seed(number))
        self.estimates[name], self.p[name] = found

    @property
    def paired(self) -> bool:
        """Whether both have the same seeds."""
        seeds = [{e.run.manifest.get("seed") for e in group.entries} for group in (self.group, self.reference)]
        return seeds[0] == seeds[1]

    def texts(self, marks: dict[tuple[str, str], int]) -> list[str]:
        """Those of `SCORES` with their intervals and arrows."""
        unit = self.group.entries[0].unit
        return [
            unit(k).with_interval(self.estimates.get(k, _UNKNOWN), sign=True)
            + arrow(marks.get((self.group.name, k), 0))
            for k in SCORES
        ]


def _marks(seeds: Sequence[SeedDifferences]) -> dict[tuple[str, str], int]:
    """(group, one of `SCORES` or a task) -> 1 or -1, where the group is better or worse than the one of the baseline.

    All of a comparison are certain together. OP, which methods are compared by, has one half of the level, all else the
    other: few seeds have few degrees of freedom, and would show nothing if each of many tasks counted as much as OP.
    """
    p = {(d.group.name, name): value for d in seeds for name, value in d.p.items() if not math.isnan(value)}
    means = sum(name == "OP" for _, name in p)
    weights = [1 / means if name == "OP" else 1 / (len(p) - means) for _, name in p]
    certain = metrics.holm(list(p.values()), weights)
    signs = {(d.group.name, name): e.sign for d in seeds for name, e in d.estimates.items()}
    return {key: signs[key] for key, sure in zip(p, certain, strict=True) if sure}


def _between_others(seeds: Sequence[SeedDifferences]) -> list[SeedDifferences]:
    """The differences of all pairs of groups that the baseline is in none of."""
    return [SeedDifferences(one.group, two.group) for one, two in itertools.combinations(seeds, 2)]


def _seeds_table(seeds: Sequence[SeedDifferences], marks: dict[tuple[str, str], int]) -> Table:
    rows = [[d.group.name, *d.texts(marks)] for d in seeds]
    title = f"Difference of seed means to `{seeds[0].reference.name}`" if seeds else ""
    return Table(["run", *SCORES], rows, title, _about_seeds(seeds))


def _others_table(seeds: Sequence[SeedDifferences]) -> Table:
    others = _between_others(seeds)
    rows = [[f"{d.group.name} against {d.reference.name}", *d.texts({})] for d in others]
    return Table(
        ["run", *SCORES], rows, "Differences of seed means between the others", _about_seeds(others) + "; no arrows"
    )


def _about_seeds(seeds: Sequence[SeedDifferences]) -> str:
    in_percent = _all_percent(e for d in seeds for e in (*d.group.entries, *d.reference.entries))
    return "in points" if in_percent else "gains, in points or the unit of the tasks"


def _spread_table(groups: Sequence[Group], columns: list[str]) -> Table:
    """The components of the variance of a run's score."""
    names = ["OP", "BWT", *columns]
    rows = []
    for group in groups:
        first = group.entries[0]

        def written(deviations: dict[str, float], first: Entry = first) -> list[str]:
            units = {name: first.unit(name) for name in ("OP", "BWT")} | first.units
            return [units[n].shown(v) if (v := deviations.get(n, 0.0)) > 0 else DASH for n in names]

        rows.append([f"{group.name}: between seeds", *written(_deviation_between_seeds(group, columns))])
        rows.append([f"{group.name}: test rows", *written(_deviation_of_test_rows(group, columns))])
    about = (
        "standard deviations of a run's score: between seeds (what another training changes, on the same test rows) "
        "and of test rows (what other test rows change, for the same training)"
    )
    return Table(["run", *names], rows, "Spread", about)


def _deviation_between_seeds(group: Group, columns: list[str]) -> dict[str, float]:
    """Of each number; 0 where all seeds have the same."""
    values = {name: [e.numbers[name] for e in group.entries] for name in ("OP", "BWT")}
    values |= {task: [e.finals.get(task, math.nan) for e in group.entries] for task in columns}
    return {name: float(np.std(v, ddof=1)) if _varies(v) else 0.0 for name, v in values.items()}


def _varies(values: list[float]) -> bool:
    """Whether the numbers of seeds say anything about a variance."""
    return not math.isnan(metrics.seed_interval(values)[0])


def _deviation_of_test_rows(group: Group, columns: list[str]) -> dict[str, float]:
    """The standard error of each number over test rows, as one run of the group has it on average."""
    found = []
    for e in group.entries:
        results, tasks = e.results, e.run.tasks
        squares = {
            _plain(task, e.run): _square(results.final_rows(task), e.units[_plain(task, e.run)]) for task in tasks
        }
        of_runs = {"OP": sum(squares.values()) / len(tasks) ** 2 if tasks else math.nan}
        if results.is_sequential and len(tasks) > 1:
            gained = [_square(results.rows_since_own(task), e.unit("BWT")) for task in tasks[:-1]]
            of_runs["BWT"] = sum(gained) / len(gained) ** 2
        known = dict.fromkeys(_OF_TASKS, math.nan) if results.unit is None else of_runs
        found.append(squares | known)
    return {name: float(np.mean([f.get(name, math.nan) for f in found])) ** 0.5 for name in ("OP", "BWT", *columns)}


def _square(rows: Matrix, unit: Unit) -> float:
    """The squared standard error of a mean of rows, as it is shown."""
    return unit.factor**2 * float(np.var(rows, ddof=1)) / len(rows) if len(rows) > 1 else math.nan


#: A difference that is worth seeing, in points.
_WORTH = 2.0


def _seeds_needed(groups: Sequence[Group]) -> list[str]:
    """How many seeds would show a difference in OP, from the spread of those that are there."""
    unit = shared_unit(e.unit("OP") for group in groups for e in group.entries)
    values = {group.name: [e.numbers["OP"] for e in group.entries] for group in groups}
    values = {name: v for name, v in values.items() if not np.isnan(v).any()}
    spread = [v for v in values.values() if _varies(v)]
    if unit is None or not spread:
        return []
    freedom = sum(len(v) - 1 for v in spread)
    deviation = math.sqrt(sum((len(v) - 1) * np.var(v, ddof=1) for v in spread) / freedom)
    wanted = [(_WORTH, f"{unit.shown(_WORTH)} {unit.of_changes}")] if unit.is_percent else []
    if len(values) > 1:
        means = {name: float(np.mean(v)) for name, v in values.items()}
        one, two = sorted(means, key=lambda name: -unit.sign * means[name])[:2]
        gap = abs(means[one] - means[two])
        if gap > 1e-9:
            wanted.append((gap, f"the {unit.shown(gap)} {unit.of_changes} between the two best ({_ticks([one, two])})"))
    needed = [(text, metrics.seeds_needed(deviation, difference)) for difference, text in wanted]
    listed = "; ".join(f"{text}: {n or f'more than {metrics.MOST_SEEDS:,}'} seeds" for text, n in needed)
    if not needed:
        return []
    return [
        "Seeds that each of two methods needs for a difference in OP to be seen (t-test at 5 %, power 80 %; standard "
        f"deviation between seeds {unit.shown(deviation)} {unit.of_changes}, {freedom} degrees of freedom): {listed}."
    ]


# -------------------------------------------------------------------------------------------------------------- tables


def _runs_table(entries: list[Entry], groups: list[Group], references: list[dict[str, str]]) -> Table:
    """The runs' numbers, and the paper's; what is the same in all runs is said once."""
    texts = [k for k in _TEXTS if len(entries) == 1 or len({e.texts[k] for e in entries}) > 1]
    same = [f"{k} {entries[0].texts[k]}" for k in _TEXTS if k not in texts]
    rows = []
    for e in entries:
        numbers = {k: write(e.numbers[k]) for k, write in _NUMBERS.items()}
        numbers["base"] = e.unit("OP").shown(e.numbers["base"])
        numbers |= {k: e.unit(k).with_interval(e.scores[k], sign) for k, sign in SCORES.items()}
        rows.append([e.name, *(e.texts[k] for k in texts), *numbers.values()])
    for group in groups:
        first = group.entries[0]
        labels = [first.texts[k] for k in texts]
        values = {k: [e.numbers[k] for e in group.entries] for k in _NUMBERS}
        writers = _NUMBERS | {k: partial(first.unit(k).shown, sign=SCORES[k]) for k in _OF_TASKS}
        writers["base"] = first.unit("OP").shown
        means = [_mean_and_deviation(values[k], write, cost=k in _COSTS) for k, write in writers.items()]
        rows.append([_over(group, _MEAN, len(groups) > 1), *labels, *means])
        bounds = [_interval_over_seeds(values[k], w) if k in SCORES else DASH for k, w in writers.items()]
        rows.append([_over(group, _INTERVAL, len(groups) > 1), *labels, *bounds])
    for reference in references:
        theirs = _reference_line(reference)
        rows.append([f"paper: {reference['method']}", *(theirs.get(k, DASH) for k in (*texts, *_NUMBERS))])
    about = "scores in percent" if _all_percent(entries) else "scores in percent or the unit of the run's tasks"
    about += f" (in all: {', '.join(same)})" if same else ""
    return Table(["run", *texts, *_NUMBERS], rows, "Runs", about, apart=len(references))


def _all_percent(entries: Iterable[Entry]) -> bool:
    return not any(e.results.not_percent for e in entries)


def _versus_table(versus: dict[str, Versus], against: Entry) -> Table:
    rows = []
    for name, v in versus.items():
        rows.append([name, *(against.unit(k).with_interval(e, sign=True) for k, e in v.scores.items())])
    about = "in points" if not against.results.not_percent else "gains, in points or the unit of the tasks"
    return Table(["run", *SCORES], rows, f"Difference to `{against.name}`", about)


def _column_units(entries: list[Entry]) -> dict[str, Unit | None]:
    """Name of a task -> its unit; None if its headline is another in some runs, and in another unit."""
    columns = dict.fromkeys(task for e in entries for task in e.units)
    return {task: shared_unit(e.units[task] for e in entries if task in e.units) for task in columns}


def _finals_table(
    entries: list[Entry],
    groups: list[Group],
    columns: list[str],
    marks: dict[tuple[str, str], int],
    seeds: Sequence[SeedDifferences],
) -> Table:
    def shown(e: Entry, task: str) -> Callable[[float | None], str]:
        return e.units.get(task, PERCENT).shown

    units = _column_units(entries)
    rows = [[e.name, *(shown(e, task)(e.finals.get(task)) for task in columns)] for e in entries]
    all_percent = _all_percent(entries)
    about = "percent of its headline metric" if all_percent else "in the unit of its headline metric"
    for group in groups:
        texts = []
        for task in columns:
            values = [e.finals.get(task, math.nan) for e in group.entries]
            text = _mean_and_deviation(values, shown(group.entries[0], task))
            texts.append(text + arrow(marks.get((group.name, task), 0)))
        rows.append([_over(group, _MEAN, len(groups) > 1), *texts])
    if any(text.endswith(("↑", "↓")) for row in rows for text in row):
        about += f" (↓, ↑: worse or better than `{seeds[0].reference.name}` over the seeds)"
    names = {task: unit.name if unit else "different units" for task, unit in units.items()}
    head = columns if all_percent else [f"{task}<br>{names[task]}" for task in columns]
    return Table(["run", *head], rows, "Final score of each task", about)


_MEAN = "mean ± standard deviation over {} seeds"
_INTERVAL = "95 % interval over {} seeds"


def _over(group: Group, text: str, several: bool) -> str:
    """What a row over the seeds of a group is called; with its name if there are several groups."""
    return text.format(len(group.entries)) + (f" of {group.name}" if several else "")


def _mean_and_deviation(values: list[float], write: Callable[[float], str], cost: bool = False) -> str:
    mean = float(np.mean(values))
    if math.isnan(mean):
        return DASH
    if not _varies(values):  # a cost may be the same for every seed, a score only by chance
        return write(mean) if cost else f"{write(mean)} ± {DASH}"
    return f"{write(mean)} ± {write(float(np.std(values, ddof=1))).lstrip('+')}"


def _interval_over_seeds(values: list[float], write: Callable[[float], str]) -> str:
    low, high = metrics.seed_interval(values)
    # Where both ends are written alike the seeds differ too little to say how much another one would.
    return DASH if math.isnan(low) or write(low) == write(high) else f"[{write(low)}, {write(high)}]"


# ----------------------------------------------------------------------------------------------------------------- CSV


def _line(entry: Entry, versus: Versus | None) -> dict[str, Any]:
    bounds: dict[str, float] = {}
    for name in SCORES:
        factor = entry.unit(name).factor
        _, low, high = (factor * x for x in entry.scores[name])
        bounds |= {f"{name} low": low, f"{name} high": high}
        if versus:
            value, low, high = (factor * x for x in versus.scores[name])
            bounds |= {f"{name} difference": value, f"{name} difference low": low, f"{name} difference high": high}
    return {
        "run": entry.name,
        **entry.texts,
        **entry.numbers,
        **{name: bound for name, bound in bounds.items() if not math.isnan(bound)},
        **entry.finals,
        **({"unit of OP": _unit_name(entry)} if entry.results.not_percent else {}),
    }


def _unit_name(entry: Entry) -> str:
    """The unit of a run's means over its tasks."""
    return entry.results.unit.name if entry.results.unit else "different units"


def _seed_lines(group: Group, columns: list[str], several: bool) -> list[dict[str, Any]]:
    values = {k: [e.numbers[k] for e in group.entries] for k in _NUMBERS}
    values |= {task: [e.finals.get(task, math.nan) for e in group.entries] for task in columns}
    first = group.entries[0]
    statistics: dict[str, Callable[[list[float]], Any]] = {
        "mean": np.mean,
        "standard deviation": lambda v: np.std(v, ddof=1),
        "low end of the 95 % interval": lambda v: metrics.seed_interval(v)[0],
        "high end of the 95 % interval": lambda v: metrics.seed_interval(v)[1],
    }
    lines: list[dict[str, Any]] = [
        {"run": _over(group, f"{name} over {{}} seeds", several), **first.texts, **{k: f(v) for k, v in values.items()}}
        for name, f in statistics.items()
    ]
    name = _over(group, "standard error over test rows, mean over {} seeds", several)
    return [*lines, {"run": name, **first.texts, **_deviation_of_test_rows(group, columns)}]


def _seed_difference_lines(difference: SeedDifferences, columns: list[str]) -> list[dict[str, Any]]:
    unit = difference.group.entries[0].unit
    factors = {name: unit(name).factor for name in SCORES}  # those of tasks are in their unit already
    texts = ("difference of seed means", "low end of the 95 % interval", "high end of the 95 % interval")
    return [
        {
            "run": f"{text}, {difference.group.name} against {difference.reference.name}",
            **{name: factors.get(name, 1) * estimate[i] for name, estimate in difference.estimates.items()},
        }
        for i, text in enumerate(texts)
    ]


def _reference_line(row: dict[str, str]) -> dict[str, Any]:
    """A row of the paper's numbers."""
    numbers = {k: v for k, v in row.items() if k in _NUMBERS}
    texts = {"method": row["method"], "tasks": "8 (order1)", "train rows": row.get("train rows", DASH)}
    return {"run": f"paper: {row['method']}, {row['model']}", **texts, **numbers}


def _set_ups(references: list[dict[str, str]]) -> list[str]:
    """What the paper's rows were measured in."""
    if not references:
        return []
    notes = [paper.SETUP]
    for row in references:
        known = [
            f"{what} {row[key]}"
            for key, what in (("train rows", "training rows a task"), ("epochs", "epochs"))
            if row.get(key, DASH) != DASH
        ]
        notes.append(f"paper: {row['method']}: {', '.join([row['model'], *known])}.")
    return notes


# -------------------------------------------------------------------------------------------------------- comparability


def _seed_groups(entries: list[Entry]) -> list[list[Entry]]:
    """Runs that differ in nothing but the seed, two or more each."""
    groups: list[list[Entry]] = []
    for entry in entries:
        for group in groups:
            keys = [
                {line.split(":")[0].strip() for line in differences(other.run.manifest, entry.run.manifest)}
                for other in group
            ]
            if all({"seed"} <= k <= {"seed", "config.seed"} for k in keys):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return [group for group in groups if len(group) > 1]


def _named(groups: list[list[Entry]], runs: Sequence[str]) -> list[Group]:
    """Groups with the names of their runs less the seed, such as `ewc` of `ewc-seed0` and `ewc-seed1`."""
    stems = [{re.sub(r"[-_.]?seed[-_.]?\d+", "", e.name) for e in group} for group in groups]
    taken = [*runs, *(name for stem in stems for name in stem)]
    names = [next(iter(stem)) if len(stem) == 1 else "" for stem in stems]
    return [
        Group(name if name and taken.count(name) == 1 else f"{group[0].name} and its seeds", group)
        for name, group in zip(names, groups, strict=True)
    ]


def _budgets(entries: list[Entry], groups: list[Group]) -> list[str]:
    """Where methods were given different budgets: rows kept of earlier tasks, and seeds."""
    memories: dict[str, list[str]] = {}
    for e in entries:
        if (rows := _memory_rows(e.results)) is not None:
            memories.setdefault(f"{rows:,}", []).append(e.name)
    seeds: dict[str, list[str]] = {}
    for group in groups:
        seeds.setdefault(str(len(group.entries)), []).append(group.name)
    for e in entries:
        if groups and not any(e in group.entries for group in groups):
            seeds.setdefault("1", []).append(e.name)
    what = {"rows kept of an earlier task:": memories, "numbers of seeds:": seeds}
    return _apart("Unequal budgets", what, _ticks)


def _apart(title: str, found: dict[str, dict[str, list[str]]], named: Callable[[list[str]], str]) -> list[str]:
    """A warning for each thing (what -> value -> runs) of which runs have different values."""
    return [
        f"**{title}**, to which a part of the differences may be due: {what} "
        + "; ".join(f"{value} in {named(runs)}" for value, runs in values.items())
        + "."
        for what, values in found.items()
        if len(values) > 1
    ]


def _memory_rows(results: Results) -> int | None:
    """How many rows of an earlier task a method keeps, the most of any task; None if it keeps none."""
    kept = [
        rows
        for train in results.training.values()
        for task, rows in (train.get("memory_rows") or train.get("replayed") or {}).items()
        if task != "alignment"
    ]
    return max(kept, default=None) or results.run.manifest["config"].get("memory_rows")


def _conditions_besides(entry: Entry) -> dict[str, dict[str, Any]]:
    """What the three deltas of two runs have to share to be compared: column of the comparison -> what -> value."""
    last = entry.run.stages[-1].index
    besides = entry.results.besides
    general = {suite: besides[last, suite] for suite in GROUPS["general"] if (last, suite) in besides}
    found: dict[str, dict[str, Any]] = {"general": {}}
    if general:
        found["general"] = {"general suites": ", ".join(suite.removeprefix("general_") for suite in general)}
        for suite, cell in general.items():
            found["general"] |= {
                f"data of {suite}": cell["settings"]["data"],
                f"rows of {suite}": cell["n"],
                f"version of {suite}": cell["version"],
            }
    for kind in KINDS:
        judged = {suite: n for (i, suite), n in entry.results.judged[kind.name].items() if i == last}
        found[kind.name] = {}
        if judged:
            judges = sorted({json.dumps(n["settings"], sort_keys=True) for n in judged.values()})
            found[kind.name] = {
                f"judge of {kind.name}": " and ".join(judges),
                f"answers judged for {kind.name}": {suite: n["direct"]["n"] for suite, n in judged.items()},
                **{
                    f"data of {suite}": besides[last, suite]["settings"].get("data")
                    for suite in judged
                    if (last, suite) in besides
                },
            }
    return found


def _comparability(entries: list[Entry]) -> list[str]:
    """What the runs differ in that their scores depend on, beside the training; and what they all lack."""
    found: dict[str, dict[str, Any]] = {}  # what -> run -> value, of the runs that have it
    limits = {e.run.manifest["config"].get("test_rows") for e in entries}
    for e in entries:
        flat = {**conditions(e.run), "tasks": ", ".join(sorted(_plain(t, e.run) for t in e.run.tasks))}
        data, versions, definitions = (flat.pop(key) for key in ("data", "task versions", "task definitions"))
        flat |= {f"definition of {_plain(t, e.run)}": json.dumps(d) for t, d in (definitions or {}).items()}
        flat |= {f"data of {_plain(task, e.run)}": fingerprint for task, fingerprint in data.items()}
        flat |= {f"version of {task}": version for task, version in versions.items()}
        for settings in _conditions_besides(e).values():
            flat |= settings
        cells = e.results.cells
        flat |= _engine(e)
        if len(limits) == 1:  # else that is said
            flat |= {f"rows of {_plain(task, e.run)}": cell["n"] for (_, task), cell in cells.items()}
        for key, value in flat.items():
            found.setdefault(key, {})[e.name] = value
    names = [e.name for e in entries]
    notes: dict[str, list[str]] = {}  # how the runs fall apart -> what in
    for key, values in found.items():
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(value_text(value), []).append(name)
        if len(groups) > 1:
            if key.startswith(("data of", "definition of")):  # says nothing to a reader, and all tasks fit on one line
                text = " against ".join(_runs(group, names) for group in groups.values())
            else:
                text = "; ".join(f"{value} in {_runs(group, names)}" for value, group in groups.items())
            notes.setdefault(text, []).append(key)
    lines = [f"**Not comparable** in {', '.join(keys)}: {text}." for text, keys in notes.items()]
    lines += _other_versions(entries)

    def named(text: str, applies: Callable[[Entry], Any]) -> None:
        those = [e.name for e in entries if applies(e)]
        if those:
            lines.append(f"{text}: {'all' if names == those and len(names) > 3 else _ticks(those)}.")

    def suites(e: Entry) -> list[dict[str, Any]]:
        return [cell for (_, name), cell in e.results.besides.items() if name in SUITES]

    named("**Demo data**, not comparable with TRACE", lambda e: e.run.manifest["data"]["demo"])
    named(
        "**Limited test rows**, not comparable with the full data", lambda e: e.run.manifest["config"].get("test_rows")
    )
    named("**Limited rows** of the general suites", lambda e: any(c["settings"]["general_rows"] for c in suites(e)))
    named(
        "**Local copies** of general suites, comparable with the hub's only if they are complete",
        lambda e: any(c["settings"]["data"] != "hub" for c in suites(e)),
    )
    return lines


def _engine(entry: Entry) -> dict[str, Any]:
    """What a run was trained and its answers generated with, beside the model and the method."""
    run, config = entry.run, entry.run.manifest["config"]
    cells = (entry.results.cells or entry.results.besides).values()
    found: dict[str, Any] = {}
    if cells:
        engines = {json.dumps(c["settings"].get("engine") or "defaults", sort_keys=True) for c in cells}
        found["backend"] = ", ".join(sorted({c["settings"]["backend"] for c in cells}))
        found["engine settings"] = " and ".join(sorted(engines)).replace('"', "")
    if len(run.stages) > 1 and "checkpoints" not in run.manifest:
        found |= {f"{key} of the training": config.get(key) or None for key in ("dtype", "bf16", "fp16")}
    return found


def _other_versions(entries: list[Entry]) -> list[str]:
    """Where runs were trained or measured with different versions of the program or of libraries."""
    found: dict[str, dict[str, list[str]]] = {}  # what -> version -> runs
    for e in entries:
        manifest = e.run.manifest
        made = {f"{name} of the training": v for name, v in manifest["packages"].items() if len(e.run.stages) > 1}
        made |= {"commit": manifest.get("commit")}
        made |= {name: ", ".join(versions) for name, versions in e.results.versions.items() if name != "commit"}
        for name, version in made.items():
            if version is not None:
                found.setdefault(name, {}).setdefault(str(version), []).append(e.name)
    names = [e.name for e in entries]
    lines = _apart("Different versions", found, partial(_runs, all_names=names))
    return lines + [
        f"**Cells of different versions** in `{e.name}`: {t}." for e in entries for t in e.results.other_versions
    ]


def _definitions(entries: list[Entry], groups: list[Group], seeds: Sequence[SeedDifferences]) -> list[str]:
    """What the numbers are, and which runs are not complete."""
    lines = ["OP, BWT and Forgetting after the last stage, BWT divided by t-1; base = mean of the base model."]
    if any(not math.isnan(e.numbers[k]) for e in entries for k in ("general", "instruction", "safety")):
        lines.append(
            "general = mean change of the general-ability suites since the base model; instruction and safety = net "
            "win rate (win - lose) against it."
        )
    if not _all_percent(entries):
        names = dict.fromkeys(map(_unit_name, entries))
        listed = "; ".join(f"{_ticks(e.name for e in entries if _unit_name(e) == name)} {name}" for name in names)
        lines.append(
            f"Unit of OP, BWT, FWT, Forgetting and base: {listed}. No mean is taken over tasks of different units. "
            "Changes and differences are gains: + and ↑ are better, so that where lower is better a fall is a gain."
        )
    means = [e.name for e in entries if e.results.has_mean and not e.results.is_sequential]
    if means:
        lines.append(f"OP is the mean of the tasks, and BWT is not defined: {_ticks(means)}.")
    if any(not math.isnan(score.low) for e in entries for score in e.scores.values()):
        lines.append(
            "In brackets 95 % intervals over test rows: what other test rows would give, not another training seed. "
            "Differences are paired where both runs have the same test rows and, of tasks, the same settings; "
            "elsewhere they have no interval."
        )
    ends = {tuple(_plain(e.run.tasks[k], e.run) for k in (0, -1)) for e in entries if e.results.is_sequential}
    if len(ends) > 1:
        lines.append(
            "BWT and Forgetting leave the last task of a run out, and FWT the first: in runs of other orders they may "
            "be means over other tasks, and then their differences have no interval."
        )
    if groups:
        listed = "; ".join(
            f"`{g.name}` ({_ticks(e.name for e in g.entries)})"
            if len(groups) > 1
            else _ticks(e.name for e in g.entries)
            for g in groups
        )
        lines.append(
            f"The seeds are those of {listed}, which differ in nothing else. Their interval (Student's t) is what "
            "another training would give, on the same test rows. Where all seeds gave the same number the variance "
            "cannot be estimated: a dash."
        )
    if seeds:
        kinds = {True: "paired by seed", False: "Welch's, since the seeds differ"}
        listed = "; ".join(
            f"{_ticks(d.group.name for d in seeds if d.paired is paired)} {kind}"
            for paired, kind in kinds.items()
            if any(d.paired is paired for d in seeds)
        )
        lines.append(
            f"Differences of seed means to `{seeds[0].reference.name}`: {listed}; in brackets 95 % intervals "
            "(Student's t). ↓, ↑: worse, better. Arrows are corrected for all tested differences to it, of all "
            "scores and tasks (Holm, with half of the level for OP): where no method differs, at most one comparison "
            "in twenty shows any. Intervals are not corrected."
        )
    if len(entries) > 1:
        lines.append(
            "Test rows alone give no arrow: differences of single runs do not say what other trainings would give. For "
            "that both sides need two seeds or more"
            + (", in the same conditions." if seeds else "; here no two methods have them.")
        )
    lines += _seeds_needed(groups)
    lines += [
        f"Without leaked rows in `{e.name}`: {left_out_text(e.results.left_out)}" for e in entries if e.run.left_out
    ]
    unfinished = []
    for e in entries:
        R = e.results.R
        # The cells that OP, BWT and Forgetting are made of.
        needed = R[1:][np.tril_indices(R.shape[1])] if e.results.is_sequential else e.results.final
        if np.isnan(needed).any():
            unfinished.append(e.name)
    if unfinished:
        lines.append(f"Not complete, so that numbers are missing: {_ticks(unfinished)}.")
    return lines


def _runs(names: list[str], all_names: list[str]) -> str:
    """Runs in a sentence about how all of them fall apart; most of many are "all others"."""
    return "all others" if len(names) > max(3, len(all_names) / 2) else _ticks(names)


def _ticks(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
