"""Writes the training data of RCL: a teacher gives each training example a reasoning path, which is checked.

RCL (arXiv 2310.06762, section 5) trains on reasoning paths that GPT-4 wrote from a prompt and three demonstrations per
task, checked against the right answers. The paper's prompts are not published; those of `judges/teacher/` are ours.

    trace-bench annotate OUT --model TEACHER        then: TRACE_REASONING=OUT python -m trainers.rcl ...

The teacher decides on no answer: what is written is its path, the official marker and the answer of the data, verbatim.

    OUT/
      <FOLDER>/{train,eval,test}.json   the official reasoning layout
      annotate-cache.jsonl              every reply, so that nothing is paid twice
      review.csv                        random rows for people to read
      annotation.md annotation.json     how it went; the second is written last: the folder is done
"""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from judges import JudgeError
from judges.prompts import block
from judges.thinking import answer_of
from judges.verdict import longer
from trace_bench import shapes
from trace_bench.run import differences, read_json
from trace_bench.tables import DASH, Table, markdown, percent
from trace_bench.text import cell, markdown_text, one_line
from trace_tasks import answers, data, scoring
from trace_tasks.data.files import fingerprint, refuse_links, write_json, write_text
from trace_tasks.reasoning import FRAMES, bare_answer, reasoning_answer, reasoning_prompt
from trace_tasks.written_numbers import names_number, number_tolerant

if TYPE_CHECKING:
    from judges.client import Judge, Reply, Request

log = logging.getLogger(__name__)

#: Part of the settings: raise it with any change of what is asked or accepted.
VERSION = 2
SAMPLING = {"temperature": 0.7, "max_tokens": 1024}
#: Share of the reference's own score that the answer of a path has to reach, see `is_right`.
CLOSE = 0.9
#: Rows of each task for people to read, and the longest text of a cell: a spread-sheet takes 32,767 characters.
REVIEWED = 20
LONGEST_CELL = 30_000
TEACHER_PATH = Path(__file__).parent / "teacher"
DEMONSTRATIONS = 3
#: Why a reply that ended at its limit is rejected.
CUT = "cut at the limit of tokens"


class Check(NamedTuple):
    """How the answers of a task are compared."""

    score: Callable[[str, str, str], float]
    """Prompt, answer, right answer -> the task's headline score."""
    names: Callable[[str, str], bool] | None = None
    """Whether a text states the right answer; None where that cannot be told."""


_CHOICE = Check(lambda prompt, answer, gold: scoring.accuracy(answer, gold), answers.names_choice)
# 12.0 for 12 is right: what is written is the gold answer in any case.
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


# ------------------------------------------------------------------------------------------------- the teacher's prompt


@dataclass(frozen=True)
class TeacherPrompt:
    """What a teacher is told and shown for one task: a YAML file with these keys."""

    instruction: str
    shown: str
    """What is added where the right answer is shown."""
    demonstrations: list[dict[str, str]]
    """Three of {"prompt", "reasoning", "answer"}; the prompt in the reasoning form."""

    def messages(self, folder: str, prompt: str, answer: str | None) -> list[dict[str, str]]:
        """The demonstrations as earlier turns of the chat, then the row.

        The texts stand between delimiters, and `neutralise` breaks what could close them or end the message for a local
        model's tokenizer. In the official training data that changes the "<s>" that every prompt of Py150 begins with,
        and nothing else. It also breaks "[[", which means nothing here and is no loss: Py150 writes "[ [", and an
        answer copied with a space more is close enough, since what is written is the answer of the data.

        Args:
            folder: The task's folder.
            prompt: The row's prompt in the reasoning form.
            answer: The right answer, to be shown; None = not.
        """
        told = self.instruction if answer is None else f"{self.instruction}\n\n{self.shown}"
        messages = []
        for demo in self.demonstrations:
            shown = None if answer is None else demo["answer"]
            messages += [
                {"role": "user", "content": _turn(demo["prompt"], shown)},
                {"role": "assistant", "content": reasoning_answer(folder, demo["reasoning"], demo["answer"])},
            ]
        messages[0]["content"] = f"{told}\n\n{messages[0]['content']}"
        return [*messages, {"role": "user", "content": _turn(prompt, answer)}]


def _turn(prompt: str, answer: str | None) -> str:
    task = block("TASK", prompt)
    return task if answer is None else f"{task}\n\n{block('RIGHT ANSWER', answer)}"


