"""What the judges are asked: the texts of prompts.yaml around the material.

The texts under judgement are material. They stand between delimiters that they cannot close, and they cannot show a
verdict: `neutralise` breaks both with a visible space. Everything is one user message, since not every model has a
system role. Our request comes before the material and again after it, so that it is the last thing that a judge reads.

`VERSION` is part of every result: raise it with any change that can move a verdict, in the texts, here, or in how
replies are read (`judges.verdict`).
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml

from judges.thinking import TAG
from trace_bench.judgements import Kind

VERSION = 8

#: The verdicts on two answers: the first is better, the second is better, a tie.
PAIR = ("A", "B", "C")

#: Invisible characters, marks of direction and variants too: with them between two brackets a model still reads a pair.
_UNSEEN = "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]*"
_BREAK_AFTER = re.compile(
    # The beginning of a verdict and of our delimiters.
    rf"\[(?={_UNSEEN}\[)|<(?={_UNSEEN}<{_UNSEEN}<)"
    # What chat templates are made of: a local model's tokenizer would read it as the end of our message.
    r"|<(?=[|｜])|<(?=/?s>)|<(?=(?:start|end)_of_turn>)|\[(?=/?INST\])"
    r"|<(?=(?:bos|eos|pad|unk)>)|<(?=\w{1,30}\|>)"
    # The marks of thinking.
    rf"|<(?=/?{TAG})|\[(?=/?THINK\])|<(?=unused\d)|◁(?=/?think▷)"
)

Messages = list[dict[str, str]]


def neutralise(text: str) -> str:
    """Text under judgement in a form that cannot close its delimiters, show a verdict, or end the message.

    A space is put between the characters of `[[` and of `<<<`, and after the first character of what chat templates
    are made of (`<|...|>`, `<s>`, `<eos>`, `<end_of_turn>`, `[INST]`, ...). Nothing is removed; other text stays.
    """
    return _BREAK_AFTER.sub(r"\g<0> ", text)


def block(name: str, text: str) -> str:
    """Material between delimiters that it cannot close."""
    return f"<<<{name}>>>\n{neutralise(text)}\n<<<END OF {name}>>>"


def pair(kind: Kind, prompt: str, a: str, b: str) -> Messages:
    """Asks which of two answers is better: [[A]], the first, [[B]], the second, or [[C]] for a tie."""
    return _message(f"{kind.name}_pair", block("REQUEST", prompt), block("ANSWER A", a), block("ANSWER B", b))


def direct(kind: Kind, prompt: str, answer: str) -> Messages:
    """Asks for a verdict on a single answer, one of `kind.words`."""
    return _message(kind.name, block("REQUEST", prompt), block("ANSWER", answer))


def _message(name: str, *material: str) -> Messages:
    texts = _texts()
    before, after = (texts[name][part].format_map(texts) for part in ("before", "after"))
    return [{"role": "user", "content": "\n\n".join([before, *material, after])}]


@cache
def _texts() -> dict:
    return yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
