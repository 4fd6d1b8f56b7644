"""Reads JSON files of others: limits their size and checks their content."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_tasks.errors import DataError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class Damaged(DataError):
    """A file has the wrong content."""


#: The most bytes of a JSON file, and of a file with JSON lines.
MOST_JSON, MOST_LINES = 64 * 2**20, 4 * 2**30
#: The most digits of a whole number. Python's JSON reads thousands; ours are all shorter than this.
_LONGEST_NUMBER = 20


def read_file(path: Path, most: int) -> bytes:
    """Reads an ordinary file of at most this many bytes. Others are refused: a pipe may block, a device never end.

    Raises:
        DataError: if it is not an ordinary file, or longer.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a folder, a pipe or a device, not a file. Remove it.")
    with path.open("rb") as f:
        if os.fstat(f.fileno()).st_size > most:
            raise DataError(
                f"{path} is damaged: it has more than {most / 2**20:g} MiB, and no real one is so large. Remove it."
            )
        return f.read()


def read_json(path: Path, shape: Any = None, hook: Any = None) -> Any:
    """Reads a JSON file and checks its content.

    Args:
        path: The file.
        shape: As for `check`; None = anything.
        hook: Makes objects of the pairs' mappings, as of `json.loads`.

    Raises:
        DataError: if it is not JSON or has a different shape; the message says the path and the place.
    """
    try:
        text = read_file(path, MOST_JSON).decode("utf-8")
        if shape is None:
            return json.loads(text, object_hook=hook)
        content = strict(text, hook)
        check(shape, content)
        return content
    except (ValueError, RecursionError) as e:  # ValueError: no UTF-8, no JSON, a number of thousands of digits
        raise Damaged(f"{path} is damaged ({e}).") from e


@cache
def _adapter(shape: Any) -> TypeAdapter:
    from pydantic import TypeAdapter  # late, as it is slow to load

    return TypeAdapter(shape)


def check(shape: Any, content: Any) -> None:
    """Checks that a JSON value has a shape, a type that pydantic knows.

    Raises:
        ValueError: saying the entry, its value and what it should be.
    """
    from pydantic import ValidationError

    try:
        _adapter(shape).validate_python(content, strict=True)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
        if error["type"] == "missing":
            raise ValueError(f"it lacks {'.'.join(map(str, error['loc']))!r}") from None
        if error["type"] == "extra_forbidden":
            raise ValueError(f"it has the unknown entry {'.'.join(map(str, error['loc']))!r}") from None
        where: list[str] = []
        inside = content
        for part in error["loc"]:  # pydantic adds the names of the types that it tried
            if not (part in inside if isinstance(inside, dict) else isinstance(inside, list) and isinstance(part, int)):
                break
            inside = inside[part]
            where.append(str(part))
        what = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        named = f"{'.'.join(where)!r} is" if where else "it holds"
        shown = "an object" if isinstance(inside, dict) else "a list" if isinstance(inside, list) else f"{inside!r:.60}"
        raise ValueError(f"{named} {shown}, not {what}") from None


def strict(text: str, hook: Any, halves: bool = False) -> Any:
    """Reads JSON of the kind that we write: numbers are finite and not too long, texts have no half characters.

    Args:
        text: The JSON.
        hook: Makes objects of the pairs' mappings, as of `json.loads`.
        halves: Whether texts may contain half of a surrogate pair, as answers of foreign models may.

    Raises:
        ValueError: for anything else.
    """
    content = json.loads(text, object_hook=hook, parse_constant=_finite, parse_int=_int, parse_float=_finite)
    if "\\u" in text and not halves:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _int(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
