"""Lets the other processes of a launch wait while the first one works alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from trace_bench.run import RunError


@contextmanager
def others_wait() -> Iterator[None]:
    """At the end of the block all processes of a launch wait for each other, without a time limit.

    An ordinary barrier fails after half an hour (`ddp_timeout`), and waits on the GPU, which the first process may
    need. A process that fails does not wait, which ends the others.

    Raises:
        RunError: in the other processes. The one that failed shows its own message.
    """
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
