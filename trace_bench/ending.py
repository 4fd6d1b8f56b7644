"""How a command ends that is stopped or not listened to: one line or none, no traceback, and the shell's exit codes.

A signal becomes an exception in the main thread, so that `finally` gives back temporary folders, locks and engines. One
line then says what is kept and the command that goes on.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Command -> what an interrupted one keeps; of the others nothing is lost, since they take no long time.
KEPT = {
    "train": "trained stages, and checkpoints within a stage, are kept",
    "evaluate": "finished cells are kept",
    "judge": "replies are kept",
    "annotate": "replies are kept",
    "study": "what its runs have done is kept",
}
#: Set for a command that another one started: that one says the line for both.
_QUIET = "_TRACE_BENCH_PARENT"
#: A second signal within so many seconds is the same one: a terminal sends Ctrl-C to parent and child, and so do we.
_SAME = 1.0


class Stopped(KeyboardInterrupt):
    """A signal asked this program to end. Libraries that know Ctrl-C give back what they have for all of them."""


class _Watch:
    """What the handler of the signals has to know."""

    process = 0  # where it was installed: forks are another one
    name, line = "", ""  # the command, and how it was given
    working = False  # whether there may be something to give back
    spawning = False  # whether a child is being started, which nobody would end
    stopped: tuple[int, float] | None = None  # the first signal, and when it came
    said = False  # whether the line was written


def watch() -> None:
    """Ends this program with the line on any of `SIGNALS`, at once until `command` begins; ignored ones stay so."""
    _Watch.process = os.getpid()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: Any) -> None:
    if os.getpid() != _Watch.process:  # a fork of a library: its parent is told as well
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not _Watch.working:
        _say_stopped()
        os._exit(128 + number)
    elif _Watch.stopped is None:
        _Watch.stopped = number, time.monotonic()
        if not (_Watch.spawning or _cancelled()):
            raise Stopped
    elif time.monotonic() - _Watch.stopped[1] > _SAME:  # asked again: what cannot be given back in time stays
        _say_stopped()
        os._exit(128 + number)


def _cancelled() -> bool:
    """Whether an event loop was running, whose tasks end as asyncio has it: an exception within one would be lost."""
    asyncio = sys.modules.get("asyncio")
    loop = asyncio._get_running_loop() if asyncio else None
    if asyncio is None or loop is None:
        return False
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    return True


def _swallowed(unraisable: Any) -> None:
    """Sends a signal again that met a place where no exception can be raised, such as `__del__`."""
    if isinstance(unraisable.exc_value, Stopped) and _Watch.stopped:
        number, _Watch.stopped = _Watch.stopped[0], None
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _say_stopped() -> None:
    # Of several processes that train together the first one speaks.
    if _Watch.said or _QUIET in os.environ or os.environ.get("RANK", "0") != "0":
        return
    _Watch.said = True
    kept = KEPT.get(_Watch.name, "nothing is lost")
    # On a new line, behind a progress bar.
    line = f"\nstopped: {kept}. Go on with: {_Watch.line or _given()}\n"
    with suppress(OSError):
        os.write(2, line.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"))


def _given() -> str:
    """The command line of this program, as a shell takes it again."""
    words = list(sys.orig_argv)
    script = Path(sys.argv[0])
    if script.name == "trace-bench":  # a script of the environment, which names its Python itself
        words = ["trace-bench" if shutil.which("trace-bench") == sys.argv[0] else sys.argv[0], *sys.argv[1:]]
    try:  # what launched it (accelerate, torchrun, timeout, ...) was given the same words at its end
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        launcher = []
    tail = ["-m", *words[words.index("-m") + 1 :]] if "-m" in words else words
    return shlex.join(launcher if launcher[-len(tail) :] == tail else words)


@contextmanager
def command(name: str, given: str | None = None) -> Iterator[None]:
    """Runs a command such that it ends in one line where it is stopped, and silently where nobody listens.

    Args:
        name: What `KEPT` is looked up by.
        given: The command line; None = that of this program.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 141 where the reader of the output is gone.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        watch()
    _Watch.name, _Watch.line, _Watch.stopped, _Watch.said, _Watch.working = name, given or "", None, False, True
    _prepare_output()
    hook, sys.unraisablehook = sys.unraisablehook, _swallowed
    try:
        try:
            yield
        finally:
            _flush()
    except BaseException as e:  # whatever a library makes of it
        if _Watch.stopped or isinstance(e, KeyboardInterrupt):
            number = _Watch.stopped[0] if _Watch.stopped else signal.SIGINT
            _unheard()
            _say_stopped()
            sys.exit(128 + number)
        if isinstance(e, BrokenPipeError) and _unheard():
            sys.exit(128 + signal.SIGPIPE)
        raise
    finally:
        _Watch.working, sys.unraisablehook = False, hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_output() -> None:
    """Makes sure that there is an output, and that it takes every character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): the next file that is opened would get the output of libraries
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        with suppress(OSError):  # a file that became something else
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may be ASCII, a name no text


def _flush() -> None:
    """Writes what was printed, so that a failure is met here and not while Python ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        _to_nowhere(1)
        sys.exit(f"error: the output cannot be written: {e.strerror}.")


def _unheard() -> bool:
    """Whether the reader of an output is gone, as of `| head`; nothing is written to such a one any more."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    gone = [fd for fd, event in poll.poll(0) if event & select.POLLERR]
    for fd in gone:
        _to_nowhere(fd)
    return bool(gone)


def _to_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


def run_child(words: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs another command of ours; where this one is stopped, that one is, too, and has ended when this one does.

    Args:
        words: Its command line.
        environment: Its environment; None = that of this program.

    Returns:
        Its exit code.
    """
    environment = {**(os.environ if environment is None else environment), _QUIET: "1"}
    sys.stdout.flush()
    child = None
    try:
        _Watch.spawning = True
        try:
            child = subprocess.Popen(words, env=environment)
        finally:
            _Watch.spawning = False
        if _Watch.stopped:
            raise Stopped
        return child.wait()
    except BaseException:
        if child is not None:
            child.terminate()
            child.wait()
        raise
