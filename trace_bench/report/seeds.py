"""Methods over several training seeds: groups of runs, differences of their means, and the spread of seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_bench import metrics
from trace_bench.manifest import differences
from trace_bench.measures import seeds as measures
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.conditions import same_conditions
from trace_bench.report.differences import defined, gain, over_the_same_tasks
from trace_bench.report.entry import NUMBERS, SCORES, Entry, column_of
from trace_bench.report.results import DELTAS, UNKNOWN
from trace_bench.report.tables import DASH, Unit, arrow, shared_unit
from trace_bench.text import one_line

#: (name of a group, one of `SCORES` or a task) -> 1 or -1, where the group is better or worse than the baseline's.
Marks = dict[tuple[str, str], int]
#: The bounds of an estimate, in the CSV.
ENDS = ("low end of the 95 % interval", "high end of the 95 % interval")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed; it may be a single run."""

    name: str
    entries: list[Entry]

    def numbers(self, name: str) -> list[float]:
        """One of `NUMBERS`, or the final score of a task, of each run."""
        return [e.numbers[name] if name in NUMBERS else e.finals.get(name, math.nan) for e in self.entries]

    def gains(self, name: str) -> dict[Any, float]:
        """Seed -> a number of its run, as a gain: see `differences.gain`."""
        return {e.run.manifest.get("seed"): gain(e, name) for e in self.entries}


def lines_of(entries: Sequence[Entry], groups: Sequence[Group]) -> list[Group]:
    """The groups, and the runs that are in no group, in the order of the runs."""
    lines: list[Group] = []
    for entry in entries:
        group = next((g for g in groups if entry in g.entries), None)
        if group is None:
            lines.append(Group(entry.name, [entry]))
        elif entry is group.entries[0]:
            lines.append(group)
    return lines


def groups_of(entries: Sequence[Entry]) -> list[Group]:
    """The groups, named after their runs without the seed: `ewc` for `ewc-seed0` and `ewc-seed1`."""
    found: list[list[Entry]] = []
    for entry in entries:
        group = next((group for group in found if all(_differ_by_seed(entry, other) for other in group)), [])
        if not group:
            found.append(group)
        group.append(entry)
    found = [group for group in found if len(group) > 1]
    stems = [{re.sub(r"[-_.]?seed[-_.]?\d+", "", e.name) for e in group} for group in found]
    taken = [*(one_line(e.run.path.name) for e in entries), *(name for stem in stems for name in stem)]
    groups = []
    for stem, group in zip(stems, found, strict=True):
        name = next(iter(stem)) if len(stem) == 1 else ""
        groups.append(Group(name if name and taken.count(name) == 1 else f"{group[0].name} and its seeds", group))
    return groups


def _differ_by_seed(one: Entry, two: Entry) -> bool:
    keys = {line.split(":")[0].strip() for line in differences(two.run.manifest, one.run.manifest)}
    return {"seed"} <= keys <= {"seed", "config.seed"}


@dataclass(frozen=True)
class SeedDifferences:
    """The differences of the seed means of two groups, as gains; of Forgetting, how much more was forgotten."""

    group: Group
    reference: Group
    estimates: dict[str, Estimate]
    """Those of `SCORES` and the columns of tasks -> the difference of the means with its interval
    (`measures.seed_difference`); tasks as they are shown, most of them in percent."""
    p: dict[str, float]
    """The same -> the p-value; only of what may be marked."""

    @classmethod
    def between(cls, group: Group, reference: Group) -> SeedDifferences:
        """The differences of a group to the one of the baseline, or to another one."""
        one, two = group.entries[0], reference.entries[0]
        tasks = [task for task in one.units if task in two.units and shared_unit([one.units[task], two.units[task]])]
        names = [*defined(one, two), *tasks]
        found = {name: measures.seed_difference(group.gains(name), reference.gains(name)) for name in names}
        # Means over different tasks say nothing about the methods.
        others = [name for name in found if not over_the_same_tasks(one, two, name)]
        found |= {name: (Estimate(found[name][0].value), math.nan) for name in others}
        comparable = same_conditions(one.results, two.results)
        p = {n: p for n, (_, p) in found.items() if n != "Forgetting" and (comparable or n in DELTAS)}
        return cls(group, reference, {name: estimate for name, (estimate, _) in found.items()}, p)

    @property
    def both(self) -> str:
        """The names of the two."""
        return f"{self.group.name} against {self.reference.name}"

    @property
    def is_paired(self) -> bool:
        """Whether both have the same seeds."""
        one, two = ({e.run.manifest.get("seed") for e in group.entries} for group in (self.group, self.reference))
        return one == two

    def texts(self, marks: Marks) -> list[str]:
        """Those of `SCORES` with their intervals and arrows."""
        unit = self.group.entries[0].unit
        texts = {k: unit(k).with_interval(self.estimates.get(k, UNKNOWN), sign=True) for k in SCORES}
        return [text + arrow(marks.get((self.group.name, k), 0)) for k, text in texts.items()]


