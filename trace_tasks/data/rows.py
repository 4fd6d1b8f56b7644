"""Reads and checks rows of prompt and answer: the files of the official layout, `<TASK>/{train,eval,test}.json`.

Each file is a JSON list of objects that have only the texts "prompt" and "answer". Any further key is refused, so that
no other variant of the data is read by mistake.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from trace_tasks.data.files import fingerprint
from trace_tasks.data.names import SPLITS, task_variant
from trace_tasks.data.reading import check, read_file
from trace_tasks.errors import DataError
from trace_tasks.reasoning import row_variant

#: The most bytes of a file of rows, which is read into memory as a whole.
MOST_ROWS = 2 * 2**30


def _whole(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a text: it has half of a surrogate pair") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text: it is empty or blank")
    return text


WholeText = Annotated[str, AfterValidator(_whole)]
Text = Annotated[WholeText, AfterValidator(_not_blank)]


@with_config(ConfigDict(extra="forbid"))
class Row(TypedDict):
    """A row to train or test on."""

    prompt: Text
    answer: Text


@with_config(ConfigDict(extra="forbid"))
class Question(TypedDict):
    """A row of a set to be judged, whose answer may be empty."""

    prompt: Text
    answer: WholeText


def row_problem(row: Any, shape: Any = Row) -> str | None:
    """The reason why a value is no row; None for a good row."""
    try:
        check(shape, row)
    except ValueError as e:
        return f"{e}; its keys are {sorted(row)}." if isinstance(row, dict) and "lacks" in str(e) else f"{e}."
    return None


def read_list(file: Path) -> list[Any]:
    """Reads a JSON list with any content.

    Raises:
        DataError: if the file is not UTF-8, not JSON, no list, or an empty list.
    """
    try:
        rows = json.loads(read_file(file, MOST_ROWS).decode("utf-8-sig"), object_pairs_hook=_once)
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}.") from e
    except (ValueError, RecursionError) as e:  # ValueError: also a number of thousands of digits
        raise DataError(f"{file} is not JSON: {e}.") from e
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file} has {'an empty list' if rows == [] else type(rows).__name__}, not a list of rows.")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object. Refuses one that has a key twice: Python would silently keep the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice; its keys are {[key for key, _ in pairs]}"[:300])
    return found


def sift_rows(file: Path, shape: Any = Row) -> tuple[dict[int, dict[str, str]], dict[int, str]]:
    """The good rows of a file, and the problems of the bad rows, by row number.

    Raises:
        DataError: as from `read_list`.
    """
    values = read_list(file)
    bad = {i: problem for i, value in enumerate(values) if (problem := row_problem(value, shape))}
    return {i: value for i, value in enumerate(values) if i not in bad}, bad


def read_rows(file: Path, answered: bool = True) -> list[dict[str, str]]:
    """Reads and checks a list of rows. Answers may be empty unless `answered`.

    Raises:
        DataError: naming the file and the first bad row (counted from 0).
    """
    rows = read_list(file)
    for i, row in enumerate(rows):
        if problem := row_problem(row, Row if answered else Question):
            raise DataError(f"{file}, row {i}: {problem}")
    return rows


def read_split(root: Path, folder: str, split: str, variant: str | None = None) -> list[dict[str, str]]:
    """Reads and checks one file of the official layout. Rows of the other variant than `variant` are refused.

    Raises:
        DataError: naming the file and the first bad row (counted from 0).
    """
    file = root / folder / f"{split}.json"
    if not file.is_file():
        have = sorted(p.name for p in (root / folder).glob("*")) if (root / folder).is_dir() else "no such folder"
        raise DataError(f"{file} is missing ({folder}: {have}).")
    rows = read_rows(file)
    found = [row_variant(folder, row) for row in rows] if variant else []
    other = [i for i, of in enumerate(found) if of not in (variant, None)]
    if other:
        raise DataError(
            f"{file}, row {other[0]}{f' and {len(other) - 1} more' if other[1:] else ''}: this is the "
            f"{found[other[0]]} variant. Set TRACE_DATA to plain rows, for trace_*, and TRACE_REASONING to those with "
            "reasoning, for reasoning_*."
        )
    return rows


def check_folders(folders: Mapping[str, Path], needed: Collection[str] = SPLITS) -> dict[str, dict[str, int]]:
    """Reads every split of some TRACE tasks (task -> folder) and returns task -> split -> number of rows.

    The splits in `needed` must exist. Training needs all; an evaluation without demonstrations needs only test.

    Raises:
        DataError: listing the problem of every bad file.
    """
    sizes: dict[str, dict[str, int]] = {}
    problems = []
    for task, folder in folders.items():
        for split in SPLITS:
            if split not in needed and not (folder / f"{split}.json").is_file():
                continue
            try:
                rows = read_split(folder.parent, folder.name, split, task_variant(task))
                sizes.setdefault(task, {})[split] = len(rows)
            except DataError as e:
                problems.append(str(e))
    if problems:
        raise DataError(f"{len(problems)} problem(s) in the data:\n" + "\n".join(f"  {p}" for p in problems))
    return sizes


def rows_digest(groups: Iterable[Iterable[Any]]) -> str:
    """SHA-256 (16 digits) over groups of rows, such as those to train on and those to test on."""
    total = hashlib.sha256()
    for rows in groups:
        for row in rows:
            total.update(json.dumps(row, sort_keys=True, default=_text_of).encode() + b"\n")
        total.update(b"\0")
    return total.hexdigest()[:16]


def _text_of(value: Any) -> str:
    """A text for a value that is no JSON: the date of a date; for images and the like only their type."""
    return value.isoformat() if hasattr(value, "isoformat") else type(value).__name__


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 (16 digits) over the existing files of a task's folder, three if it is complete."""
    names = [f"{split}.json" for split in SPLITS]
    return fingerprint(folder, [name for name in names if (folder / name).is_file()])
