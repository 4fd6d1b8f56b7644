"""Types of options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from trace_bench.run import RunError
from trace_tasks.data.reading import strict


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: use a number of at least 1")
    return number


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """An option that is a JSON object; None if it is not given."""
    try:
        value = strict(text, None) if text else None
    except (ValueError, RecursionError) as e:
        raise RunError(f"{option} must be a JSON object: {e}") from e
    if value is not None and not isinstance(value, dict):
        raise RunError(f"{option} must be a JSON object: {text} is none")
    return value


def indices(stages: str | None) -> list[int] | None:
    """The numbers of --stages; None if it is not given."""
    try:
        return [int(s) for s in stages.split(",")] if stages else None
    except ValueError as e:
        raise RunError(f"--stages numbers are written with commas, such as 0,3,8: {e}") from e


def names(text: str | None) -> list[str] | None:
    """Names with commas between them; None if there is none."""
    return [name for name in text.split(",") if name] if text else None


def options(keys: Iterable[str]) -> str:
    """Options as they are written on the command line."""
    return ", ".join("--" + key.replace("_", "-") for key in keys)
