"""Numbers and tables as text, for the reports of runs, comparisons and judgements: Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trace_bench.metrics import Estimate
from trace_bench.text import markdown_text, one_line
from trace_tasks.data import FOLDERS, REASONING

DASH = "–"


def task_name(task: str) -> str:
    """A task as the paper calls it, with (R) where it is asked for its reasoning first; others by their own name."""
    return f"{REASONING[task]} (R)" if task in REASONING else FOLDERS.get(task, task)


def number(value: float | None, sign: bool = False) -> str:
    """One digit after the point; a dash where there is no number."""
    if value is None or math.isnan(value):
        return DASH
    value = round(value, 1) + 0.0  # no "-0.0"
    return f"{value:+.1f}" if sign else f"{value:.1f}"


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

    Scores are shown as the metric gives them, but for fractions of 1, which are shown in percent. A change is shown as
    a gain, `sign` times the difference: + and ↑ are better. So where lower is better a rise of errors is negative, as
    forgetting is.
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
    def name(self) -> str:
        """The unit, and that lower is better where it is."""
        return self.plain if self.higher_is_better else f"{self.plain}, lower is better"

    @property
    def plain(self) -> str:
        """The unit alone."""
        return "percent" if self.scale == 1 else self.metric

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

    def text(self, score: float, sign: bool = False) -> str:
        """A score, or a difference of scores."""
        return self.shown(self.factor * score, sign)

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
        if self.scale is not None:
            low, high = 0.0, float(self.scale)
        else:
            low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        return (low, high) if self.higher_is_better else (high, low)


def shared_unit(units: Iterable[Unit]) -> Unit | None:
    """The unit that all have; None if they differ, so that no mean is taken. Percent without any."""
    found = {(u.scale, u.higher_is_better, u.scale == 1 or u.metric): u for u in units}
    return next(iter(found.values()), PERCENT) if len(found) <= 1 else None


def shade(score: float, ends: tuple[float, float]) -> float:
    """Where a score lies between the worst (0) and the best (1)."""
    worst, best = ends
    return (score - worst) / ((best - worst) or 1)


def arrow(mark: int) -> str:
    """Behind a number: an arrow where its change is certain, 1 or -1; up is better."""
    return {1: " ↑", 0: "", -1: " ↓"}[mark]


def value_text(value: Any) -> str:
    """A setting in a sentence; short, whatever it is."""
    if isinstance(value, dict):
        return one_line(", ".join(f"{task_name(k)} {v}" for k, v in value.items()))
    return "not set" if value is None else one_line(str(value))


def left_out_text(left_out: dict[str, tuple[int, int]]) -> str:
    """Says which test rows do not count in a run that is seen without leaked rows (`Results.left_out`)."""
    text = ", ".join(f"{task_name(task)} {n} of {total}" for task, (n, total) in left_out.items() if n)
    return (
        "Test rows whose prompt is in the training rows of the task, exactly or nearly, are left out of all scores: "
        f"{text or 'none was found'}. Not comparable with scores of all rows."
    )


PERCENT = Unit()
"""Of fractions of 1, of which more is better."""
percent, percent_with_interval = PERCENT.text, PERCENT.with_interval


@dataclass(frozen=True)
class Table:
    """A table of texts; `<br>` in a head begins a new line."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    about: str = ""
    """What its numbers are, behind the title."""
    apart: int = 0
    """The last so many rows are for orientation and set apart from the others."""

    @property
    def caption(self) -> str:
        """Title and what the numbers are."""
        return f"{self.title}, {self.about}" if self.about else self.title

    def set_apart(self, form: Callable[[str], str]) -> list[Sequence[str]]:
        """The rows, with the cells of those for orientation in another form."""
        own = len(self.rows) - self.apart
        return [
            *self.rows[:own],
            *([form(cell) if cell not in ("", DASH) else cell for cell in row] for row in self.rows[own:]),
        ]


#: A part of a report: a table, or Markdown of headings, paragraphs, lists and quotes.
Block = str | Table


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    key: str
    """What it is about: the page puts figures to some."""
    blocks: list[Block]


def without_empty_columns(table: Table) -> Table:
    """The table without columns that hold nothing but dashes, whatever rows for orientation have there."""
    own = table.rows[: len(table.rows) - table.apart]
    kept = [i for i in range(len(table.header)) if any(row[i] != DASH for row in own)]
    return replace(table, header=[table.header[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])


def markdown(table: Table) -> str:
    """A table in Markdown; rows for orientation in italics."""
    texts = replace(table, rows=[[markdown_text(str(cell), in_table=True) for cell in row] for row in table.rows])
    head = ["<br>".join(markdown_text(line, in_table=True) for line in text.split("<br>")) for text in table.header]
    lines = [head, ["---"] * len(head), *texts.set_apart("*{}*".format)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: Table) -> str:
    """A table environment in LaTeX, for the packages booktabs and xcolor."""
    texts = replace(table, rows=[list(map(latex_text, row)) for row in table.rows])
    rows = texts.set_apart(r"\textcolor{{gray}}{{{}}}".format)
    lines = [" & ".join(line) + r" \\" for line in (list(map(latex_text, table.header)), *rows)]
    words = [any(re.search("[a-z]", row[i]) for row in table.rows) for i in range(len(table.header))]
    columns = "".join("l" if of_words else "r" for of_words in words)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{latex_text(table.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


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
