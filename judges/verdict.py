"""From a judge's reply to its verdict, or to None and the reason why there is none. Pure.

A verdict is a word in double square brackets, such as [[A]]. The rule:

1. What a model thinks aloud gives no verdict (`judges.thinking`): only what follows its thinking is read, and nothing
   of a reply whose thinking is not closed.
2. Nor does a reply that was cut at its limit of tokens: over an endpoint it may be thinking without any mark, since the
   chat template opened it ("if I chose [[A]] ...").
3. A reply that names one verdict, however often, gives it.
4. A reply that names several (a judge that weighs "[[A]] or [[B]]?" before it decides) is ambiguous, unless its last
   line that is not empty names exactly one: judges are told to end with the verdict, so that line decides.
5. Everything else is None: unscored, counted and shown, never a tie and never a loss.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from judges.thinking import answer_of

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
        One of `allowed`, or None if the reply was cut, its thinking is not closed, or its answer names none of them, or
        several without deciding in its last line.
    """
    text = answer_of(reply or "")
    if text is None or cut:
        return None
    verdicts = _named(text, allowed)
    if len(verdicts) > 1:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        verdicts = _named(last, allowed)
    return verdicts.pop() if len(verdicts) == 1 else None


def _named(text: str, allowed: Sequence[str]) -> set[str]:
    return {word.upper() for word in _VERDICT.findall(text)} & set(allowed)


def verdict_of(reply: Reply, allowed: Sequence[str]) -> str | None:
    """The verdict of what a judge answered; None for a request that failed, or a verdict that was forced. See `parse`.

    What a local model was made to choose is no judgement of its own (`forced_verdict`): it counts in no rate.
    """
    return None if reply.forced else _found(reply, allowed)


def forced_verdict(reply: Reply, allowed: Sequence[str]) -> str | None:
    """The verdict that a local model was made to choose; None if it was not."""
    return _found(reply, allowed) if reply.forced else None


def _found(reply: Reply, allowed: Sequence[str]) -> str | None:
    if reply.error or is_unclosed(reply):
        return None
    # A forced verdict stands behind what the model wrote, however that ended.
    return parse(reply.text, allowed, cut=reply.cut and not reply.forced)


def is_unclosed(reply: Reply) -> bool:
    """Whether a reply ends while the model still thinks."""
    return reply.unclosed or answer_of(reply.text) is None


def why_unscored(reply: Reply, allowed: Sequence[str]) -> str | None:
    """Why a reply has no verdict, for people to read; None if it has one."""
    if verdict_of(reply, allowed):
        return None
    if reply.error:
        return "failed"
    if reply.forced:
        return "forced"
    reasons = ["thinking not closed"] * is_unclosed(reply) + ["cut at its limit of tokens"] * reply.cut
    return ", ".join(reasons or ["refused" if reply.refusal else "no clear verdict"])


def ends(replies: Iterable[Reply]) -> dict[str, int]:
    """How replies ended where that costs verdicts: `cut` at their limit, `unclosed` in their thinking; or both."""
    replies = list(replies)
    return {"cut": sum(reply.cut for reply in replies), "unclosed": sum(map(is_unclosed, replies))}


def ends_in_words(counts: Mapping[str, int], replies: int, sampling: Mapping[str, Any]) -> list[str]:
    """A sentence for each count of `ends` that is not 0, and the option that helps.

    Args:
        counts: What `ends` returned, or sums of it; empty for results of versions without these counts.
        replies: Of how many.
        sampling: The judge's parameters.
    """
    found = []
    if counts.get("cut"):
        found.append(
            f"{counts['cut']} of {replies} replies were cut at their limit of tokens, and no verdict is read from "
            f"them: raise it with {longer(sampling)}"
        )
    if counts.get("unclosed"):
        found.append(
            f"{counts['unclosed']} of {replies} replies ended in thinking that is not closed, and have no verdict"
        )
    return found


def longer(sampling: Mapping[str, Any]) -> str:
    """The option that doubles the limit of replies, as it is typed."""
    name = "max_completion_tokens" if "max_completion_tokens" in sampling else "max_tokens"
    limit = sampling.get(name)
    option = f"--sampling {shlex.quote(json.dumps({**sampling, name: 2 * limit if limit else 4096}))}"
    return option if limit else f"{option}, or give the model a longer context"
