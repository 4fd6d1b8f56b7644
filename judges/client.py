"""Chat completions over any OpenAI-compatible endpoint, such that nothing is paid twice.

A request is the body of a chat completion without what the client adds to each: the model and the sampling parameters.
Every reply is appended to a cache file and synced before the next request of its worker is sent, keyed by the whole
request: a killed program loses what was in flight, and nothing that succeeded is sent again.

The openai package retries 408, 409, 429 and 5xx and cut connections, with back-off, and waits as long as Retry-After
says, up to two minutes. Handled here is what it leaves: longer waits, bodies that are no JSON, bodies without a choice.
What comes back is bounded in size and time, and no redirect is followed (`Bounded`). The key comes from OPENAI_API_KEY
and goes into the header of the requests, nowhere else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from tqdm import tqdm

from judges import JudgeError
from trace_bench.keys import refuse_secrets
from trace_bench.run import InUse, RunError, locked
from trace_bench.text import printable
from trace_tasks.data.files import open_own
from trace_tasks.data.reading import MOST_LINES, read_file

log = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
SAMPLING = {"temperature": 0, "max_tokens": 1024}
#: Times that the package sends a request again: its waits of 0.5 s to 8 s add up to about 40 s.
MAX_RETRIES = 8
#: Times that a request is begun anew after what the package does not retry, and the first wait between them.
ATTEMPTS = 4
FIRST_WAIT = 0.5
#: The longest Retry-After that is waited for. After a longer one, the same command is for later.
LONGEST_WAIT = 900.0
#: Failures in a row (or from the start) after which the endpoint is taken to be down, or the request to be wrong.
GIVE_UP = 10
#: Bytes of a reply, as they come and unpacked: the longest that models write, with their thinking, are about 1 MB.
MOST_REPLY = 4 * 2**20
#: The most of a batch's replies together, and the seconds that it, or the file of its requests, may be on its way.
MOST_FILE = 2 * 2**30
FILE_SECONDS = 3600.0
#: The largest count of tokens or requests that is believed.
MOST_COUNT = 10**9
#: Seconds between two looks at whether another process is done with the cache.
LOCK_SECONDS = 0.2
#: For estimates only: characters of a token, and tokens of a reply.
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_REPLY = 300

#: What endpoints call the end of a reply at its limit, or at the end of the model's context.
_CUT = ("length", "max_tokens", "model_length")

Request = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What came back for one request."""

    text: str
    """The answer; of a refusal its text, which may be empty."""
    thinking: str = ""
    """What the model thought before it, where that came apart from the answer."""
    unclosed: bool = False
    """Whether the thinking came apart from the answer and never ended: there is no answer."""
    refusal: bool = False
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    forced: bool = False
    """Whether the model gave no verdict by itself and had to choose one (`judges.local`)."""
    error: str | None = None
    """Why there is no answer after all tries; None if there is one. Such a reply is in no cache."""

    @property
    def cut(self) -> bool:
        """Whether the reply ended at its limit of tokens."""
        return self.finish_reason in _CUT


@dataclass
class Usage:
    """What the calls of one program used. Tokens are those of replies from now, not from the cache."""

    sent: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, price_in: float, price_out: float) -> float:
        """The cost, from prices per million tokens."""
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


