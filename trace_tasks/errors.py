"""The errors that a user can fix. Commands print their message without a traceback and exit with 1."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class TraceError(Exception):
    """An error that the user can fix. The message says the value, what is allowed and how to fix it."""


class DataError(TraceError):
    """Data or a file is missing or wrong. The message says where and how to fix it."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to an unknown one; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, known, 1)), None)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def with_neighbours(names: Iterable[str], known: Iterable[str]) -> str:
    """Lists several unknown names for a message, each with the most similar known name."""
    known = list(known)
    found = ((name, nearest(name, known)) for name in names)
    return ", ".join(f"{name} (did you mean {near}?)" if near else name for name, near in found)


def brief(error: BaseException) -> str:
    """A library's message on one line, cut to a readable length."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def advice(error: BaseException, memory: str) -> str | None:
    """What an error of the machine (memory, disk, GPU) means and what to do, in one line; None for any other error.

    Args:
        error: The error that ended a command.
        memory: What to do if the machine ran out of memory.
    """
    text = brief(error).rstrip(".")
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and torch write files themselves and raise their own errors.
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(
        r"\(os error (28|122|27)\)|PytorchStreamWriter failed|inline_container.*(file write|unexpected pos)", text
    ):
        return f"{text}. The disk or the quota is full. Finished work is kept: make room and run the command again."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS) or re.search(r"\(os error (1|13|30)\)", text):
        return f"{text}. Finished work is kept. Make the file or folder accessible (writable), or copy it."
    if isinstance(error, MemoryError) or re.search(
        r"out of memory|can't allocate memory|not enough memory", text, re.I
    ):
        return f"Not enough memory: {text}. Finished work is kept. {memory}"
    return None
