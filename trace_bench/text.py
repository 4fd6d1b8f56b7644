"""Text from elsewhere (names, replies, errors of servers), shown as text wherever it is shown."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Control characters except tab and line feed, marks of text direction, invisible characters, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
#: What begins something in Markdown, wherever it stands. Elsewhere these characters are text, and stay readable.
_MARKUP = re.compile(
    r"""[\\`~$*]              # escapes, code, lines through, formulas, emphasis
    |(?<![^\W_])_|_(?![^\W_]) # emphasis, which does not begin or end within a word
    |<(?=[A-Za-z/!?])         # HTML
    |&(?=\#|\w+;)             # entities
    |\](?=[(:\[])             # the end of what a link shows
    |(?<=http):(?=//)|(?<=https):(?=//)|(?<=ftp):(?=//)|(?<=www)\.  # addresses, which some programs make links
    """,
    re.VERBOSE | re.IGNORECASE,
)


def printable(text: str) -> str:
    r"""Text for a terminal: control characters as \x1b or \u202e, so that they do nothing and are seen."""
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def word(path: str | Path) -> str:
    """A path as one word of a command line: in quotes, if it has spaces."""
    return shlex.quote(str(path))


def one_line(value: Any) -> Any:
    """A value of JSON with all of its texts printable, each on one line."""
    if isinstance(value, Mapping):
        return {one_line(k): one_line(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [one_line(v) for v in value]
    return printable(" ".join(value.splitlines())) if isinstance(value, str) else value


def markdown_text(text: str, in_table: bool = False) -> str:
    """Text of a report as Markdown: its `code` and **bold** stay, and nothing else in a line is markup.

    What begins a line (headings, lists, quotes) is the report's own: foreign text comes as `one_line`.
    """
    if in_table:
        text = " ".join(text.splitlines())
    parts = re.split(r"(`[^`\n\\|]+`)" if in_table else r"(`[^`\n]+`)", printable(text))
    for i in range(0, len(parts), 2):  # between the code
        bold = re.split(r"(\*\*[^*\n]+\*\*)", parts[i])
        escaped = [
            f"**{_escaped(part[2:-2], in_table)}**" if k % 2 else _escaped(part, in_table)
            for k, part in enumerate(bold)
        ]
        parts[i] = "".join(escaped)
    return "".join(parts)


def _escaped(text: str, in_table: bool) -> str:
    text = _MARKUP.sub(r"\\\g<0>", text)
    return text.replace("|", "\\|") if in_table else text


def cell(value: Any) -> Any:
    """A value for a table that spread-sheets open: where they would see a formula, a text begins with an apostrophe."""
    formula = isinstance(value, str) and value.lstrip(" ").startswith(tuple("=+-@\t\r\n＝＋－＠"))
    return f"'{value}" if formula else value


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def prepare_logging() -> None:
    """Shows warnings of this program, and what ends it unexpectedly, as printable text."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of options of its own command line
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))

    def show(*error: Any) -> None:
        if sys.stderr is not None:
            sys.stderr.write(printable("".join(traceback.format_exception(*error))))

    sys.excepthook = show
