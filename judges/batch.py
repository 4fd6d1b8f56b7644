"""The Batch API: the same requests into the same cache, within a day and, at OpenAI, for half the price.

What was submitted is remembered in a file next to the cache (`replies.batch_file`). Before a batch is made, the file
says which requests it is to hold, and a tag that the batch will carry: a program that was killed, or cut off while the
endpoint was making the batch, finds it by the tag and does not submit it twice. Replies go into the cache before a
batch is forgotten. Programs that share a cache share that file, and change it while they have the cache alone.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
from tqdm import tqdm

from judges import JudgeError
from judges.bounded import MOST_REPLY
from judges.client import Client
from judges.replies import DECLINED, DECLINES, Request, batch_file, count, read_reply, submitted
from trace_tasks.data.files import write_json

log = logging.getLogger(__name__)

#: OpenAI's limits of one batch are 50,000 requests and 200 MB; of fewer requests the replies fit into MOST_FILE, too.
MOST_REQUESTS = 20_000
MOST_BYTES = 150_000_000
#: The most bytes of a batch's replies together.
MOST_FILE = 2 * 2**30
POLL_SECONDS = 30.0
#: The most pages of batches, newest first, that are searched for one of ours.
MOST_PAGES = 100
_ENDED = ("completed", "failed", "expired", "cancelled")
_STATES = ("validating", "in_progress", "finalizing", "cancelling", *_ENDED)

Batch = dict[str, Any]
"""Our record of a batch: its `tag`, `id` (None while it is being made), `endpoint`, and the `keys` of its requests."""


class _UnusableError(Exception):
    """The endpoint's answer is not one of a Batch API."""


