"""What people read of an annotation: numbers about the paths, annotation.md, and random rows as review.csv."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from judges.teacher.paths import CHECKS, CUT, Row
from trace_bench.judgements import longer
from trace_bench.report import DASH, Table, markdown, percent
from trace_bench.text import cell, markdown_text, one_line
from trace_tasks import answers

#: Rows of each task for people to read, and the longest text of a cell: a spread-sheet takes 32,767 characters.
REVIEWED = 20
LONGEST_CELL = 30_000

Numbers = dict[str, dict[str, Any]]
"""Task -> numbers, as in annotation.json."""


def quality(found: Sequence[tuple[Row, str]]) -> dict[str, Any]:
    """Numbers about the accepted paths of one task.

    Returns:
        `characters` and `words`: min, 5th percentile, median, 95th percentile and max (a Chinese character is a word),
        or None without a path. `answer_first`: paths of which `answers_first` holds, None for texts. `duplicates`:
        paths that more than one row has, apart from white space.
    """
    texts = Counter(" ".join(path.split()) for _, path in found)
    defined = found and CHECKS[found[0][0].folder].names
    return {
        "characters": _spread([len(path) for _, path in found]),
        "words": _spread([len(re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", path)) for _, path in found]),
        "answer_first": sum(answers_first(row, path) for row, path in found) if defined else None,
        "duplicates": sum(times for times in texts.values() if times > 1),
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    percentiles = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    return {name: float(np.percentile(values, p)) for name, p in percentiles.items()} if values else None


# The full stop of "U.S." ends none.
_SENTENCE = re.compile(r".*?(?:[。！？]|(?<!\.[A-Z])[.!?](?=\s)|\n|\Z)", re.DOTALL)


def answers_first(row: Row, path: str) -> bool:
    """Whether the first of several sentences states the right answer already, so that the rest explains it afterwards.

    A letter counts where it stands as a label ("the stance is B.", "B: ..."), not as a word; a number or word where the
    sentence holds it and the question does not. Without shown answers this is style, with them a sign of rationalising.
    """
    names = CHECKS[row.folder].names
    first = _SENTENCE.match(path)
    assert names is not None and first is not None  # of a task with such answers; the pattern matches any text
    if not path[first.end() :].strip() or not names(first.group(), row.gold):
        return False
    return names is answers.names_choice or not names(row.prompt, row.gold)


def review(paths: dict[Row, str]) -> str:
    """A table of random annotated rows of each task for people to judge, as CSV for spread-sheets."""
    table = io.StringIO()
    table.write("\ufeff")  # without it spread-sheets take UTF-8 for something else
    writer = csv.writer(table)
    writer.writerow(["task", "row", "prompt", "path", "answer", "ok", "comment"])
    for task, group in groupby(paths, lambda row: row.task):
        rows = list(group)
        for i in sorted(random.Random(0).sample(range(len(rows)), min(REVIEWED, len(rows)))):
            texts = (rows[i].prompt, paths[rows[i]], rows[i].answer)
            writer.writerow([task, rows[i].index, *map(_cell, texts), "", ""])
    return table.getvalue()


def _cell(text: str) -> str:
    """A text that a spread-sheet takes for one: no formula, and not too long."""
    if len(text) > LONGEST_CELL:
        text = f"{text[: LONGEST_CELL // 2]} [...] {text[-LONGEST_CELL // 2 :]}"
    return cell(text)


def cut_note(settings: dict[str, Any], results: Numbers) -> str:
    """How many replies were cut, and the option that helps; empty if none was."""
    cut = sum(r["rejected_replies"].get(CUT, 0) for r in results.values())
    return f"{cut} replies were {CUT} and rejected: raise it with {longer(settings['sampling'])}" if cut else ""


def report(settings: dict[str, Any], demo: bool, results: Numbers) -> str:
    """The text of annotation.md."""
    counted = [
        [
            *(task, str(r["rows"])),
            *_accepted(r, settings["attempts"]),
            *(f"{r[name]}" for name in ("kept", "dropped", "failed_requests")),
            *(f"{r[name]:,}" for name in ("prompt_tokens", "completion_tokens")),
        ]
        for task, r in results.items()
    ]
    described = [
        [
            *(task, *(_range(r[unit]) for unit in ("characters", "words"))),
            DASH if r["answer_first"] is None else str(r["answer_first"]),
            *(str(r["duplicates"]), *(_listed(r[name]) for name in ("rejected_replies", "left_out"))),
        ]
        for task, r in results.items()
    ]
    counts = ["task", "rows", "accepted", "by attempt", "kept", "dropped", "failed", "tokens in", "tokens out"]
    texts = ["task", "characters", "words", "answer first", "duplicates", "replies rejected", "rows left out"]
    return "\n\n".join(
        [
            "# Reasoning paths",
            "\n".join(markdown_text(one_line(note)) for note in _notes(settings, demo, results)),
            markdown(Table(counts, counted)),
            "Accepted: the path ends in the right answer, or in a copy of the reference if the teacher saw it. The "
            "written answer is always that of the data. Kept: written with only the answer.",
            markdown(Table(texts, described)),
            "Lengths: median (5th to 95th percentile; min, max). Answer first: paths whose first sentence already "
            "states the answer. Duplicates: paths that several rows share. `review.csv` has random rows for you to "
            "read.",
        ]
    )


def _accepted(numbers: dict[str, Any], attempts: int) -> list[str]:
    """How many paths were accepted, and at which attempt: nothing is known where every request failed."""
    accepted, rows = numbers["accepted"], numbers["rows"]
    if numbers["failed_requests"] == rows * attempts:
        return [DASH, DASH]
    return [f"{accepted} ({percent(accepted / rows)} %)", " + ".join(map(str, numbers["accepted_by_attempt"]))]


def _notes(settings: dict[str, Any], demo: bool, results: Numbers) -> list[str]:
    teacher = settings["teacher"] + (f" ({settings['revision']})" if settings["revision"] else "")
    shown = "the right answers of all tasks" if settings["show_answers"] else "only the references of the text tasks"
    notes = [
        f"- teacher: `{teacher}`, `{json.dumps(settings['sampling'])}`; it saw {shown}",
        f"- the first {settings['rows']} different training prompts of each task that are not test prompts; at most "
        f"{settings['attempts']} attempts; rejected rows: {settings['rejected']}",
    ]
    if demo:
        notes.append("- **Demo data**, generated by this program: not comparable with TRACE")
    if len(models := sorted({model for r in results.values() for model in r["models"]})) > 1:
        notes.append(f"- **Several models answered** as this teacher: {', '.join(models)}")
    if failed := sum(r["failed_requests"] for r in results.values()):
        notes.append(f"- {failed} requests failed: run the same `trace-bench annotate` again to repeat them")
    if note := cut_note(settings, results):
        notes.append(f"- {note}")
    return notes


def _range(spread: dict[str, float] | None) -> str:
    return DASH if spread is None else "{median:.0f} ({p5:.0f} to {p95:.0f}; {min:.0f}, {max:.0f})".format(**spread)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n) or DASH
