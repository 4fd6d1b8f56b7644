"""What all figures share: colours and style, axes, and SVG and PNG made by matplotlib.

They are the same bytes whenever they are drawn from the same numbers. Colours are those of Okabe and Ito, which the
colour-blind can tell apart, and what they mean is told by shape, place or text too.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trace_bench.metrics import Estimate
from trace_bench.report.tables import PERCENT, Unit
from trace_bench.run import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More stages than these are numbered, not named; more tasks have no number in the cells of the matrix.
MOST_NAMES = 12

INK, MUTED, RULE = "#1c2024", "#5f6873", "#d3d8de"
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
GREY = "#9aa3ad"
ON_BAR = {BLUE: "#fffffe", ORANGE: "#10151b", GREY: "#10151b"}  # numbers
SERIES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (YELLOW, "v"), (SKY, "P"), (GREY, "X")]
#: Colour -> the name of the variable of the page that replaces it there, for dark and light.
COLOURS = {
    **{INK: "ink", MUTED: "muted", RULE: "rule", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple"},
    **{YELLOW: "yellow", SKY: "sky", GREY: "grey", ON_BAR[BLUE]: "on-blue"},
}
WIDTH = 10.0  # inches
_STYLE = Path(__file__).parent / "figures.mplstyle"
#: Characters of a name that XML cannot hold.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

#: Draws a figure and says what it shows; None where there is nothing to draw.
Drawing = Callable[[Any], "tuple[Figure, str] | None"]


class Picture(NamedTuple):
    """A drawn figure."""

    name: str
    caption: str
    svg: str
    png: bytes
    cut: float | None
    """Where panels side by side can be cut apart, to stand one below the other: points from the left."""


def draw(drawings: Mapping[str, Drawing], of: Any) -> list[Picture]:
    """Draws what there is, with our style and nothing of the user's own."""
    import matplotlib

    drawn = []
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(_STYLE, use_default_template=False))
        for name, drawing in drawings.items():
            if made := drawing(of):
                figure, caption = made
                drawn.append(Picture(name, caption, _svg(figure), _png(figure), _cut(figure)))
    return drawn


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _NO_XML.sub("\ufffd", out.getvalue())


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _cut(figure: Figure) -> float | None:
    """Between the halves of two or four columns, with room for the numbers at an axis; None where there are names."""
    columns = sorted({tuple(axes.get_position().intervalx) for axes in figure.axes})
    if len(columns) not in (2, 4) or columns[0][0] * WIDTH > 1:
        return None
    end, begin = columns[len(columns) // 2 - 1][1], columns[len(columns) // 2][0]
    return 72 * (WIDTH * begin - min(0.55, 0.9 * WIDTH * (begin - end)))


def axes_of(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    left: float = 0.6,
    gap: float = 0.6,
    right: float = 0.15,
    **kwargs: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; margins and gaps in inches, since measuring texts takes long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    bottom, top = 0.55, 0.35
    wide = (WIDTH - left - right - gap * (columns - 1)) / columns
    high = (height - bottom - top - 0.5 * (rows - 1)) / rows
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    sides = {"left": left / WIDTH, "right": 1 - right / WIDTH, "bottom": bottom / height, "top": 1 - top / height}
    figure.subplots_adjust(**sides, wspace=gap / wide, hspace=0.5 / high)
    return figure, list(axes.flat)


def panels(units: Sequence[Unit], stages: Sequence[Stage]) -> tuple[Figure, list[Axes]]:
    """A small panel for each unit, four in a row, scores over stages; units that are not all percent are named."""
    count, shared = len(units), all(unit.is_percent for unit in units)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, axes = axes_of(1.0 + 1.65 * rows, rows, columns, left=0.5, gap=0.42, sharex=True, sharey=shared)
    for panel, unit in zip(axes[: 1 if shared else count], units, strict=False):
        if not shared:
            panel.set_ylabel(unit.name, fontsize=7.0, labelpad=1.0)
        if unit.scale == 1:
            panel.set_ylim(-4, 104)
            panel.set_yticks([0, 50, 100])
    number_stages(stages, axes[0])
    for i, panel in enumerate(axes):
        panel.set_visible(i < count)
        lowest = i + columns >= count
        numbers = not shared or i % columns in (0, columns // 2)
        panel.tick_params(labelsize=8, labelbottom=lowest, labelleft=numbers)
        panel.set_xlabel("stage" if lowest else "")
    return figure, axes[:count]


def clipped(text: str, most: int = 14) -> str:
    """A text no longer than so many letters, its middle left out: names of runs differ at their ends."""
    if _letters(text) <= most:
        return text
    head = tail = ""
    for first, last in zip(text, reversed(text), strict=True):
        if _letters(head + first + tail) < most:
            head += first
        if _letters(head + last + tail) < most:
            tail = last + tail
    return f"{head}…{tail}"


def _letters(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def number_stages(stages: Sequence[Stage], *panels: Axes) -> None:
    """Numbers the stages below the axes of panels."""
    step = max(1, math.ceil(len(stages) / (MOST_NAMES + 1)))
    ticks = {s.index: str(s.number) for s in stages if s.index % step == 0}
    for panel in panels:
        panel.set_xticks(list(ticks), ticks.values(), fontsize=8.0)
        panel.set_xlim(stages[0].index - 0.5, stages[-1].index + 0.5)
        panel.set_xlabel("stage")


def grid_across(axes: Axes) -> None:
    """Lines from top to bottom alone."""
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")


def line(
    axes: Axes,
    x: Sequence[int],
    estimates: Sequence[Estimate],
    colour: str,
    marker: str = "o",
    unit: Unit = PERCENT,
    **kwargs: Any,
) -> None:
    """A line through estimates, with their intervals as bars; a gap where there is none."""
    values, low, high = shown(estimates, unit)
    axes.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.65)
    axes.plot(x, values, color=colour, marker=marker if len(values) <= 40 else "", **kwargs)


def shown(estimates: Sequence[Estimate], unit: Unit = PERCENT) -> list[Any]:
    """Values, low and high ends of estimates, as they are shown."""
    return [unit.factor * np.array([e[k] for e in estimates], dtype=float) for k in range(3)]
