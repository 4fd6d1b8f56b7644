"""Requests, replies, and the files that keep them so that nothing is paid twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from trace_bench.run import read_json
from trace_bench.waiting import locked
from trace_tasks.data.files import open_own
from trace_tasks.data.reading import MOST_LINES, read_file

#: The largest plausible count of tokens or requests; larger ones are ignored.
MOST_COUNT = 10**9
#: How endpoints say that a reply ended at its limit, or at the end of the model's context;
_CUT = ("length", "max_tokens", "model_length", "model_context_window_exceeded")
#: that a filter ended it, wherever it was;
_FILTERED = ("content_filter", "sensitive", "refusal")
#: and that the model behind a gateway broke off, in the middle of a sentence and with the status of success.
_BROKE_OFF = ("error", "abort", "network_error", "insufficient_system_resource")

#: The body of a chat completion without what a judge adds to each: the model and the sampling parameters.
Request = dict[str, Any]
Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]


@dataclass(frozen=True)
class Reply:
    """The reply to one request."""

    text: str
    """The answer, or the text of a refusal, which may be empty."""
    thinking: str = ""
    """The model's thinking, if the endpoint returns it separately."""
    unclosed: bool = False
    """Whether the thinking came separately and never ended: there is no answer."""
    refusal: bool = False
    finish_reason: str | None = None
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    forced: bool = False
    """Whether the model gave no verdict by itself and had to choose one (`judges.local`)."""
    model: str = ""
    """The model that the endpoint says it was: an alias such as gpt-4o stands for one today and another one later."""
    error: str | None = None
    """Why there is no answer after all tries; None if there is one. A reply with an error is never cached."""

    @property
    def cut(self) -> bool:
        """Whether the reply ended at its limit of tokens."""
        return self.finish_reason in _CUT


#: What the endpoint's own filter declined: a refusal, since it would decline again. And the codes of its error; the
#: last one is that of OpenAI's models that reason.
DECLINED = Reply("", refusal=True, finish_reason="content_filter")
DECLINES = ("content_filter", "content_policy_violation", "invalid_prompt")


class _Line(TypedDict):
    """A line of a cache; its request is there for people."""

    key: str
    reply: Reply


_LINE = TypeAdapter(_Line)


class Cache(dict[str, Reply]):
    """Replies on the disk, by key: a file of JSON lines {"key", "request", "reply"}, only ever appended to.

    Several processes may share it: the one that sends has it `alone`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.read()

    def read(self) -> None:
        """Reads the file again, with what other processes have added."""
        content = read_file(self.path, MOST_LINES) if self.path.exists() else b""
        for line in content.split(b"\n"):
            # A line may be torn when a program is killed: its request counts as never sent.
            with suppress(ValueError):
                found = _LINE.validate_json(line, strict=True)
                if found["reply"].error is None:
                    self[found["key"]] = found["reply"]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is adding replies to this file, then locks it.

        What others asked meanwhile has been read when the block begins, so it is not paid again. One lock for all
        requests is enough: processes that share a cache mostly share the endpoint, and its limits, too.
        """
        with locked(self.path.parent, self.path.name, wait=True):
            self.read()
            yield

    def put(self, key: str, request: Request | None, reply: Reply) -> None:
        """Adds a reply; when this returns it is on the disk."""
        line = json.dumps({"key": key, "request": request, "reply": asdict(reply)}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Prompts and answers may be private: the file is for its user alone.
        with open(self.path, "ab+", buffering=0, opener=lambda _, flags: open_own(self.path, flags, 0o600)) as f:
            # A program that was killed, this one or another, may have left a part of a line.
            torn = f.seek(0, os.SEEK_END) and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n"
            rest = b"\n" * bool(torn) + line.encode()
            while rest:  # one system call a line, so that lines of two machines do not mix; a full disk writes less
                rest = rest[f.write(rest) :]
            os.fsync(f.fileno())
        self[key] = reply


def batch_file(cache: Path) -> Path:
    """The batches of requests that were submitted and not fetched yet: next to the cache of their replies."""
    return cache.with_suffix(".batches.json")


def submitted(cache: Path) -> list[dict[str, Any]]:
    """The batches in `batch_file`."""
    file = batch_file(cache)
    return read_json(file)["batches"] if file.exists() else []


def request_key(endpoint: str, body: Request) -> str:
    """SHA-256 of a whole request: the endpoint, the model, the messages, and every sampling parameter."""
    return hashlib.sha256(json.dumps([endpoint, body], sort_keys=True).encode()).hexdigest()


def read_reply(body: Any) -> Reply:
    """The reply in the body of a chat completion.

    Raises:
        ValueError: if there is none; the message says what is there instead.
    """
    if not isinstance(body, dict):
        raise ValueError(f"a body that is {type(body).__name__}, not an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"no choices: {json.dumps(body.get('error') or body)}")
    message, reason = choices[0].get("message"), _text(choices[0].get("finish_reason"))[:100]
    if choices[0].get("error") or reason in _BROKE_OFF:
        raise ValueError(f"it broke off: {json.dumps(choices[0].get('error') or reason)}")
    if not isinstance(message, dict) or not isinstance(content := _content(message, "text") or "", str):
        raise ValueError(f"a choice without a text: {json.dumps(choices[0])}")
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    refusal, filtered = message.get("refusal"), reason.startswith(_FILTERED)
    text = _text(content or refusal)
    # The first name is that of DeepSeek and older vLLM, the second that of vLLM and OpenRouter.
    thinking = _text(message.get("reasoning_content") or message.get("reasoning") or _content(message, "thinking"))
    reply = Reply(
        text=text,
        thinking=thinking,
        unclosed=bool(thinking.strip()) and not (text.strip() or refusal or filtered),
        refusal=bool(refusal) or filtered,
        finish_reason=reason or None,
        prompt_tokens=count(usage.get("prompt_tokens")),
        completion_tokens=count(usage.get("completion_tokens")),
        model=_text(body.get("model"))[:200],
    )
    if not (text or thinking or reply.refusal or reply.cut or reply.completion_tokens or message.get("tool_calls")):
        raise ValueError("an empty reply of no tokens")
    return reply


def _content(message: Request, kind: str) -> Any:
    """The text of a message, or its "thinking", which Mistral's models send as parts of the content."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content if kind == "text" else None
    parts = [{"content": part.get(kind)} for part in content if part.get("type") == kind]
    return "".join(_text(_content(part, "text")) for part in parts)


def _text(value: Any) -> str:
    """A text that can be written as UTF-8 (JSON may hold half a character); empty for anything that is no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def models_of(replies: Iterable[Reply]) -> dict[str, int]:
    """Model that answered, as the endpoint calls it -> number of replies; those of which it told none are left out."""
    return dict(sorted(Counter(reply.model for reply in replies if reply.model).items()))


def count(value: Any) -> int:
    """A count from a server; 0 if it is no number or implausible."""
    return value if type(value) is int and 0 < value <= MOST_COUNT else 0
