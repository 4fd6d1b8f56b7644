"""The Batch API: the same requests into the same cache, within a day and, at OpenAI, for half the price.

What was submitted is remembered in a file beside the cache. Before a batch is made, the file says which requests it is
to hold and a tag that the batch will carry: a program that was killed, or cut off while the endpoint was making the
batch, finds it by the tag and does not submit it twice. Replies go into the cache before a batch is forgotten.
"""

from __future__ import annotations

import io
import json
import logging
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
from tqdm import tqdm

from judges import JudgeError
from judges.client import Request, read_reply
from trace_bench.run import read_json, write_json

if TYPE_CHECKING:
    from judges.client import Client

log = logging.getLogger(__name__)

#: OpenAI's limits of one batch are 50,000 requests and 200 MB.
MOST_REQUESTS = 50_000
MOST_BYTES = 150_000_000
POLL_SECONDS = 30.0
_ENDED = ("completed", "failed", "expired", "cancelled")


def batch_file(cache: Path) -> Path:
    """Where the batches of a cache that were not fetched yet are remembered."""
    return cache.with_suffix(".batches.json")


def complete_batch(client: Client, bodies: dict[str, Request], desc: str, succeeded: int) -> dict[str, str]:
    """Submits what is in no batch yet, waits for the batches, and puts the replies into the client's cache.

    Args:
        client: Whose endpoint and cache are used.
        bodies: Key -> body of the requests that the cache does not hold.
        desc: What the progress bar says.
        succeeded: As for `Judge.send`.

    Returns:
        Key -> error of the requests that failed.

    Raises:
        JudgeError: if the endpoint has no Batch API, refuses a batch, or no request succeeded, now or before.
    """
    file = batch_file(client.cache.path)
    try:
        with openai.OpenAI(**client.connection()) as api:
            _recover(api, client, file)
            waiting = {key for batch in _read(file) if batch["endpoint"] == client.endpoint for key in batch["keys"]}
            for chunk in _chunks({key: body for key, body in bodies.items() if key not in waiting}):
                _submit(api, client, file, chunk)
            errors = _fetch_all(api, client, file, bodies, desc)
    except openai.OpenAIError as e:
        raise JudgeError(
            f"The Batch API of {client.endpoint} failed: {client.masked(e)}. What was submitted is remembered in "
            f"{file}: the same command goes on from there. Without --batch, requests are sent one by one."
        ) from None
    errors |= {key: "no reply in the batch" for key in bodies if key not in client.cache and key not in errors}
    if not succeeded and len(errors) == len(bodies):
        raise JudgeError(f"{client.endpoint} failed every request; the last: {next(reversed(errors.values()))}.")
    if errors:
        log.warning("%d requests failed, such as: %s", len(errors), next(iter(errors.values())))
    return errors


def _read(file: Path) -> list[dict[str, Any]]:
    return read_json(file)["batches"] if file.exists() else []


def _write(file: Path, batches: list[dict[str, Any]]) -> None:
    if batches:
        write_json(file, {"batches": batches})
    else:
        file.unlink(missing_ok=True)


def _recover(api: openai.OpenAI, client: Client, file: Path) -> None:
    """Finds the batches that a killed program was about to make; forgets those that were not made."""
    batches = _read(file)
    if any(b["id"] is None and b["endpoint"] == client.endpoint for b in batches):
        for batch in batches:
            if batch["id"] is None and batch["endpoint"] == client.endpoint:
                batch["id"] = _find(api, batch["tag"])
        _write(file, [b for b in batches if b["id"] is not None or b["endpoint"] != client.endpoint])


def _find(api: openai.OpenAI, tag: str) -> str | None:
    return next((b.id for b in api.batches.list(limit=100) if (b.metadata or {}).get("trace_bench") == tag), None)


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


def _submit(api: openai.OpenAI, client: Client, file: Path, lines: dict[str, bytes]) -> None:
    tag = uuid.uuid4().hex
    batch: dict[str, Any] = {"tag": tag, "id": None, "endpoint": client.endpoint, "keys": list(lines)}
    content = io.BytesIO(b"".join(lines.values()))
    upload = api.files.create(file=(f"{tag}.jsonl", content), purpose="batch")
    others = _read(file)
    _write(file, [*others, batch])
    try:
        # Not repeated by the package: after a lost answer the batch may be there, and a second one would cost as much.
        made = api.with_options(max_retries=0).batches.create(
            input_file_id=upload.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"trace_bench": tag},
        )
        batch["id"] = made.id
    except openai.APIStatusError as e:
        if e.status_code < 500:  # it said no, so there is none
            _write(file, others)
            raise
        batch["id"] = _find(api, tag)
    except openai.APIConnectionError:
        batch["id"] = _find(api, tag)
    if batch["id"] is None:
        _write(file, others)
        raise JudgeError(f"{client.endpoint} did not make the batch. Nothing was submitted: run the command again.")
    _write(file, [*others, batch])
    log.info("Submitted batch %s with %d requests.", batch["id"], len(lines))


def _fetch_all(api: openai.OpenAI, client: Client, file: Path, bodies: dict[str, Request], desc: str) -> dict[str, str]:
    errors: dict[str, str] = {}
    done: dict[str, int] = {}
    with tqdm(total=len(bodies), desc=f"{desc} (batch; may be stopped and gone on with)", unit="request") as bar:
        while True:
            # Other batches of the file are left to the command that submitted them.
            mine = [
                b for b in _read(file) if b["endpoint"] == client.endpoint and not bodies.keys().isdisjoint(b["keys"])
            ]
            if not mine:
                return errors
            for entry in mine:
                batch = api.batches.retrieve(entry["id"])
                if batch.request_counts:
                    done[batch.id] = batch.request_counts.completed + batch.request_counts.failed
                bar.n = min(sum(done.values()), len(bodies))
                bar.set_postfix_str(batch.status)
                if batch.status not in _ENDED:
                    continue
                reasons = [e.message or e.code or "" for e in (batch.errors.data or [])] if batch.errors else []
                why = client.masked("; ".join([f"the batch ended as {batch.status}", *reasons[:3]]))
                for output in filter(None, (batch.output_file_id, batch.error_file_id)):
                    _keep(client, api.files.content(output).content, bodies, errors)
                errors |= {k: why for k in entry["keys"] if k in bodies and k not in client.cache and k not in errors}
                _write(file, [b for b in _read(file) if b["id"] != batch.id])
            if any(b["id"] in {e["id"] for e in mine} for b in _read(file)):
                time.sleep(POLL_SECONDS)


def _keep(client: Client, content: bytes, bodies: dict[str, Request], errors: dict[str, str]) -> None:
    """Puts the replies of an output file into the cache, and what went wrong into `errors`."""
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        key = None
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
                raise ValueError("it names no request")
            key, response = row["custom_id"], row.get("response")
            if row.get("error") or not isinstance(response, dict) or response.get("status_code") != 200:
                raise ValueError(json.dumps(row.get("error") or response))
            reply = read_reply(response.get("body"))
        except (ValueError, RecursionError) as e:
            if key is None:  # whose reply it was shows as a request without one
                log.warning("A line of the batch cannot be read: %s", client.masked(e))
            else:
                errors[key] = client.masked(e)
            continue
        if key not in client.cache:
            client.cache.put(key, bodies.get(key), reply)
