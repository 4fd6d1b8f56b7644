"""The sentences of a comparison: why runs are not comparable, and what the numbers mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from trace_bench.metrics import Matrix
from trace_bench.report import paper
from trace_bench.report.conditions import conditions, delta_conditions, other_prompts
from trace_bench.report.entry import Entry, column_of
from trace_bench.report.orders import Family, are_one_method, order_of
from trace_bench.report.results import DELTAS, Results
from trace_bench.report.seeds import Group, SeedDifferences, seeds_needed
from trace_bench.report.tables import DASH, left_out_text, value_text
from trace_tasks.data import SUITES, task_name


def _ticks(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _runs(names: list[str], all_names: list[str]) -> str:
    """The names of runs for a sentence; if they are most of many runs, "all others"."""
    return "all others" if len(names) > max(3, len(all_names) / 2) else _ticks(names)


def _by_value(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Turns run -> what -> value into what -> value -> the runs that have it, without values of None."""
    found: dict[str, dict[str, list[str]]] = {}
    for run, values in facts.items():
        for what, value in values.items():
            if value is not None:
                found.setdefault(what, {}).setdefault(str(value), []).append(run)
    return found


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings(entries: Sequence[Entry], groups: Sequence[Group]) -> list[str]:
    """Warnings about differences between runs, other than the training, that change scores; and about limits."""
    return [*_not_comparable(entries), *_other_versions(entries), *_limits(entries), *_budgets(entries, groups)]


def _not_comparable(entries: Sequence[Entry]) -> list[str]:
    names = [e.name for e in entries]
    same_limit = len({e.run.manifest["config"].get("test_rows") for e in entries}) == 1  # else a warning says it
    facts = {e.name: {k: value_text(v) for k, v in _conditions(e, same_limit).items()} for e in entries}
    notes: dict[str, list[str]] = {}  # a grouping of the runs by value -> the facts with this grouping
    for key, values in _by_value(facts).items():
        if len(values) > 1:
            parts = {value: _runs(runs, names) for value, runs in values.items()}
            if key.startswith(("data of", "definition of")):  # a fingerprint: without it all tasks share one line
                text = " against ".join(parts.values())
            else:
                text = "; ".join(f"{value} in {runs}" for value, runs in parts.items())
            notes.setdefault(text, []).append(key)
    lines = [f"**Not comparable** in {', '.join(keys)}: {text}." for text, keys in notes.items()]
    odd = [e.name for e in entries if other_prompts(e.results)]
    if odd and len(entries) > 1:
        lines.append(f"**Not comparable** in prompts, which were changed and are not on record: {_ticks(odd)}.")
    return lines


def _conditions(entry: Entry, same_limit: bool) -> dict[str, Any]:
    """All that a run's scores depend on, other than its training."""
    run, config, cells = entry.run, entry.run.manifest["config"], entry.results.cells_of(entry.run.tasks)
    column = partial(column_of, run=run)
    found = {**conditions(run), "tasks": ", ".join(sorted(map(column, run.tasks)))}
    data, versions, definitions = (found.pop(key) for key in ("data", "task versions", "task definitions"))
    found |= {f"definition of {column(t)}": json.dumps(d) for t, d in (definitions or {}).items()}
    found |= {f"data of {column(task)}": fingerprint for task, fingerprint in data.items()}
    found |= {f"version of {task}": version for task, version in versions.items()}
    for settings in delta_conditions(entry.results).values():
        found |= settings
    if made := [cell["settings"] for cell in (cells or entry.results.cells).values()]:
        engines = {json.dumps(settings.get("engine") or "defaults", sort_keys=True) for settings in made}
        found["backend"] = ", ".join(sorted({settings["backend"] for settings in made}))
        found["engine settings"] = " and ".join(sorted(engines)).replace('"', "")
    if len(run.stages) > 1 and "checkpoints" not in run.manifest:
        found |= {f"{key} of the training": config.get(key) or None for key in ("dtype", "bf16", "fp16")}
    return found | {f"rows of {column(task)}": cell["n"] for (_, task), cell in cells.items() if same_limit}


def _other_versions(entries: Sequence[Entry]) -> list[str]:
    facts: dict[str, dict[str, Any]] = {}
    for e in entries:
        packages = e.run.manifest["packages"] if len(e.run.stages) > 1 else {}
        facts[e.name] = {f"{name} of the training": version for name, version in packages.items()}
        facts[e.name]["commit"] = e.run.manifest.get("commit")
        facts[e.name] |= {name: ", ".join(found) for name, found in e.results.versions.items() if name != "commit"}
    lines = _apart("Different versions", facts, partial(_runs, all_names=[e.name for e in entries]))
    return lines + [
        f"**Cells of different versions** in `{e.name}`: {text}." for e in entries for text in e.results.other_versions
    ]


