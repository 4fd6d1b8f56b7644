"""What tasks and suites lost: since their own stage, since another stage of the run, or against another run.

A part is a task or suite with its gain. The parts of a group have the same starting point. Rows are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from trace_bench import metrics, records
from trace_bench.manifest import differences
from trace_bench.metrics import Estimate
from trace_bench.report.differences import final_gains, task_difference
from trace_bench.report.results import Change, Results, headline
from trace_bench.report.tables import PERCENT, Unit, shared_unit
from trace_bench.run import Run, RunError
from trace_bench.text import word
from trace_tasks.data import GROUPS, SUITES


class Part(NamedTuple):
    """The gain of a task or suite."""

    name: str
    gain: Estimate
    rows: int
    """How many test rows it has; 0 = there are no samples."""
    unit: Unit


class Group(NamedTuple):
    """The gains of several tasks or suites since the same starting point."""

    since: str
    parts: list[Part]

    @property
    def averaged(self) -> set[str]:
        """The names of those whose mean stands for the group: all but the suites that the paper does not have."""
        return {p.name for p in self.parts if p.name in GROUPS["general"] or p.name not in SUITES}

    @property
    def mean(self) -> Part | None:
        """The mean, with the rows of all of its parts; None without a common unit."""
        own = [part for part in self.parts if part.name in self.averaged]
        unit = shared_unit(part.unit for part in own)
        if unit is None or not own:
            return None
        return Part("", metrics.mean_of([part.gain for part in own]), sum(part.rows for part in own), unit)


def _part(results: Results, name: str, gain: Estimate) -> Part:
    rows = len(results.rows[name].ids) if name in results.rows else 0
    return Part(name, gain, rows, results.units.get(name, PERCENT))


# ------------------------------------------------------------------------------------------------------- within a run


def of_tasks(results: Results) -> list[Group]:
    """What the old tasks of a sequence gained since their own stages, to the last one: their mean is BWT.

    Of checkpoints of unknown training: what the last one gained since the base model, and since the one before it.

    Raises:
        RunError: if the run has neither, or cells are missing, with the command that makes them.
    """
    run, last = results.run, results.run.stages[-1]
    if results.is_sequential and last.index > 1:
        since = {"its own stage": {task: i for i, task in enumerate(run.tasks[:-1], 1)}}
    elif run.tasks and not results.has_mean:
        which = run.manifest["config"].get("cells", "seen")
        since = {}
        for stage in run.stages[:-1][:1] + run.stages[:-1][-1:]:
            both = set(run.seen_tasks(stage, which)) & set(run.seen_tasks(last, which))
            name = stage.name if stage.index else "the base model"
            since[name] = {task: stage.index for task in run.tasks if task in both}
    else:
        raise RunError(
            f"--max-forgetting: {run.path} ({run.manifest['method']}) does not train several tasks in sequence, so it "
            "cannot forget. Compare it with a different run (--against), or use only --max-general-drop."
        )
    if not since:
        raise RunError(
            f"{run.path} has no checkpoint, so nothing can be forgotten. Add one: "
            f"trace-bench evaluate {word(run.path)} --checkpoint NAME=FOLDER"
        )
    pairs = [(task, stage) for earlier in since.values() for task, stage in earlier.items()]
    _require(results, [cell for task, stage in pairs for cell in ((stage, task), (last.index, task))])
    return [
        Group(name, [_part(results, t, results.changes[Change(t, i, last.index)]) for t, i in earlier.items()])
        for name, earlier in since.items()
    ]


def of_suites(results: Results) -> Group:
    """What the general suites gained since the base model, at the last stage.

    Raises:
        RunError: if they are not measured, with the command that does.
    """
    last = results.run.stages[-1]
    there = _suites(results, 0, "the base model")
    missing = [suite for suite in there if (last.index, suite) not in results.cells]
    if missing:
        _lack_suites(results, ", ".join(missing), last.name, there)
    parts = []
    for suite in there if last.index else []:
        value = Estimate(headline(results.cells[last.index, suite]) - headline(results.cells[0, suite]))
        parts.append(_part(results, suite, results.changes.get(Change(suite, 0, last.index), value)))
    return Group("the base model", parts)


def _suites(results: Results, index: int, stage: str) -> list[str]:
    """The suites that a stage is measured on; refuses none."""
    _require(results, [])
    there = [suite for suite in SUITES if (index, suite) in results.cells]
    if not there:
        _lack_suites(results, "any general suite", stage, ["general"])
    return there


def _lack_suites(results: Results, missing: str, stage: str, suites: Sequence[str]) -> NoReturn:
    command = f"trace-bench evaluate {word(results.run.path)} --general {' '.join(suites)}"
    raise RunError(
        f"--max-general-drop: {results.run.path} has no score of {missing} at {stage}. {_measure(results.run, command)}"
    )


def _require(results: Results, cells: Iterable[tuple[int, str]]) -> None:
    """Makes sure that the stages are trained, each from the one before, and that the cells exist."""
    run = results.run
    if untrained := [stage.name for stage in run.stages if not stage.is_trained]:
        raise RunError(
            f"{run.path}: {', '.join(untrained)} is not trained. Train it, then: trace-bench evaluate {word(run.path)}"
        )
    records.check_stages(run, run.stages[1:])
    if missing := dict.fromkeys(cell for cell in cells if cell not in results.cells):
        listed = ", ".join(f"{task} at {run.stages[i].name}" for i, task in missing)
        more = " --cells seen" if run.manifest["config"].get("cells") == "own" else ""
        command = f"trace-bench evaluate {word(run.path)}{more}"
        raise RunError(f"{run.path} has no score of {listed}. {_measure(run, command)}")


def _measure(run: Run, command: str) -> str:
    """The command that makes a missing score."""
    if run.manifest.get("answers_only"):
        return "The run was made elsewhere: import this score with the others, or measure it with the callback."
    return f"Measure it: {command}"


# ------------------------------------------------------------------------------------------------ against another run


def of_tasks_against(one: Results, two: Results) -> Group:
    """The gains of a run's final task scores over those of another run, on the same test rows.

    Raises:
        RunError: naming the tasks, settings or rows that differ, or the cells that are missing.
    """
    a, b = (dict(zip(r.run.tasks, r.final_stages, strict=True)) for r in (one, two))
    if a.keys() != b.keys() or not a:
        names = [", ".join(sorted(end)) or "none" for end in (a, b)]
        _refuse(one, two, [f"  tasks: {names[0]} -> {names[1]}"])
    for results, end in ((one, a), (two, b)):
        _require(results, [(i, task) for task, i in end.items()])
    _check_same(one, two, {task: (a[task], b[task]) for task in a})
    parts = []
    for task in one.run.tasks:
        x, y = (float(r.gains[end[task], r.run.tasks.index(task)]) for r, end in ((one, a), (two, b)))
        gain = Estimate(x - y, *task_difference(one, two, task, final_gains)[1:])
        parts.append(_part(one, task, gain))
    return Group(str(two.run.path), parts)


def of_suites_against(one: Results, two: Results) -> Group:
    """The gains of a run's general suites at the last stage over those of another run, on the same rows.

    Raises:
        RunError: as `of_tasks_against`.
    """
    i, j = (results.run.stages[-1].index for results in (one, two))
    suites, others = (_suites(r, index, r.run.stages[-1].name) for r, index in ((one, i), (two, j)))
    if suites != others:
        _refuse(one, two, [f"  general suites: {', '.join(suites)} -> {', '.join(others)}"])
    _check_same(one, two, dict.fromkeys(suites, (i, j)))
    parts = []
    for suite in suites:
        gain = Estimate(headline(one.cells[i, suite]) - headline(two.cells[j, suite]))
        if suite in one.rows and suite in two.rows:
            differences_of_rows = one.task_rows(suite)[:, i] - two.task_rows(suite)[:, j]
            (paired,) = one.rows[suite].estimates(differences_of_rows[:, None], metrics.difference_interval)
            gain = Estimate(gain.value, *paired[1:])
        parts.append(_part(one, suite, gain))
    return Group(str(two.run.path), parts)


def _check_same(one: Results, two: Results, cells: dict[str, tuple[int, int]]) -> None:
    """Makes sure that cells (name -> its stage in each run) were asked and scored in one way, on the same rows."""
    lines: dict[str, None] = {}
    data = [r.run.manifest["data"] for r in (one, two)]
    for name, (i, j) in cells.items():
        a, b = one.cells[i, name], two.cells[j, name]
        lines |= dict.fromkeys(differences(a.get("settings", {}), b.get("settings", {})))
        for key in ("headline", "version", "definition"):
            if a.get(key, b.get(key)) != b.get(key, a.get(key)):  # older cells do not say all of them
                lines[f"  {key} of {name}: {a[key]} -> {b[key]}"] = None
        key = "test" if all(name in d.get("test", {}) for d in data) else "fingerprint"
        x, y = (d.get(key, {}).get(name) for d in data)
        if x != y:
            lines[f"  rows of {name}: fingerprint {x} -> {y}"] = None
        elif a["n"] != b["n"]:
            lines[f"  rows of {name}: {a['n']} -> {b['n']}"] = None
        elif name in one.rows and name in two.rows and one.rows[name].ids != two.rows[name].ids:
            lines[f"  rows of {name}: the same number, but different rows"] = None
    if lines:
        _refuse(one, two, list(lines))


def _refuse(one: Results, two: Results, lines: list[str]) -> NoReturn:
    raise RunError(
        f"{one.run.path} and {two.run.path} cannot be compared row by row:\n"
        + "\n".join(lines)
        + "\nEvaluate both with the same tasks, settings and data."
    )
