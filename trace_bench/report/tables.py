"""Numbers and tables as text, in Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trace_bench.metrics import Estimate
from trace_bench.run import Stage
from trace_bench.text import cell, markdown_text, one_line
from trace_tasks.data import task_name

DASH = "–"
_ARROWS = (
    "↓, ↑: changed{since}. Arrows are corrected for all changes that this report tests (Holm): if nothing changed, at "
    "most one report in twenty shows an arrow. Intervals are not corrected: for one in twenty unchanged cells they "
    "exclude zero by chance."
)


def number(value: float | None, sign: bool = False) -> str:
    """A number with one decimal; a dash if there is none."""
    if value is None or math.isnan(value):
        return DASH
    return format(round(value, 1) + 0.0, "+.1f" if sign else ".1f")  # no "-0.0"


def count(value: float | None) -> str:
    """A whole number; a dash if there is none."""
    return DASH if value is None or math.isnan(value) else f"{value:,.0f}"


def length(characters: float | None, empty: float | None) -> str:
    """The mean length of answers and, if some are empty, their percentage in brackets."""
    if characters is None:
        return DASH
    return f"{characters:.0f}" + (f" ({100 * empty:.0f} %)" if empty else "")


@dataclass(frozen=True)
class Unit:
    """The unit of a metric's scores, and the direction in which they get better.

    Fractions of 1 are shown in percent, other scores as the metric gives them. A change is shown as a gain: `sign`
    times the difference.
    """

    metric: str = ""
    scale: float | None = 1
    """The highest score: 1 (fractions) or 100; None = unknown."""
    higher_is_better: bool = True

    @property
    def is_percent(self) -> bool:
        """Whether scores are fractions of 1 and higher is better, as for all tasks of TRACE."""
        return self.scale == 1 and self.higher_is_better

    @property
    def plain(self) -> str:
        """The unit without its direction."""
        return "percent" if self.scale == 1 else self.metric

    @property
    def name(self) -> str:
        """The unit, with its direction if lower is better."""
        return self.plain if self.higher_is_better else f"{self.plain}, lower is better"

    @property
    def of_changes(self) -> str:
        """The unit of a difference of scores."""
        return "points" if self.scale == 1 else self.metric

    @property
    def sign(self) -> int:
        """1, or -1 if lower is better: a gain = sign x difference."""
        return 1 if self.higher_is_better else -1

    @property
    def factor(self) -> int:
        """Factor x score = the number that is shown."""
        return 100 if self.scale == 1 else 1

    def shown(self, number_shown: float | None, sign: bool = False) -> str:
        """A number in this unit: with one decimal, or three digits if the scale is unknown."""
        if self.scale is not None or number_shown is None or math.isnan(number_shown):
            return number(number_shown, sign)
        value = round(number_shown, 9) + 0.0  # the difference of equal means may be 1e-17
        form = "#.3g" if abs(value) < 99.95 else ".1f" if abs(value) < 1e6 else ".3e"
        return format(value, f"{'+' if sign else ''}{form}")

    def text(self, score: float | None, sign: bool = False) -> str:
        """A score, or a difference of scores."""
        return DASH if score is None else self.shown(self.factor * score, sign)

    def with_interval(self, estimate: Estimate, sign: bool = False) -> str:
        """A score or a difference with its interval in brackets, if there is one."""
        text = self.text(estimate.value, sign)
        if math.isnan(estimate.low) or text == DASH:
            return text
        return f"{text} [{self.text(estimate.low, sign)}, {self.text(estimate.high, sign)}]"

    def ends(self, scores: ArrayLike) -> tuple[float, float]:
        """The worst and the best score, for colours: of the scale, or of these scores if the scale is unknown."""
        known = np.asarray(scores, dtype=np.float64)
        known = known[~np.isnan(known)]
        low, high = 0.0, 1.0 if self.scale is None else float(self.scale)
        if self.scale is None and known.size:
            low, high = float(known.min()), float(known.max())
        return (low, high) if self.higher_is_better else (high, low)


PERCENT = Unit()
"""The unit of fractions of 1 with higher = better."""
percent, percent_with_interval = PERCENT.text, PERCENT.with_interval


def shared_unit(units: Iterable[Unit]) -> Unit | None:
    """The unit that all have; None if they differ, so that there is no mean; percent if there are none."""
    found = {(u.scale, u.higher_is_better, u.scale == 1 or u.metric): u for u in units}
    return next(iter(found.values()), PERCENT) if len(found) <= 1 else None


def shade(score: Any, ends: tuple[float, float]) -> Any:
    """The position of a score, or of each score of an array, between the worst (0) and the best (1)."""
    worst, best = ends
    return (score - worst) / ((best - worst) or 1)


def arrow(mark: int) -> str:
    """The arrow behind a number with a significant change (1 or -1); up is better."""
    return {1: " ↑", 0: "", -1: " ↓"}[mark]


def legend(rows: Iterable[Iterable[str]], since: str = "") -> str:
    """The meaning of arrows, if a table has some or has changes with intervals, which might have one."""
    return f"\n\n{_ARROWS.format(since=since)}" if any(t.endswith(("↓", "↑", "]")) for row in rows for t in row) else ""


def stage_label(stage: Stage) -> str:
    """A short name of a stage."""
    if stage.index == 0:
        return "base"
    return task_name(stage.task) if stage.task else stage.name.partition("_")[2]


def left_out_text(left_out: dict[str, tuple[int, int]]) -> str:
    """Says which test rows are left out of a report without leaked rows (`Results.left_out`)."""
    text = ", ".join(f"{task_name(task)} {n} of {total}" for task, (n, total) in left_out.items() if n)
    return (
        "Left out of all scores: test rows whose prompt is also in the training rows of the task, exactly or nearly: "
        f"{text or 'none was found'}. Not comparable with scores of all rows."
    )


def value_text(value: Any) -> str:
    """A setting in a sentence."""
    if isinstance(value, dict):
        return one_line(", ".join(f"{task_name(k)} {v}" for k, v in value.items()))
    return "not set" if value is None else one_line(str(value))


@dataclass(frozen=True)
class Table:
    """A table of texts; `<br>` in a head begins a new line."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    about: str = ""
    """What its numbers are."""
    apart: int = 0
    """The number of rows at the end that are for orientation, such as the paper's, and set apart."""
    detail: bool = False
    """Whether a page folds it, since another table summarises it."""
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """(row, column) of a cell -> the target of its link on a page."""

    @property
    def caption(self) -> str:
        """Title and what the numbers are."""
        return f"{self.title}, {self.about}" if self.about else self.title

    def without_empty_columns(self) -> Table:
        """The table without columns that hold only dashes; the rows set `apart` do not count."""
        own = self.rows[: len(self.rows) - self.apart]
        kept = [i for i in range(len(self.header)) if any(row[i] != DASH for row in own)]
        return replace(self, header=[self.header[i] for i in kept], rows=[[row[i] for i in kept] for row in self.rows])

    def texts(self, form: Callable[[str], str], apart: str) -> list[list[str]]:
        """The cells as formatted by `form`; those of rows set apart are put into the format string `apart`."""
        own, rows = len(self.rows) - self.apart, [[form(str(cell)) for cell in row] for row in self.rows]
        return rows[:own] + [[apart.format(c) if c not in ("", DASH) else c for c in row] for row in rows[own:]]


