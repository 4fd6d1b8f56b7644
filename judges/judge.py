"""A judge: a model that answers requests, each once. `Client` is one behind an endpoint, `LocalJudge` one in vLLM."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges import JudgeError
from judges.replies import DECLINED, MOST_COUNT, Cache, Reply, Request, models_of, request_key
from trace_bench.keys import refuse_secrets
from trace_bench.text import printable

log = logging.getLogger(__name__)

SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}
#: The parameters that limit the tokens of a reply.
LIMITS = ("max_tokens", "max_completion_tokens")
#: For estimates only: characters of a token, and tokens of a reply.
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_REPLY = 300
#: How many different errors are shown at the end.
SHOWN = 10


@dataclass
class Usage:
    """What this program has used. Tokens count only new replies, not cached ones."""

    sent: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Replies from now of which the endpoint told no tokens."""

    @property
    def succeeded(self) -> int:
        """The number of requests that got a reply."""
        return self.sent + self.cached - self.failed


@dataclass(frozen=True)
class Estimate:
    """What `Judge.complete` would send. The tokens of prompts are a rough guess, too few for Chinese."""

    sent: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    """A guess."""
    most_completion_tokens: int | None
    """If every reply is as long as the limit that is sent; None where a request has no limit."""


def token_limit(body: Request) -> int | None:
    """The limit of a reply's tokens in its request; None if there is none.

    Of two limits servers take the one or the other: it is the larger one. Some take -1 for no limit.
    """
    limits = [body[name] for name in LIMITS if body.get(name) is not None]
    return max(limits) if limits and min(limits) > 0 else None


class Judge:
    """Answers requests, and keeps the replies in the file `cache`.

    `sampling` are the parameters of every request; None = SAMPLING.

    Raises:
        JudgeError, RunError: if a parameter is set by the program itself, or is a secret.
    """

    revision: str | None = None
    date: str | None = None
    """The date that chat templates get; None if a server renders them."""

    def __init__(self, model: str, *, endpoint: str, cache: Path, sampling: dict[str, Any] | None) -> None:
        sampling = SAMPLING if sampling is None else sampling
        if fixed := sorted({"model", "messages", "stream"} & sampling.keys()):
            raise JudgeError(f"--sampling {', '.join(fixed)} is set by this program. Leave it out.")
        if not isinstance(sampling.get("chat_template_kwargs", {}), dict):
            raise JudgeError(
                f"--sampling chat_template_kwargs is {sampling['chat_template_kwargs']!r}, not an object. Write the "
                'arguments of the chat template like \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
            )
        for name in LIMITS:
            limit = sampling.get(name)
            if limit is not None and (type(limit) is not int or abs(limit) > MOST_COUNT):
                raise JudgeError(f"--sampling {name} is {limit!r:.50}: use a whole number of tokens, such as 1024.")
        if sampling.get("n") not in (None, 1):
            raise JudgeError(
                f"--sampling n is {sampling['n']!r:.50}, but only one reply to each request is read. Leave it out."
            )
        refuse_secrets({"model": model, "sampling": sampling}, "the judge's")
        self.model, self.endpoint, self.sampling = model, endpoint, sampling
        self.cache = Cache(cache)
        self.usage = Usage()

    def send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Sends the requests (key -> body), caches the replies, and returns key -> error. The cache is locked."""
        raise NotImplementedError

    def collect(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Waits for replies that come later, perhaps after a day; otherwise as `send`. The cache is not locked."""
        return {}

    def bodies(self, requests: Sequence[Request]) -> dict[str, Request]:
        """Key -> body of the chat completion, without duplicates, in the order of the requests."""
        return dict(map(self._body, requests))

    def _body(self, request: Request) -> tuple[str, Request]:
        body = {"model": self.model, **self.sampling, **request}
        return request_key(self.endpoint, body), body

    def complete(self, requests: Sequence[Request], desc: str = "judging") -> list[Reply]:
        """Sends what the cache does not hold, and returns one reply for each request, in their order.

        A request has "messages", and parameters that differ from the judge's own. A reply whose `error` is set failed
        after all tries; asking again sends only those. `desc` is what the progress bar says.

        Raises:
            JudgeError: if the judge cannot be asked, or every request of this program failed. Replies so far are kept.
        """
        keyed = [self._body(request) for request in requests]
        bodies = dict(keyed)
        all_there = all(key in self.cache for key in bodies)
        with nullcontext() if all_there else self.cache.alone():  # `alone` also reads what others asked meanwhile
            todo = {key: body for key, body in bodies.items() if key not in self.cache}
            self.usage.cached += len(bodies) - len(todo)
            errors = self.send(todo, desc) if todo else {}
        errors |= self.collect(todo, desc) if todo else {}
        self.usage.sent += len(todo)
        self.usage.failed += len(errors)
        if errors and not self.usage.succeeded:
            raise self.all_failed(errors)
        for error, times in Counter(errors.values()).most_common(SHOWN):
            log.warning("%d requests failed: %s", times, error)
        for key in todo.keys() - errors.keys():
            self.usage.prompt_tokens += self.cache[key].prompt_tokens
            self.usage.completion_tokens += self.cache[key].completion_tokens
            self.usage.uncounted += self.cache[key] != DECLINED and not self.cache[key].prompt_tokens
        replies = [Reply("", error=errors[key]) if key in errors else self.cache[key] for key, _ in keyed]
        if len(models := models_of(replies)) > 1:
            log.warning(
                "%s answered as several models (%s), so the replies are not from one model. Give the exact name with "
                "--model.",
                self.model,
                ", ".join(f"{printable(name)} {times} times" for name, times in models.items()),
            )
        return replies

    def all_failed(self, errors: dict[str, str]) -> JudgeError:
        """The error if there was no reply at all; `errors` are key -> error, the first one first."""
        first = next(iter(errors.values())).rstrip(".")
        return JudgeError(
            f"{self.endpoint} failed every request ({len(errors)}), so there are no results. The first failure: "
            f"{first}."
        )

    def cached(self, request: Request) -> Reply | None:
        """The reply to a request, if the cache holds it."""
        key, _ = self._body(request)
        return self.cache.get(key)

    def estimate(self, requests: Sequence[Request]) -> Estimate:
        """How many requests `complete` would send, and how many tokens they may take."""
        bodies = self.bodies(requests)
        todo = [body for key, body in bodies.items() if key not in self.cache]
        characters = sum(len(m["content"]) for body in todo for m in body["messages"])
        limits = [token_limit(body) for body in todo]
        return Estimate(
            sent=len(todo),
            cached=len(bodies) - len(todo),
            prompt_tokens=characters // CHARACTERS_PER_TOKEN,
            completion_tokens=sum(min(TOKENS_PER_REPLY, limit or TOKENS_PER_REPLY) for limit in limits),
            most_completion_tokens=None if None in limits else sum(filter(None, limits)),
        )
