"""Reads a reasoning path out of a teacher's reply, and checks the answer that it leads to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from judges.replies import Reply
from judges.thinking import answer_of
from trace_tasks import answers, data, scoring
from trace_tasks.reasoning import FRAMES, reasoning_answer
from trace_tasks.written_numbers import names_number, number_tolerant

#: Share of the reference's own score that the answer of a path has to reach, see `is_right`.
CLOSE = 0.9
#: Why a reply that ended at its limit is rejected.
CUT = "cut at the limit of tokens"


class Check(NamedTuple):
    """How the answers of a task are compared."""

    score: Callable[[str, str, str], float]
    """Prompt, answer, right answer -> the task's headline score."""
    names: Callable[[str, str], bool] | None = None
    """Whether a text states the right answer; None where that cannot be told."""


# "B. hawkish" for B and 12.0 for 12 are right: what is written is the gold answer in any case.
_CHOICE = Check(lambda prompt, answer, gold: answers.choice_tolerant(answer, gold, prompt), answers.names_choice)
_NUMBER = Check(lambda prompt, answer, gold: number_tolerant(answer, gold), names_number)
CHECKS = {
    "C-STANCE": _CHOICE,
    "FOMC": _CHOICE,
    "MeetingBank": Check(lambda prompt, answer, gold: scoring.rouge_l(answer, gold)),
    "Py150": Check(lambda prompt, answer, gold: scoring.similarity(answer, gold)),
    "ScienceQA": _CHOICE,
    "NumGLUE-cm": _NUMBER,
    "NumGLUE-ds": _NUMBER,
    "20Minuten": Check(scoring.sari),
}


@dataclass(frozen=True)
class Row:
    """A training example: its place in the plain file, the prompt in the reasoning form, the bare answer."""

    task: str
    index: int
    prompt: str
    answer: str

    @property
    def folder(self) -> str:
        """The folder of the task."""
        return data.FOLDERS[self.task]

    @property
    def gold(self) -> str:
        """See `read_back`."""
        return read_back(self.folder, self.answer)


def read_back(folder: str, answer: str) -> str:
    """An answer of the data as it is read back from a training answer."""
    return answer if FRAMES[folder].form == "code" else answer.strip()


def is_right(folder: str, prompt: str, answer: str, gold: str) -> bool:
    """Whether an answer is good enough for its path to be kept.

    Where the headline is an accuracy, it has to be right. The references of MeetingBank, Py150 and 20Minuten are each
    one of many good texts: the teacher is shown the reference and ends with it, and the answer has to reach `CLOSE` of
    the score that the reference has against itself. That forgives slips of copying, such as other quotation marks; a
    text of the teacher's own is far below (GPT-4 in the official data: a SARI of 0.37 to 0.46 against 0.99).
    """
    score = CHECKS[folder].score
    # Some references of Py150 are ") ", of which a copy without the space would lose a third.
    answer, gold = answer.strip(), gold.strip()
    return score(prompt, answer, gold) >= CLOSE * score(prompt, gold, gold) > 0


# What stands before the marker has to end a sentence or a line: not "So the final answer: 36".
_ENDED = re.compile(r"(?:[\n.!?。！？]|\A)[ \t]*\Z")
# Markdown around a marker: "**Answer:** B", "**Answer**: B", "### Final answer: B"; and around its whole line.
_WORDS = r"answer|回答|答案|reasoning|推理|(?:therefore,\s)?the summary of the meeting transcripts? is"
_MARKED_UP = re.compile(
    rf"(?:^#{{1,6}}[ \t]+)?([*_]{{1,3}}|)(?:final[ \t]+)?({_WORDS})(?:\1[ \t]*([:：])|[ \t]*([:：])\1)", re.I | re.M
)
_LINE_MARKED_UP = re.compile(rf"([*_]{{1,3}})((?:{_WORDS})[ \t]*[:：].{{0,300}}?)\1[ \t]*$", re.I | re.M)
# "**B**", "`B`", "$B$"; \boxed{B}, also with \text{B} in it.
_WRAPPED = re.compile(
    r"(?:(\*{1,3}|_{1,3}|`|\$)([^*`$]+)\1|(?:\$|\\\()?\\boxed\{(?:\\text\{)?([^{}]+)\}{1,2}(?:\$|\\\))?)[.。]?"
)
# The line of code in a block of its own, or in backticks.
_FENCED = re.compile(r"\A\s*(`{3,})\w*[ \t]*\n(.+?)\n\1[ \t]*(?=\n)|\A\s*`([^`\n]+)`[ \t]*(?=\n)", re.DOTALL)


def read_path(row: Row, reply: Reply) -> tuple[str, str]:
    """The reasoning path of a reply and "", or "" and the reason why it is rejected."""
    if reply.refusal:
        return "", "refused"
    if reply.cut:
        return "", CUT
    frame = FRAMES[row.folder]
    text = None if reply.unclosed else answer_of(reply.text)
    if text is None:
        return "", "thinking not closed"
    path, answer = answers.split_answer(frame.form, _without_markdown(frame.form, text)) or ("", None)
    if answer is None:
        return "", "no answer in the task's form"
    while frame.form == "line" and len(answer) < 100 and (wrapped := _WRAPPED.fullmatch(answer)):
        answer = "".join(filter(None, wrapped.groups()[1:]))
    if not is_right(row.folder, row.prompt, answer, row.gold):
        return "", "wrong answer"
    if frame.form != "code" and not _ENDED.search(path):
        return "", "no answer in the task's form"
    path = path.strip().removeprefix(frame.reasoning_cue).strip()
    problem = path_problem(row.folder, path, row.answer)
    if not problem and states_another(row, path):
        problem = "another answer in the path"
    return ("", problem) if problem else (path, "")


def _without_markdown(form: str, text: str) -> str:
    """A reply without the Markdown around its markers, and around a line of code that is the answer."""
    text = _LINE_MARKED_UP.sub(r"\2", _MARKED_UP.sub(r"\2\3\4", text))
    return _FENCED.sub(lambda found: found[2] or found[3], text) if form == "code" else text


_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_STATES_ANSWER = re.compile(r"\b(?:answer|stance)\b|答案|态度|立场", re.IGNORECASE)


def states_another(row: Row, path: str) -> bool:
    """Whether the last sentence of a path states another option than the right one ("So the stance is C").

    Of the 600 official paths to an option one does, and is wrong ("A hawkish policy stance ..." before A, dovish).
    """
    *_, last = filter(str.strip, _SENTENCE_ENDS.split(path))
    if CHECKS[row.folder] is not _CHOICE or not _STATES_ANSWER.search(last):
        return False
    return answers.read_choice(last, row.prompt) not in (None, row.gold)


def path_problem(folder: str, path: str, answer: str) -> str:
    """Why a path cannot stand before an answer; empty if it can."""
    if not path.strip():
        return "no path"
    form = FRAMES[folder].form
    # With a letter after it, a marker that the path holds is found wherever it stands.
    inner = answers.split_answer(form, path + "x")
    if inner and (form != "code" or inner[0]):
        return "a marker in the path"
    if path.count("```") % 2:
        return "a block of code that is not closed"
    return "" if is_readable(folder, path, answer) else "another answer would be read"


def is_readable(folder: str, path: str, answer: str) -> bool:
    """Whether the very answer is read back from a training answer with this path."""
    composed = reasoning_answer(folder, path, answer)
    return answers.extract_answer(FRAMES[folder].form, composed) == read_back(folder, answer)