#: A part of a report: a table, or Markdown of headings, paragraphs, lists and quotes.
Block = str | Table


def markdown(table: Table) -> str:
    """A table in Markdown; rows for orientation in italics."""
    escaped = partial(markdown_text, in_table=True)
    head = ["<br>".join(map(escaped, text.split("<br>"))) for text in table.header]
    lines = [head, ["---"] * len(head), *table.texts(escaped, "*{}*")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]], numbers: Collection[str] = ()) -> str:
    """Lines as CSV; a missing column is empty. Columns that are not in `numbers` are protected from being formulas."""
    out = io.StringIO()
    rows = ([line.get(c, "") if c in numbers else cell(line.get(c, "")) for c in columns] for line in lines)
    csv.writer(out, lineterminator="\n").writerows([map(cell, columns), *rows])
    return out.getvalue()


_LATEX_TABLE = r"""\begin{{table}}
\centering\small
\caption{{{caption}}}
\begin{{tabular}}{{{columns}}}
\toprule
{head}
\midrule
{rows}
\bottomrule
\end{{tabular}}
\end{{table}}"""


def latex(table: Table) -> str:
    """A table environment in LaTeX, for the packages booktabs and xcolor."""
    rows = [list(map(latex_text, table.header)), *table.texts(latex_text, r"\textcolor{{gray}}{{{}}}")]
    head, *lines = [" & ".join(row) + r" \\" for row in rows]
    words = [any(re.search("[a-z]", row[i]) for row in table.rows) for i in range(len(table.header))]
    columns = "".join("l" if of_words else "r" for of_words in words)
    return _LATEX_TABLE.format(caption=latex_text(table.caption), columns=columns, head=head, rows="\n".join(lines))


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # at the start of a line \\ would take it for its option
    "]": "{]}",
    "–": "--",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "…": r"\ldots{}",
}


def latex_text(text: str) -> str:
    """Escapes a text for LaTeX; `code` and **bold** of Markdown become LaTeX's."""
    text = "".join(_LATEX.get(c, c) for c in one_line(text.replace("<br>", " ")))
    text = re.sub(r"`([^`]*)`", r"\\texttt{\1}", text)
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"(?<![\w.,-])-(?=\d)", "$-$", text)  # a minus, not a hyphen
