"""From a judge's reply to its verdict, or to None and the reason why there is none. Pure.

A verdict is a word in double square brackets, such as [[A]]. The rule:

1. What a model thinks aloud gives no verdict (`judges.thinking`): only what follows its thinking is read, and nothing
   of a reply whose thinking is not closed.
2. Nor does a reply that was cut at its limit of tokens: over an endpoint it may be thinking without any mark, since the
   chat template opened it ("if I chose [[A]] ..."). Nor one that is a refusal, or that the endpoint's filter ended.
3. A reply that names one verdict, however often, gives it.
4. A reply that names several (a judge that weighs "[[A]] or [[B]]?" before it decides) is ambiguous, unless its last
   line that is not empty names exactly one: judges are told to end with the verdict, so that line decides.
5. A verdict in quotation marks is one that the reply speaks of ('The format asks for "[[A]]", but I find both weak.').
   It counts only where it ends the reply, or stands alone on its line or behind its last colon, or is all of the text
   of a field if the whole reply is a JSON object (`{"verdict": "[[A]]", "reason": "..."}`).
6. Everything else is None: unscored, counted and shown, never a tie and never a loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from judges.replies import Reply
from judges.thinking import QUOTE, answer_of

_VERDICT = re.compile(r"\[\[\s*(\w+)\s*\]\]")
#: A verdict that the reply gives: not quoted, or at the end of the reply, or alone on its line or behind a colon.
_GIVEN = re.compile(
    rf"(?<!{QUOTE}){_VERDICT.pattern}|{_VERDICT.pattern}\W*\Z|(?:^|[:：])[^\w\n[:：]*{_VERDICT.pattern}[^\w\n]*$",
    re.MULTILINE,
)
#: The marks of a block of code that is the whole text.
_FENCE = re.compile(r"\A```\w*|```\Z")


def parse(reply: str | None, allowed: Sequence[str], cut: bool = False) -> str | None:
    """The verdict of a reply, by the rule above: one of `allowed`, which are in capitals, or None.

    Other words in brackets are text. `cut` = the reply ended at its limit of tokens.
    """
    text = answer_of(reply or "")
    if text is None or cut:
        return None
    in_fields = _in_fields(text)
    for part in (text, *text.rstrip().splitlines()[-1:]):
        verdicts = {word.upper() for word in _VERDICT.findall(part)} & set(allowed)
        given = {"".join(words).upper() for words in _GIVEN.findall(part)} | in_fields
        if len(verdicts) == 1 and verdicts <= given:
            return verdicts.pop()
    return None


def _in_fields(text: str) -> set[str]:
    """The verdicts that fields of a JSON object consist of; none if the text is no such object."""
    try:
        fields = json.loads(_FENCE.sub("", text.strip()), strict=False)  # a model breaks lines within texts
    except (ValueError, RecursionError):
        return set()
    texts = [value for value in fields.values() if isinstance(value, str)] if isinstance(fields, dict) else []
    return {match[1].upper() for value in texts if (match := _VERDICT.fullmatch(value.strip()))}


def verdict_of(reply: Reply, allowed: Sequence[str], forced: bool = False) -> str | None:
    """The verdict of what a judge answered, see `parse`; None for a request that failed.

    With `forced` it is the one that a local model was made to choose, which is no judgement of its own: no rate counts
    it. Without, it is any other.
    """
    if reply.forced != forced or reply.error or reply.refusal or is_unclosed(reply):
        return None
    # A forced verdict stands behind what the model wrote, however that ended.
    return parse(reply.text, allowed, cut=reply.cut and not forced)


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


def ends(replies: Sequence[Reply]) -> dict[str, int]:
    """Counts replies whose end costs verdicts: `cut` at their limit, `unclosed` in their thinking; or both."""
    return {"cut": sum(reply.cut for reply in replies), "unclosed": sum(map(is_unclosed, replies))}