def prompt_files(tasks: Iterable[str], own: Path | None = None) -> dict[str, Path]:
    """The file of the teacher's prompt for each task: that of the user's folder where it has one, or the built-in one.

    Raises:
        JudgeError: if that folder has none, or files for tasks that do not exist.
    """
    names = {task: f"{task.removeprefix('trace_')}.yaml" for task in data.FOLDERS}
    given = {file.name for file in own.glob("*.yaml")} if own else set()
    if own and (not given or given - set(names.values())):
        raise JudgeError(
            f"--prompts {own} has the files {', '.join(sorted(given)) or 'none'}; they are to be named "
            f"{', '.join(names.values())}, such as those in {TEACHER_PATH}, which serve for the tasks without one."
        )
    return {task: (own if own and names[task] in given else TEACHER_PATH) / names[task] for task in tasks}


def read_prompt(file: Path, folder: str) -> TeacherPrompt:
    """Reads and checks the teacher's prompt of a task.

    Raises:
        JudgeError: naming the file, and what is wrong in it.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise JudgeError(f"{file} is not YAML: {e}") from e

    def texts(value: Any, keys: set[str], where: str) -> dict[str, str]:
        if not isinstance(value, dict) or value.keys() != keys:
            raise JudgeError(f"{file}{where}: the keys have to be {', '.join(sorted(keys))}.")
        for key, text in value.items():
            if not isinstance(text, str) or not text.strip():
                raise JudgeError(f"{file}{where}: {key} is {text!r}, not a text. Put numbers into quotes.")
        return value

    demos = content.pop("demonstrations", None) if isinstance(content, dict) else None
    told = texts(content, {"instruction", "shown"}, "")
    if not isinstance(demos, list) or len(demos) != DEMONSTRATIONS:
        raise JudgeError(f"{file}: demonstrations has to be a list of {DEMONSTRATIONS}.")
    frame = FRAMES[folder]
    for i, demo in enumerate(demos, 1):
        where = f", demonstration {i}"
        texts(demo, {"prompt", "reasoning", "answer"}, where)
        if frame.asking not in demo["prompt"] or not demo["prompt"].endswith(frame.reasoning_cue):
            raise JudgeError(f"{file}{where}: a prompt holds {frame.asking!r} and ends in {frame.reasoning_cue!r}.")
        if _problem(folder, demo["reasoning"], demo["answer"]):
            raise JudgeError(f"{file}{where}: {_problem(folder, demo['reasoning'], demo['answer'])}.")
    return TeacherPrompt(**told, demonstrations=demos)


# ------------------------------------------------------------------------------------------------------ reading replies


@dataclass(frozen=True)
class Row:
    """A training example: its place in the plain file, the prompt in the reasoning form, the bare answer."""

    task: str
    index: int
    prompt: str
    answer: str

    @property
    def folder(self) -> str:
        """The task's folder."""
        return data.FOLDERS[self.task]

    @property
    def gold(self) -> str:
        """The answer as it is read back from a training answer."""
        return _gold(self.folder, self.answer)


def _gold(folder: str, answer: str) -> str:
    return answer if FRAMES[folder].form == "code" else answer.strip()


def is_right(folder: str, prompt: str, answer: str, gold: str) -> bool:
    """Whether an answer is good enough for its path to be kept.

    Where the headline is an accuracy, it has to be right. The references of MeetingBank, Py150 and 20Minuten are each
    one of many good texts, which no teacher can guess: there the teacher is shown the reference and ends with it, and
    the answer has to reach `CLOSE` of the score that the reference has against itself. That forgives slips of copying,
    such as other quotation marks or a lost line break, while a text of the teacher's own is far below: the
    simplifications by GPT-4 in the official data reach a SARI of 0.37 to 0.46 where the reference has 0.99.

    Args:
        folder: The task's folder.
        prompt: The row's prompt, which SARI compares with too.
        answer: The answer that a path ends with.
        gold: The right one, as it is read from a training answer.
    """
    score = CHECKS[folder].score
    # Some references of Py150 are ") ", of which a copy without the space would lose a third.
    answer, gold = answer.strip(), gold.strip()
    return score(prompt, answer, gold) >= CLOSE * score(prompt, gold, gold) > 0


# What stands before the marker has to end a sentence or a line: not "So the final answer: 36", nor "**Answer:** B".
_ENDED = re.compile(r"(?:[\n.!?。！？]|\A)[ \t]*\Z")


