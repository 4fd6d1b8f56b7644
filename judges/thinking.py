"""Tells what a model thinks aloud from what it answers. Pure.

Models that reason write their thinking between marks of their family, and then the answer. A chat template may write
the opening mark itself, as DeepSeek-R1's does: then a reply holds the closing one alone. A mark behind a quotation mark
or backtick is one that the text speaks of.
"""

from __future__ import annotations

import re

#: Of Qwen3, DeepSeek-R1, GLM and most others; also <seed:think>, <mm:think>, <ifm|think_fast>, <think:...>.
TAG = r"(?:\w{1,16}[:|])?(?i:think|thinking|thoughts?|reasoning)(?:_\w{1,16})?(?::[^\s<>]{1,32})?>"
#: The opening and the closing mark of each family.
_MARKS = [
    (rf"<{TAG}", rf"</{TAG}"),
    # Magistral
    (r"\[THINK\]", r"\[/THINK\]"),
    # Kimi-VL, Kimi-K3
    (r"◁think▷|<\|open\|>think<\|sep\|>", r"◁/think▷|<\|close\|>think<\|sep\|>"),
    # Command A
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    # OpenThinker, Sky-T1
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    # gpt-oss: channels; the last one holds the answer.
    (
        r"<\|channel\|>(?:analysis|commentary)[^\n<]{0,40}<\|message\|>",
        r"<\|channel\|>final[^\n<]{0,40}<\|message\|>",
    ),
    # Gemma 4, MedGemma
    (r"<\|channel>thought|<unused94>thought", r"<channel\|>|<unused95>"),
    # Granite 3: plain words, so only where a reply begins with them.
    (r"\A\s{0,8}Here(?:'s| is) my thought process:", r"Here(?:'s| is) my response:"),
]
QUOTE = "[`\"'“”‘’«»]"
#: Group 2 i + 1 is the opening mark of family i, group 2 i + 2 its closing one.
_MARK = re.compile(rf"(?<!{QUOTE})(?:" + "|".join(f"({mark})" for marks in _MARKS for mark in marks) + ")")
_OPENED = re.compile("(?:" + "|".join(opening for opening, _ in _MARKS) + r")\s{0,8}\Z")


def answer_of(text: str) -> str | None:
    """What follows the last closing mark of a reply, behind what `opened_by` finds in its prompt.

    None if thinking was opened and not closed, so that there is no answer.
    """
    opened: set[str | int] = set()
    end = 0
    for mark in _MARK.finditer(text):
        family, closes = divmod((mark.lastindex or 0) - 1, 2)
        # Tags are told apart by their names: </reasoning> does not close <think>.
        name = family or mark.group().lower().replace("/", "")
        if closes:
            opened.discard(name)
            end = mark.end()
        else:
            opened.add(name)
    return None if opened else text[end:]


def opened_by(prompt: str) -> str:
    """The opening mark at the end of a rendered prompt, after which the model thinks; empty if there is none."""
    found = _OPENED.search(prompt[-100:])
    return found.group() if found else ""
