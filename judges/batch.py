"""The Batch API: the same requests into the same cache, within a day and, at OpenAI, for half the price.

What was submitted is remembered in a file beside the cache. Before a batch is made, the file says which requests it is
to hold and a tag that the batch will carry: a program that was killed, or cut off while the endpoint was making the
batch, finds it by the tag and does not submit it twice. Replies go into the cache before a batch is forgotten.

Programs that share a cache share that file, and change it while they have the cache alone: what one has submitted is
waited for by the others. What the endpoint says is read as JSON of unknown form.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
from tqdm import tqdm

from judges import JudgeError
from judges.client import MOST_FILE, MOST_REPLY, Request, count, read_reply
from trace_bench.run import RunError, read_json
from trace_tasks.data.files import write_json

if TYPE_CHECKING:
    from judges.client import Client

log = logging.getLogger(__name__)

#: OpenAI's limits of one batch are 50,000 requests and 200 MB; of fewer requests the replies fit into MOST_FILE, too.
MOST_REQUESTS = 20_000
MOST_BYTES = 150_000_000
POLL_SECONDS = 30.0
#: Pages of batches, the newest first, that are looked through for one of ours.
MOST_PAGES = 100
#: Lines of a batch that cannot be read and are shown; the others are counted.
SHOWN = 10
_ENDED = ("completed", "failed", "expired", "cancelled")
_STATES = ("validating", "in_progress", "finalizing", "cancelling", *_ENDED)


def batch_file(cache: Path) -> Path:
    """Where the batches of a cache that were not fetched yet are remembered."""
    return cache.with_suffix(".batches.json")


def refuse_submitted(client: Client, bodies: dict[str, Request]) -> None:
    """Refuses to send what is in a batch already: it would be paid twice.

    Raises:
        JudgeError: naming both ways out.
    """
    file = batch_file(client.cache.path)
    submitted = bodies.keys() & {key for batch in _mine(client, file) for key in batch["keys"]}
    if submitted:
        raise JudgeError(
            f"{len(submitted)} of these requests are in a batch that was submitted already and not fetched yet. Use "
            f"--batch to wait for it, or delete {file} to pay for them again."
        )


async def submit(client: Client, bodies: dict[str, Request]) -> dict[str, str]:
    """Submits what is in no batch yet; nobody else uses the cache meanwhile.

    Args:
        client: Whose endpoint and cache are used.
        bodies: Key -> body of the requests that the cache does not hold.

    Returns:
        Nothing, since no request has failed yet.

    Raises:
        JudgeError: if the endpoint has no Batch API or refuses a batch.
    """
    file = batch_file(client.cache.path)
    with _explained(client):
        async with client.connect() as api:
            await _recover(api, client, file)
            waiting = {key for batch in _mine(client, file) for key in batch["keys"]}
            for chunk in _chunks({key: body for key, body in bodies.items() if key not in waiting}):
                await _submit(api, client, file, chunk)
    return {}


async def fetch(client: Client, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
    """Waits for the batches, whoever submitted them, and puts the replies into the client's cache.

    Args:
        client: Whose endpoint and cache are used.
        bodies: Key -> body of the requests that are waited for.
        desc: What the progress bar says.
        succeeded: As for `Judge.send`.

    Returns:
        Key -> error of the requests that failed.

    Raises:
        JudgeError: if the Batch API fails, or no request succeeded, now or before.
    """
    with _explained(client):
        async with client.connect() as api:
            errors = await _fetch_all(api, client, batch_file(client.cache.path), bodies, desc)
    client.cache.read()  # what other programs have fetched
    errors = {key: error for key, error in errors.items() if key not in client.cache}
    errors |= {key: "no reply in the batch" for key in bodies if key not in client.cache and key not in errors}
    if not succeeded and len(errors) == len(bodies):
        raise JudgeError(f"{client.endpoint} failed every request; the last: {next(reversed(errors.values()))}.")
    if errors:
        log.warning("%d requests failed, such as: %s", len(errors), next(iter(errors.values())))
    return errors


@contextmanager
def _explained(client: Client) -> Iterator[None]:
    """Makes errors of the endpoint errors of the project."""
    try:
        yield
    except (openai.OpenAIError, _UnusableError) as e:
        if isinstance(e, openai.APIStatusError):
            client.refuse_redirect(e)
        file = batch_file(client.cache.path)
        rest = "Without --batch, requests are sent one by one."
        if _mine(client, file):
            rest = f"What was submitted is remembered in {file}: the same command goes on from there."
            rest += " If the endpoint has forgotten it, delete that file, and all is paid again."
        raise JudgeError(f"The Batch API of {client.endpoint} failed: {client.masked(e)}. {rest}") from None


class _UnusableError(Exception):
    """What the endpoint answers is nothing that a Batch API would."""


async def _object(call: Awaitable[Any]) -> dict[str, Any]:
    """The JSON object that a call of the API returns."""
    try:
        body = json.loads((await call).http_response.content)
    except (ValueError, RecursionError) as e:
        raise _UnusableError(f"unusable reply: {e}") from None
    if not isinstance(body, dict):
        raise _UnusableError(f"unusable reply: {type(body).__name__}, not an object")
    return body


def _name(body: dict[str, Any], field: str = "id") -> str:
    """The name of a batch or file, which becomes a part of an address."""
    name = body.get(field)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.:-]{0,200}", name, re.ASCII):
        raise _UnusableError(f"unusable reply: {field} is {name!r:.100}")
    return name


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    content = read_json(file)
    batches = content.get("batches") if isinstance(content, dict) else None
    kinds = {"tag": str, "id": str | None, "endpoint": str, "keys": list}
    if not isinstance(batches, list) or not all(
        isinstance(b, dict)
        and all(isinstance(b.get(name, 0), kind) for name, kind in kinds.items())
        and all(isinstance(key, str) for key in b["keys"])
        for b in batches
    ):
        raise RunError(f"{file} is damaged. Delete it; what was submitted and not fetched yet is paid again.")
    return batches


def _mine(client: Client, file: Path) -> list[dict[str, Any]]:
    return [batch for batch in _read(file) if batch["endpoint"] == client.endpoint]


def _write(file: Path, batches: list[dict[str, Any]]) -> None:
    if batches:
        write_json(file, {"batches": batches})
    else:
        file.unlink(missing_ok=True)


async def _recover(api: openai.AsyncOpenAI, client: Client, file: Path) -> None:
    """Finds the batches that a killed program was about to make; forgets those that were not made."""
    batches = _read(file)
    if any(b["id"] is None and b["endpoint"] == client.endpoint for b in batches):
        for batch in batches:
            if batch["id"] is None and batch["endpoint"] == client.endpoint:
                batch["id"] = await _find(api, batch["tag"])
        _write(file, [b for b in batches if b["id"] is not None or b["endpoint"] != client.endpoint])


async def _find(api: openai.AsyncOpenAI, tag: str) -> str | None:
    """The batch that carries a tag; None if there is none."""
    after: dict[str, str] = {}
    for _ in range(MOST_PAGES):
        page = await _object(api.batches.with_raw_response.list(limit=100, extra_query=after))
        rows = page.get("data")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        for row in rows:
            metadata = row.get("metadata")
            if isinstance(metadata, dict) and metadata.get("trace_bench") == tag:
                return _name(row)
        if not rows or page.get("has_more") is not True:
            return None
        after = {"after": _name(rows[-1])}
    return None


def _chunks(bodies: dict[str, Request]) -> list[dict[str, bytes]]:
    """Key -> line of the input file, in as many files as the limits need."""
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


async def _submit(api: openai.AsyncOpenAI, client: Client, file: Path, lines: dict[str, bytes]) -> None:
    tag = uuid.uuid4().hex
    batch: dict[str, Any] = {"tag": tag, "id": None, "endpoint": client.endpoint, "keys": list(lines)}
    content = io.BytesIO(b"".join(lines.values()))
    upload = await _object(api.files.with_raw_response.create(file=(f"{tag}.jsonl", content), purpose="batch"))
    uploaded = _name(upload)
    others = _read(file)
    _write(file, [*others, batch])
    try:
        # Not repeated by the package: after a lost answer the batch may be there, and a second one would cost as much.
        made = api.with_options(max_retries=0).batches.with_raw_response.create(
            input_file_id=uploaded,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"trace_bench": tag},
        )
        batch["id"] = _name(await _object(made))
    except openai.APIStatusError as e:
        if e.status_code < 500:  # it said no, so there is none
            _write(file, others)
            raise
        batch["id"] = await _find(api, tag)
    except (openai.APIConnectionError, _UnusableError):
        batch["id"] = await _find(api, tag)
    if batch["id"] is None:
        _write(file, others)
        raise JudgeError(f"{client.endpoint} did not make the batch. Nothing was submitted: run the command again.")
    _write(file, [*others, batch])
    log.info("Submitted batch %s with %d requests.", batch["id"], len(lines))


async def _fetch_all(
    api: openai.AsyncOpenAI, client: Client, file: Path, bodies: dict[str, Request], desc: str
) -> dict[str, str]:
    errors: dict[str, str] = {}
    done: dict[str, int] = {}
    with tqdm(total=len(bodies), desc=f"{desc} (batch; may be stopped and gone on with)", unit="request") as bar:
        while True:
            # Other batches of the file are left to the command that submitted them.
            mine = [b for b in _mine(client, file) if b["id"] and not bodies.keys().isdisjoint(b["keys"])]
            if not mine:
                return errors
            for entry in mine:
                batch = await _object(api.batches.with_raw_response.retrieve(entry["id"]))
                status, counts = batch.get("status"), batch.get("request_counts")
                if status not in _STATES:
                    raise _UnusableError(f"unusable reply: the batch {entry['id']} has the status {status!r:.100}")
                if isinstance(counts, dict):
                    done[entry["id"]] = count(counts.get("completed")) + count(counts.get("failed"))
                bar.n = min(sum(done.values()), len(bodies))
                bar.set_postfix_str(status)
                if status not in _ENDED:
                    continue
                with client.cache.alone():
                    if any(b["id"] == entry["id"] for b in _mine(client, file)):  # nobody was faster
                        errors |= await _take(client, entry, batch, bodies)
                        _write(file, [b for b in _read(file) if b["id"] != entry["id"]])
            if any(b["id"] in {e["id"] for e in mine} for b in _mine(client, file)):
                await asyncio.sleep(POLL_SECONDS)


async def _take(
    client: Client, entry: dict[str, Any], batch: dict[str, Any], bodies: dict[str, Request]
) -> dict[str, str]:
    """Puts the replies of a batch that has ended into the cache, and returns what went wrong."""
    errors: dict[str, str] = {}
    for field in ("output_file_id", "error_file_id"):
        if batch.get(field) is not None:
            # As many replies as there are requests, in both files together.
            most = min(MOST_FILE, MOST_REPLY * (len(entry["keys"]) + 1))
            async with client.connect(most) as api:
                content = (await api.files.content(_name(batch, field))).content
            _keep(client, content, bodies, errors, entry["keys"])
    reasons = batch.get("errors")
    reasons = reasons.get("data") if isinstance(reasons, dict) else None
    reasons = [r.get("message") or r.get("code") for r in reasons if isinstance(r, dict)] if reasons else []
    why = "; ".join([f"the batch ended as {batch['status']}", *map(str, filter(None, reasons[:3]))])
    missing = [k for k in entry["keys"] if k in bodies and k not in client.cache and k not in errors]
    return errors | dict.fromkeys(missing, client.masked(why))


def _keep(
    client: Client,
    content: bytes,
    bodies: dict[str, Request],
    errors: dict[str, str],
    keys: Iterable[str] | None = None,
) -> None:
    """Puts the replies of an output file into the cache, and what went wrong into `errors`; `keys` = of the batch."""
    asked, unreadable = set(bodies if keys is None else keys), 0
    for line in io.BytesIO(content):
        if not line.strip():
            continue
        key = None
        try:
            if len(line) > MOST_REPLY:
                raise ValueError(f"a reply of more than {MOST_REPLY:,} bytes")
            row = json.loads(line)
            if not isinstance(row, dict) or row.get("custom_id") not in asked:
                raise ValueError("it names no request")
            key, response = row["custom_id"], row.get("response")
            if row.get("error") or not isinstance(response, dict) or response.get("status_code") != 200:
                raise ValueError(json.dumps(row.get("error") or response))
            reply = read_reply(response.get("body"))
        except (ValueError, TypeError, RecursionError) as e:
            if key is None:  # whose reply it was shows as a request without one
                unreadable += 1
                if unreadable <= SHOWN:
                    log.warning("A line of the batch cannot be read: %s", client.masked(e))
            else:
                errors[key] = client.masked(e)
            continue
        if key not in client.cache:
            client.cache.put(key, bodies.get(key), reply)
    if unreadable > SHOWN:
        log.warning("In all %d lines of the batch cannot be read.", unreadable)
