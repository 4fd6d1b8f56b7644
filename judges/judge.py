"""A judge: a model that answers requests, each only once. Over an endpoint it is a `Client`, here a `LocalJudge`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges import JudgeError
from judges.replies import Cache, Reply, Request, request_key
from trace_bench.keys import refuse_secrets

SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}
#: For estimates only: characters of a token, and tokens of a reply.
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_REPLY = 300


@dataclass
class Usage:
    """What the calls of one program used. Tokens are those of replies from now, not from the cache."""

    sent: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def succeeded(self) -> int:
        """Requests that there is a reply to."""
        return self.sent + self.cached - self.failed


class Judge:
    """Answers requests, and keeps the replies in the file `cache`.

    `sampling` are the parameters of every request; None = SAMPLING.

    Raises:
        JudgeError, RunError: if a parameter is set by the program itself, or is a secret.
    """

    revision: str | None = None
    date: str | None = None
    """The day that chat templates are told; None where a server renders them."""

    def __init__(self, model: str, *, endpoint: str, cache: Path, sampling: dict[str, Any] | None) -> None:
        sampling = SAMPLING if sampling is None else sampling
        if fixed := sorted({"model", "messages", "stream"} & sampling.keys()):
            raise JudgeError(f"--sampling {', '.join(fixed)}: the program sets this itself. Leave it out.")
        if not isinstance(sampling.get("chat_template_kwargs", {}), dict):
            raise JudgeError(
                f"--sampling chat_template_kwargs is {sampling['chat_template_kwargs']!r}, not an object. Give the "
                'arguments of the chat template such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
            )
        refuse_secrets({"model": model, "sampling": sampling}, "the judge's")
        self.model, self.endpoint, self.sampling = model, endpoint, sampling
        self.cache = Cache(cache)
        self.usage = Usage()

    def send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Asks (key -> body), puts the replies into the cache, and returns key -> error. No other process does."""
        raise NotImplementedError

    def collect(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Waits for replies that come after `send`, for a day perhaps; see `send`. Others may send meanwhile."""
        return {}

    def bodies(self, requests: Sequence[Request]) -> dict[str, Request]:
        """Key -> whole body of a chat completion, each different one once, in the order of the requests."""
        return dict(map(self._body, requests))

    def _body(self, request: Request) -> tuple[str, Request]:
        body = {"model": self.model, **self.sampling, **request}
        return request_key(self.endpoint, body), body

    def complete(self, requests: Sequence[Request], desc: str = "judging") -> list[Reply]:
        """Sends what the cache does not hold, and returns one reply for each request, in their order.

        A request has "messages", and parameters that differ from the judge's own. A reply whose `error` is set failed
        after all tries; asking again sends only those. `desc` is what the progress bar says.

        Raises:
            JudgeError: if the judge cannot be asked. Replies so far are kept.
        """
        keyed = [self._body(request) for request in requests]
        bodies = dict(keyed)
        all_there = all(key in self.cache for key in bodies)
        with nullcontext() if all_there else self.cache.alone():  # where others may have asked meanwhile
            todo = {key: body for key, body in bodies.items() if key not in self.cache}
            self.usage.cached += len(bodies) - len(todo)
            errors = self.send(todo, desc) if todo else {}
        errors |= self.collect(todo, desc) if todo else {}
        self.usage.sent += len(todo)
        self.usage.failed += len(errors)
        for key in todo.keys() - errors.keys():
            self.usage.prompt_tokens += self.cache[key].prompt_tokens
            self.usage.completion_tokens += self.cache[key].completion_tokens
        return [Reply("", error=errors[key]) if key in errors else self.cache[key] for key, _ in keyed]

    def estimate(self, requests: Sequence[Request]) -> Usage:
        """What `complete` would send: a rough guess of the tokens, too few for Chinese."""
        bodies = self.bodies(requests)
        todo = [body for key, body in bodies.items() if key not in self.cache]
        characters = sum(len(m["content"]) for body in todo for m in body["messages"])
        limit = self.sampling.get("max_tokens") or self.sampling.get("max_completion_tokens") or TOKENS_PER_REPLY
        return Usage(
            sent=len(todo),
            cached=len(bodies) - len(todo),
            prompt_tokens=characters // CHARACTERS_PER_TOKEN,
            completion_tokens=len(todo) * min(TOKENS_PER_REPLY, limit),
        )
