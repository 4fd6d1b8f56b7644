"""From plain rows to rows with reasoning paths: plan and check, ask round after round, write."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges import JudgeError
from judges.judge import Judge
from judges.replies import Reply, Request, models_of
from judges.teacher.paths import Row, is_readable, read_path
from judges.teacher.prompts import TeacherPrompt, prompt_files, read_prompt
from judges.teacher.review import cut_note, quality, report, review
from trace_bench import shapes
from trace_bench.manifest import differences
from trace_bench.run import read_json
from trace_tasks import data
from trace_tasks.data.files import fingerprint, refuse_links, remove, write_json, write_text
from trace_tasks.errors import suggestion
from trace_tasks.reasoning import FRAMES, bare_answer, reasoning_answer, reasoning_prompt

log = logging.getLogger(__name__)

#: In the folder: the replies, and the settings with the numbers, which is written last.
CACHE, ANNOTATION = "annotate-cache.jsonl", "annotation.json"
#: Part of the settings: raise it with any change of what is asked or accepted.
VERSION = 4
SAMPLING = {"temperature": 0.7, "max_tokens": 1024}


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

    def requests(self, rows: Iterable[Row], attempt: int = 1) -> list[Request]:
        """What is asked about rows; attempts differ in their seed."""
        requests = []
        for row in rows:
            shown = self.settings["show_answers"] or FRAMES[row.folder].form != "line"
            messages = self.prompts[row.task].messages(row.folder, row.prompt, row.gold if shown else None)
            requests.append({"messages": messages, "seed": attempt})
        return requests

    def all_rows(self) -> list[Row]:
        """The rows of all tasks."""
        return [row for rows in self.rows.values() for row in rows]


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
    """Reads and checks everything that an annotation of the plain data in `root` needs.

    `tasks` are names of the eight tasks or of their orders (None = all that the data has), `prompts` a folder of the
    user's for `prompt_files`; the rest is as the options of `trace-bench annotate` say.

    Raises:
        DataError: if a task is unknown, or its data is missing or in another frame.
        JudgeError: if a teacher's prompt is wrong, or the folder was made with other settings or by something else.
    """
    if teacher.sampling.get("seed") is not None:
        raise JudgeError("--sampling seed is set by this program, to the number of the attempt. Leave it out.")
    names = _names(root, tasks)
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
    _check_folder(out, settings, teacher.endpoint)
    if attempts > 1 and teacher.sampling.get("temperature") == 0:
        log.warning("At temperature 0 every attempt gives the same reply. Use --attempts 1 or a temperature above 0.")
    left_out = {task: {"repeated": 0, "test prompt": 0, "unreadable answer": 0} for task in names}
    return Plan(
        out=out,
        rows={task: _rows(root, task, rows, left_out[task]) for task in names},
        bare={task: {split: _bare_rows(root, task, split) for split in ("eval", "test")} for task in names},
        left_out=left_out,
        prompts={task: read_prompt(file, data.FOLDERS[task]) for task, file in files.items()},
        settings=settings,
        demo=data.is_demo(root),
    )


def _names(root: Path, tasks: Sequence[str] | None) -> list[str]:
    """The tasks that are asked for, or all that the data has."""
    names = data.expand_orders(tasks or ())
    if unknown := [name for name in names if name not in data.FOLDERS]:
        raise data.DataError(
            f"{', '.join(unknown)}: no official reasoning form. Use tasks of {', '.join(data.FOLDERS)}."
            + "".join(suggestion(name, data.FOLDERS) for name in unknown)
        )
    return list(dict.fromkeys(names)) or [t for t, folder in data.FOLDERS.items() if (root / folder).is_dir()]


def _check_folder(out: Path, settings: dict[str, Any], endpoint: str) -> None:
    file = out / ANNOTATION
    if out.exists() and not out.is_dir():
        raise JudgeError(f"{out} is a file. Give a folder.")
    refuse_links(out, *data.FOLDERS.values())
    if file.exists():
        made = read_json(file, shapes.Annotation)
        there = {**made["settings"], "endpoint": made.get("endpoint", endpoint)}
        if lines := differences(there, {**settings, "endpoint": endpoint}):
            raise JudgeError(
                f"{out} was annotated with different settings (in the folder -> asked for):\n"
                + "\n".join(lines)
                + f"\nUse the settings of the folder, or a new folder. To make this one again, delete {file}; replies "
                "to the same requests are taken from the cache."
            )
    elif not (out / CACHE).exists() and any((out / folder).exists() for folder in data.FOLDERS.values()):
        raise JudgeError(f"{out} has task folders that this command did not write. Give a different folder.")


def _rows(root: Path, task: str, most: int, left_out: dict[str, int]) -> list[Row]:
    """The first different prompts of the training file; counts what is left out up to the last of them."""
    folder = data.FOLDERS[task]
    tested = {row["prompt"] for row in data.read_split(root, folder, "test")}
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
        elif not is_readable(folder, "", answer):
            left_out["unreadable answer"] += 1
        else:
            rows.append(Row(task, i, _asking(root / folder / "train.json", i, row["prompt"]), answer))
        seen.add(row["prompt"])
    if not rows:
        raise data.DataError(f"{root / folder}/train.json has no rows to annotate: {left_out}.")
    return rows


def _bare_rows(root: Path, task: str, split: str) -> list[dict[str, str]]:
    folder = data.FOLDERS[task]
    file = root / folder / f"{split}.json"
    return [
        {"prompt": _asking(file, i, row["prompt"]), "answer": bare_answer(folder, row["answer"])}
        for i, row in enumerate(data.read_split(root, folder, split))
    ]


def _asking(file: Path, index: int, prompt: str) -> str:
    """A prompt in the reasoning form."""
    try:
        return reasoning_prompt(file.parent.name, prompt)
    except ValueError as e:
        raise data.DataError(f"{file}, row {index}: {e}") from e


def possible_requests(plan: Plan, teacher: Judge) -> list[Request]:
    """All requests of all attempts that `annotate` may come to, with those that the cache holds.

    A row whose path is rejected each time is asked about in every attempt; one that a cached reply has settled is not.
    """
    rows, possible = plan.all_rows(), []
    for attempt in range(1, plan.settings["attempts"] + 1):
        requests = plan.requests(rows, attempt)
        possible += requests
        cached = [teacher.cached(request) for request in requests]
        rows = [row for row, reply in zip(rows, cached, strict=True) if not reply or not read_path(row, reply)[0]]
    return possible


def annotate(plan: Plan, teacher: Judge) -> dict[str, dict[str, Any]]:
    """Asks what is not in the cache, writes the folder, and returns task -> numbers, as in annotation.json.

    Every round asks about all rows without an accepted path, with the round as the seed, so that an interrupted program
    comes to the same files as one that was not. A request that failed counts as not accepted.

    Raises:
        JudgeError: if the teacher cannot be asked. Its replies so far are kept.
    """
    paths: dict[Row, str] = {}
    by_attempt: dict[Row, int] = {}
    asked_about: list[tuple[Row, Reply, str]] = []  # with the reason why a reply was rejected
    attempts = plan.settings["attempts"]
    for attempt in range(1, attempts + 1):
        asked = [row for row in plan.all_rows() if row not in paths]
        replies = teacher.complete(plan.requests(asked, attempt), f"attempt {attempt} of {attempts}")
        for row, reply in zip(asked, replies, strict=True):
            path, reason = ("", "") if reply.error is not None else read_path(row, reply)
            asked_about.append((row, reply, reason))
            if path:
                paths[row], by_attempt[row] = path, attempt
    paths = {row: paths[row] for row in plan.all_rows() if row in paths}  # in their order
    results: dict[str, dict[str, Any]] = {}
    for task, rows in plan.rows.items():
        found = [(row, path) for row, path in paths.items() if row.task == task]
        kept = len(rows) - len(found) if plan.settings["rejected"] == "keep" else 0
        replies = [reply for row, reply, _ in asked_about if row.task == task]
        tries = Counter(by_attempt[row] for row, _ in found)
        reasons = Counter(reason for row, _, reason in asked_about if row.task == task and reason)
        results[task] = {
            "rows": len(rows),
            "accepted": len(found),
            "accepted_by_attempt": [tries[attempt] for attempt in range(1, attempts + 1)],
            "kept": kept,
            "dropped": len(rows) - len(found) - kept,
            "failed_requests": sum(reply.error is not None for reply in replies),
            # Of all replies, whether they were paid now or came from the cache.
            "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
            "completion_tokens": sum(reply.completion_tokens for reply in replies),
            "rejected_replies": dict(sorted(reasons.items())),
            "left_out": plan.left_out[task],
            "models": models_of(replies),  # that answered, as the endpoint calls them
            **quality(found),
        }
    _write(plan, teacher, paths, results)
    if note := cut_note(plan.settings, results):
        log.warning("%s.", note)
    return results


def _write(plan: Plan, teacher: Judge, paths: dict[Row, str], results: dict[str, dict[str, Any]]) -> None:
    file = plan.out / ANNOTATION
    file.unlink(missing_ok=True)  # until it is there again the folder is not done
    for folder in data.FOLDERS.values():  # what another teacher wrote would be trained as this one's
        remove(plan.out / folder)
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
    write_text(plan.out / "review.csv", review(paths))
    write_text(plan.out / "annotation.md", report(plan.settings, plan.demo, results))
    write_json(file, {"settings": plan.settings, "endpoint": teacher.endpoint, "demo": plan.demo, "tasks": results})