def marks_of(seeds: Sequence[SeedDifferences]) -> Marks:
    """The certain differences.

    All of a comparison are certain together. OP, which methods are compared by, has one half of the level, all else the
    other: few seeds have few degrees of freedom, and would show nothing if each of many tasks counted as much as OP.
    """
    p = {(d.group.name, name): value for d in seeds for name, value in d.p.items() if not math.isnan(value)}
    means = sum(name == "OP" for _, name in p)
    weights = [1 / means if name == "OP" else 1 / (len(p) - means) for _, name in p]
    certain = metrics.holm(list(p.values()), weights)
    signs = {(d.group.name, name): e.sign for d in seeds for name, e in d.estimates.items()}
    return {key: signs[key] for key, sure in zip(p, certain, strict=True) if sure}


def csv_lines(what: str, whose: str, entry: Entry, estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """The lines of the CSV for differences: the numbers, and the ends of their intervals."""
    factors = {name: entry.unit(name).factor for name in SCORES}  # tasks are as they are shown already
    return [
        {"run": f"{text}, {whose}", **{name: factors.get(name, 1) * e[i] for name, e in estimates.items()}}
        for i, text in enumerate((what, *ENDS))
    ]


# -------------------------------------------------------------------------------------------------------------- spread


def varies(values: Sequence[float]) -> bool:
    """Whether the numbers of the seeds differ, so that a variance can be estimated."""
    return not math.isnan(measures.seed_interval(values)[0])


def mean_and_deviation(values: Sequence[float], write: Callable[[float], str], cost: bool = False) -> str:
    """The mean over seeds ± the standard deviation; only the number for a `cost` that is the same for all seeds."""
    mean = float(np.mean(values))
    if math.isnan(mean):
        return DASH
    if not varies(values):  # a cost may well be the same for all seeds, a score only by chance
        return write(mean) if cost else f"{write(mean)} ± {DASH}"
    return f"{write(mean)} ± {write(float(np.std(values, ddof=1))).lstrip('+')}"


def interval_over_seeds(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The interval of the mean over seeds; empty if there is none."""
    low, high = measures.seed_interval(values)
    # If both ends look the same, the seeds differ too little for an interval.
    return "" if math.isnan(low) or write(low) == write(high) else f"[{write(low)}, {write(high)}]"


def deviation_between_seeds(group: Group, columns: Iterable[str]) -> dict[str, float]:
    """OP, BWT and the tasks -> the standard deviation between seeds; 0 if all seeds have the same number."""
    values = {name: group.numbers(name) for name in ("OP", "BWT", *columns)}
    return {name: float(np.std(v, ddof=1)) if varies(v) else 0.0 for name, v in values.items()}


def deviation_of_test_rows(group: Group, columns: Iterable[str]) -> dict[str, float]:
    """OP, BWT and the tasks -> the mean standard error over test rows of one run of the group."""
    found = []
    for e in group.entries:
        results, tasks = e.results, e.run.tasks
        columns_of = {task: column_of(task, e.run) for task in tasks}
        squares = {name: _square(results.final_rows(task), e.units[name]) for task, name in columns_of.items()}
        of_run = {**squares, "OP": math.nan}
        if results.unit is not None and tasks:
            of_run["OP"] = sum(squares.values()) / len(tasks) ** 2
        if results.unit is not None and results.is_sequential and len(tasks) > 1:
            gained = [_square(results.rows_since_own(task), e.unit("BWT")) for task in tasks[:-1]]
            of_run["BWT"] = sum(gained) / len(gained) ** 2
        found.append(of_run)
    return {name: float(np.mean([f.get(name, math.nan) for f in found])) ** 0.5 for name in ("OP", "BWT", *columns)}


def _square(rows: Matrix, unit: Unit) -> float:
    """The squared standard error of a mean of rows, as it is shown."""
    return unit.factor**2 * float(np.var(rows, ddof=1)) / len(rows) if len(rows) > 1 else math.nan


#: A difference that is worth seeing, in points.
_WORTH = 2.0


def seeds_needed(groups: Sequence[Group]) -> str | None:
    """How many seeds are needed to show a difference in OP, from the spread of the present ones."""
    unit = shared_unit(e.unit("OP") for group in groups for e in group.entries)
    values = {group.name: group.numbers("OP") for group in groups}
    values = {name: v for name, v in values.items() if not np.isnan(v).any()}
    spread = [v for v in values.values() if varies(v)]
    if unit is None or not spread:
        return None
    freedom = sum(len(v) - 1 for v in spread)
    deviation = math.sqrt(sum((len(v) - 1) * np.var(v, ddof=1) for v in spread) / freedom)
    wanted = {f"{unit.shown(_WORTH)} {unit.of_changes}": _WORTH} if unit.is_percent else {}
    means = {name: float(np.mean(v)) for name, v in values.items()}
    best = sorted(means, key=lambda name: -unit.sign * means[name])[:2]
    gap = abs(means[best[0]] - means[best[-1]])
    if gap > 1e-9:
        named = ", ".join(f"`{name}`" for name in best)
        wanted[f"the {unit.shown(gap)} {unit.of_changes} between the two best ({named})"] = gap
    needed = {text: measures.seeds_needed(deviation, difference) for text, difference in wanted.items()}
    if not needed:
        return None
    listed = "; ".join(f"{text}: {n or f'more than {measures.MOST_SEEDS:,}'} seeds" for text, n in needed.items())
    return (
        "Seeds that each of two methods needs to show a difference in OP (t-test at 5 %, power 80 %; standard "
        f"deviation between seeds {unit.shown(deviation)} {unit.of_changes}, {freedom} degrees of freedom): {listed}."
    )
