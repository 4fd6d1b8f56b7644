"""Waiting for other processes: of the same launch, or of other commands that write to the same place."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from trace_bench.run import RunError
from trace_tasks.data.files import open_own

log = logging.getLogger(__name__)


class InUse(RunError):
    """Another process (`holder`) is writing the same results."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


@contextmanager
def locked(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Locks a step (`what`, such as "evaluate") of a folder, so that only one process writes its results.

    With `wait` it waits, without a time limit, until no other process has the lock.

    Raises:
        InUse: naming the process that has the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = open_own(folder / f".{what}.lock", os.O_RDWR | os.O_CREAT)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or os.access(folder, os.W_OK):
            raise
        yield  # a read-only folder: an error comes only if something has to be written
        return
    with open(fd, "r+", encoding="utf-8", errors="replace") as file, ExitStack() as held:
        try:
            _take(file, folder, what, wait)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # otherwise forks keep it, such as vLLM's engine on a GPU
        except OSError as e:
            log.warning("%s: the file system has no locks (%s). Let only one process write there at a time.", folder, e)
        else:
            if os.fstat(fd).st_nlink == 1:  # a hard link may be any file of the user: do not overwrite it
                file.seek(0)  # where the name of the holder was read, this position is behind it
                file.truncate()
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield


def _take(file: Any, folder: Path, what: str, wait: bool) -> None:
    """Takes the exclusive lock of an open lock file."""
    for pause in (0.1, 0.0):  # `in_use` holds it for an instant
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(pause)
    holder = (re.match(r"process \d+ on [\w.-]+", file.read(200)) or ["another process"])[0]
    if not wait:
        raise InUse(
            f"{folder} is in use: {holder} is running `{what}` there. Wait for it, or end it, which frees the folder. "
            "To evaluate one run with several processes, use --share.",
            holder,
        )
    log.warning("Waiting for %s, which is writing to %s.", holder, folder / what)
    fcntl.flock(file, fcntl.LOCK_EX)


def in_use(folder: Path, what: str) -> bool | None:
    """Whether a process holds the lock of a step; None if nobody began it, or the file system has no locks."""
    try:
        with (folder / f".{what}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


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