def read_path(row: Row, reply: Reply) -> tuple[str, str]:
    """The reasoning path of a reply, and why it is rejected.

    Returns:
        The path and "", or "" and the reason.
    """
    if reply.refusal:
        return "", "refused"
    if reply.cut:
        return "", CUT
    form = FRAMES[row.folder].form
    text = None if reply.unclosed else answer_of(reply.text)
    if text is None:
        return "", "thinking not closed"
    parts = answers.split_answer(form, text)
    if parts is None:
        return "", "no answer in the task's form"
    path, answer = parts
    if not is_right(row.folder, row.prompt, answer, row.gold):
        return "", "wrong answer"
    if form != "code" and not _ENDED.search(path):
        return "", "no answer in the task's form"
    path = path.strip().removeprefix(FRAMES[row.folder].reasoning_cue).strip()
    problem = _problem(row.folder, path, row.answer)
    return ("", problem) if problem else (path, "")


def _problem(folder: str, path: str, answer: str) -> str:
    """Why a path cannot stand before an answer; empty if it can."""
    if not path.strip():
        return "no path"
    form = FRAMES[folder].form
    # With something behind it, a marker that the path holds is found wherever it stands.
    inner = answers.split_answer(form, path + "x")
    if inner and (form != "code" or inner[0]):
        return "a marker in the path"
    return "" if _is_readable(folder, path, answer) else "another answer would be read"


def _is_readable(folder: str, path: str, answer: str) -> bool:
    composed = reasoning_answer(folder, path, answer)
    return answers.extract_answer(FRAMES[folder].form, composed) == _gold(folder, answer)


# ------------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Plan:
    """What is to be annotated, checked, with nothing asked."""

    out: Path
    rows: dict[str, list[Row]]
    """Task -> its rows, in the order of the file."""
    bare: dict[str, dict[str, list[dict[str, str]]]]
    """Task -> eval and test rows, as they are written."""
    left_out: dict[str, dict[str, int]]
    """Task -> why rows before the last one taken were not: repeated, test prompt, unreadable answer."""
    prompts: dict[str, TeacherPrompt]
    settings: dict[str, Any]
    demo: bool

    @property
    def attempts(self) -> int:
        """The most times that a row is asked about."""
        return self.settings["attempts"]

    def requests(self, rows: Iterable[Row], attempt: int = 1) -> list[Request]:
        """What is asked about rows; attempts differ in their seed."""
        return [{"messages": self._messages(row), "seed": attempt} for row in rows]

    def _messages(self, row: Row) -> list[dict[str, str]]:
        shown = self.settings["show_answers"] or FRAMES[row.folder].form != "line"
        return self.prompts[row.task].messages(row.folder, row.prompt, row.gold if shown else None)

    @property
    def first_requests(self) -> list[Request]:
        """The first attempt at all rows."""
        return self.requests(row for rows in self.rows.values() for row in rows)


def cache_file(out: Path) -> Path:
    """The replies."""
    return out / "annotate-cache.jsonl"


def annotation_file(out: Path) -> Path:
    """The settings and the numbers; written last."""
    return out / "annotation.json"