class Cache:
    """Replies on the disk: a file of JSON lines {"key", "request", "reply"}, only ever appended to.

    Several processes may share it: who sends has it `alone`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        self.read()

    def read(self) -> None:
        """Reads what is in the file now, whoever wrote it."""
        content = read_file(self.path, MOST_LINES) if self.path.exists() else b""
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
                reply = Reply(**row["reply"])
                if isinstance(row["key"], str) and _is_whole(reply):
                    self._replies[row["key"]] = reply
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line that was torn when a program was killed: its request counts as never sent

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process sends requests whose replies go into this file, and then keeps it for this one.

        So nothing is paid twice: what others asked meanwhile has been read when the block begins. One lock for all
        requests is enough, since processes that share a cache mostly share the endpoint, and its limits, too. The lock
        ends with its process, however that ends.
        """
        with ExitStack() as lock:
            waits = False
            while True:
                try:
                    lock.enter_context(locked(self.path.parent, self.path.name))
                    break
                except InUse as e:
                    if not waits:
                        log.warning("Waiting for %s, which is adding replies to %s.", e.holder, self.path)
                    waits = True
                    time.sleep(LOCK_SECONDS)
            self.read()
            yield

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def put(self, key: str, request: Request | None, reply: Reply) -> None:
        """Adds a reply; when this returns it is on the disk."""
        line = json.dumps({"key": key, "request": request, "reply": asdict(reply)}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Made for its user alone: prompts and answers may be private.
        with open(self.path, "ab+", buffering=0, opener=lambda _, flags: open_own(self.path, flags, 0o600)) as f:
            # A program that was killed may have left a part of a line, this one or another on this file.
            torn = f.seek(0, os.SEEK_END) and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n"
            rest = memoryview((b"\n" if torn else b"") + line.encode())
            while rest:  # one system call, so that the lines of two machines do not mix; less is written on a full disk
                rest = rest[f.write(rest) :]
            os.fsync(f.fileno())
        self._replies[key] = reply


def _is_whole(reply: Reply) -> bool:
    """Whether a reply that was read back holds what replies hold."""
    texts = (reply.text, reply.thinking, "" if reply.finish_reason is None else reply.finish_reason)
    return (
        all(isinstance(text, str) and text == _whole(text) for text in texts)
        and all(isinstance(value, bool) for value in (reply.unclosed, reply.refusal, reply.forced))
        and all(number == count(number) for number in (reply.prompt_tokens, reply.completion_tokens))
        and reply.error is None
    )


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
    choices, usage = body.get("choices"), body.get("usage")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"no choices: {json.dumps(body.get('error') or body)}")
    message = choices[0].get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
        raise ValueError(f"a choice without a text: {json.dumps(choices[0])}")
    refusal, usage = message.get("refusal"), usage if isinstance(usage, dict) else {}
    content = message.get("content") or ""
    text = content or (refusal if isinstance(refusal, str) else "")
    # The first name is that of DeepSeek and older vLLM, the second that of vLLM and OpenRouter.
    thinking = message.get("reasoning_content") or message.get("reasoning")
    thinking = thinking if isinstance(thinking, str) else ""
    reason = choices[0].get("finish_reason")
    return Reply(
        text=_whole(text),
        thinking=_whole(thinking),
        unclosed=bool(thinking.strip()) and not (text.strip() or refusal),
        refusal=bool(refusal),
        finish_reason=_whole(reason)[:100] if isinstance(reason, str) else None,
        prompt_tokens=count(usage.get("prompt_tokens")),
        completion_tokens=count(usage.get("completion_tokens")),
    )


def _whole(text: str) -> str:
    """A text that a file can hold: JSON can hold half a character."""
    return text.encode("utf-8", "replace").decode()


def count(value: Any) -> int:
    """A number as a server tells it; 0 for what is none, or cannot be true."""
    return value if type(value) is int and 0 < value <= MOST_COUNT else 0


class Bounded(httpx.AsyncClient):
    """Sends requests such that a server can neither hold us for ever, nor fill the memory, nor lead us elsewhere.

    A reply has a size, as it comes and unpacked, and a time for all of it, connecting included: the time-outs of httpx
    begin again with every byte. Redirects come back as they are, since they would carry prompts and names of the
    organisation to another host. Of its headers only those remain that are looked at. A reply that is refused is
    replaced by one that says why, as `extensions["why"]`, and whether the package may ask again.
    """

    def __init__(self, endpoint: str, seconds: float, most_file: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # --concurrency is the limit
        # httpx would parse where a redirect leads, even if it does not follow it.
        hooks = {"response": [_hide_location]}
        super().__init__(limits=limits, headers={"Accept-Encoding": "gzip"}, event_hooks=hooks)
        self.path, self.seconds, self.most_file = httpx.URL(endpoint).path, seconds, most_file

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:  # type: ignore[override]
        """Sends a request and reads the whole reply."""
        of_files = request.url.path.removeprefix(self.path).startswith("/files")
        most = self.most_file if of_files and request.method == "GET" else MOST_REPLY
        seconds = max(self.seconds, FILE_SECONDS) if of_files else self.seconds
        try:
            async with asyncio.timeout(seconds):
                response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
                try:
                    content = b"" if _is_redirect(response.status_code) else await _read(response, most)
                finally:
                    await response.aclose()
        except TimeoutError:
            # What costs money, and as much time again, is not left to the package, which would try eight times more.
            again = {"x-should-retry": "true"} if request.method == "GET" else {"Retry-After": "0"}
            return _refused(request, 504, f"no whole reply within {seconds:g} s", again)
        except _RefusedError as e:
            return _refused(request, 502, str(e), {})
        waits = ("retry-after", "retry-after-ms", "x-should-retry")
        names = (_HIDDEN,) if _is_redirect(response.status_code) else waits
        headers = {name: response.headers[name] for name in names if name in response.headers}
        headers["Content-Type"] = "application/json"  # another charset could take for ever to decode
        return httpx.Response(response.status_code, headers=headers, content=content, request=request)


#: The header that a redirect has for its Location.
_HIDDEN = "x-hidden-location"


async def _hide_location(response: httpx.Response) -> None:
    if _is_redirect(response.status_code):
        response.headers[_HIDDEN] = response.headers.pop("location", "")


class _RefusedError(Exception):
    """Why a reply is not read."""


def _refused(request: httpx.Request, status: int, why: str, headers: dict[str, str]) -> httpx.Response:
    headers = {"x-should-retry": "false", **headers}
    return httpx.Response(status, headers=headers, request=request, content=b"", extensions={"why": why})


def _is_redirect(status: int) -> bool:
    return 300 <= status < 400


async def _read(response: httpx.Response, most: int) -> bytes:
    """The content of a reply.

    Raises:
        _RefusedError: if it is larger, or packed in a way that was not asked for.
    """
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip"):
        raise _RefusedError(f"a reply in the encoding {coding[:40]!r}, which was not asked for")
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS) if coding == "gzip" else None
    content, raw = bytearray(), 0
    async for part in response.aiter_raw():
        raw += len(part)
        try:
            content += unpacker.decompress(part, most + 1 - len(content)) if unpacker else part
        except zlib.error as e:
            raise httpx.DecodingError(str(e), request=response.request) from e
        if max(raw, len(content)) > most:
            raise _RefusedError(f"a reply of more than {most:,} bytes")
    if unpacker and not unpacker.eof:
        raise httpx.DecodingError("a part of the reply is missing", request=response.request)
    return bytes(content)


