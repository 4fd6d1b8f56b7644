"""Methods over several orders of the tasks: their means, and differences to the baseline's method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_bench.manifest import differences
from trace_bench.measures.seeds import order_difference
from trace_bench.metrics import Estimate
from trace_bench.report.conditions import same_conditions
from trace_bench.report.differences import defined
from trace_bench.report.entry import SCORES, Entry
from trace_bench.report.results import UNKNOWN
from trace_bench.report.seeds import Group, csv_lines, mean_and_deviation
from trace_bench.report.tables import Table

#: An order of tasks.
Order = tuple[str, ...]
#: Families with their differences to the baseline's family: score -> difference.
Differences = list[tuple["Family", dict[str, Estimate]]]


@dataclass(frozen=True)
class Family:
    """Runs that differ only in the order of the tasks and in the seed."""

    name: str
    orders: dict[Order, Group]
    """Order -> its runs, with any seed."""

    @property
    def first(self) -> Entry:
        """One of the runs; all have the same conditions and units."""
        return next(iter(self.orders.values())).entries[0]

    def means(self, name: str) -> list[float]:
        """One of `NUMBERS` in each order: the mean over its seeds."""
        return [float(np.mean(group.numbers(name))) for group in self.orders.values()]


def order_of(group: Group) -> Order:
    """The order of a group's tasks."""
    return tuple(group.entries[0].run.tasks)


def families_of(lines: Iterable[Group]) -> list[Family]:
    """The methods that were trained in at least two orders of the same tasks."""
    together: list[list[Group]] = []
    for line in lines:
        family = next((f for f in together if not differences(*map(_without_order, (f[0], line)))), [])
        if not family:
            together.append(family)
        family.append(line)
    found = [{order_of(line): line for line in family} for family in together]
    found = [orders for orders in found if len(orders) > 1]
    firsts = [next(iter(orders.values())) for orders in found]
    methods = [first.entries[0].texts["method"] for first in firsts]
    return [
        Family(method if methods.count(method) == 1 else f"{first.name} and its orders", orders)
        for method, first, orders in zip(methods, firsts, found, strict=True)
    ]


def _without_order(group: Group) -> dict[str, Any]:
    """The manifest of a group's runs without the order of the tasks and the seed; epochs by task."""
    manifest = group.entries[0].run.manifest
    config = {key: value for key, value in manifest["config"].items() if key not in ("tasks", "seed")}
    if isinstance(epochs := config.get("epochs"), list) and len(epochs) == len(manifest["tasks"]):
        config["epochs"] = dict(zip(manifest["tasks"], epochs, strict=True))
    return {**manifest, "tasks": sorted(manifest["tasks"]), "seed": None, "config": config}


def of_method(families: Iterable[Family], group: Group) -> Family | None:
    """The family that a group belongs to."""
    return next((family for family in families if group in family.orders.values()), None)


def are_one_method(one: Group, two: Group, families: Iterable[Family]) -> bool:
    """Whether two groups differ only in the order of the tasks."""
    return any(one in family.orders.values() and two in family.orders.values() for family in families)


def are_mixed(one: Group, two: Group, families: Iterable[Family]) -> bool:
    """Whether two groups differ in both method and order of the same tasks, so that their effects are mixed."""
    orders = order_of(one), order_of(two)
    moved = orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    return moved and not are_one_method(one, two, families)


def held_against(group: Group, baseline: Group, families: Sequence[Family]) -> Group:
    """The group to compare a group with: the baseline's method in the same order, if there is one with seeds."""
    family = of_method(families, baseline)
    found = family.orders.get(order_of(group), baseline) if family else baseline
    return baseline if found is group or len(found.entries) < 2 else found


def difference(family: Family, other: Family) -> dict[str, Estimate]:
    """Those of `SCORES` -> the mean over the orders of the difference of the means over the seeds, as a gain.

    Empty where the two were not trained in the same orders, or are not measured under the same conditions.
    """
    one, two = family.first, other.first
    if family.orders.keys() != other.orders.keys() or not same_conditions(one.results, two.results):
        return {}
    pairs = [(group, other.orders[order]) for order, group in family.orders.items()]
    return {
        name: order_difference([(mine.gains(name), theirs.gains(name)) for mine, theirs in pairs])[0]
        for name in defined(one, two)
    }


def differences_to(families: Sequence[Family], baseline: Group) -> Differences:
    """The families that have a `difference` to the baseline's family, with these differences."""
    reference = of_method(families, baseline)
    found = [(family, difference(family, reference)) for family in families if reference and family is not reference]
    return [(family, estimates) for family, estimates in found if estimates]


def tables(families: Sequence[Family], baseline: Group, to_baseline: Differences, in_percent: bool) -> list[Table]:
    """The means over the orders, and the differences to the baseline's method."""
    rows = []
    for family in families:
        cells = (mean_and_deviation(family.means(name), family.first.writer(name)) for name in SCORES)
        runs = sum(len(group.entries) for group in family.orders.values())
        rows.append([family.name, str(len(family.orders)), str(runs), *cells])
    unit = "scores in percent" if in_percent else "scores in percent or the unit of the run's tasks"
    about = f"mean ± standard deviation over the orders of the tasks (each order: the mean over its seeds); {unit}"
    means = Table(["run", "orders", "runs", *SCORES], rows, "Over orders", about)
    rows = []
    for family, estimates in to_baseline:
        texts = (family.first.unit(s).with_interval(estimates.get(s, UNKNOWN), sign=True) for s in SCORES)
        rows.append([family.name, *texts])
    title = f"Difference over orders to `{reference.name}`" if (reference := of_method(families, baseline)) else ""
    about = "in points; no arrows" if in_percent else "gains, in points or the unit of the tasks; no arrows"
    found = [means, Table(["run", *SCORES], rows, title, about)]
    return [table.without_empty_columns() for table in found if table.rows]


def lines(families: Sequence[Family], to_baseline: Differences) -> list[dict[str, Any]]:
    """The lines of the CSV with the same numbers."""
    found: list[dict[str, Any]] = []
    for family in families:
        over, values = f"over {len(family.orders)} orders", {name: family.means(name) for name in SCORES}
        found.append({"run": f"{family.name}: mean {over}", **{k: np.mean(v) for k, v in values.items()}})
        deviations = {k: np.std(v, ddof=1) for k, v in values.items()}
        found.append({"run": f"{family.name}: standard deviation {over}", **deviations})
    for family, estimates in to_baseline:
        found += csv_lines("difference over orders", f"{family.name} against the baseline", family.first, estimates)
    return found
