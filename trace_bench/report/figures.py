"""The figures of a run, and those of several runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_bench import judgements
from trace_bench.measures.seeds import seed_interval
from trace_bench.measures.transitions import CAME_BACK, GAINED, KEPT, LOST, NAMES, NEVER
from trace_bench.metrics import Estimate
from trace_bench.report import drawing
from trace_bench.report.comparison import Comparison
from trace_bench.report.distance import Point, correlations, last_points, points
from trace_bench.report.drawing import BLUE, GREEN, GREY, INK, MUTED, ON_BAR, ORANGE, RULE, SERIES, SKY, YELLOW
from trace_bench.report.results import DELTAS, Results, measured
from trace_bench.report.seeds import Group, lines_of
from trace_bench.report.tables import DASH, PERCENT, Unit, shared_unit, stage_label
from trace_bench.report.transitions import histories
from trace_tasks.data import SUITES, task_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More tasks than these have no curve each; it is shown for the ones that changed most.
MOST_CURVES = 24
#: More runs than these are not drawn side by side.
MOST_RUNS = 40
_HEAT = ["#dbe9f6", "#9ecae1", "#3f8fc5", "#08306b"]


def _matrix(results: Results) -> tuple[Figure, str] | None:
    from matplotlib.colors import LinearSegmentedColormap

    R, run = results.R, results.run
    if np.isnan(R).all():
        return None
    stages, tasks = R.shape
    height = 7.0 if max(tasks, stages - 1) > MOST_CURVES else 1.0 + 0.42 * stages
    figure, (axes,) = drawing.axes_of(height, left=1.5, right=0.55)
    colours = LinearSegmentedColormap.from_list("scores", _HEAT)
    shades = 100 * results.shades
    image = axes.imshow(shades, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if tasks <= drawing.MOST_NAMES and stages <= drawing.MOST_NAMES + 1:
        for (t, i), value in np.ndenumerate(R):
            colour = MUTED if np.isnan(value) else "#ffffff" if shades[t, i] > 55 else "#0b1f33"
            text = results.units[run.tasks[i]].text(value)
            axes.text(i, t, text, ha="center", va="center", color=colour)
        axes.set_xticks(range(tasks), [drawing.clipped(task_name(t)) for t in run.tasks])
        axes.set_yticks(range(stages), [f"{s.number} {drawing.clipped(stage_label(s), 16)}" for s in run.stages])
    else:
        axes.set_xlabel("task, in the order of training")
        axes.set_ylabel("stage")
    what, label = "in percent", "percent"
    if results.not_percent:
        what, label = "each in the unit of its metric; colours go from a column's worst to its best", "worst to best"
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.025, label=label)
    bar.outline.set_visible(False)
    if results.not_percent:
        bar.set_ticks([])
    return figure, f"Scores {what}. Rows: the model after a stage. Columns: tasks. Empty: not evaluated."


def _tasks(results: Results) -> tuple[Figure, str] | None:
    run, R = results.run, results.R
    drawn = [i for i in range(len(run.tasks)) if not np.isnan(R[:, i]).all()]
    if not drawn or len(run.stages) < 2 or results.is_single:
        return None
    note = ""
    if len(drawn) > MOST_CURVES:
        ranges = np.nanmax(results.shades[:, drawn], axis=0) - np.nanmin(results.shades[:, drawn], axis=0)
        drawn = sorted(drawn[k] for k in np.argsort(-ranges, kind="stable")[:MOST_CURVES])
        note = f" Only the {MOST_CURVES} of {len(run.tasks)} tasks with the widest range of scores are shown."
    units = [results.units[run.tasks[i]] for i in drawn]
    figure, axes = drawing.panels(units, run.stages)
    numbers = range(len(run.stages))
    for panel, i, unit in zip(axes, drawn, units, strict=True):
        known = [t for t in numbers if not np.isnan(R[t, i])]
        # Stages in between that were not evaluated: a thin line leads over them.
        panel.plot(known, unit.factor * R[known, i], color=BLUE, linewidth=0.8, linestyle=(0, (2, 2)))
        drawing.line(panel, numbers, [results.cell(t, i) for t in numbers], BLUE, unit=unit, markersize=3.5)
        if results.is_sequential:
            own, score = i + 1, unit.factor * R[i + 1, i]
            panel.axvline(own, color=RULE, linewidth=1.2)
            panel.plot([own], [score], color=ORANGE, marker="D", markersize=6.0, linestyle="none")
        panel.set_title(drawing.clipped(task_name(run.tasks[i]), 22))
    own_text = " Diamond: right after the task's own stage." if results.is_sequential else ""
    what = "each in the unit of its metric" if results.not_percent else "percent"
    return figure, f"Score of each task over the stages, {what}; bars: 95 % intervals.{own_text}{note}"


def _sequence(results: Results) -> tuple[Figure, str] | None:
    unit = results.unit
    if not results.last_stage or unit is None:
        return None
    stages = results.run.stages[1:]
    figure, (left, right) = drawing.axes_of(2.9, 1, 2, left=0.5)
    x = [s.index for s in stages]
    drawing.line(left, x, results.sequence["OP"], BLUE, unit=unit)
    left.set_title("OP_t" if unit.is_percent else f"OP_t ({unit.name})")
    if unit.scale == 1:
        left.set_ylim(-4, 104)
    right.axhline(0, color=MUTED, linewidth=0.8)
    drawing.line(right, x, results.sequence["BWT"], ORANGE, "s", unit=unit)
    right.set_title("BWT_t")
    drawing.number_stages(stages, left, right)
    return figure, (
        "OP_t: mean score of the tasks seen so far. BWT_t: their mean change since their own stage; below zero is "
        f"forgetting. {'Percent and points' if unit.scale == 1 else f'In {unit.plain}'}; bars: 95 % intervals over "
        "test rows."
    )


def _form(results: Results) -> tuple[Figure, str] | None:
    forms = results.forms
    if not forms or len(forms) > MOST_CURVES:
        return None
    figure, (axes,) = drawing.axes_of(0.95 + 0.5 * len(forms), left=1.5)
    y = np.arange(len(forms))
    for label, colour, shift, parts in (
        ("in knowledge", BLUE, -0.2, [form.tolerant for form in forms]),
        ("only in form", YELLOW, 0.2, [form.form for form in forms]),
    ):
        values, low, high = drawing.shown(parts)
        axes.barh(y + shift, values, 0.36, color=colour, label=label)
        axes.hlines(y + shift, low, high, color=INK, linewidth=1.0)
    axes.set_yticks(y, [drawing.clipped(task_name(form.task), 20) for form in forms])
    axes.invert_yaxis()
    drawing.grid_across(axes)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_xlabel("points lost since the task's own stage")
    figure.legend(loc="upper right", ncols=2)
    return figure, (
        f"What was forgotten by stage {results.last_stage}: knowledge (wrong in any form), or only the form of the "
        "answer. Lines: 95 % intervals."
    )


def _general(results: Results) -> tuple[Figure, str] | None:
    cells = results.cells_of(SUITES)
    if not cells:
        return None
    stages = measured(results.run, cells)
    names = [s for s in SUITES if s in results.headlines]
    figure, (left, right) = drawing.axes_of(3.3, 1, 2, left=0.5, gap=1.5)
    ends: list[tuple[float, str, str, str]] = []
    for name, (colour, marker) in zip(names, SERIES, strict=False):
        known = [s.index for s in stages if (s.index, name) in cells]
        estimates = [results.score(i, name) for i in known]
        drawing.line(left, known, estimates, colour, marker)
        ends.append((100 * estimates[-1].value, name.removeprefix("general_"), colour, marker))
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
    drawing.line(right, x, [results.general[i] for i in x], ORANGE, "s")
    right.set_title("delta: mean change since stage 0")
    drawing.number_stages([results.run.stages[0], *stages], left, right)
    for panel in (left, right):
        panel.set_xlim(-0.5, results.run.stages[-1].index + 0.5)
    return figure, "General ability, percent and points; bars: 95 % intervals over test rows."


def _judged(results: Results) -> tuple[Figure, str] | None:
    kinds = {}
    for kind in judgements.KINDS:
        counts = {stage.index: judgements.pooled(results.judged[kind.name], stage) for stage in results.run.stages}
        scored = {i: c for i, c in counts.items() if c and c["win"] + c["tie"] + c["lose"]}
        if scored:
            kinds[kind.title] = scored
    if not kinds:
        return None
    figure, axes = drawing.axes_of(3.0, 1, len(kinds), left=0.5)
    for panel, (title, scored) in zip(axes, kinds.items(), strict=True):
        x = np.array(list(scored))
        totals = np.array([c["win"] + c["tie"] + c["lose"] for c in scored.values()])
        bottom = np.zeros(len(x))
        for part, colour in (("win", BLUE), ("tie", GREY), ("lose", ORANGE)):
            height = 100 * np.array([c[part] for c in scored.values()]) / totals
            bars = panel.bar(x, height, 0.7, bottom, color=colour, label=part)
            for bar, share in zip(bars, height, strict=True) if len(x) <= drawing.MOST_NAMES else ():
                if share >= 8:
                    middle = bar.get_x() + 0.35, bar.get_y() + share / 2
                    on = ON_BAR[colour]
                    panel.text(*middle, f"{share:.0f}", ha="center", va="center", color=on, fontsize=8.0)
            bottom += height
        panel.set_title(title)
        panel.set_ylim(0, 100)
    drawing.number_stages(results.run.stages[1:], *axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", ncols=3)
    return figure, "Answers of each stage against those of the base model: scored pairs won, tied and lost, in percent."


def _losses(results: Results) -> tuple[Figure, str] | None:
    losses = {i: t["losses"] for i, t in results.training.items() if t.get("losses")}
    if not losses:
        return None
    figure, (axes,) = drawing.axes_of(2.9)
    start, ticks = 0, []
    for number, (i, entries) in enumerate(losses.items()):
        steps = start + np.array([e["step"] for e in entries])
        end = start + max(results.training[i]["steps"], entries[-1]["step"])
        axes.plot(steps, [e["loss"] for e in entries], color=(BLUE, ORANGE)[number % 2], linewidth=1.3)
        axes.axvline(end, color=RULE, linewidth=0.8)
        stage = results.run.stages[i]
        name = f"\n{drawing.clipped(stage_label(stage), 12)}" if len(losses) <= drawing.MOST_NAMES else ""
        ticks.append(((start + end) / 2, f"{stage.number}{name}"))
        start = end
    places, labels = zip(*ticks[:: math.ceil(len(ticks) / drawing.MOST_NAMES)], strict=True)
    axes.set_xticks(places, labels, fontsize=8.0)
    axes.set_xlim(0, start)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss")
    return figure, "Logged training loss of all stages in order; the width of a stage is its number of steps."


def _cost(results: Results) -> tuple[Figure, str] | None:
    stages, training = results.run.stages, results.training
    if not training:
        return None
    x = np.array([s.index for s in stages])
    train = np.array([training[i]["seconds"] if i in training else 0.0 for i in x])
    evaluation = np.array([results.evaluation_seconds(s) for s in stages])
    unit, per = ("minutes", 60.0) if (train + evaluation).max() > 300 else ("seconds", 1.0)
    figure, (left, right) = drawing.axes_of(2.9, 1, 2)
    left.bar(x, train / per, 0.7, color=BLUE, label="training")
    left.bar(x, evaluation / per, 0.7, train / per, color=YELLOW, label="evaluation")
    left.set_title(unit)
    left.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.0)
    right.bar(x, [training[i]["tokens"] if i in training else 0 for i in x], 0.7, color=BLUE)
    right.set_title("tokens trained on")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    drawing.number_stages(stages, left, right)
    return figure, "Cost of each stage."


_FATES = {KEPT: BLUE, CAME_BACK: SKY, GAINED: GREEN, LOST: ORANGE, NEVER: GREY}
_KEY = 0.35  # inches


def _flow(results: Results) -> tuple[Figure, str] | None:
    """What became of the rows of each task and suite since the stage that they are compared with."""
    found = results.once(histories)
    if not found:
        return None
    drawn = sorted(found, key=lambda h: -h.shares(h.stages[-1])[LOST])[:MOST_CURVES]
    drawn = [h for h in found if h in drawn]
    figure, axes = drawing.panels([PERCENT] * len(drawn), results.run.stages)
    for panel, history in zip(axes, drawn, strict=True):
        begin = np.zeros(len(NAMES))
        begin[[KEPT, NEVER]] = history.had, 1 - history.had
        shares = 100 * np.array([begin, *map(history.shares, history.stages)]).T[list(_FATES)]
        labels = [NAMES[fate] for fate in _FATES]
        stages = [history.reference, *history.stages]
        panel.stackplot(stages, shares, colors=list(_FATES.values()), labels=labels, linewidth=0)
        panel.set_ylim(0, 100)
        panel.set_title(drawing.clipped(history.title, 22))
    height = figure.get_figheight()
    bottom, top = figure.subplotpars.bottom * height, (1 - figure.subplotpars.top) * height
    height += _KEY
    figure.set_figheight(height)
    figure.subplots_adjust(bottom=bottom / height, top=1 - (top + _KEY) / height)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper left", ncols=len(NAMES), fontsize=8.0)
    note = f" The {MOST_CURVES} of {len(found)} with the largest loss are shown." if len(found) > MOST_CURVES else ""
    return figure, (
        "How the test rows changed, in percent. Left: the stage that they are compared with, right (kept) and wrong "
        f"(never).{note}"
    )


# -------------------------------------------------------------------------------------------------------- several runs


def _runs(comparison: Comparison) -> tuple[Figure, str] | None:
    lines, against = lines_of(comparison.entries, comparison.groups), comparison.against
    shown_lines = lines[:MOST_RUNS]
    if not any(against in line.entries for line in shown_lines):
        shown_lines = [*shown_lines[:-1], *(line for line in lines if against in line.entries)]
    entries = [e for line in shown_lines for e in line.entries]
    names = [n for n in ("OP", "BWT", *DELTAS) if any(not math.isnan(e.scores[n].value) for e in entries)]
    unit = shared_unit(e.unit("OP") for e in entries if not math.isnan(e.scores["OP"].value))
    if unit is None:  # there is no axis for them
        names = [n for n in names if n in DELTAS]
    if not names:
        return None
    in_percent = unit is None or unit.is_percent
    papers = {f"paper: {r['method']}": r for r in comparison.references if in_percent}
    rows = [*(line.name for line in shown_lines), *papers]
    figure, axes = drawing.axes_of(0.9 + 0.27 * len(rows), 1, len(names), left=2.2, gap=0.25, sharey=True)
    for panel, name in zip(axes, names, strict=True):
        if name != "OP":
            panel.axvline(0, color=MUTED, linewidth=0.8)
        own = PERCENT if name in DELTAS or unit is None else unit
        for y, of_method in enumerate(shown_lines):
            is_baseline = against in of_method.entries
            value, low, high = (own.factor * x for x in _estimate(of_method, name))
            if is_baseline:
                panel.axvline(value, color=ORANGE, linewidth=0.9, linestyle=(0, (3, 2)))
            colour, marker = (ORANGE, "s") if is_baseline else (BLUE, "o")
            panel.hlines(y, low, high, color=colour, linewidth=1.4, alpha=0.65)
            panel.plot([value], [y], color=colour, marker=marker)
            if len(of_method.entries) > 1:
                seeds = [own.factor * e.scores[name].value for e in of_method.entries]
                panel.plot(seeds, [y] * len(seeds), color=colour, marker="|", linestyle="none", markersize=7)
        for y, row in enumerate(papers.values(), len(shown_lines)):
            value = float(row[name]) if row.get(name, DASH) != DASH else math.nan
            panel.plot([value], [y], color=GREY, marker="D", markerfacecolor="none")
        panel.set_title(name if own.is_percent else f"{name} ({own.name if name == 'OP' else own.of_changes})")
        drawing.grid_across(panel)
    axes[0].set_yticks(range(len(rows)), [drawing.clipped(name, 30) for name in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    kind = "lines" if comparison.groups else "runs"
    note = f" Only {MOST_RUNS} of {len(lines)} {kind} are shown." * (len(lines) > MOST_RUNS)
    grey = " Grey, hollow: the paper's numbers." if papers else ""
    what = "Percent and points" if in_percent or unit is None else f"OP and BWT in {unit.plain}, others in points"
    bars = "95 % intervals over test rows"
    if comparison.groups:
        bars += " (methods with several seeds: over the seeds); strokes: the single seeds"
    baseline = next(line.name for line in lines if against in line.entries)
    return figure, f"{what}; bars: {bars}. Square and dashed line: {baseline}.{grey}{note}"


def _estimate(line: Group, name: str) -> Estimate:
    """A number with its interval: over the seeds where there are several, else over test rows."""
    if len(line.entries) == 1:
        return line.entries[0].scores[name]
    values = [e.scores[name].value for e in line.entries]
    return Estimate(float(np.mean(values)), *seed_interval(values))


def _stages(comparison: Comparison) -> tuple[Figure, str] | None:
    sequential = [e for e in comparison.entries if e.results.is_sequential and len(e.run.stages) > 2]
    entries = [e for e in sequential if not all(math.isnan(op.value) for op in e.results.sequence["OP"])]
    if not entries:
        return None
    note = f" Only the first {MOST_CURVES} of {len(entries)} runs are shown." if len(entries) > MOST_CURVES else ""
    entries, against = entries[:MOST_CURVES], comparison.against
    longest = max(entries, key=lambda e: len(e.run.stages))
    units = [e.unit("OP") for e in entries]
    in_percent = all(unit.is_percent for unit in units)
    figure, axes = drawing.panels(units, longest.run.stages[1:])
    for panel, entry, unit in zip(axes, entries, units, strict=True):
        comparable = shared_unit([unit, against.unit("OP")]) is not None
        if against.results.is_sequential and entry is not against and comparable:
            values, *_ = drawing.shown(against.results.sequence["OP"], unit)
            panel.plot(range(1, len(values) + 1), values, color=GREY, linewidth=1.2)
        estimates = entry.results.sequence["OP"]
        colour, marker = (ORANGE, "s") if entry is against else (BLUE, "o")
        drawing.line(panel, range(1, len(estimates) + 1), estimates, colour, marker, unit=unit, markersize=3.5)
        panel.set_title(drawing.clipped(entry.name, 26))
    grey = f" Grey: {against.name}." if against.results.is_sequential and len(entries) > 1 else ""
    what = "percent" if in_percent else "in the unit of the tasks"
    return figure, f"OP_t, the mean of the tasks seen so far, {what}; bars: 95 % intervals over test rows.{grey}{note}"


# ---------------------------------------------------------------------------------------------- distance and forgetting

_PANELS = {"own": "on the prompts of the stage's own task", "neutral": "on neutral questions"}
_WHAT = "KL(base || stage), nats per token, against -BWT_t; bars: 95 % intervals over prompts and over test rows."


def _distance(results: Results) -> tuple[Figure, str] | None:
    """The stages of a run."""
    found, unit = points(results), results.unit
    if unit is None or not (made := _scatter(found, [(BLUE, "o")] * len(found), unit, 3.3)):
        return None
    figure, panels = made
    for name, axes in panels.items():
        for point in found:
            x, y = getattr(point, name).value, point.forgetting.value
            if not math.isnan(x + y):
                at = (x, unit.factor * y)
                axes.annotate(str(point.stage), at, xytext=(5, 4), textcoords="offset points", fontsize=8.0)
    return figure, f"Distance and forgetting, one point for each stage: {_WHAT} {correlations(found)}".strip()


def _distances(comparison: Comparison) -> tuple[Figure, str] | None:
    """The last stages of runs, methods by colour."""
    last = last_points(comparison.entries)
    entries = [e for e in comparison.entries if e.name in last]
    found = [last[e.name] for e in entries]
    unit, methods = shared_unit(e.unit("BWT") for e in entries), [e.texts["method"] for e in entries]
    series = dict(zip(dict.fromkeys(methods), itertools.cycle(SERIES), strict=False))
    if unit is None or not (made := _scatter(found, [series[m] for m in methods], unit, 3.6, right=1.6)):
        return None
    figure, panels = made
    axes = list(panels.values())[-1]
    for method, (colour, marker) in series.items():
        axes.plot([], [], color=colour, marker=marker, linestyle="none", label=drawing.clipped(method, 16))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    what = f"Distance and forgetting at the last stage, one point for each run: {_WHAT}"
    return figure, f"{what} {correlations(found)}".strip()


def _scatter(
    found: Sequence[Point], styles: Sequence[tuple[str, str]], unit: Unit, height: float, right: float = 0.15
) -> tuple[Figure, dict[str, Axes]] | None:
    """Points with their two intervals, in a panel for each of `_PANELS` that has some; None for less than two."""
    names = [
        name for name in _PANELS if any(not math.isnan(getattr(p, name).value + p.forgetting.value) for p in found)
    ]
    if len(found) < 2 or not names:
        return None
    figure, panels = drawing.axes_of(height, 1, len(names), left=0.6, right=right)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(_PANELS[name])
        axes.set_xlabel("KL from the base model, nats per token")
        axes.set_ylabel(f"forgotten, {unit.of_changes}")
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for point, (colour, marker) in zip(found, styles, strict=True):
            x, (value, low, high) = getattr(point, name), (unit.factor * y for y in point.forgetting)
            axes.hlines([value], [x.low], [x.high], color=colour, linewidth=0.9, alpha=0.5)
            axes.vlines([x.value], [low], [high], color=colour, linewidth=0.9, alpha=0.5)
            axes.plot([x.value], [value], color=colour, marker=marker, linestyle="none")
    return figure, dict(zip(names, panels, strict=True))


def _by_name(*functions: Any) -> dict[str, drawing.Drawing]:
    return {function.__name__.lstrip("_"): function for function in functions}


#: The figures that there may be, of a run and of several.
OF_A_RUN = _by_name(_matrix, _tasks, _sequence, _form, _general, _judged, _distance, _losses, _cost, _flow)
OF_RUNS = _by_name(_runs, _stages, _distances)
