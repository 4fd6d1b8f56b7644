"""How a command ends: an error of ours, a signal or a closed output is one line or none, with the shell's exit codes.

A signal becomes an exception in the main thread, so that `finally` removes temporary folders, locks and engines. One
line then says what is kept and the command that goes on.
"""

from __future__ import annotations

import errno
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
from typing import Any, NoReturn

from trace_bench.text import printable
from trace_tasks.errors import TraceError, advice

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Command -> what is kept when it is interrupted. The other commands are short.
KEPT = {
    "train": "trained stages, and checkpoints within a stage, are kept",
    "evaluate": "finished cells are kept",
    "judge": "replies are kept",
    "annotate": "replies are kept",
    "relearn": "tasks that are trained or measured are kept",
    "study": "the finished work of its runs is kept",
}
#: Command -> its exit code for errors, where 1 says something else.
FAILED = {"check": 2}
#: Set for a command that another of ours started, which says the line for both.
_QUIET = "_TRACE_BENCH_PARENT"
#: A second signal within so many seconds counts as the first: a terminal and we send it to parent and child.
_SAME = 1.0


class Stopped(KeyboardInterrupt):
    """A signal asked this program to end. Libraries clean up as they do after Ctrl-C."""


class _Watch:
    """What the signal handler has to know."""

    process = 0  # where it was installed: a fork has another number
    name, line = "", ""  # the command, and how it was given
    working = False  # whether there may be something to clean up
    spawning = False  # whether a child is being started, which would be left running
    stopped: tuple[int, float] | None = None  # the first signal, and when it came
    said = False  # whether the line was written


def watch() -> None:
    """Ends this program with the line on any of `SIGNALS`, at once until `command` begins; not those ignored."""
    _Watch.process = os.getpid()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: Any) -> None:
    if os.getpid() != _Watch.process:  # a library's fork; its parent gets the signal too
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif not _Watch.working:
        _say_stopped()
        os._exit(128 + number)
    elif _Watch.stopped is None:
        _Watch.stopped = number, time.monotonic()
        if not (_Watch.spawning or _cancelled()):
            raise Stopped
    elif time.monotonic() - _Watch.stopped[1] > _SAME:  # asked again: end without cleaning up
        _say_stopped()
        os._exit(128 + number)


def _cancelled() -> bool:
    """Whether an event loop was running: its tasks are cancelled, since an exception within one would be lost."""
    asyncio = sys.modules.get("asyncio")
    loop = asyncio._get_running_loop() if asyncio else None
    if asyncio is None or loop is None:
        return False
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
    return True


def _swallowed(unraisable: Any) -> None:
    """Sends a signal again that came where no exception can be raised, such as in `__del__`."""
    if isinstance(unraisable.exc_value, Stopped) and _Watch.stopped:
        number, _Watch.stopped = _Watch.stopped[0], None
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _say_stopped() -> None:
    # If several processes train together, the first one says it.
    if _Watch.said or _QUIET in os.environ or os.environ.get("RANK", "0") != "0":
        return
    _Watch.said = True
    kept = KEPT.get(_Watch.name, "nothing is lost")
    # On a new line, since a progress bar may be shown.
    line = f"\nstopped: {kept}. To continue: {_Watch.line or _given()}\n"
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
def command(name: str, given: str | None = None, memory: str = "") -> Iterator[None]:
    """Runs a command such that it ends in one line where it fails or is stopped, and silently if nobody listens.

    Args:
        name: The command, as in `KEPT`.
        given: The command line; None = that of this program.
        memory: What to do if the machine is short of memory.

    Raises:
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of the output is gone, and with a message for
            errors that a user can mend.
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
            if _Watch.stopped:  # the signal was lost in a library
                raise Stopped
        finally:
            _flush()
    except BaseException as e:  # libraries may turn the signal into something else
        _end(e, memory)
        raise
    finally:
        _Watch.working, sys.unraisablehook = False, hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(error: BaseException, memory: str) -> None:
    """Exits for all but unexpected errors."""
    if _Watch.stopped or isinstance(error, KeyboardInterrupt):
        number = _Watch.stopped[0] if _Watch.stopped else signal.SIGINT
        _unheard()
        _say_stopped()
        sys.exit(128 + number)
    if isinstance(error, BrokenPipeError) and _unheard():
        sys.exit(128 + signal.SIGPIPE)
    line = str(error) if isinstance(error, TraceError) else None
    if line is None and isinstance(error, Exception):
        line = advice(error, memory) or _wrong_path(error)
    if line is not None:
        _fail(printable(f"error: {line}"))
    if isinstance(error, Exception) and _Watch.name in FAILED:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(FAILED[_Watch.name])


def _wrong_path(error: Exception) -> str | None:
    """What a path that cannot be a folder or file means, in one line; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"{error}. There is a file instead of a folder, or the reverse: remove it, or name a different path."
    return f"{error}. Use a shorter name." if number == errno.ENAMETOOLONG else None


def _fail(line: str) -> NoReturn:
    if _Watch.name not in FAILED:
        sys.exit(line)
    print(line, file=sys.stderr)
    sys.exit(FAILED[_Watch.name])


def _prepare_output() -> None:
    """Replaces closed outputs, and lets standard output take every character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed (>&-): else libraries would write into the next file that is opened
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        with suppress(OSError):  # a file that became something else
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal may be ASCII, a name no text


def _flush() -> None:
    """Writes what was printed, so that a failure comes here and not while Python ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        _to_nowhere(1)
        _fail(f"error: the output cannot be written: {e.strerror}.")


def _unheard() -> bool:
    """Whether the reader of an output is gone, as of `| head`; such an output is closed."""
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


def for_child(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment (None = ours) for another command of ours, so that it runs the code that this one runs.

    A folder trainers/ or judges/ that this command is started in does not hide ours; unless ours are there, as in a
    checkout of which another copy may be installed.
    """
    environment = {**(os.environ if environment is None else environment), _QUIET: "1", "PYTHONSAFEPATH": "1"}
    root = str(Path(__file__).parents[1])
    if os.path.abspath(sys.path[0]) == root:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


def start_child(words: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """Starts another command of ours, which the caller ends; a signal that comes meanwhile is raised when it runs.

    The options are those of `Popen`.
    """
    sys.stdout.flush()
    child = None
    try:
        _Watch.spawning = True
        try:
            child = subprocess.Popen(words, env=for_child(environment), **options)
        finally:
            _Watch.spawning = False
        if _Watch.stopped:
            raise Stopped
    except BaseException:
        if child is not None:
            child.terminate()
            child.wait()
        raise
    return child


def run_child(words: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs another command of ours and returns its exit code; a signal ends it before this command ends."""
    child = start_child(words, environment)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
