"""The figures of a run, drawn by matplotlib: each as SVG, for a page or a paper, and as PNG.

They are the same bytes whenever they are drawn from the same numbers. Colours are those of Okabe and Ito, which the
colour-blind can tell apart, and what they mean is told by shape, place or text too.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from judges.judging import KINDS
from judges.report import pooled
from trace_bench.metrics import Estimate
from trace_bench.results import DELTAS, Results, headline
from trace_bench.run import Stage
from trace_bench.tables import DASH, PERCENT, Unit, shade, shared_unit, task_name
from trace_tasks.data import SUITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trace_bench.comparison import Comparison

#: More tasks than these have no curve each; it is shown for the ones that changed most.
MOST_CURVES = 24
#: More runs than these are not drawn beside each other.
MOST_RUNS = 40
#: More stages than these are numbered, not named; more tasks have no number in the cells of the matrix.
MOST_NAMES = 12

INK, MUTED, RULE = "#1c2024", "#5f6873", "#d3d8de"
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#9aa3ad",
)
ON_BLUE, ON_LIGHT = "#fffffe", "#10151b"  # numbers on bars
#: Colour -> the name of the variable of the page that replaces it there, for dark and light.
COLOURS = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    PURPLE: "purple",
    YELLOW: "yellow",
    SKY: "sky",
    GREY: "grey",
    ON_BLUE: "on-blue",
}
_SERIES = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (YELLOW, "v"), (SKY, "P"), (GREY, "X")]
_HEAT = ["#dbe9f6", "#9ecae1", "#3f8fc5", "#08306b"]
_WIDTH = 10.0  # inches
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, which can be searched and takes the page's font
    "svg.hashsalt": "trace-bench",  # ids are the same in every run of the program
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titley": 1.0,  # fixed, since finding a place for it measures all labels
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


#: Characters of a name that XML cannot hold.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    name: str
    """The stem of its files."""
    caption: str
    svg: str
    png: bytes
    cut: float | None
    """Where panels beside each other can be cut apart, to stand one below the other: points from the left."""


def pictures(results: Results) -> list[Picture]:
    """Draws what the run has numbers for."""
    return _drawn(_DRAW, results)


def pictures_of_runs(comparison: Comparison) -> list[Picture]:
    """Draws several runs beside each other."""
    return _drawn(_DRAW_RUNS, comparison)


def _drawn(drawings: Mapping[str, Callable[[Any], tuple[Figure, str] | None]], of: Any) -> list[Picture]:
    drawn = []
    with _style():
        for name, draw in drawings.items():
            made = draw(of)
            if made is not None:
                figure, caption = made
                drawn.append(Picture(name, caption, _svg(figure), _png(figure), _cut(figure)))
    return drawn


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib with our style and nothing of the user's own."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


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
    if len(columns) not in (2, 4) or columns[0][0] * _WIDTH > 1:
        return None
    end, begin = columns[len(columns) // 2 - 1][1], columns[len(columns) // 2][0]
    return 72 * (_WIDTH * begin - min(0.55, 0.9 * _WIDTH * (begin - end)))


def _axes(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    left: float = 0.6,
    bottom: float = 0.55,
    gap: float = 0.6,
    right: float = 0.15,
    **kwargs: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; margins and gaps in inches, since measuring texts takes long."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    top = 0.35
    wide = (_WIDTH - left - right - gap * (columns - 1)) / columns
    high = (height - bottom - top - 0.5 * (rows - 1)) / rows
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    figure.subplots_adjust(
        left=left / _WIDTH,
        right=1 - right / _WIDTH,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=gap / wide,
        hspace=0.5 / high,
    )
    return figure, list(axes.flat)


def _panels(units: Sequence[Unit], stages: Sequence[Stage]) -> tuple[Figure, list[Axes]]:
    """A figure with a small panel for each unit, four in a row, scores over stages.

    Where all are percent they share an axis, and both halves of the figure have its numbers.
    """
    count, shared = len(units), all(unit.is_percent for unit in units)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, axes = _axes(1.0 + 1.65 * rows, rows, columns, left=0.5, bottom=0.55, gap=0.42, sharex=True, sharey=shared)
    for panel, unit in zip(axes[: 1 if shared else count], units, strict=False):
        if unit.scale == 1:
            panel.set_ylim(-4, 104)
            panel.set_yticks([0, 50, 100])
    _name_stages(axes[0], stages, wide=False)
    for i, panel in enumerate(axes):
        panel.set_visible(i < count)
        numbers = not shared or i % columns in (0, columns // 2)
        panel.tick_params(labelsize=8, labelbottom=i + columns >= count, labelleft=numbers)
        if i + columns >= count:  # the lowest of its column
            panel.set_xlabel("stage")
    return figure, axes[:count]


def stage_label(stage: Stage) -> str:
    """A stage's name in a figure."""
    if stage.index == 0:
        return "base"
    return task_name(stage.task) if stage.task else stage.name.partition("_")[2]


