"""The figures of distance and forgetting: over the stages of a run, and over several runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trace_bench.metrics import Estimate
from trace_bench.report.distance import Point, correlations, last_points, points
from trace_bench.report.drawing import BLUE, MUTED, SERIES, axes_of, clipped
from trace_bench.report.results import Results
from trace_bench.report.tables import Unit, shared_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trace_bench.report.comparison import Comparison

_PANELS = {"own": "on the prompts of the stage's own task", "neutral": "on neutral questions"}
_WHAT = "KL(base || stage), nats per token, against -BWT_t; bars: 95 % intervals over prompts and over test rows."


def distance(results: Results) -> tuple[Figure, str] | None:
    """The stages of a run."""
    found, unit = points(results), results.unit
    names = _drawn(found)
    if unit is None or len(found) < 2 or not names:
        return None
    figure, panels = axes_of(3.3, 1, len(names), left=0.6)
    for axes, name in zip(panels, names, strict=True):
        _frame(axes, name, unit)
        for point in found:
            x, y = getattr(point, name), point.forgetting
            _cross(axes, x, y, unit, BLUE, "o")
            if not math.isnan(x.value + y.value):
                at = (x.value, unit.factor * y.value)
                axes.annotate(str(point.stage), at, xytext=(5, 4), textcoords="offset points", fontsize=8.0)
    return figure, f"Distance and forgetting, a point a stage: {_WHAT} {correlations(found)}".strip()


def distances(comparison: Comparison) -> tuple[Figure, str] | None:
    """The last stages of runs, methods by colour."""
    found = last_points(comparison.entries)
    of_method = {e.name: e.texts["method"] for e in comparison.entries if e.name in found}
    unit = shared_unit(e.unit("BWT") for e in comparison.entries if e.name in found)
    names = _drawn(list(found.values()))
    if unit is None or len(found) < 2 or not names:
        return None
    series = dict(zip(dict.fromkeys(of_method.values()), itertools.cycle(SERIES), strict=False))
    figure, panels = axes_of(3.6, 1, len(names), left=0.6, right=1.6)
    for axes, name in zip(panels, names, strict=True):
        _frame(axes, name, unit)
        for run, point in found.items():
            _cross(axes, getattr(point, name), point.forgetting, unit, *series[of_method[run]])
    for method, (colour, marker) in series.items():
        panels[-1].plot([], [], color=colour, marker=marker, linestyle="none", label=clipped(method, 16))
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return (
        figure,
        f"Distance and forgetting, a point a run, its last stage: {_WHAT} {correlations([*found.values()])}".strip(),
    )


def _drawn(found: Sequence[Point]) -> list[str]:
    """The panels that have points."""
    return [name for name in _PANELS if any(not math.isnan(getattr(p, name).value + p.forgetting.value) for p in found)]


def _frame(axes: Axes, name: str, unit: Unit) -> None:
    axes.set_title(_PANELS[name])
    axes.set_xlabel("KL from the base model, nats per token")
    axes.set_ylabel(f"forgotten, {unit.of_changes}")
    axes.axhline(0, color=MUTED, linewidth=0.8)


def _cross(axes: Axes, x: Estimate, y: Estimate, unit: Unit, colour: str, marker: str) -> None:
    """A point with its two intervals."""
    value, low, high = (unit.factor * number for number in y)
    axes.hlines([value], [x.low], [x.high], color=colour, linewidth=0.9, alpha=0.5)
    axes.vlines([x.value], [low], [high], color=colour, linewidth=0.9, alpha=0.5)
    axes.plot([x.value], [value], color=colour, marker=marker, linestyle="none")