def _limits(entries: Sequence[Entry]) -> Iterable[str]:
    suites = {e.name: [cell["settings"] for cell in e.results.cells_of(SUITES).values()] for e in entries}
    applies: dict[str, Callable[[Entry], Any]] = {
        "**Demo data**, not comparable with TRACE": lambda e: e.run.manifest["data"]["demo"],
        "**Limited test rows**, not comparable with the full data": lambda e: e.run.manifest["config"].get("test_rows"),
        "**Limited rows** of the general suites": lambda e: any(s["general_rows"] for s in suites[e.name]),
        "**Local copies** of general suites, comparable with the hub's only if they are complete": lambda e: any(
            s["data"] != "hub" for s in suites[e.name]
        ),
    }
    for text, applies_to in applies.items():
        if names := [e.name for e in entries if applies_to(e)]:
            yield f"{text}: {'all' if len(names) == len(entries) > 3 else _ticks(names)}."


def _budgets(entries: Sequence[Entry], groups: Sequence[Group]) -> list[str]:
    """Warnings about different budgets of methods: rows kept of earlier tasks, and seeds."""
    title, kept = "Unequal budgets", {e.name: _memory_rows(e.results) for e in entries}
    rows = {name: {"rows kept of an earlier task:": f"{n:,}"} for name, n in kept.items() if n is not None}
    single = [e.name for e in entries if groups and not any(e in group.entries for group in groups)]
    seeds = {group.name: len(group.entries) for group in groups} | dict.fromkeys(single, 1)
    of_seeds = {name: {"numbers of seeds:": n} for name, n in seeds.items()}
    return [*_apart(title, rows, _ticks), *_apart(title, of_seeds, _ticks)]


def _memory_rows(results: Results) -> int | None:
    """The most rows that a method keeps of any earlier task; None if it keeps none."""
    kept = [
        rows
        for train in results.training.values()
        for task, rows in (train.get("memory_rows") or train.get("replayed") or {}).items()
        if task != "alignment" and isinstance(rows, int)  # a user's method may record other things
    ]
    return max(kept, default=None) or results.run.manifest["config"].get("memory_rows")


def _apart(title: str, facts: Mapping[str, Mapping[str, Any]], named: Callable[[list[str]], str]) -> list[str]:
    """A line for each fact in which runs differ and which may explain a part of their differences."""
    return [
        f"**{title}**, which may cause a part of the differences: {what} "
        + "; ".join(f"{value} in {named(runs)}" for value, runs in values.items())
        + "."
        for what, values in _by_value(facts).items()
        if len(values) > 1
    ]


# --------------------------------------------------------------------------------------------------------------- notes


def notes(
    entries: Sequence[Entry],
    groups: Sequence[Group],
    families: Sequence[Family],
    seeds: Sequence[SeedDifferences],
    references: Sequence[dict[str, str]],
) -> Iterable[str]:
    """What the numbers mean, and which runs are incomplete."""
    yield from _definitions(entries)
    yield from _of_seeds(groups, families, seeds, len(entries))
    yield from _of_orders(families)
    for e in entries:
        if e.run.left_out:
            yield f"Without leaked rows in `{e.name}`: {left_out_text(e.results.left_out)}"
    unfinished = [e.name for e in entries if np.isnan(_needed(e.results)).any()]
    if unfinished:
        yield f"Not complete, so numbers are missing: {_ticks(unfinished)}."
    if references:
        yield paper.SETUP
    for row in references:
        known = {"training rows a task": row.get("train rows", DASH), "epochs": row.get("epochs", DASH)}
        texts = [row["model"], *(f"{what} {value}" for what, value in known.items() if value != DASH)]
        yield f"paper: {row['method']}: {', '.join(texts)}."


def _needed(results: Results) -> Matrix:
    """The cells needed for OP, BWT and Forgetting, or for the mean."""
    R = results.R
    return R[1:][np.tril_indices(R.shape[1])] if results.is_sequential else results.final


