"""Numbers and tables as text, for the reports of runs, comparisons and judgements: Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trace_bench.data import FOLDERS, REASONING
from trace_bench.metrics import Estimate

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


def length(characters: float, empty: float) -> str:
    """How long answers are on average, and in brackets the percentage of empty ones, where some are."""
    return f"{characters:.0f}" + (f" ({100 * empty:.0f} %)" if empty else "")


def percent(value: float, sign: bool = False) -> str:
    """A fraction of 1 as percent."""
    return number(100 * value, sign)


def percent_with_interval(estimate: Estimate, sign: bool = False) -> str:
    """Percent with its interval in brackets, if there is one."""
    text = percent(estimate.value, sign)
    if math.isnan(estimate.low) or text == DASH:
        return text
    return f"{text} [{percent(estimate.low, sign)}, {percent(estimate.high, sign)}]"


def arrow(change: Estimate | None) -> str:
    """Behind a number: an arrow where the interval of its change excludes zero."""
    return {1: " ↑", 0: "", -1: " ↓"}[change.sign if change else 0]


def value_text(value: Any) -> str:
    """A setting in a sentence; short, whatever it is."""
    if isinstance(value, dict):
        return ", ".join(f"{task_name(k)} {v}" for k, v in value.items())
    return "not set" if value is None else str(value)


def left_out_text(left_out: dict[str, tuple[int, int]]) -> str:
    """Says which test rows do not count in a run that is seen without leaked rows (`Results.left_out`)."""
    text = ", ".join(f"{task_name(task)} {n} of {total}" for task, (n, total) in left_out.items() if n)
    return (
        "Test rows whose prompt is in the training rows of the task, exactly or nearly, are left out of all scores: "
        f"{text or 'none was found'}. Not comparable with scores of all rows."
    )


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


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


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
    text = "".join(_LATEX.get(c, c) for c in text.replace("<br>", " "))
    text = re.sub(r"`([^`]*)`", r"\\texttt{\1}", text)
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"(?<![\w.,-])-(?=\d)", "$-$", text)  # a minus, not a hyphen
