"""The HTTP client under the openai package: no server can hold us for ever, fill the memory, or lead us away.

The openai package sends a request again after 408, 409, 429, 5xx and cut connections, and waits as long as Retry-After
says, up to a minute. What it leaves is handled here: longer waits, and replies to a chat that hold no reply.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

import httpx

from judges.replies import read_reply

#: Times that the package sends a request again: its waits of 0.5 s to 8 s add up to about 40 s.
MAX_RETRIES = 8
#: Times that a chat is asked for in all, where the reply came too late or was unusable: it may have cost money.
ATTEMPTS = 4
#: The longest Retry-After that every openai package waits for, and the longest that we do.
#: After a longer one, the same command is for later.
PACKAGE_WAIT, LONGEST_WAIT = 60.0, 900.0
#: Bytes of a reply: the longest that models write, with their thinking, are about 1 MB.
MOST_REPLY = 4 * 2**20
#: The most seconds that a file may be on its way.
FILE_SECONDS = 3600.0


class Bounded(httpx.AsyncClient):
    """Limits the size of a reply and the time for all of it, connecting included, and follows no redirect.

    The time-outs of httpx begin again with every byte. A redirect would carry prompts and names of the organisation to
    another host. A reply that is refused is replaced by one that says why, as `extensions["why"]`. A file may have
    `most_file` bytes, anything else MOST_REPLY.

    `reached` is set once a connection was made. Until then a connection that is refused is not tried again: nothing
    listens there, which the reply says as `extensions["nobody"]`.
    """

    def __init__(self, endpoint: str, seconds: float, most_file: int, reached: Event) -> None:
        super().__init__(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),  # --concurrency is the limit
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [_hide_location]},
        )
        # Without a path, as DeepSeek's endpoint is, httpx says "/".
        self.path = httpx.URL(endpoint).path.rstrip("/")
        self.seconds, self.most_file = seconds, most_file
        self.reached = reached

    async def _trace(self, event: str, info: Any) -> None:
        """Hears of each step of a request from httpx."""
        if event == "connection.connect_tcp.complete":
            self.reached.set()

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:  # type: ignore[override]
        """Sends a request and reads the whole reply."""
        path = request.url.path.removeprefix(self.path)
        file, chat, get = path.startswith("/files"), path == "/chat/completions", request.method == "GET"
        tries = int(request.headers.get("x-stainless-retry-count", 0)) + 1
        again = get or (chat and tries < ATTEMPTS)
        seconds = max(self.seconds, FILE_SECONDS) if file else self.seconds
        request.extensions = {**request.extensions, "trace": self._trace}
        try:
            async with asyncio.timeout(seconds):
                response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
                try:
                    content = await _read(response, self.most_file if file and get else MOST_REPLY)
                finally:
                    await response.aclose()
        except TimeoutError:
            return _refused(request, 504, f"no whole reply within {seconds:g} s", again)
        except httpx.ConnectError as e:
            if self.reached.is_set() or not any(isinstance(cause, ConnectionRefusedError) for cause in _causes(e)):
                raise
            return _refused(request, 503, "the connection is refused", False, nobody=True)
        if isinstance(content, str):
            return _refused(request, 502, content, False)
        if chat and response.status_code == 200:
            try:
                read_reply(json.loads(content))
            except (ValueError, RecursionError) as e:
                return _refused(request, 502, f"unusable reply: {e}", again)
        # Another charset could take for ever to decode, and other headers are not looked at.
        headers = {"Content-Type": "application/json"}
        if response.status_code >= 400:  # a gateway may send them with good replies, too
            headers |= {name: response.headers[name] for name in _OF_RETRIES if name in response.headers}
        if response.status_code == 429 and b"insufficient_quota" in content:  # waiting pays no bill
            headers["x-should-retry"] = "false"
        wait = _seconds(headers.get("retry-after"))
        if chat and wait > PACKAGE_WAIT and tries <= MAX_RETRIES:
            if wait > LONGEST_WAIT:
                headers["x-should-retry"] = "false"
            else:
                await asyncio.sleep(wait)
                headers = {"Content-Type": "application/json"}
        where = {"location": response.extensions["location"]}
        return httpx.Response(response.status_code, headers=headers, content=content, request=request, extensions=where)


_OF_RETRIES = ("retry-after", "retry-after-ms", "x-should-retry")


async def _hide_location(response: httpx.Response) -> None:
    """Hides where a redirect leads: httpx would parse it, even if it does not follow it."""
    response.extensions["location"] = response.headers.pop("location", "")


async def _read(response: httpx.Response, most: int) -> bytes | str:
    """The content of a reply, or why it is not read: it is larger, or packed, which was not asked for."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        return f"a reply in the encoding {coding[:40]!r}, which was not asked for"
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > most:
            return f"a reply of more than {most:,} bytes"
    return bytes(content)


def _refused(request: httpx.Request, status: int, why: str, again: bool, **more: Any) -> httpx.Response:
    headers = {"x-should-retry": "true" if again else "false"}
    return httpx.Response(status, headers=headers, request=request, content=b"", extensions={"why": why, **more})


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it: a host with several addresses has an error of each."""
    while error:
        yield error
        for other in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
            yield from _causes(other)
        error = error.__cause__ or error.__context__


def _seconds(header: str | None) -> float:
    """The seconds of a Retry-After header, a number or a date; 0 where it holds neither."""
    with suppress(ValueError):
        return float(header or 0)
    with suppress(ValueError, OverflowError):
        return parsedate_to_datetime(str(header)).timestamp() - time.time()
    return 0.0