def _definitions(entries: Sequence[Entry]) -> Iterable[str]:
    yield "OP, BWT and Forgetting are those after the last stage (BWT divided by t-1); base = mean of the base model."
    if any(not math.isnan(e.scores["soft BWT"].value) for e in entries):
        yield "soft BWT = BWT of the log-likelihood of the reference answers, in nats per token."
    if any(not math.isnan(e.numbers[k]) for e in entries for k in DELTAS):
        yield (
            "general = mean change of the general-ability suites since the base model; instruction and safety = net "
            "win rate (win - lose) against it."
        )
    if any(e.results.not_percent for e in entries):
        names = dict.fromkeys(e.unit_name for e in entries)
        listed = "; ".join(f"{_ticks(e.name for e in entries if e.unit_name == name)} {name}" for name in names)
        yield (
            f"Unit of OP, BWT, FWT, Forgetting and base: {listed}. There is no mean over tasks with different units. "
            "Changes and differences are gains: + and ↑ are better; if lower is better, a fall is a gain."
        )
    means = [e.name for e in entries if e.results.has_mean and not e.results.is_sequential]
    if means:
        yield f"OP is the mean of the tasks, and BWT is not defined: {_ticks(means)}."
    if any(not math.isnan(score.low) for e in entries for score in e.scores.values()):
        yield (
            "In brackets: 95 % intervals over test rows, for the score of these trainings on all such rows. "
            "Differences are paired if both runs have the same test rows and, for tasks, the same settings; otherwise "
            "they have no interval."
        )
    ends = {tuple(column_of(e.run.tasks[k], e.run) for k in (0, -1)) for e in entries if e.results.is_sequential}
    if len(ends) > 1:
        yield (
            "BWT and Forgetting leave out the last task of a run, and FWT the first. In runs of different orders they "
            "may be means over different tasks; then their differences have no interval."
        )


def _of_seeds(
    groups: Sequence[Group], families: Sequence[Family], seeds: Sequence[SeedDifferences], entries: int
) -> Iterable[str]:
    if groups:
        runs = {group.name: _ticks(e.name for e in group.entries) for group in groups}
        listed = "; ".join(f"`{name}` ({names})" if len(groups) > 1 else names for name, names in runs.items())
        yield (
            f"The seeds are those of {listed}, which differ only in the seed. Their interval (Student's t) is for the "
            "mean over all seeds on the same test rows; a single new training may be outside it. If all seeds gave the "
            "same number, the variance cannot be estimated and there is a dash."
        )
    if seeds:
        reference = next(group for group in groups if all(d.group is not group for d in seeds))
        kinds = {True: "paired by seed", False: "Welch's, since the seeds differ"}
        listed = "; ".join(
            f"{_ticks(d.group.name for d in seeds if d.is_paired is paired)} {kind}"
            for paired, kind in kinds.items()
            if any(d.is_paired is paired for d in seeds)
        )
        yield (
            f"Differences of seed means to `{reference.name}`: {listed}; in brackets 95 % intervals "
            "(Student's t). ↓, ↑: worse, better. Arrows are corrected for all tested differences to it, over all "
            "scores and tasks (Holm, with half of the level for OP): if no method differs, at most one comparison "
            "in twenty shows an arrow. Intervals are not corrected."
        )
        own = [d.both for d in seeds if d.reference is not reference]
        if own:
            yield f"A different order of the tasks, compared with the same method in that order: {', '.join(own)}."
        moved = [d for d in seeds if order_of(d.group) != order_of(d.reference)]
        mixed = [d.group.name for d in moved if not are_one_method(d.group, d.reference, families)]
        if mixed:
            yield (
                f"Trained in a different order or on different tasks than `{reference.name}`: {_ticks(mixed)}. Their "
                "differences and arrows mix the effects of the method and of the order. To see the method alone, add "
                "the baseline's method in that order, with at least two seeds."
            )
    if entries > 1:
        yield (
            "There are no arrows for differences of single runs, since new trainings might give other results. For "
            "arrows, both sides need at least two seeds"
            + (", in the same conditions." if seeds else "; here no two methods have them.")
        )
    if needed := seeds_needed(groups):
        yield needed


def _of_orders(families: Sequence[Family]) -> Iterable[str]:
    orders = dict.fromkeys(order for family in families for order in family.orders)
    if orders:
        listed = "; ".join(", ".join(map(task_name, order)) for order in orders)
        yield (
            f"Orders of the tasks: {listed}. A mean over orders is over these. The interval of a difference is over "
            "the seeds in each order, or over the orders if each has one seed. Methods with different orders, or "
            "measured under different conditions, have no interval."
        )
