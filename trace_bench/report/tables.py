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
    "↓, ↑: changed{since}. Arrows are corrected for all changes that this report tests (Holm): where nothing changed, "
    "at most one report in twenty shows any. Intervals are not corrected: one in twenty of unchanged cells excludes "
    "zero by chance."
)


def number(value: float | None, sign: bool = False) -> str:
    """One digit after the point; a dash where there is no number."""
    if value is None or math.isnan(value):
        return DASH
    return format(round(value, 1) + 0.0, "+.1f" if sign else ".1f")  # no "-0.0"


def count(value: float | None) -> str:
    """A whole number; a dash where there is none."""
    return DASH if value is None or math.isnan(value) else f"{value:,.0f}"


def length(characters: float | None, empty: float | None) -> str:
    """How long answers are on average, and in brackets the percentage of empty ones, where some are."""
    if characters is None:
        return DASH
    return f"{characters:.0f}" + (f" ({100 * empty:.0f} %)" if empty else "")


@dataclass(frozen=True)
class Unit:
    """What a metric's scores are measured in, and which way they get better.

    Fractions of 1 are shown in percent, others as the metric gives them; a change as a gain, `sign` times it.
    """

    metric: str = ""
    scale: float | None = 1
    """Scores go from 0 to this: 1 = a fraction, 100; None = they have no known end."""
    higher_is_better: bool = True

    @property
    def is_percent(self) -> bool:
        """Whether scores are fractions of 1, of which more is better, as all of TRACE's are."""
        return self.scale == 1 and self.higher_is_better

    @property
    def plain(self) -> str:
        """The unit alone."""
        return "percent" if self.scale == 1 else self.metric

    @property
    def name(self) -> str:
        """The unit, and that lower is better where it is."""
        return self.plain if self.higher_is_better else f"{self.plain}, lower is better"

    @property
    def of_changes(self) -> str:
        """The unit of a difference of scores."""
        return "points" if self.scale == 1 else self.metric

    @property
    def sign(self) -> int:
        """1, or -1 where lower is better: times a difference it is the gain."""
        return 1 if self.higher_is_better else -1

    @property
    def factor(self) -> int:
        """Times a score it is the number that is shown."""
        return 100 if self.scale == 1 else 1

    def shown(self, number_shown: float | None, sign: bool = False) -> str:
        """A number in this unit: one digit after the point, or three digits where the scale is not known."""
        if self.scale is not None or number_shown is None or math.isnan(number_shown):
            return number(number_shown, sign)
        value = round(number_shown, 9) + 0.0  # the difference of equal means is no 1e-17
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
        """Worst and best score, between which colours go: of the scale, or where it is not known of these scores."""
        known = np.asarray(scores, dtype=np.float64)
        known = known[~np.isnan(known)]
        low, high = 0.0, 1.0 if self.scale is None else float(self.scale)
        if self.scale is None and known.size:
            low, high = float(known.min()), float(known.max())
        return (low, high) if self.higher_is_better else (high, low)


PERCENT = Unit()
"""Of fractions of 1, of which more is better."""
percent, percent_with_interval = PERCENT.text, PERCENT.with_interval


def shared_unit(units: Iterable[Unit]) -> Unit | None:
    """The unit that all have; None if they differ, so that no mean is taken. Percent without any."""
    found = {(u.scale, u.higher_is_better, u.scale == 1 or u.metric): u for u in units}
    return next(iter(found.values()), PERCENT) if len(found) <= 1 else None


def shade(score: Any, ends: tuple[float, float]) -> Any:
    """Where a score, or each of an array, lies between the worst (0) and the best (1)."""
    worst, best = ends
    return (score - worst) / ((best - worst) or 1)


def arrow(mark: int) -> str:
    """Behind a number: an arrow where its change is certain, 1 or -1; up is better."""
    return {1: " ↑", 0: "", -1: " ↓"}[mark]


def legend(rows: Iterable[Iterable[str]], since: str = "") -> str:
    """What arrows in a table mean, where there are some, or changes with intervals, which might have one."""
    return f"\n\n{_ARROWS.format(since=since)}" if any(t.endswith(("↓", "↑", "]")) for row in rows for t in row) else ""


def stage_label(stage: Stage) -> str:
    """A stage's name where there is little room."""
    if stage.index == 0:
        return "base"
    return task_name(stage.task) if stage.task else stage.name.partition("_")[2]


def left_out_text(left_out: dict[str, tuple[int, int]]) -> str:
    """Says which test rows do not count in a run that is seen without leaked rows (`Results.left_out`)."""
    text = ", ".join(f"{task_name(task)} {n} of {total}" for task, (n, total) in left_out.items() if n)
    return (
        "Test rows whose prompt is in the training rows of the task, exactly or nearly, are left out of all scores: "
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
    """The last so many rows are for orientation and set apart from the others."""
    detail: bool = False
    """Whether a page shows it only when asked, since another table has its numbers in short."""
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """(row, column) of a cell -> where it leads on a page."""

    @property
    def caption(self) -> str:
        """Title and what the numbers are."""
        return f"{self.title}, {self.about}" if self.about else self.title

    def without_empty_columns(self) -> Table:
        """The table without columns that hold nothing but dashes, whatever rows for orientation have there."""
        own = self.rows[: len(self.rows) - self.apart]
        kept = [i for i in range(len(self.header)) if any(row[i] != DASH for row in own)]
        return replace(self, header=[self.header[i] for i in kept], rows=[[row[i] for i in kept] for row in self.rows])

    def texts(self, form: Callable[[str], str], apart: str) -> list[list[str]]:
        """The cells of the rows in a form; those of rows for orientation within the braces of `apart`."""
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
    """Lines as CSV, empty where they lack a column; texts that are in none of the `numbers` are no formulas."""
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
    """Text as LaTeX sets it: nothing in it is a command; `code` and **bold** of Markdown become LaTeX's."""
    text = "".join(_LATEX.get(c, c) for c in one_line(text.replace("<br>", " ")))
    text = re.sub(r"`([^`]*)`", r"\\texttt{\1}", text)
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"(?<![\w.,-])-(?=\d)", "$-$", text)  # a minus, not a hyphen