def plan(
    out: Path,
    teacher: Judge,
    root: Path,
    *,
    tasks: Sequence[str] | None = None,
    rows: int,
    attempts: int,
    rejected: str = "drop",
    show_answers: bool = False,
    prompts: Path | None = None,
) -> Plan:
    """Reads and checks everything that an annotation needs, without asking anything.

    Args:
        out: The folder to write to.
        teacher: Who will be asked.
        root: The plain data.
        tasks: Names of the eight tasks or of their orders; None = all that the data has.
        rows: The first so many different prompts of each task that are no test prompt.
        attempts: The most times that a row is asked about.
        rejected: "drop" leaves rows without an accepted path out, "keep" writes them with their answer alone.
        show_answers: Whether the teacher sees the right answers of all tasks.
        prompts: A folder with teacher's prompts that replace the built-in ones of the same names.

    Raises:
        DataError: if a task is unknown, or its data is missing or in another frame.
        JudgeError: if a teacher's prompt is wrong, or the folder was made with other settings or by something else.
    """
    names = [t for name in tasks for t in data.ORDERS.get(name, [name])] if tasks else []
    names = list(dict.fromkeys(names)) or [t for t, folder in data.FOLDERS.items() if (root / folder).is_dir()]
    unknown = [name for name in names if name not in data.FOLDERS]
    if unknown:
        raise data.DataError(
            f"{', '.join(unknown)}: not among the tasks with an official reasoning form: {', '.join(data.FOLDERS)}."
        )
    trace_data = data.Data.at(root, names)
    trace_data.check()
    files = prompt_files(names, prompts)
    settings = {
        "version": VERSION,
        "teacher": teacher.model,
        "revision": teacher.revision,
        "sampling": teacher.sampling,
        "date": teacher.date,
        "rows": rows,
        "attempts": attempts,
        "rejected": rejected,
        "show_answers": show_answers,
        "prompts": {task: fingerprint(file) for task, file in files.items()},
        "data": trace_data.fingerprint,
    }
    settings = json.loads(json.dumps(settings))  # as it will be read back
    _check_folder(out, settings)
    if attempts > 1 and teacher.sampling.get("temperature") == 0:
        log.warning("At temperature 0 every attempt gives the same reply: use --attempts 1 or a temperature above 0.")
    taken = {task: _rows(root, task, rows) for task in names}
    return Plan(
        out=out,
        rows={task: found for task, (found, _) in taken.items()},
        bare={task: {split: _bare_rows(root, task, split) for split in ("eval", "test")} for task in names},
        left_out={task: left_out for task, (_, left_out) in taken.items()},
        prompts={task: read_prompt(file, data.FOLDERS[task]) for task, file in files.items()},
        settings=settings,
        demo=data.is_demo(root),
    )


def _check_folder(out: Path, settings: dict[str, Any]) -> None:
    file = annotation_file(out)
    if out.exists() and not out.is_dir():
        raise JudgeError(f"{out} is a file. Name a folder.")
    refuse_links(out, *data.FOLDERS.values())
    if file.exists():
        lines = differences(read_json(file, shapes.Annotation)["settings"], settings)
        if lines:
            raise JudgeError(
                f"{out} was annotated with other settings (there -> asked for):\n"
                + "\n".join(lines)
                + f"\nUse the old ones, or another folder. To make this one anew, delete {file}: replies to the same "
                "requests are taken from the cache."
            )
    elif not cache_file(out).exists() and any((out / folder).exists() for folder in data.FOLDERS.values()):
        raise JudgeError(f"{out} holds task folders that this command did not write. Name another folder.")


def _asking(root: Path, task: str, split: str, index: int, prompt: str) -> str:
    folder = data.FOLDERS[task]
    try:
        return reasoning_prompt(folder, prompt)
    except ValueError as e:
        raise data.DataError(f"{root / folder / split}.json, row {index}: {e}") from e


def _rows(root: Path, task: str, most: int) -> tuple[list[Row], dict[str, int]]:
    """The first different prompts of the training file, and what was left out up to the last of them."""
    folder = data.FOLDERS[task]
    tested = {row["prompt"] for row in data.read_split(root, folder, "test")}
    left_out = {"repeated": 0, "test prompt": 0, "unreadable answer": 0}
    seen: set[str] = set()
    rows: list[Row] = []
    for i, row in enumerate(data.read_split(root, folder, "train")):
        if len(rows) == most:
            break
        answer = bare_answer(folder, row["answer"])
        if row["prompt"] in seen:
            left_out["repeated"] += 1
        elif row["prompt"] in tested:
            left_out["test prompt"] += 1
        elif not _is_readable(folder, "", answer):
            left_out["unreadable answer"] += 1
        else:
            rows.append(Row(task, i, _asking(root, task, "train", i, row["prompt"]), answer))
        seen.add(row["prompt"])
    if not rows:
        raise data.DataError(f"{root / folder}/train.json has no row to annotate: {left_out}.")
    return rows, left_out


def _bare_rows(root: Path, task: str, split: str) -> list[dict[str, str]]:
    folder = data.FOLDERS[task]
    return [
        {"prompt": _asking(root, task, split, i, row["prompt"]), "answer": bare_answer(folder, row["answer"])}
        for i, row in enumerate(data.read_split(root, folder, split))
    ]


# ----------------------------------------------------------------------------------------------------------- annotating


