"""A judge over an OpenAI-compatible endpoint.

The key comes from OPENAI_API_KEY and goes into the header of the requests, nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
from tqdm import tqdm

from judges import JudgeError
from judges.bounded import FILE_SECONDS, MAX_RETRIES, MOST_REPLY, Bounded
from judges.judge import Judge
from judges.replies import DECLINED, DECLINES, Reply, Request, batch_file, read_reply, submitted
from trace_bench.keys import refuse_secrets
from trace_bench.text import printable

OPENAI_URL = "https://api.openai.com/v1"
#: Failures in a row (or from the start) after which the endpoint is taken to be down, or the request to be wrong.
GIVE_UP = 10
#: The most seconds that replies on their way are waited for once the program has to end.
LAST_SECONDS = 60.0


class Client(Judge):
    """A model behind an OpenAI-compatible endpoint; see `Judge`.

    `base_url` is such as http://localhost:8000/v1; None takes OPENAI_BASE_URL, or OpenAI's own. `timeout` = seconds
    that a reply may take, from connecting to its last byte.

    Raises:
        JudgeError: if the key or the URL cannot be used. An estimate needs no key.
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
    ) -> None:
        endpoint = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).strip().rstrip("/")
        super().__init__(model, endpoint=endpoint, cache=cache, sampling=sampling)
        self.concurrency, self.timeout = concurrency, timeout
        self.reached = Event()  # once a connection was made
        # The URL is part of results and messages: this one shows none.
        if any(mark in endpoint for mark in "@?#"):
            raise JudgeError(
                "The URL of the endpoint has a user, password, query or fragment (@, ? or #). Remove it, and put the "
                "key in OPENAI_API_KEY."
            )
        refuse_secrets({"--base-url": endpoint}, "the judge's")
        try:
            url = httpx.URL(endpoint)
        except (httpx.InvalidURL, ValueError) as e:
            raise JudgeError(f"--base-url {endpoint!r} is not a URL: {e}.") from None
        if url.scheme not in ("http", "https") or not url.host or not 0 <= (url.port or 0) < 2**16:
            raise JudgeError(f"--base-url {endpoint} is not a whole URL: use one such as http://localhost:8000/v1.")
        if not (_key().isascii() and _key().isprintable()):
            raise JudgeError("OPENAI_API_KEY has characters that are not allowed in a header: copy the key again.")

    def connect(self, most_file: int = MOST_REPLY) -> openai.AsyncOpenAI:
        """A client of the openai package, to be closed, whose files have so many bytes at most."""
        try:
            http = Bounded(self.endpoint, self.timeout, most_file, self.reached)
        except (ImportError, ValueError, httpx.InvalidURL) as e:
            raise JudgeError(
                f"A proxy of the environment cannot be used ({self.masked(e)}). Set HTTP_PROXY, HTTPS_PROXY and "
                "ALL_PROXY to URLs that begin with http://, or unset them."
            ) from None
        return openai.AsyncOpenAI(
            api_key=_key() or "none",  # the package wants one, `vllm serve` does not
            base_url=self.endpoint,
            max_retries=MAX_RETRIES,
            # Of openai 2 this is the HTTP library; openai 3 has a successor of it, and takes both.
            timeout=httpx.Timeout(FILE_SECONDS, connect=60.0),  # type: ignore[arg-type]
            http_client=http,  # type: ignore[arg-type]
        )

    def masked(self, error: object) -> str:
        """The text of an error as a short line, without the key, which a server may echo."""
        key = _key()
        lacking = isinstance(error, openai.APIStatusError) and error.status_code in (401, 403) and not key
        if isinstance(error, openai.APIStatusError):
            error = error.response.extensions.get("why", error)  # see `Bounded`
        elif isinstance(error, openai.APIConnectionError) and str(error.__cause__ or ""):
            error = f"{error} ({error.__cause__})"  # a name that is unknown, a certificate that is not trusted, ...
        text = " ".join(printable(str(error) or type(error).__name__).split())
        text = (text.replace(key, "***") if len(key) >= 6 else text)[:500]
        return f"no key was set: set OPENAI_API_KEY. The endpoint says: {text}" if lacking else text

    def refuse(self, error: openai.APIStatusError) -> None:
        """Raises an error that says what to do, if nothing listens at the endpoint or the reply was a redirect."""
        if "nobody" in error.response.extensions:
            raise JudgeError(
                f"Nothing listens at {self.endpoint}{self._or_proxy()}: the connection is refused. Start the server, "
                "or give a different endpoint with --base-url."
            ) from None
        if not 300 <= error.status_code < 400:
            return
        asked, target = error.response.request.url, "nowhere"
        with suppress(httpx.InvalidURL, ValueError):
            if location := error.response.extensions["location"]:
                # A user, password or query may be a secret of the server's.
                target = str(asked.join(location).copy_with(userinfo=b"", query=None, fragment=None))
        rest = asked.path.removeprefix(httpx.URL(self.endpoint).path.rstrip("/"))
        raise JudgeError(
            self.masked(
                f"{self.endpoint} answers {error.status_code} and redirects to {target.removesuffix(rest)} . Redirects "
                "are not followed, since they would send prompts elsewhere. Give the endpoint itself with --base-url."
            )
        ) from None

    def _or_proxy(self) -> str:
        """A hint, if the environment sets a proxy, that the proxy may be the one that does not answer; else empty."""
        url = httpx.URL(self.endpoint)
        if not urllib.request.getproxies().keys() & {url.scheme, "all"} or urllib.request.proxy_bypass(url.host):
            return ""
        return f", or at the proxy of {url.scheme.upper()}_PROXY or ALL_PROXY"

    def refuse_without_key(self) -> None:
        """Raises an error if the endpoint is OpenAI's and there is no key."""
        if not _key() and self.endpoint == OPENAI_URL:
            raise JudgeError(
                "OPENAI_API_KEY is not set. Set it; or give an endpoint that needs no key with --base-url or "
                "OPENAI_BASE_URL, such as that of `vllm serve`; or use a local model (--local)."
            )

    def batches(self) -> list[dict[str, Any]]:
        """The batches of this endpoint that were submitted and not fetched yet, see `judges.batch`."""
        return [batch for batch in submitted(self.cache.path) if batch["endpoint"] == self.endpoint]

    def send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Sends the requests individually; refuses those that are in a batch, which would be paid twice."""
        self.refuse_without_key()
        if waiting := bodies.keys() & {key for batch in self.batches() for key in batch["keys"]}:
            raise JudgeError(
                f"{len(waiting)} of these requests are in a submitted batch whose replies were not fetched yet. Use "
                f"--batch to wait for it, or delete {batch_file(self.cache.path)} to pay for them again."
            )
        return asyncio.run(self._send(bodies, desc))

    async def _send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        errors: dict[str, str] = {}
        queue = iter(bodies.items())  # all workers draw from it
        succeeded = self.usage.succeeded  # while nothing has, the request itself may be wrong
        in_a_row = 0

        async def work(api: openai.AsyncOpenAI, bar: tqdm) -> None:
            nonlocal in_a_row, succeeded
            for key, body in queue:
                reply, outage = await self._ask(api, body)
                if reply.error is None:
                    self.cache.put(key, body, reply)
                    succeeded += 1
                    in_a_row = 0
                else:
                    errors[key] = reply.error
                    in_a_row += outage
                    if not succeeded and len(errors) >= GIVE_UP:
                        raise self.all_failed(errors)
                    if in_a_row >= GIVE_UP:
                        raise JudgeError(
                            f"{self.endpoint} failed {in_a_row} requests in a row; the last: {reply.error}. Replies "
                            "are kept: run the same command again to continue."
                        )
                bar.update()

        async with self.connect() as api:
            with tqdm(total=len(bodies), desc=desc, unit="request") as bar:
                workers = [asyncio.create_task(work(api, bar)) for _ in range(min(self.concurrency, len(bodies)))]
                ended, others = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                if others:  # one failed: what is on its way is paid, so that it is waited for
                    for _ in queue:  # no more is sent
                        pass
                    await asyncio.wait(others, timeout=LAST_SECONDS)
                for worker in others:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        for worker in ended:
            worker.result()  # raises what it failed with
        return errors

    def sent(self, body: Request) -> Request:
        """The body as it is sent: without the seed of an attempt if --sampling sets the seed to null."""
        takes_none = self.sampling.get("seed", 0) is None  # for endpoints that take no seed, such as Gemini's
        return {name: value for name, value in body.items() if not (takes_none and name == "seed")}

    async def _ask(self, api: openai.AsyncOpenAI, body: Request) -> tuple[Reply, bool]:
        """The reply to one request (perhaps with an error), and whether the error looks like an outage."""
        known = {"model": body["model"], "messages": body["messages"]}
        extra = {name: value for name, value in self.sent(body).items() if name not in known}
        try:
            raw = await api.chat.completions.with_raw_response.create(**known, extra_body=extra)
            return read_reply(json.loads(raw.http_response.content)), False
        except openai.APIStatusError as e:
            self.refuse(e)
            error = self.masked(e)
            if e.status_code in (401, 404):
                how = " with this key" if _key() else ""
                if e.status_code == 404 and not re.search(r"/v\d[^/]*\Z", self.endpoint):
                    error += ". The URL of an endpoint usually ends in /v1: see --base-url"
                raise JudgeError(f"{self.endpoint} does not serve {self.model}{how}: {error}") from None
            if e.code in DECLINES:
                return DECLINED, False
            if e.code == "insufficient_quota":
                raise JudgeError(f"{error} Replies are kept: run the same command again to continue.") from None
            if e.param in list(self.sampling):  # a server may send anything, such as a list
                error += f" ({e.param} is set by --sampling: use a value that the model accepts)"
            # The first ones: this request is too long, or not to the endpoint's liking.
            return Reply("", error=error), e.status_code not in (400, 403, 413, 422)
        except openai.APIConnectionError as e:
            return Reply("", error=self.masked(e)), True


def _key() -> str:
    """The API key, read only when it is used, so that no object holds it."""
    return os.environ.get("OPENAI_API_KEY", "").strip()
