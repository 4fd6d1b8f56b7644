"""Secrets among settings: what is on record for everybody to read must not hold one."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import Any

from trace_bench.run import RunError
from trace_bench.text import printable

#: Words of a name that stand for a secret, in whatever company.
_SECRET = {
    *("password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets", "credential", "credentials"),
    *("authorization", "authentication", "auth", "bearer", "cookie", "cookies", "apikey", "apikeys"),
}
#: What stands before "key" in the name of one; alone, or at the end behind other words but these, it is one as well.
_KEYS = {"api", "access", "private", "subscription", "account", "encryption", "signing", "ssh", "license"}
_NO_KEYS = {"cache", "sort", "primary", "foreign", "group", "label", "column", "row", "dict", "prompt", "text", "image"}
#: What stands before "token" in the name of a model's token, and of a place in a prompt.
_OF_MODELS = {
    *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video", "vision", "stop", "start", "end"),
    *("special", "additional", "think", "reasoning", "tool", "decoder", "forced", "last", "first", "next", "per"),
    *("boi", "eoi", "boa", "eoa", "fake", "max", "min", "num", "placeholder", "speech", "response", "instruction"),
}
#: How "tokens" that open something are called; others are counted.
_TOKENS = {"api", "access", "auth", "refresh", "session", "hf", "hub", "github"}

#: The forms of known keys and tokens, found under any name.
_VALUE = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        sk-(?=[\w-]{0,100}\d)[\w-]{16} | sk-[A-Za-z]{20}         # OpenAI, Anthropic, OpenRouter, ...
        | hf_[A-Za-z0-9]{16} | gh[pousr]_[A-Za-z0-9]{16} | github_pat_\w{16}
        | (?:gsk|r8|npm|pypi|glpat|nvapi|xai|dop_v1|[sr]k_live|[sr]k_test)[_-](?=[\w-]{0,100}\d)[\w-]{20}
        | (?:AKIA|ASIA)[A-Z0-9]{12} | AIza[\w-]{30} | ya29\.[\w-]{16} | xox[a-z]-[\w-]{10}
        | eyJ[\w-]{8,500}\.eyJ[\w-]{8}                          # JSON web tokens
    )
    | ://[^/\s:@]{0,200}:[^/\s@]{1,500}@ | ://[^/\s:@]{16,500}@  # URLs with a password, or a token for a user
    | -----BEGIN\ [A-Z ]{0,40}PRIVATE\ KEY
    | \b(?i:bearer|basic)\s{1,9}(?:(?=\S{0,100}[\d=+/._-])[\w.~+/=-]{8}|[A-Za-z]{16})
    | \b(?i:authorization["']?\s{0,9}[:=]\s{0,9}\S{3})
    | (?:^|[?&;\s"'])(?i:[\w-]{0,40}(?:api[-_]?key|token|password|passwd|secret)|sig|key)
      ["']?\s?[:=]\s?["']?(?=\S{0,100}\d)[^\s&"'{\[]{8}         # in a query, a header, on a line
    """,
    re.VERBOSE,
)


def refuse_secrets(settings: Any, what: str) -> None:
    """Refuses secrets among settings, at any depth: by their name, and by their form.

    What a variable of the environment with such a name holds is one wherever it stands.

    Args:
        settings: Values of JSON, also as texts of JSON.
        what: Their name in the message.

    Raises:
        RunError: naming the place, not the value.
    """
    # Not of PWD, which a shell sets to the working directory.
    known = [v for name, v in os.environ.items() if len(v) >= 12 and _is_secret_name(name, v) and not os.path.exists(v)]
    waiting: list[tuple[tuple[str, ...], Any, bool]] = [((), settings, False)]
    seen = 0
    while waiting:
        path, value, secret = waiting.pop()
        seen += 1
        if len(path) > 100 or seen > 1_000_000:  # aliases of YAML can make a few bytes endless
            raise RunError(
                f"{what} entries are nested more than 100 deep, or there are more than a million: write fewer."
            )
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with suppress(ValueError, RecursionError):
                waiting.append((path, json.loads(value), secret))
        if isinstance(value, dict):
            for key, inner in value.items():
                name = str(key)
                if _VALUE.search(name) or any(text in name for text in known):  # a name that is a key itself
                    waiting.append(((*path, "***"), name, True))
                else:
                    waiting.append(((*path, printable(name)), inner, secret or _is_secret_name(name, inner)))
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += [((*path, str(i)), inner, secret) for i, inner in enumerate(value)]
        elif value is None or isinstance(value, bool) or value == "" or _is_masked(value):
            continue
        elif secret or (isinstance(value, str) and (_VALUE.search(value) or any(text in value for text in known))):
            raise RunError(
                f"{what} {' '.join(path)} looks like a secret, and settings are written to files that others may read. "
                "Leave it out: put the key of an endpoint into OPENAI_API_KEY, and that of the hub into HF_TOKEN."
            )


def _is_masked(value: Any) -> bool:
    """Whether a value stands for a secret that was taken out: transformers writes <HUB_TOKEN>."""
    return isinstance(value, str) and re.fullmatch(r"<[A-Z_]+>|\*+", value) is not None


def _is_secret_name(name: str, value: Any) -> bool:
    """Whether a setting of this name holds a secret."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower())
    before = ["", *words]
    for last, word in zip(before, words, strict=False):
        if word in _SECRET or (word in ("key", "keys") and last in _KEYS) or (word == "tokens" and last in _TOKENS):
            return True
    if not words or isinstance(value, int | float):
        return False
    before_last, last = before[-2], words[-1]
    return (last == "key" and before_last not in _NO_KEYS) or (last == "token" and before_last not in _OF_MODELS)
