"""Several processes of which the first one works alone, for as long as that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from trace_bench.run import RunError


@contextmanager
def others_wait() -> Iterator[None]:
    """At its end the processes of a launch wait for each other, without a limit of time.

    An ordinary barrier ends a training after half an hour (`ddp_timeout`, which CPUs do not even have), and waits on
    the GPU, which the first process may need. A process that fails leaves without waiting: it ends the others.

    Raises:
        RunError: in these, since the message of the one that failed says why.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    # Made before the work begins, since that has a limit of its own.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if several else None
    yield
    if group is not None:
        try:
            dist.barrier(group)
        except RuntimeError as e:
            raise RunError("Another process of this training has ended, see its message.") from e
        dist.destroy_process_group(group)