def _clipped(text: str, most: int = 14) -> str:
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
    """The width of a text; Chinese characters are twice as wide as others."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _name_stages(axes: Axes, stages: Sequence[Stage], wide: bool = True) -> None:
    """Numbers the stages below an axis, and names them where there is room."""
    step = max(1, math.ceil(len(stages) / (MOST_NAMES + 1)))
    ticks = [s for s in stages if s.index % step == 0]
    named = wide and len(stages) <= MOST_NAMES
    labels = [f"{s.index}\n{_clipped(stage_label(s), 12)}" if named else str(s.index) for s in ticks]
    axes.set_xticks([s.index for s in ticks], labels, fontsize=8.0)
    axes.set_xlim(stages[0].index - 0.5, stages[-1].index + 0.5)


def _line(
    axes: Axes,
    x: Sequence[int],
    estimates: Sequence[Estimate],
    colour: str,
    marker: str = "o",
    unit: Unit = PERCENT,
    **kwargs: Any,
) -> None:
    """A line through estimates, with their intervals as bars; a gap where there is none."""
    values, low, high = (unit.factor * np.array([e[k] for e in estimates], dtype=float) for k in range(3))
    axes.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.65)
    axes.plot(x, values, color=colour, marker=marker if len(values) <= 40 else "", **kwargs)


def _many(results: Results) -> bool:
    return max(len(results.run.tasks), len(results.run.stages) - 1) > MOST_CURVES


# ---------------------------------------------------------------------------------------------------------- drawings


def _matrix(results: Results) -> tuple[Figure, str] | None:
    from matplotlib.colors import LinearSegmentedColormap

    R, run = results.R, results.run
    if np.isnan(R).all():
        return None
    stages, tasks = R.shape
    height = 7.0 if _many(results) else 1.0 + 0.42 * stages
    figure, (axes,) = _axes(height, left=1.5, right=0.55)
    colours = LinearSegmentedColormap.from_list("scores", _HEAT)
    units = [results.units[task] for task in run.tasks]
    ends = [unit.ends(R[:, i]) for i, unit in enumerate(units)]
    shades = 100 * np.array([[shade(value, ends[i]) for i, value in enumerate(row)] for row in R])
    image = axes.imshow(shades, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if tasks <= MOST_NAMES and stages <= MOST_NAMES + 1:
        for (t, i), value in np.ndenumerate(R):
            colour = MUTED if np.isnan(value) else "#ffffff" if shades[t, i] > 55 else "#0b1f33"
            axes.text(i, t, units[i].text(value), ha="center", va="center", color=colour)
        axes.set_xticks(range(tasks), [_clipped(task_name(t)) for t in run.tasks])
        axes.set_yticks(range(stages), [f"{s.index} {_clipped(stage_label(s), 16)}" for s in run.stages])
    else:
        axes.set_xlabel("task, in the order of training")
        axes.set_ylabel("stage")
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.025, label="worst to best")
    bar.outline.set_visible(False)
    what = "each in the unit of its metric; colours go from a column's worst to its best"
    if results.not_percent:
        bar.set_ticks([])
    else:
        bar.set_label("percent")
        what = "in percent"
    return figure, f"Scores {what}. Rows: the model after a stage. Columns: tasks. Empty: not evaluated."


def _tasks(results: Results) -> tuple[Figure, str] | None:
    run, R = results.run, results.R
    drawn = [i for i in range(len(run.tasks)) if not np.isnan(R[:, i]).all()]
    if not drawn or len(run.stages) < 2 or results.is_single:
        return None
    note = ""
    if len(drawn) > MOST_CURVES:
        ends = [results.units[task].ends(R[:, i]) for i, task in enumerate(run.tasks)]
        ranges = {i: np.ptp([shade(v, ends[i]) for v in R[:, i] if not np.isnan(v)]) for i in drawn}
        drawn = sorted(sorted(drawn, key=lambda i: -ranges[i])[:MOST_CURVES])
        note = f" Shown are the {MOST_CURVES} of {len(run.tasks)} tasks whose scores have the widest range."
    units = [results.units[run.tasks[i]] for i in drawn]
    figure, axes = _panels(units, run.stages)
    numbers = range(len(run.stages))
    for panel, i, unit in zip(axes, drawn, units, strict=True):
        estimates = [results.cell(t, i) for t in numbers]
        own = i + 1 if results.is_sequential else None
        known = [t for t in numbers if not np.isnan(R[t, i])]
        # Stages in between that were not evaluated: a thin line leads over them.
        panel.plot(known, unit.factor * R[known, i], color=BLUE, linewidth=0.8, linestyle=(0, (2, 2)))
        _line(panel, numbers, estimates, BLUE, unit=unit, markersize=3.5)
        if own is not None:
            panel.axvline(own, color=RULE, linewidth=1.2)
            panel.plot([own], [unit.factor * R[own, i]], color=ORANGE, marker="D", markersize=6.0, linestyle="none")
        panel.set_title(_clipped(task_name(run.tasks[i]), 22))
        if results.not_percent:
            panel.set_ylabel(unit.name, fontsize=7.0, labelpad=1.0)
    own_text = " Diamond: right after the task's own stage." if results.is_sequential else ""
    what = "each in the unit of its metric" if results.not_percent else "percent"
    return figure, f"Score of each task over the stages, {what}; bars: 95 % intervals.{own_text}{note}"


def _sequence(results: Results) -> tuple[Figure, str] | None:
    unit = results.unit
    if not results.is_sequential or not results.last_stage or unit is None:
        return None
    stages = results.run.stages[1:]
    figure, (left, right) = _axes(2.9, 1, 2, left=0.5)
    x = [s.index for s in stages]
    _line(left, x, results.sequence["OP"], BLUE, unit=unit)
    left.set_title("OP_t" if unit.is_percent else f"OP_t ({unit.name})")
    if unit.scale == 1:
        left.set_ylim(-4, 104)
    right.axhline(0, color=MUTED, linewidth=0.8)
    _line(right, x, results.sequence["BWT"], ORANGE, "s", unit=unit)
    right.set_title("BWT_t")
    for panel in (left, right):
        _name_stages(panel, stages, wide=False)
        panel.set_xlabel("stage")
    return figure, (
        "OP_t: mean score of the tasks seen so far. BWT_t: their mean change since their own stage; below zero is "
        f"forgetting. {'Percent and points' if unit.scale == 1 else f'In {unit.plain}'}; bars: 95 % intervals over "
        "test rows."
    )


def _form(results: Results) -> tuple[Figure, str] | None:
    forms = results.forms if results.is_sequential else []
    if not forms or len(forms) > MOST_CURVES:
        return None
    figure, (axes,) = _axes(0.95 + 0.5 * len(forms), left=1.5)
    y = np.arange(len(forms))
    kinds = (("in knowledge", BLUE, -0.2), ("in form alone", YELLOW, 0.2))
    for label, colour, shift in kinds:
        parts = [form.tolerant if shift < 0 else form.form for form in forms]
        values, low, high = (100 * np.array([e[k] for e in parts], dtype=float) for k in range(3))
        axes.barh(y + shift, values, 0.36, color=colour, label=label)
        axes.hlines(y + shift, low, high, color=INK, linewidth=1.0)
    axes.set_yticks(y, [_clipped(task_name(form.task), 20) for form in forms])
    axes.invert_yaxis()
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_xlabel("points lost since the task's own stage")
    figure.legend(loc="upper right", ncols=2)
    return figure, (
        f"What was forgotten by stage {results.last_stage}: in knowledge (wrong in any form), or in the form of the "
        "answer alone. Lines: 95 % intervals."
    )


def _general(results: Results) -> tuple[Figure, str] | None:
    cells = {key: cell for key, cell in results.besides.items() if key[1] in SUITES}
    if not cells:
        return None
    stages = [s for s in results.run.stages if any(index == s.index for index, _ in cells)]
    names = [s for s in SUITES if any(s == name for _, name in cells)]
    figure, (left, right) = _axes(3.3, 1, 2, left=0.5, gap=1.5)
    ends: list[tuple[float, str, str, str]] = []
    for name, (colour, marker) in zip(names, _SERIES, strict=False):
        known = [s.index for s in stages if (s.index, name) in cells]
        values = [headline(cells[i, name]) for i in known]
        estimates = [
            Estimate(v, *results.intervals.get((i, name, cells[i, name]["headline"]), ()))
            for i, v in zip(known, values, strict=True)
        ]
        _line(left, known, estimates, colour, marker)
        ends.append((100 * values[-1], name.removeprefix("general_"), colour, marker))
    left.set_title("suites")
    left.set_ylim(-4, 104)
    at = -math.inf
    for y, text, colour, marker in sorted(ends):
        at = max(y, at + 7.5)  # labels do not lie on each other
        place = left.get_yaxis_transform()  # across in parts of the axes, upwards in percent
        left.plot([1.03], [at], color=colour, marker=marker, transform=place, clip_on=False)
        left.text(1.06, at, text, transform=place, va="center")
    x = sorted(results.general)
    right.axhline(0, color=MUTED, linewidth=0.8)
    _line(right, x, [results.general[i] for i in x], ORANGE, "s")
    right.set_title("delta: mean change since stage 0")
    for panel in (left, right):
        _name_stages(panel, [results.run.stages[0], *stages], wide=False)
        panel.set_xlim(-0.5, results.run.stages[-1].index + 0.5)
        panel.set_xlabel("stage")
    return figure, "General ability, percent and points; bars: 95 % intervals over test rows."


def _judged(results: Results) -> tuple[Figure, str] | None:
    shown = {}
    for kind in KINDS:
        counts = {stage.index: pooled(results.judged[kind.name], stage) for stage in results.run.stages}
        scored = {i: c for i, c in counts.items() if c and c["n"] > c["unscored"]}
        if scored:
            shown[kind] = scored
    if not shown:
        return None
    figure, axes = _axes(3.0, 1, len(shown), left=0.5)
    parts = (("win", BLUE), ("tie", GREY), ("lose", ORANGE))
    for panel, (kind, scored) in zip(axes, shown.items(), strict=True):
        x = np.array(list(scored))
        totals = np.array([c["n"] - c["unscored"] for c in scored.values()])
        bottom = np.zeros(len(x))
        for part, colour in parts:
            height = 100 * np.array([c[part] for c in scored.values()]) / totals
            bars = panel.bar(x, height, 0.7, bottom, color=colour, label=part)
            for bar, share in zip(bars, height, strict=True) if len(x) <= MOST_NAMES else ():
                if share >= 8:
                    middle = bar.get_x() + 0.35, bar.get_y() + share / 2
                    on = ON_BLUE if colour == BLUE else ON_LIGHT
                    panel.text(*middle, f"{share:.0f}", ha="center", va="center", color=on, fontsize=8.0)
            bottom += height
        panel.set_title(kind.title)
        panel.set_ylim(0, 100)
        _name_stages(panel, results.run.stages[1:], wide=False)
        panel.set_xlabel("stage")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", ncols=3)
    return figure, "Answers of each stage against the base model's: percent of the scored pairs won, tied and lost."


def _losses(results: Results) -> tuple[Figure, str] | None:
    runs = {i: t["losses"] for i, t in results.training.items() if t.get("losses")}
    if not runs:
        return None
    figure, (axes,) = _axes(2.9, left=0.6)
    start, ticks = 0, []
    for number, (i, entries) in enumerate(runs.items()):
        steps = start + np.array([e["step"] for e in entries])
        end = start + max(results.training[i]["steps"], entries[-1]["step"])
        axes.plot(steps, [e["loss"] for e in entries], color=(BLUE, ORANGE)[number % 2], linewidth=1.3)
        axes.axvline(end, color=RULE, linewidth=0.8)
        ticks.append(((start + end) / 2, results.run.stages[i]))
        start = end
    step = math.ceil(len(ticks) / MOST_NAMES)
    named = len(ticks) <= MOST_NAMES
    axes.set_xticks(
        [x for x, _ in ticks[::step]],
        [f"{s.index}\n{_clipped(stage_label(s), 12)}" if named else str(s.index) for _, s in ticks[::step]],
        fontsize=8.0,
    )
    axes.set_xlim(0, start)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss")
    return figure, "Training loss as it was logged, stage after stage; the width of a stage is its number of steps."


def _cost(results: Results) -> tuple[Figure, str] | None:
    stages, training = results.run.stages, results.training
    if not training:
        return None
    x = np.array([s.index for s in stages])
    train = np.array([training[i]["seconds"] if i in training else 0.0 for i in x])
    evaluation = np.array([results.evaluation_seconds(s) for s in stages])
    unit, per = ("minutes", 60.0) if (train + evaluation).max() > 300 else ("seconds", 1.0)
    figure, (left, right) = _axes(2.9, 1, 2, left=0.6)
    left.bar(x, train / per, 0.7, color=BLUE, label="training")
    left.bar(x, evaluation / per, 0.7, train / per, color=YELLOW, label="evaluation")
    left.set_title(unit)
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.0)
    right.bar(x, [training[i]["tokens"] if i in training else 0 for i in x], 0.7, color=BLUE)
    right.set_title("tokens trained on")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for panel in (left, right):
        _name_stages(panel, stages, wide=False)
        panel.set_xlabel("stage")
    return figure, "What each stage took."


def _runs(comparison: Comparison) -> tuple[Figure, str] | None:
    entries, against = comparison.entries[:MOST_RUNS], comparison.against
    if against not in entries:
        entries = [*entries[:-1], against]
    shown = [n for n in ("OP", "BWT", *DELTAS) if any(not math.isnan(e.scores[n].value) for e in entries)]
    means = [e for e in entries if not math.isnan(e.scores["OP"].value)]
    unit = shared_unit(e.unit("OP") for e in means)
    if unit is None:  # there is no axis for them
        shown = [n for n in shown if n in DELTAS]
    if not shown:
        return None
    in_percent = unit is None or unit.is_percent
    papers = {f"paper: {r['method']}": r for r in comparison.references if in_percent}
    names = [*(e.name for e in entries), *papers]
    figure, axes = _axes(0.9 + 0.27 * len(names), 1, len(shown), left=2.2, gap=0.25, sharey=True)
    for panel, name in zip(axes, shown, strict=True):
        if name != "OP":
            panel.axvline(0, color=MUTED, linewidth=0.8)
        own = PERCENT if name in DELTAS or unit is None else unit
        at = own.factor * against.scores[name].value
        panel.axvline(at, color=ORANGE, linewidth=0.9, linestyle=(0, (3, 2)))
        for y, entry in enumerate(entries):
            value, low, high = (own.factor * x for x in entry.scores[name])
            colour, marker = (ORANGE, "s") if entry is against else (BLUE, "o")
            panel.hlines(y, low, high, color=colour, linewidth=1.4, alpha=0.65)
            panel.plot([value], [y], color=colour, marker=marker)
        for y, row in enumerate(papers.values(), len(entries)):
            value = float(row[name]) if row.get(name, DASH) != DASH else math.nan
            panel.plot([value], [y], color=GREY, marker="D", markerfacecolor="none")
        panel.set_title(name if own.is_percent else f"{name} ({own.name if name == 'OP' else own.of_changes})")
        panel.grid(True, axis="x")
        panel.grid(False, axis="y")
    axes[0].set_yticks(range(len(names)), [_clipped(name, 30) for name in names])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    note = f" Shown are {MOST_RUNS} of {len(comparison.entries)} runs." * (len(comparison.entries) > MOST_RUNS)
    grey = " Grey, hollow: the paper's." if papers else ""
    what = "Percent and points" if in_percent or unit is None else f"OP and BWT in {unit.plain}, others in points"
    return figure, (f"{what}; bars: 95 % intervals over test rows. Square and dashed line: {against.name}.{grey}{note}")


def _stages(comparison: Comparison) -> tuple[Figure, str] | None:
    sequential = [e for e in comparison.entries if e.results.is_sequential and len(e.run.stages) > 2]
    entries = [e for e in sequential if not all(math.isnan(op.value) for op in e.results.sequence["OP"])]
    if not entries:
        return None
    note = f" Shown are the first {MOST_CURVES} of {len(entries)} runs." if len(entries) > MOST_CURVES else ""
    entries, against = entries[:MOST_CURVES], comparison.against
    longest = max(entries, key=lambda e: len(e.run.stages))
    units = [e.unit("OP") for e in entries]
    figure, axes = _panels(units, longest.run.stages[1:])
    for panel, entry, unit in zip(axes, entries, units, strict=True):
        comparable = shared_unit([unit, against.unit("OP")]) is not None
        if against.results.is_sequential and entry is not against and comparable:
            theirs = against.results.sequence["OP"]
            panel.plot(range(1, len(theirs) + 1), [unit.factor * e.value for e in theirs], color=GREY, linewidth=1.2)
        estimates = entry.results.sequence["OP"]
        colour, marker = (ORANGE, "s") if entry is against else (BLUE, "o")
        _line(panel, range(1, len(estimates) + 1), estimates, colour, marker, unit=unit, markersize=3.5)
        panel.set_title(_clipped(entry.name, 26))
        if not all(u.is_percent for u in units):
            panel.set_ylabel(unit.name, fontsize=7.0, labelpad=1.0)
    grey = f" Grey: {against.name}." if against.results.is_sequential and len(entries) > 1 else ""
    what = "percent" if all(u.is_percent for u in units) else "in the unit of the tasks"
    return figure, f"OP_t, the mean of the tasks seen so far, {what}; bars: 95 % intervals over test rows.{grey}{note}"


_DRAW = {
    "matrix": _matrix,
    "tasks": _tasks,
    "sequence": _sequence,
    "form": _form,
    "general": _general,
    "judged": _judged,
    "losses": _losses,
    "cost": _cost,
}
_DRAW_RUNS = {"runs": _runs, "stages": _stages}
#: The figures that there may be, of a run and of several.
NAMES, RUNS_NAMES = tuple(_DRAW), tuple(_DRAW_RUNS)
