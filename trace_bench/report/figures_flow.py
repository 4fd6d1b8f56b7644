"""The figure of where the test rows went over the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trace_bench.measures.transitions import CAME_BACK, GAINED, KEPT, LOST, NAMES, NEVER
from trace_bench.report.drawing import BLUE, GREEN, GREY, ORANGE, SKY, clipped, panels
from trace_bench.report.results import Results
from trace_bench.report.tables import PERCENT
from trace_bench.report.transitions import histories

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More tasks than these have no panel each; it is drawn for those that lost most.
MOST_PANELS = 24
_COLOURS = {KEPT: BLUE, CAME_BACK: SKY, GAINED: GREEN, LOST: ORANGE, NEVER: GREY}
_KEY = 0.35  # inches


def flow(results: Results) -> tuple[Figure, str] | None:
    """Stacked areas for each task and suite: what became of its rows since the stage that they are compared with."""
    found = results.once(histories)
    if not found:
        return None
    drawn = sorted(found, key=lambda h: -h.shares(h.stages[-1])[LOST])[:MOST_PANELS]
    drawn = [h for h in found if h in drawn]
    figure, axes = panels([PERCENT] * len(drawn), results.run.stages)
    for panel, history in zip(axes, drawn, strict=True):
        begin = np.zeros(len(NAMES))
        begin[[KEPT, NEVER]] = history.had, 1 - history.had
        shares = 100 * np.array([begin, *map(history.shares, history.stages)])
        order = list(_COLOURS)
        panel.stackplot(
            [history.reference, *history.stages],
            shares[:, order].T,
            colors=list(_COLOURS.values()),
            labels=[NAMES[fate] for fate in order],
            linewidth=0,
        )
        panel.set_ylim(0, 100)
        panel.set_title(clipped(history.title, 22))
    height = figure.get_figheight()
    bottom, top = figure.subplotpars.bottom * height, (1 - figure.subplotpars.top) * height
    height += _KEY
    figure.set_figheight(height)
    figure.subplots_adjust(bottom=bottom / height, top=1 - (top + _KEY) / height)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper left", ncols=len(NAMES), fontsize=8.0)
    note = f" Shown are the {MOST_PANELS} of {len(found)} that lost most." if len(found) > MOST_PANELS else ""
    return figure, (
        "Where the test rows went, percent. On the left the stage that they are compared with: right (kept) and wrong "
        f"(never).{note}"
    )
