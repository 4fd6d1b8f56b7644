"""Waiting for other processes: of the same launch, or of other commands that write to the same place."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from trace_bench.run import InUse, RunError, locked

log = logging.getLogger(__name__)

#: Seconds between two attempts to get a lock.
LOCK_SECONDS = 0.2


@contextmanager
def locked_in_turn(folder: Path, what: str) -> Iterator[None]:
    """As `locked`, but waits, without a time limit, until no other process has the lock."""
    with ExitStack() as lock:
        for attempt in itertools.count():
            try:
                lock.enter_context(locked(folder, what))
                break
            except InUse as e:
                if attempt == 0:
                    log.warning("Waiting for %s, which is writing to %s.", e.holder, folder / what)
                time.sleep(LOCK_SECONDS)
        yield


@contextmanager
def others_wait() -> Iterator[None]:
    """At the end of the block all processes of a launch wait for each other, without a time limit.

    An ordinary barrier fails after half an hour (`ddp_timeout`), and waits on the GPU, which the first process may
    need. A process that fails does not wait, which ends the others.

    Raises:
        RunError: in the other processes. The one that failed shows its own message.
    """
    import torch.distributed as dist

    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    # Made before the work begins: making a group has a time limit of its own.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if several else None
    yield
    if group is not None:
        try:
            dist.barrier(group)
        except RuntimeError as e:
            raise RunError("Another process of this training failed: see its error message.") from e
        dist.destroy_process_group(group)
