"""The numbers of a run from its files: the matrix, OP and BWT with intervals, changes, suites and judgements.

Only JSON is read, and nothing is written or rendered here. Scores are as the metrics give them, mostly fractions of 1.
Changes are gains: positive = better (`tables.Unit`). A mean over tasks is NaN unless all tasks have the same unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from trace_bench import judgements, metrics, records
from trace_bench.judgements import Judged
from trace_bench.metrics import Estimate, Matrix
from trace_bench.report.leaks import without_rows
from trace_bench.report.rows import Cells, Choices, Rows, load_choices, load_rows
from trace_bench.report.tables import Unit, shade, shared_unit
from trace_bench.run import Run, Stage, read_json, read_jsonl
from trace_tasks.data import GROUPS, JUDGED, SUITES

#: The three deltas (TRACE, section 3.3).
DELTAS = ("general", *(kind.name for kind in judgements.KINDS))
UNKNOWN = Estimate(math.nan)
T = TypeVar("T")


def load_cells(run: Run) -> Cells:
    """Reads the cells of the matrix, general suites and judged sets, without cells of older weights."""
    cells = {}
    for stage in run.stages:
        if not stage.is_trained:
            continue
        records.check_one_checkpoint(stage)
        records.check_origin(run, stage)
        trained = read_json(stage.train_file)["checkpoint"] if stage.train_file.exists() else None
        for name in dict.fromkeys([*run.tasks, *SUITES, *JUDGED]):
            if not stage.eval_file(name).exists():
                continue
            cell = records.read_cell(stage, name)
            if trained is None or cell["checkpoint"] == trained:
                if name in run.left_out:
                    samples = read_jsonl(stage.samples_file(name))
                    records.check_samples(stage, name, [row["doc_id"] for row in samples])
                    cell = without_rows(cell, samples, run.left_out[name])
                cells[stage.index, name] = cell
    return cells


def measured(run: Run, cells: Collection[tuple[int, str]]) -> list[Stage]:
    """The stages that have at least one of the cells."""
    return [stage for stage in run.stages if any(index == stage.index for index, _ in cells)]


def headline(cell: dict[str, Any]) -> float:
    """The headline score of a cell; NaN if it has none."""
    value = cell["metrics"][cell["headline"]]["value"]
    return math.nan if value is None else value


def unit_of(metric: str, cells: Iterable[dict[str, Any]]) -> Unit:
    """The unit of a metric, from all cells of a task with this metric; older cells do not record it.

    If the scores of one cell are not fractions of 1, the unit is not percent.
    """
    cells = list(cells)
    scales = [c["scale"][metric] for c in cells if metric in c.get("scale", ())]
    better = [c["higher_is_better"][metric] for c in cells if metric in c.get("higher_is_better", ())]
    return Unit(metric, next((s for s in scales if s != 1), 1), False not in better)


class Form(NamedTuple):
    """What a task lost from its own stage to the last one, in strict and in form-tolerant accuracy."""

    task: str
    strict: Estimate
    tolerant: Estimate
    form: Estimate
    """Strict minus tolerant: lost only because answers have another form."""


class Change(NamedTuple):
    """A change of a task's or suite's score between two stages."""

    name: str
    earlier: int
    later: int


@dataclass(frozen=True)
class Results:
    """The numbers of a run, each computed at first use. Intervals need the samples and take seconds."""

    run: Run
    units_among_runs: dict[str, Unit] = field(default_factory=dict)
    """Task -> its unit, decided by several compared runs together."""
    made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """The cache of `once`."""

    def once(self, make: Callable[[Results], T]) -> T:
        """`make(self)`, called only once."""
        if make not in self.made:
            self.made[make] = make(self)
        made: T = self.made[make]
        return made

    @cached_property
    def cells(self) -> Cells:
        """See `load_cells`."""
        return load_cells(self.run)

    def cells_of(self, names: Iterable[str]) -> Cells:
        """The cells of some tasks, suites or sets."""
        names = set(names)
        return {(i, name): cell for (i, name), cell in self.cells.items() if name in names}

    def matrix(self, metric: str | None = None) -> Matrix:
        """The scores of a metric (None = each task's headline), shape (stages, tasks); NaN = not measured."""
        R = np.full((len(self.run.stages), len(self.run.tasks)), np.nan)
        for (index, task), cell in self.cells_of(self.run.tasks).items():
            score = cell["metrics"].get(metric or cell["headline"])
            if score is not None and score["value"] is not None:
                R[index, self.run.tasks.index(task)] = score["value"]
        return R

    @cached_property
    def R(self) -> Matrix:
        """The headline scores, shape (stages, tasks)."""
        return self.matrix()

    @cached_property
    def headlines(self) -> dict[str, str]:
        """Name of a task, suite or judged set -> its headline metric."""
        return {name: cell["headline"] for (_, name), cell in self.cells.items()}

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Task -> the unit of its headline score; percent if nothing is evaluated yet."""
        tasks = self.run.tasks
        found = {task: unit_of(self.headlines.get(task, ""), self.cells_of([task]).values()) for task in tasks}
        return found | self.units_among_runs

    @cached_property
    def unit(self) -> Unit | None:
        """The unit that all evaluated tasks share, for means over tasks; None if they differ."""
        return shared_unit(self.units[task] for task in self.run.tasks if task in self.headlines)

    @property
    def not_percent(self) -> bool:
        """Whether some task's unit is not percent with higher = better, so that tables have to name units."""
        return not all(unit.is_percent for unit in self.units.values())

    @cached_property
    def gains(self) -> Matrix:
        """R times the sign of each task's unit, so that differences of rows are gains."""
        return self.R * [self.units[task].sign for task in self.run.tasks]

    @property
    def left_out(self) -> dict[str, tuple[int, int]]:
        """Task -> (how many of its test rows are left out, of how many); empty if all rows count."""
        cells = self.cells_of(self.run.left_out)
        return {task: (cell["n_left_out"], cell["n_left_out"] + cell["n"]) for (_, task), cell in cells.items()}

    @cached_property
    def shades(self) -> Matrix:
        """The position of each score of R between the worst (0) and the best (1) of its task."""
        columns = zip(self.run.tasks, self.R.T, strict=True)
        return np.array([shade(scores, self.units[task].ends(scores)) for task, scores in columns]).T

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The test rows of the tasks, suites and judged sets that have samples."""
        loaded = {name: load_rows(self.run, name, self.cells) for name in self.headlines}
        return {name: rows for name, rows in loaded.items() if rows is not None}

    @cached_property
    def choices(self) -> dict[str, Choices]:
        """The options and chosen options of the multiple-choice tasks and suites."""
        loaded = {name: load_choices(self.run, name, self.cells) for name in self.rows}
        return {name: choices for name, choices in loaded.items() if choices is not None}

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """Name of a kind of judgement -> its judgements."""
        return {kind.name: judgements.load(self.run, kind) for kind in judgements.KINDS}

    @cached_property
    def training(self) -> dict[int, dict[str, Any]]:
        """Stage -> the content of its train.json, for stages that were trained in this run."""
        return {s.index: read_json(s.train_file) for s in self.run.stages if s.train_file.exists()}

    @cached_property
    def versions(self) -> dict[str, dict[str, list[str]]]:
        """What scores depend on (a library, scoring code, a task, a method) -> version, if known -> its stages."""
        found: dict[str, dict[str, list[str]]] = {}
        method = f"of the method {self.run.manifest['method']}"
        made = [(index, {f"code {method}": t.get("method_code")}) for index, t in self.training.items()]
        # Older programs noted the method's whole file, with its comments.
        made += [(index, {f"file {method}": t.get("method_source")}) for index, t in self.training.items()]
        for (index, name), cell in sorted(self.cells.items()):
            own = {"commit": cell.get("commit"), f"definition of {name}": cell.get("definition")}
            made.append((index, {**cell.get("made_with", {}), **own}))
        for index, versions in made:
            for key, value in versions.items():
                if value is not None:
                    stages = found.setdefault(key, {}).setdefault(str(value), [])
                    if self.run.stages[index].name not in stages:
                        stages.append(self.run.stages[index].name)
        return found

    @property
    def other_versions(self) -> list[str]:
        """A text for each library or code that has different versions among the run's cells."""
        return [
            f"{key}: " + "; ".join(f"{value} at {', '.join(stages)}" for value, stages in versions.items())
            for key, versions in self.versions.items()
            if len(versions) > 1 and key != "commit"  # the fingerprint of the scoring code is more exact
        ]

    def evaluation_seconds(self, stage: Stage) -> float:
        """How long the evaluation of all existing cells of a stage took."""
        return sum(cell["seconds"] for (i, _), cell in self.cells.items() if i == stage.index)

    # ------------------------------------------------------------------------------------------ what the run is

    @property
    def is_single(self) -> bool:
        """Whether each task has its own model, trained from the base model."""
        return self.run.manifest["method"] == "single"

    @property
    def is_sequential(self) -> bool:
        """Whether row t is the model after tasks 1 to t, so that OP and BWT are defined."""
        run = self.run
        return bool(run.tasks) and run.is_sequence() and len(run.stages) == len(run.tasks) + 1 and not self.is_single

    @property
    def has_mean(self) -> bool:
        """Whether a mean over all tasks makes sense; it does not for checkpoints of unknown training."""
        return self.is_sequential or "checkpoints" not in self.run.manifest

    @property
    def final_stages(self) -> list[int]:
        """For each task the stage of its final score: the last one, or its own if each task has its own model."""
        last = len(self.run.stages) - 1
        return [i + 1 if self.is_single else last for i in range(len(self.run.tasks))]

    @property
    def final(self) -> Matrix:
        """The final score of each task."""
        return self.R[self.final_stages, range(len(self.run.tasks))]

    @cached_property
    def last_stage(self) -> int:
        """The last stage of a sequence at which all seen tasks are evaluated; 0 if there is none."""
        stages = range(1, len(self.run.stages)) if self.is_sequential else ()
        return max((t for t in stages if not np.isnan(self.R[t, :t]).any()), default=0)

    # ------------------------------------------------------------------------------------------------ statistics

    def task_rows(self, task: str, metric: str | None = None) -> Matrix:
        """The scores of a task's rows (None = headline), shape (rows, stages); without samples two rows of NaN."""
        rows, n = self.rows.get(task), len(self.run.stages)
        if rows is None:
            return np.full((2, n), np.nan)
        return rows.scores.get(metric or self.headlines[task], np.full((len(rows.ids), n), np.nan))

    def final_rows(self, task: str) -> Matrix:
        """The final headline scores of a task's rows, shape (rows,)."""
        return self.task_rows(task)[:, self.final_stages[self.run.tasks.index(task)]]

    def rows_since_own(self, task: str, t: int = -1, metric: str | None = None) -> Matrix:
        """The gains of a task's rows from its own stage to stage t, shape (rows,): their means make BWT.

        The metric is the headline (None), or one that is better if it is higher.
        """
        x, sign = self.task_rows(task, metric), self.units[task].sign if metric is None else 1
        return sign * (x[:, t] - x[:, self.run.tasks.index(task) + 1])

    def rows_ahead(self, task: str) -> Matrix:
        """Their gains from the base model to the stage before the task's own, shape (rows,): their means make FWT."""
        x = self.task_rows(task)
        return self.units[task].sign * (x[:, self.run.tasks.index(task)] - x[:, 0])

    @cached_property
    def intervals(self) -> dict[tuple[int, str, str], tuple[float, float]]:
        """(stage, name, metric) -> the interval of the score, if it has one."""
        found: dict[tuple[int, str, str], tuple[float, float]] = {}
        for name, rows in self.rows.items():
            cells = self.cells_of([name]).values()
            for fractions in (True, False):
                those = [m for m in rows.scores if (unit_of(m, cells).scale == 1) is fractions]
                if not those:
                    continue
                columns = np.concatenate([rows.scores[metric] for metric in those], axis=1)
                keys = [(stage.index, name, metric) for metric in those for stage in self.run.stages]
                estimates = rows.estimates(columns, partial(metrics.mean_interval, fractions=fractions))
                found |= {key: (e.low, e.high) for key, e in zip(keys, estimates, strict=True) if not math.isnan(e.low)}
        return found

    def score(self, stage: int, name: str) -> Estimate:
        """The headline score of a cell with its interval; NaN if there is no cell."""
        cell = self.cells.get((stage, name))
        if cell is None:
            return UNKNOWN
        return Estimate(headline(cell), *self.intervals.get((stage, name, cell["headline"]), ()))

    def cell(self, t: int, i: int) -> Estimate:
        """R[t, i] with its interval."""
        return self.score(t, self.run.tasks[i])

    @cached_property
    def mean(self) -> Estimate:
        """The mean of the final scores; NaN if the tasks have different units."""
        if self.unit is None:
            return UNKNOWN
        interval = partial(metrics.mean_interval, fractions=self.unit.scale == 1)
        bounds = [interval(self.final_rows(task)[:, None]) for task in self.run.tasks]
        return metrics.mean_of([Estimate(float(v), a[0], b[0]) for v, (a, b) in zip(self.final, bounds, strict=True)])

    @cached_property
    def sequence(self) -> dict[str, list[Estimate]]:
        """OP, BWT and Forgetting after each stage from 1 on; FWT and mean OP as lists of one.

        NaN if the tasks have different units. OP is a mean of scores; the others are means of gains. Forgetting has no
        interval, since its maximum is biased: see `metrics.bootstrap_interval`.
        """
        T, mean = len(self.run.tasks), metrics.mean_of
        if self.unit is None:
            lengths = {"OP": T, "BWT": T, "Forgetting": T, "FWT": 1, "mean OP": 1}
            return {name: [UNKNOWN] * length for name, length in lengths.items()}
        stages = range(1, T + 1)
        rows = [self.task_rows(task) for task in self.run.tasks]
        mean_op = metrics.mean_over_stages(rows, fractions=self.unit.scale == 1)
        return {
            "OP": [mean([self.cell(t, i) for i in range(t)]) for t in stages],
            "BWT": [mean([self.change(i, i + 1, t) for i in range(t - 1)]) for t in stages],
            "Forgetting": [Estimate(metrics.forgetting(self.gains, t)) for t in stages],
            "FWT": [mean([self.change(i, 0, i) for i in range(1, T)])],
            "mean OP": [mean_op._replace(value=metrics.average_accuracy(self.R))],
        }

    @cached_property
    def changes(self) -> dict[Change, Estimate]:
        """The gains of suites since the base model, and of tasks since the base model and since their own stage.

        For checkpoints of unknown training: since the base model and since the checkpoint before.
        """
        found: dict[Change, Estimate] = {}
        stages = range(len(self.run.stages))
        for i, task in enumerate(self.run.tasks):
            since: dict[int, Sequence[int]] = {0: stages[1:]}
            if self.is_sequential:
                since[i + 1] = stages[i + 2 :]
            elif not self.has_mean:
                since |= {t - 1: [t] for t in stages[2:]}
            for earlier, later in since.items():
                rows = self.rows.get(task)
                changes = rows.changes(self.units[task], list(later), earlier) if rows else [UNKNOWN] * len(later)
                for t, change in zip(later, changes, strict=True):
                    gain = float(self.gains[t, i] - self.gains[earlier, i])
                    found[Change(task, earlier, t)] = change._replace(value=gain)
        for suite in SUITES:
            later = [i for i, _ in self.cells_of([suite]) if i]
            if later and (0, suite) in self.cells and suite in self.rows:
                changes = self.rows[suite].changes(Unit(self.headlines[suite]), later, 0)
                found |= {Change(suite, 0, i): change for i, change in zip(later, changes, strict=True)}
        return found

    def change(self, i: int, earlier: int, later: int) -> Estimate:
        """The gain of R[later, i] over R[earlier, i], one of `changes`."""
        return self.changes[Change(self.run.tasks[i], earlier, later)]

    @property
    def tested(self) -> list[Change]:
        """The changes that a report tests: all but, in a sequence, most of the changes since the base model."""
        shown = set(self.changes)
        for i, task in enumerate(self.run.tasks if self.is_sequential else ()):
            shown -= {Change(task, 0, t) for t in range(len(self.run.stages))}
            shown |= {Change(task, 0, t) for t in (i + 1, max(i + 1, self.last_stage))}
        return [change for change in self.changes if change in shown]

    @cached_property
    def marks(self) -> dict[Change, int]:
        """The changes that get an arrow -> 1 or -1. They are significant together (Holm over all tested changes).

        A mark never contradicts the interval that is shown, which is not corrected.
        """
        p: dict[Change, float] = {}
        for (name, earlier), group in itertools.groupby(self.tested, key=lambda change: change[:2]):
            if name in self.rows:
                unit, those = self.units.get(name) or Unit(self.headlines[name]), list(group)
                p |= zip(those, self.rows[name].p_values(unit, [c.later for c in those], earlier), strict=True)
        certain = metrics.holm(list(p.values()))
        signs = {change: self.changes[change].sign for change, sure in zip(p, certain, strict=True) if sure}
        return {change: sign for change, sign in signs.items() if sign}

    def mark(self, name: str, earlier: int, later: int) -> int:
        """1 or -1 if a task or suite got significantly better or worse between two stages, else 0."""
        return self.marks.get(Change(name, earlier, later), 0)

    def matrix_mark(self, t: int, i: int) -> int:
        """The mark of R[t, i]: since the task's own stage, or since the base model if the run is no sequence."""
        return self.mark(self.run.tasks[i], i + 1 if self.is_sequential else 0, t)

    @cached_property
    def forms(self) -> list[Form]:
        """Loss of form and of knowledge, for the tasks of a sequence that have a form-tolerant accuracy."""
        tolerant, last = self.matrix("accuracy_tolerant"), self.last_stage
        found = []
        for i, task in enumerate(self.run.tasks[: max(0, last - 1)]):
            strict, knowledge = (float(R[i + 1, i] - R[last, i]) for R in (self.R, tolerant))
            if self.headlines[task] != "accuracy" or math.isnan(strict + knowledge):
                continue
            estimates = [Estimate(value) for value in (strict, knowledge, strict - knowledge)]
            if task in self.rows:
                scores = self.rows[task].scores
                a, b = (scores[m][:, i + 1] - scores[m][:, last] for m in ("accuracy", "accuracy_tolerant"))
                ends = zip(*metrics.difference_interval(np.stack([a, b, a - b], axis=1)), strict=True)
                estimates = [Estimate(e.value, *bounds) for e, bounds in zip(estimates, ends, strict=True)]
            found.append(Form(task, *estimates))
        return found

    @cached_property
    def general(self) -> dict[int, Estimate]:
        """Stage -> general-ability delta over those of the paper's suites that the base model was measured on.

        A stage that lacks one of them has no delta, since means over different suites cannot be compared.
        """
        base, *stages = (
            {s: headline(self.cells[stage.index, s]) for s in GROUPS["general"] if (stage.index, s) in self.cells}
            for stage in self.run.stages
        )
        found = {}
        for i, after in enumerate(stages, 1):
            if after and after.keys() == base.keys():
                value = metrics.general_ability_delta(base, after)
                changes = [self.changes.get(Change(suite, 0, i), UNKNOWN) for suite in after]
                if not math.isnan(value):
                    found[i] = Estimate(value, *metrics.mean_of(changes)[1:])
        return found
