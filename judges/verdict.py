"""From the text of a judge's reply to its verdict, or to None. Pure.

A verdict is a word in double square brackets, such as [[A]]. The rule:

1. A reply that names one verdict, however often, gives it.
2. A reply that names several (a judge that weighs "[[A]] or [[B]]?" before it decides) is ambiguous, unless its last
   line that is not empty names exactly one: judges are told to end with the verdict, so that line decides.
3. Of a reply that was cut at its limit only a last line that is a verdict and nothing else counts: what stands before
   may be a judge's thinking ("if I chose [[A]] ...").
4. Everything else is None: unscored, counted and shown, never a tie and never a loss.

What a model thinks aloud, up to </think>, is not part of its reply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from judges.client import Reply

_VERDICT = re.compile(r"\[\[\s*(\w+)\s*\]\]")


def parse(reply: str | None, allowed: Sequence[str], cut: bool = False) -> str | None:
    """The verdict of a reply.

    Args:
        reply: The text of the reply; None if there is none.
        allowed: The verdicts that may be given, in capitals, such as ("A", "B", "C"). Others in brackets are text.
        cut: Whether the reply ended at its limit of tokens.

    Returns:
        One of `allowed`, or None if the reply names none of them, or several without deciding in its last line.
    """
    text = (reply or "").rpartition("</think>")[2]
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if cut:
        text = last if _VERDICT.fullmatch(last.strip(" *_.")) else ""
    verdicts = _named(text, allowed)
    if len(verdicts) > 1:
        verdicts = _named(last, allowed)
    return verdicts.pop() if len(verdicts) == 1 else None


def verdict_of(reply: Reply, allowed: Sequence[str]) -> str | None:
    """The verdict of what a judge answered; None for a request that failed. See `parse`."""
    return None if reply.error else parse(reply.text, allowed, cut=reply.finish_reason == "length")


def _named(text: str, allowed: Sequence[str]) -> set[str]:
    return {word.upper() for word in _VERDICT.findall(text)} & set(allowed)