class BatchClient(Client):
    """A `Client` that sends its requests as batches."""

    def send(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Submits the requests that are in no batch yet."""
        self.refuse_without_key()
        with self._explained():
            asyncio.run(self._submit(bodies))
        return {}

    def collect(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Waits for the batches, including those of other processes, and puts the replies into the cache."""
        with self._explained():
            failed = asyncio.run(self._fetch(bodies, desc))
        self.cache.read()  # other processes may have fetched replies
        return {key: failed.get(key, "no reply in the batch") for key in bodies if key not in self.cache}

    def _remember(self, batches: list[Batch]) -> None:
        """Replaces the batches of this endpoint in the file."""
        file = batch_file(self.cache.path)
        batches = [batch for batch in submitted(self.cache.path) if batch["endpoint"] != self.endpoint] + batches
        if batches:
            write_json(file, {"batches": batches})
        else:
            file.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns errors of the endpoint into errors of ours."""
        try:
            yield
        except (openai.OpenAIError, _UnusableError) as e:
            if isinstance(e, openai.APIStatusError):
                self.refuse(e)
            rest = "Leave out --batch to send requests one by one."
            if self.batches():
                rest = (
                    f"The submitted batch is on record in {batch_file(self.cache.path)}: run the same command again to "
                    "continue. If the endpoint no longer has the batch, delete that file; all requests are then paid "
                    "again."
                )
            raise JudgeError(f"The Batch API of {self.endpoint} failed: {self.masked(e)}. {rest}") from None

    async def _submit(self, bodies: dict[str, Request]) -> None:
        async with self.connect() as api:
            batches = self.batches()
            for batch in batches:  # one without an id was being made when its program was killed
                batch["id"] = batch["id"] or await _find(api, batch["tag"])
            batches = [batch for batch in batches if batch["id"]]
            self._remember(batches)
            waiting = {key for batch in batches for key in batch["keys"]}
            for lines in _chunks({key: self.sent(body) for key, body in bodies.items() if key not in waiting}):
                await self._make(api, lines)

    async def _make(self, api: openai.AsyncOpenAI, lines: dict[str, bytes]) -> None:
        """Makes one batch of the lines of its input file."""
        others, tag = self.batches(), uuid.uuid4().hex
        batch: Batch = {"tag": tag, "id": None, "endpoint": self.endpoint, "keys": list(lines)}
        content = io.BytesIO(b"".join(lines.values()))
        upload = await _object(api.files.with_raw_response.create(file=(f"{tag}.jsonl", content), purpose="batch"))
        uploaded = _name(upload)
        self._remember([*others, batch])
        try:
            # No automatic second try: after a lost answer the batch may exist, and a second one would be paid, too.
            made = api.with_options(max_retries=0).batches.with_raw_response.create(
                input_file_id=uploaded,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"trace_bench": tag},
            )
            batch["id"] = _name(await _object(made))
        except (openai.APIError, _UnusableError) as e:
            if isinstance(e, openai.APIStatusError) and e.status_code < 500:  # refused, so no batch exists
                self._remember(others)
                raise
            batch["id"] = await _find(api, tag)
        if batch["id"] is None:
            self._remember(others)
            raise JudgeError(f"{self.endpoint} did not accept the batch. Nothing was submitted; run the command again.")
        self._remember([*others, batch])
        log.info("Submitted batch %s with %d requests.", batch["id"], len(lines))

    async def _fetch(self, bodies: dict[str, Request], desc: str) -> dict[str, str]:
        """Key -> error of requests that failed in their batch, once all batches of these requests have ended."""
        errors: dict[str, str] = {}
        done: dict[str, int] = {}

        def waited_for() -> list[Batch]:  # others are left to the command that submitted them
            return [b for b in self.batches() if b["id"] and not bodies.keys().isdisjoint(b["keys"])]

        with tqdm(total=len(bodies), desc=f"{desc} (batch; can be stopped and continued)", unit="request") as bar:
            async with self.connect() as api:
                while batches := waited_for():
                    for batch in batches:
                        said = await _object(api.batches.with_raw_response.retrieve(batch["id"]))
                        status, counts = said.get("status"), said.get("request_counts")
                        if status not in _STATES:
                            raise _UnusableError(f"unusable reply: batch {batch['id']} has the status {status!r:.100}")
                        if isinstance(counts, dict):
                            done[batch["id"]] = count(counts.get("completed")) + count(counts.get("failed"))
                        bar.n = min(sum(done.values()), len(bodies))
                        bar.set_postfix_str(status)
                        if status in _ENDED:
                            errors |= await self._take(batch, said, bodies)
                    if any(batch in batches for batch in waited_for()):
                        await asyncio.sleep(POLL_SECONDS)
        return errors

    async def _take(self, batch: Batch, said: dict[str, Any], bodies: dict[str, Request]) -> dict[str, str]:
        """Caches the replies of a batch that has ended, forgets the batch, and returns key -> error."""
        errors: dict[str, str] = {}
        # As many replies as there are requests, in both files together.
        most = min(MOST_FILE, MOST_REPLY * (len(batch["keys"]) + 1))
        with self.cache.alone():
            if batch not in self.batches():  # another program was faster
                return errors
            async with self.connect(most) as api:
                for field in ("output_file_id", "error_file_id"):
                    if said.get(field) is not None:
                        content = (await api.files.content(_name(said, field))).content
                        errors |= self._keep(content, batch["keys"], bodies)
            self._remember([other for other in self.batches() if other != batch])
        reasons = said["errors"].get("data") if isinstance(said.get("errors"), dict) else None
        reasons = [r.get("message") or r.get("code") for r in _objects(reasons)]
        why = "; ".join([f"the batch ended as {said['status']}", *map(str, filter(None, reasons[:3]))])
        return {key: errors.get(key, self.masked(why)) for key in batch["keys"] if key not in self.cache}

    def _keep(self, content: bytes, keys: list[str], bodies: dict[str, Request]) -> dict[str, str]:
        """Caches the replies in a batch's output file, and returns key -> error."""
        errors, asked = {}, set(keys)
        unreadable: list[str] = []  # whose replies they were shows as requests without one
        for line in filter(bytes.strip, io.BytesIO(content)):
            key = None
            try:
                if len(line) > MOST_REPLY:
                    raise ValueError(f"a reply of more than {MOST_REPLY:,} bytes")
                row = json.loads(line)
                if not isinstance(row, dict) or row.get("custom_id") not in asked:
                    raise ValueError("it names no request of this batch")
                key, response = row["custom_id"], row.get("response")
                if _code(response) in DECLINES:
                    reply = DECLINED
                elif row.get("error") or not isinstance(response, dict) or response.get("status_code") != 200:
                    raise ValueError(json.dumps(row.get("error") or response))
                else:
                    reply = read_reply(response.get("body"))
            except (ValueError, TypeError, RecursionError) as e:
                if key is None:
                    unreadable.append(self.masked(e))
                else:
                    errors[key] = self.masked(e)
            else:
                if key not in self.cache:
                    self.cache.put(key, bodies.get(key), reply)
        if unreadable:
            log.warning("Cannot read %d lines of the batch, such as: %s", len(unreadable), unreadable[0])
        return errors


async def _object(call: Awaitable[Any]) -> dict[str, Any]:
    """The JSON object that a call of the API returns."""
    try:
        body = json.loads((await call).http_response.content)
    except (ValueError, RecursionError) as e:
        raise _UnusableError(f"unusable reply: {e}") from None
    if not isinstance(body, dict):
        raise _UnusableError(f"unusable reply: {type(body).__name__}, not an object")
    return body


def _objects(rows: Any) -> list[dict[str, Any]]:
    """The objects in a list from a server; empty if it is no list."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _code(response: Any) -> Any:
    """The code of the error in the body of a response; None without one."""
    for name in ("body", "error", "code"):
        response = response.get(name) if isinstance(response, dict) else None
    return response


def _name(body: dict[str, Any], field: str = "id") -> str:
    """The name of a batch or file, which becomes a part of an address."""
    name = body.get(field)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.:-]{0,200}", name, re.ASCII):
        raise _UnusableError(f"unusable reply: {field} is {name!r:.100}")
    return name


async def _find(api: openai.AsyncOpenAI, tag: str) -> str | None:
    """The batch that carries a tag; None if there is none."""
    after: dict[str, str] = {}
    for _ in range(MOST_PAGES):
        page = await _object(api.batches.with_raw_response.list(limit=100, extra_query=after))
        rows = _objects(page.get("data"))
        for row in rows:
            metadata = row.get("metadata")
            if isinstance(metadata, dict) and metadata.get("trace_bench") == tag:
                return _name(row)
        if not rows or page.get("has_more") is not True:
            return None
        after = {"after": _name(rows[-1])}
    return None


def _chunks(bodies: dict[str, Request]) -> list[dict[str, bytes]]:
    """Splits key -> line into input files that keep the limits of a batch."""
    chunks: list[dict[str, bytes]] = []
    size = 0
    for key, body in bodies.items():
        row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(row).encode() + b"\n"
        if not chunks or len(chunks[-1]) == MOST_REQUESTS or size + len(line) > MOST_BYTES:
            chunks.append({})
            size = 0
        chunks[-1][key] = line
        size += len(line)
    return chunks
