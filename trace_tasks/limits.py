"""Limits the time and memory that files from others can use: patterns, templates, sizes in configurations."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_tasks.errors import TraceError


class LimitError(TraceError):
    """Something took more time or memory than allowed."""


class _TimeUp(BaseException):
    """Raised when the time is up. It is no `Exception`, so that libraries do not catch it."""


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Ends a block that takes too long or too much memory: Python code, regular expressions, and calls that return.

    The time is limited only in the main thread, where Python handles signals. The memory is limited only on Linux, to
    this many bytes more than the process has now.

    Raises:
        LimitError: saying which of the two limits was reached.
    """
    began, active, torch = time.monotonic(), True, sys.modules.get("torch")
    graded = torch is not None and torch.is_grad_enabled()

    def up(*_: Any) -> None:
        if active:
            raise _TimeUp

    in_main = threading.current_thread() is threading.main_thread()
    before = _limit_memory(memory)
    if in_main:
        handler = signal.signal(signal.SIGALRM, up)
        # Repeat every second, in case something catches the exception and goes on.
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    except _TimeUp as e:
        _close(e)
        if torch is not None:  # the end of a `no_grad` may have been interrupted itself
            torch.set_grad_enabled(graded)
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
            if left:  # there is an outer limit
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _close(error: BaseException) -> None:
    """Closes the contexts that the interrupted calls had open; otherwise they stay open until the error is deleted.

    For example torch's context of a device: if it closed after the outer one, its device would stay set.
    """
    traceback.clear_frames(error.__traceback__)


def _limit_memory(more: int) -> tuple[int, int] | None:
    """Limits this process to this many bytes more than it has. Returns the old limits; None if it cannot set one."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(statm.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") + more
    others = [n for n in before if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *others]), hard))
    return soft, hard