def annotate(plan: Plan, teacher: Judge) -> dict[str, dict[str, Any]]:
    """Asks what is not in the cache, round after round, and writes the folder.

    Every round asks about all rows without an accepted path, with the round as the seed, so that an interrupted program
    comes to the same files as one that was not. A request that failed counts as not accepted.

    Returns:
        Task -> numbers, as in annotation.json.

    Raises:
        JudgeError: if the teacher cannot be asked. Its replies so far are kept.
    """
    paths: dict[Row, str] = {}
    accepted: dict[str, list[int]] = {task: [] for task in plan.rows}
    counts: dict[str, Counter[str]] = {task: Counter() for task in plan.rows}
    reasons: dict[str, Counter[str]] = {task: Counter() for task in plan.rows}
    for attempt in range(1, plan.attempts + 1):
        asked = [row for rows in plan.rows.values() for row in rows if row not in paths]
        replies = teacher.complete(plan.requests(asked, attempt), f"attempt {attempt} of {plan.attempts}")
        for row, reply in zip(asked, replies, strict=True):
            count = counts[row.task]
            if reply.error is not None:
                count["failed"] += 1
                continue
            count["prompt_tokens"] += reply.prompt_tokens
            count["completion_tokens"] += reply.completion_tokens
            path, reason = read_path(row, reply)
            if path:
                paths[row] = path
            else:
                reasons[row.task][reason] += 1
        for task, rows in plan.rows.items():
            accepted[task].append(sum(row in paths for row in rows) - sum(accepted[task]))

    keep = plan.settings["rejected"] == "keep"
    results = {}
    for task, rows in plan.rows.items():
        found = [(row, paths[row]) for row in rows if row in paths]
        missing = len(rows) - len(found)
        results[task] = {
            "rows": len(rows),
            "accepted": len(found),
            "accepted_by_attempt": accepted[task],
            "kept": missing if keep else 0,
            "dropped": 0 if keep else missing,
            # Of all replies, whether they were paid now or came from the cache.
            "failed_requests": counts[task]["failed"],
            "prompt_tokens": counts[task]["prompt_tokens"],
            "completion_tokens": counts[task]["completion_tokens"],
            "rejected_replies": dict(sorted(reasons[task].items())),
            "left_out": plan.left_out[task],
            **quality(found),
        }
    _write(plan, teacher, paths, results)
    if note := _cut_note(plan, results):
        log.warning("%s.", note)
    return results


def _cut_note(plan: Plan, results: dict[str, dict[str, Any]]) -> str:
    """How many replies were cut, and the option that helps; empty if none was."""
    cut = sum(r["rejected_replies"].get(CUT, 0) for r in results.values())
    return f"{cut} replies were {CUT} and rejected: raise it with {longer(plan.settings['sampling'])}" if cut else ""


