"""Types of options that several commands share."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from typing import Any, NoReturn

from trace_bench.run import RunError
from trace_tasks.data import split_names
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
        raise RunError(f"{option} must be a JSON object, such as '{{\"a\": 1}}': {text} is not")
    return value


class _List(argparse.Action):
    """Keeps the words of a list, and that there was one: it may have taken an argument that stands behind it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, words: Any, option: str | None = None
    ) -> None:
        if not names(words):
            raise argparse.ArgumentError(self, "the list is empty")
        setattr(namespace, self.dest, words)
        parser.set_defaults(has_list=True)


#: What makes an option a list: `a b c`, `a,b,c` or `a, b c`. The command reads it by `names` or `indices`.
LIST: dict[str, Any] = {"nargs": "+", "action": _List}


def put_first(parser: argparse.ArgumentParser, argument: argparse.Action, needed: str = "") -> None:
    """Shows an argument before the options, since a list takes what stands behind it; its error then says so.

    A command that does not always need the argument calls `args.missing()` where it does.

    Args:
        parser: The parser of a command that has lists.
        argument: What `add_argument` returned for it, with a metavar.
        needed: The options that the command cannot do without, as its usage shows them.
    """
    name, plain = str(argument.metavar), parser.error
    shown = f"[{name}]" if argument.nargs == "?" else name
    parser.usage = " ".join(word for word in ("%(prog)s", shown, needed, "[--OPTION VALUE ...]") if word)

    def error(message: str) -> NoReturn:
        if name in message.partition("are required: ")[2].split(", ") and parser.get_default("has_list"):
            message += f"; a list option takes every word behind it, so write {name} before the options"
        plain(message)

    parser.error = error  # type: ignore[method-assign]
    parser.set_defaults(missing=lambda: error(f"the following arguments are required: {name}"))


def indices(words: Iterable[str] | None) -> list[int] | None:
    """The numbers of --stages; None if it is not given."""
    try:
        return None if words is None else [int(s) for s in split_names(words)]
    except ValueError as e:
        raise RunError(f"--stages must be numbers with spaces or commas between them, such as 0,3,8: {e}") from e


def names(words: Iterable[str] | None) -> list[str] | None:
    """The names of a list; None if it is not given."""
    return None if words is None else split_names(words)


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """An option NAME=PATH, given several times: name -> path."""
    split = [text.partition("=") for text in given]
    if not all(name and path for name, _, path in split):
        raise RunError(f"{option} {' '.join(given)}: write each as NAME=PATH.")
    found = {name: os.path.expanduser(path) for name, _, path in split}  # which few shells do behind a "="
    if len(found) < len(split):
        raise RunError(f"{option}: found {', '.join(name for name, _, _ in split)}; give each NAME only once.")
    return found


def options(keys: Iterable[str]) -> str:
    """Options as they are written on the command line."""
    return ", ".join("--" + key.replace("_", "-") for key in keys)


def option_words(key: str, value: Any) -> list[str]:
    """An option as the trainers take it: lists as several values, mappings as JSON."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict | bool) else value]
    return [f"--{key}", *map(str, values)]
