"""A limit of time and memory for what files from elsewhere ask for: patterns, templates, sizes in configurations."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_tasks.errors import TraceError


class LimitError(TraceError):
    """Something took more time or memory than it may."""


class _TimeUp(BaseException):
    """No library takes it for an error of its own."""


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Ends what takes too long or too much memory: Python code, regular expressions, and calls that return.

    The time is limited in the main thread, where Python handles signals; the memory on Linux, for the whole process,
    as so many bytes more than it has.

    Raises:
        LimitError: saying which of the two it was.
    """
    began, active = time.monotonic(), True

    def up(*_: Any) -> None:
        if active:
            raise _TimeUp

    in_main = threading.current_thread() is threading.main_thread()
    before = _limit_memory(memory)
    if in_main:
        handler = signal.signal(signal.SIGALRM, up)
        # Again every second, if something catches the exception and goes on.
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    except _TimeUp as e:
        _close(e)
        raise LimitError(f"it takes more than {seconds:g} s") from None
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            _close(e)
            raise LimitError(f"it takes more than {memory / 2**30:g} GiB of memory") from None
        raise
    finally:
        active = False
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left:  # a limit around this one
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _close(error: BaseException) -> None:
    """Closes what the interrupted calls had open, which would else be closed with the last reference to the error.

    Such as torch's context of a device: put back after the one around it has ended, it would hold for all that follows.
    """
    traceback.clear_frames(error.__traceback__)


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Sets the limit of this process to so many bytes above what it has; the limits before, None where it cannot be."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(statm.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") + more
    others = [n for n in before if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *others]), hard))
    return soft, hard