def quality(found: Sequence[tuple[Row, str]]) -> dict[str, Any]:
    """Numbers about the accepted paths of one task.

    Returns:
        `characters` and `words`: min, 5th percentile, median, 95th percentile and max (a Chinese character is a word),
        or None without a path. `answer_first`: paths whose first of several sentences states the right answer (see
        `answers_first`), None for texts. `duplicates`: paths that more than one row has, apart from white space.
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
    if not values:
        return None
    names = ("min", "p5", "median", "p95", "max")
    return dict(zip(names, np.percentile(values, [0, 5, 50, 95, 100]).tolist(), strict=True))


# The full stop of "U.S." ends none.
_SENTENCE = re.compile(r".*?(?:[。！？]|(?<!\.[A-Z])[.!?](?=\s)|\n|\Z)", re.DOTALL)


def answers_first(row: Row, path: str) -> bool:
    """Whether the first sentence of a path states the right answer already, so that the rest explains it afterwards.

    A letter counts where it stands as a label ("the stance is B.", "B: ..."), not as a word; a number or word where the
    sentence holds it and the question does not. In a path of one sentence nothing comes afterwards. Without shown
    answers this is a matter of style, with them a sign of rationalising.
    """
    names = CHECKS[row.folder].names
    first = _SENTENCE.match(path)
    assert names is not None and first is not None  # of a task with such answers; the pattern matches any text
    if not path[first.end() :].strip() or not names(first.group(), row.gold):
        return False
    return names is answers.names_choice or not names(row.prompt, row.gold)


# -------------------------------------------------------------------------------------------------------------- writing


def _write(plan: Plan, teacher: Judge, paths: dict[Row, str], results: dict[str, dict[str, Any]]) -> None:
    file = annotation_file(plan.out)
    file.unlink(missing_ok=True)  # until it is there again the folder is not done
    for task, rows in plan.rows.items():
        folder = data.FOLDERS[task]
        train = [
            {"prompt": row.prompt, "answer": reasoning_answer(folder, paths.get(row, ""), row.answer)}
            for row in rows
            if row in paths or plan.settings["rejected"] == "keep"
        ]
        if not train:
            log.warning("%s: no path was accepted, so there is no %s.", task, plan.out / folder)
            continue
        for split, content in {"train": train, **plan.bare[task]}.items():
            write_json(plan.out / folder / f"{split}.json", content)
    write_text(plan.out / "review.csv", review(plan, paths))
    write_text(plan.out / "annotation.md", _report(plan, results))
    write_json(
        file,
        {"settings": plan.settings, "endpoint": teacher.endpoint, "demo": plan.demo, "tasks": results},
    )


def review(plan: Plan, paths: dict[Row, str]) -> str:
    """A table of random annotated rows of each task for people to judge, as CSV for spread-sheets."""
    table = io.StringIO()
    table.write("\ufeff")  # without it spread-sheets take UTF-8 for something else
    writer = csv.writer(table)
    writer.writerow(["task", "row", "prompt", "path", "answer", "ok", "comment"])
    for task, rows in plan.rows.items():
        found = [row for row in rows if row in paths]
        for i in sorted(random.Random(0).sample(range(len(found)), min(REVIEWED, len(found)))):
            row = found[i]
            writer.writerow([task, row.index, *map(_cell, (row.prompt, paths[row], row.answer)), "", ""])
    return table.getvalue()


def _cell(text: str) -> str:
    """A text that a spread-sheet takes for one: no formula, and not too long."""
    if len(text) > LONGEST_CELL:
        text = f"{text[: LONGEST_CELL // 2]} [...] {text[-LONGEST_CELL // 2 :]}"
    return cell(text)


def _report(plan: Plan, results: dict[str, dict[str, Any]]) -> str:
    settings = plan.settings
    teacher = settings["teacher"] + (f" ({settings['revision']})" if settings["revision"] else "")
    shown = "the right answers of all tasks" if settings["show_answers"] else "the references of the text tasks alone"
    notes = [
        f"- teacher: `{teacher}`, `{json.dumps(settings['sampling'])}`; it saw {shown}",
        f"- the first {settings['rows']} different training prompts of each task that are no test prompt; at most "
        f"{settings['attempts']} attempts; rejected rows: {settings['rejected']}",
    ]
    if plan.demo:
        notes.append("- **Demo data** made by this program: not comparable with TRACE")
    failed = sum(r["failed_requests"] for r in results.values())
    if failed:
        notes.append(f"- {failed} requests failed: the same `trace-bench annotate` asks them again")
    if note := _cut_note(plan, results):
        notes.append(f"- {note}")
    counted = [
        [
            task,
            str(r["rows"]),
            f"{r['accepted']} ({percent(r['accepted'] / r['rows'])} %)",
            " + ".join(map(str, r["accepted_by_attempt"])),
            str(r["kept"]),
            str(r["dropped"]),
            str(r["failed_requests"]),
            f"{r['prompt_tokens']:,}",
            f"{r['completion_tokens']:,}",
        ]
        for task, r in results.items()
    ]
    described = [
        [
            task,
            *(_range(r[unit]) for unit in ("characters", "words")),
            DASH if r["answer_first"] is None else str(r["answer_first"]),
            str(r["duplicates"]),
            _listed(r["rejected_replies"]),
            _listed(r["left_out"]),
        ]
        for task, r in results.items()
    ]
    return "\n\n".join(
        [
            "# Reasoning paths",
            "\n".join(map(markdown_text, map(one_line, notes))),
            markdown(
                Table(
                    ["task", "rows", "accepted", "by attempt", "kept", "dropped", "failed", "tokens in", "tokens out"],
                    counted,
                )
            ),
            "Accepted: the path ends in the right answer, or in a copy of the reference where the teacher saw it. What "
            "is written is the answer of the data in any case. Kept: written with the answer alone.",
            markdown(
                Table(
                    ["task", "characters", "words", "answer first", "duplicates", "replies rejected", "rows left out"],
                    described,
                )
            ),
            "Lengths: median (5th to 95th percentile; min, max). Answer first: paths whose first sentence states the "
            "answer already. Duplicates: paths that several rows share. `review.csv` holds random rows for people to "
            "read.",
        ]
    )


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return DASH
    return "{median:.0f} ({p5:.0f} to {p95:.0f}; {min:.0f}, {max:.0f})".format(**spread)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items() if n) or DASH