class Judge:
    """Answers requests, each only once: what `Client` and `judges.local.LocalJudge` share.

    Args:
        model: The model's name.
        endpoint: Where it is asked; part of the keys of the cache.
        cache: The file of replies.
        sampling: Parameters of every request.
    """

    revision: str | None = None
    date: str | None = None
    """The day that chat templates are told; None where a server renders them."""

    def __init__(self, model: str, *, endpoint: str, cache: Path, sampling: dict[str, Any]) -> None:
        fixed = sorted({"model", "messages", "stream"} & sampling.keys())
        if fixed:
            raise JudgeError(f"--sampling {', '.join(fixed)}: the program sets this itself. Leave it out.")
        if not isinstance(sampling.get("chat_template_kwargs", {}), dict):
            raise JudgeError(
                f"--sampling chat_template_kwargs is {sampling['chat_template_kwargs']!r}, not an object. Give the "
                'arguments of the chat template such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
            )
        try:
            refuse_secrets({"model": model, "sampling": sampling}, "the judge's")
        except RunError as e:
            raise JudgeError(str(e)) from None
        self.model, self.endpoint, self.sampling = model, endpoint, sampling
        self.cache = Cache(cache)
        self.usage = Usage()

    def send(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Asks what the cache does not hold, and puts the replies there. No other process does meanwhile.

        Args:
            bodies: Key -> body.
            desc: What the progress bar says.
            succeeded: Requests that this program has replies to already, whether sent or cached.

        Returns:
            Key -> error of those that failed.
        """
        raise NotImplementedError

    def collect(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Waits for replies that come later than `send` returns, and may for a day. Others may send meanwhile."""
        return {}

    def bodies(self, requests: Sequence[Request]) -> dict[str, Request]:
        """Key -> whole body of a chat completion, each different one once, in the order of the requests."""
        return dict(map(self._body, requests))

    def _body(self, request: Request) -> tuple[str, Request]:
        body = {"model": self.model, **self.sampling, **request}
        return request_key(self.endpoint, body), body

    def complete(self, requests: Sequence[Request], desc: str = "judging") -> list[Reply]:
        """Sends what the cache does not hold, and returns one reply for each request, in their order.

        Args:
            requests: Bodies of chat completions: "messages", and parameters that differ from the client's own.
            desc: What the progress bar says.

        Returns:
            Replies. One whose `error` is set failed after all tries; asking again sends only those.

        Raises:
            JudgeError: if the endpoint does not take the key or know the model, or nothing but failures came back from
                it so far.
        """
        bodies, todo, errors = self.bodies(requests), {}, {}
        if not all(key in self.cache for key in bodies):
            with self.cache.alone():
                todo = {key: body for key, body in bodies.items() if key not in self.cache}
                # Of earlier calls too: that a few last requests all fail does not mean that the endpoint is down.
                succeeded = self.usage.cached + self.usage.sent - self.usage.failed + len(bodies) - len(todo)
                errors = self.send(todo, desc, succeeded) if todo else {}
            errors |= self.collect(todo, desc, succeeded) if todo else {}
        self.usage.cached += len(bodies) - len(todo)
        for key in todo:
            if key in errors:
                self.usage.failed += 1
            else:
                self.usage.prompt_tokens += self.cache[key].prompt_tokens
                self.usage.completion_tokens += self.cache[key].completion_tokens
        self.usage.sent += len(todo)
        keys = [self._body(request)[0] for request in requests]
        return [Reply("", error=errors[key]) if key in errors else self.cache[key] for key in keys]

    def estimate(self, requests: Sequence[Request]) -> Usage:
        """What `complete` would send, without sending it: a rough guess of the tokens.

        Prompts are counted as characters / CHARACTERS_PER_TOKEN, too few for Chinese; each reply as TOKENS_PER_REPLY,
        or as the limit of its length if that is less.
        """
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


class Client(Judge):
    """A model behind an OpenAI-compatible endpoint.

    Args:
        model: The model's name at the endpoint.
        cache: The file of replies.
        base_url: The endpoint, such as http://localhost:8000/v1; None takes OPENAI_BASE_URL, or OpenAI's own.
        sampling: Parameters of every request; None = SAMPLING.
        concurrency: The most requests at a time.
        timeout: Seconds that a reply may take, from connecting to its last byte.
        batch: Whether to use the Batch API (`judges.batch`): the same replies, later and cheaper.

    Raises:
        JudgeError: if the key or the URL cannot be used. That there is no key for OpenAI is an error of `complete`,
            since an estimate needs none.
    """

    def __init__(
        self,
        model: str,
        *,
        cache: Path,
        base_url: str | None = None,
        sampling: dict[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        batch: bool = False,
    ) -> None:
        endpoint = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        super().__init__(model, endpoint=endpoint, cache=cache, sampling=SAMPLING if sampling is None else sampling)
        self.concurrency, self.timeout, self.batch = concurrency, timeout, batch
        # Before anything shows the URL, and without showing it: it is part of results and messages.
        if any(mark in self.endpoint for mark in "@?#"):
            raise JudgeError(
                "The URL of the endpoint holds a user, password, query or fragment (one of @, ? and #): put the key in "
                "OPENAI_API_KEY."
            )
        try:
            url = httpx.URL(self.endpoint)
        except (httpx.InvalidURL, ValueError) as e:
            raise JudgeError(f"--base-url {self.endpoint!r} is no URL: {e}.") from None
        if url.scheme not in ("http", "https") or not url.host or not 0 <= (url.port or 0) < 2**16:
            raise JudgeError(f"--base-url {self.endpoint}: use a whole URL, such as http://localhost:8000/v1.")
        if not (self._key().isascii() and self._key().isprintable()):
            raise JudgeError("OPENAI_API_KEY holds characters that no header can hold: copy the key anew.")

    @staticmethod
    def _key() -> str:
        # Read where it is used, so that no object holds it.
        return os.environ.get("OPENAI_API_KEY", "").strip()

    def connect(self, most_file: int = MOST_REPLY) -> openai.AsyncOpenAI:
        """A client of the openai package, to be closed, whose files have so many bytes at most."""
        return openai.AsyncOpenAI(
            api_key=self._key() or "none",  # the package wants one, `vllm serve` does not
            base_url=self.endpoint,
            max_retries=MAX_RETRIES,
            # Of openai 2 this is the HTTP library; openai 3 has a successor of it, and takes both.
            timeout=httpx.Timeout(FILE_SECONDS, connect=60.0),  # type: ignore[arg-type]
            http_client=Bounded(self.endpoint, self.timeout, most_file),  # type: ignore[arg-type]
        )

    def masked(self, error: object) -> str:
        """The text of an error for people to read: a short line, without the key, which servers may send back."""
        if isinstance(error, openai.APIStatusError):
            error = error.response.extensions.get("why", error)
        text = " ".join(printable(str(error) or type(error).__name__).split())
        key = self._key()
        return (text.replace(key, "***") if len(key) >= 6 else text)[:500]

    def refuse_redirect(self, error: openai.APIStatusError) -> None:
        """Raises an error that says where a reply would have led; nothing if it would not have led elsewhere."""
        if not _is_redirect(error.status_code):
            return
        asked, text = error.response.request.url, error.response.headers.get(_HIDDEN, "")
        try:
            url = asked.join(text)
            # No user, password or query: they may be secrets of the server's.
            target = f"{url.scheme}://{url.netloc.decode()}{url.raw_path.partition(b'?')[0].decode()}"
        except (httpx.InvalidURL, ValueError):
            text = ""
        rest = asked.path.removeprefix(httpx.URL(self.endpoint).path)
        advice = "Name the endpoint itself with --base-url."
        if text and url.scheme in ("http", "https") and url.host and target.endswith(rest):
            advice = f"If that is your endpoint, use --base-url {target.removesuffix(rest)}"
        where = f"redirects to {target}" if text else f"answers {error.status_code}, which leads nowhere"
        raise JudgeError(
            self.masked(f"{self.endpoint} {where}. Redirects are not followed: they carry prompts elsewhere. {advice}")
        ) from None

    def send(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Sends the requests, through the Batch API if that was chosen; see `Judge.send`."""
        if not self._key() and self.endpoint == OPENAI_URL:
            raise JudgeError(
                "OPENAI_API_KEY is not set. Set it, or name an endpoint that needs none with --base-url or "
                "OPENAI_BASE_URL, such as that of `vllm serve`, or judge with a local model (--local)."
            )
        from judges.batch import refuse_submitted, submit

        if self.batch:
            return asyncio.run(submit(self, bodies))
        refuse_submitted(self, bodies)
        return asyncio.run(self._send(bodies, desc, succeeded))

    def collect(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        """Waits for the batches; see `Judge.collect`."""
        from judges.batch import fetch

        return asyncio.run(fetch(self, bodies, desc, succeeded)) if self.batch else {}

    async def _send(self, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
        errors: dict[str, str] = {}
        queue: Iterator[tuple[str, Request]] = iter(bodies.items())
        in_a_row = 0  # and while nothing succeeded at all, the request itself may be wrong

        async def work(api: openai.AsyncOpenAI, bar: tqdm) -> None:
            nonlocal in_a_row, succeeded
            for key, body in queue:  # all workers draw from one queue
                reply, outage = await self._ask(api, body)
                if reply.error is None:
                    self.cache.put(key, body, reply)
                    succeeded += 1
                    in_a_row = 0
                else:
                    errors[key] = reply.error
                    in_a_row += outage
                    if in_a_row >= GIVE_UP or (not succeeded and len(errors) >= GIVE_UP):
                        raise JudgeError(
                            f"{self.endpoint} failed {max(in_a_row, len(errors))} requests in a row; the last: "
                            f"{reply.error}. What succeeded is kept: the same command goes on from there."
                        )
                bar.update()

        async with self.connect() as api:
            with tqdm(total=len(bodies), desc=desc, unit="request") as bar:
                await asyncio.gather(*(work(api, bar) for _ in range(min(self.concurrency, len(bodies)))))
        if not succeeded:
            raise JudgeError(f"{self.endpoint} failed every request; the last: {next(reversed(errors.values()))}.")
        for error in sorted(set(errors.values())):
            log.warning("%d requests failed: %s", list(errors.values()).count(error), error)
        return errors

    async def _ask(self, api: openai.AsyncOpenAI, body: Request) -> tuple[Reply, bool]:
        """The reply to one request, or one with an error, and whether that looks like an outage."""
        known = {"model": body["model"], "messages": body["messages"]}
        extra = {name: value for name, value in body.items() if name not in known}
        error, wait = "", 0.0
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(wait)
            wait = FIRST_WAIT * 2**attempt
            try:
                raw = await api.chat.completions.with_raw_response.create(**known, extra_body=extra)
                return read_reply(json.loads(raw.http_response.content)), False
            except openai.APIStatusError as e:
                self.refuse_redirect(e)
                error = self.masked(e)
                if e.status_code in (401, 404):
                    raise JudgeError(f"{self.endpoint} does not serve {self.model} with this key: {error}") from None
                if e.code in ("content_filter", "content_policy_violation"):
                    # The endpoint's own filter declined: a refusal, and it would decline again.
                    return Reply("", refusal=True, finish_reason="content_filter"), False
                if e.status_code in (400, 403, 413, 422):  # this request is too long, or not to the endpoint's liking
                    return Reply("", error=error), False
                after = _seconds(e.response.headers.get("retry-after"))
                if after is None or after > LONGEST_WAIT:
                    return Reply("", error=error), True
                wait = after
            except openai.APIConnectionError as e:
                return Reply("", error=self.masked(e)), True
            except (ValueError, RecursionError) as e:  # no JSON, or no reply in it
                error = f"unusable reply: {self.masked(e)}"
        return Reply("", error=error), True


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After header, if it holds a number."""
    try:
        return max(0.0, float(header or ""))
    except ValueError:
        return None
