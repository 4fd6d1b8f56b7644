"""Runs functions and programs in processes of their own that need not import vLLM and other slow packages again.

They are forks of a server process that has imported them. Each test process starts its server when it first needs it.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

#: The modules that the server imports. They include those that vLLM imports when an engine starts.
IMPORTED = [
    *("trace_bench.engine.vllm", "trace_bench.engine.hf", "trace_bench.evaluate", "trainers.base"),
    *("vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama"),
]


@cache
def _context() -> BaseContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _call(environment: dict[str, str], function: Callable[..., Any], *args: Any) -> Any:
    os.environ |= environment
    return function(*args)


def forked(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Calls a function of a test module in a process of its own. Its result is returned, its error raised here."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    with ProcessPoolExecutor(1, _context()) as pool:
        return pool.submit(_call, environment, function, *args).result()


def forked_twice(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Like `forked`, in two processes as `torchrun --nproc_per_node 2` starts them. The first error ends both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ProcessPoolExecutor(2, _context()) as pool:
        ranks = [{**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        results = [pool.submit(_call, environment, function, *args) for environment in ranks]
        failed = [result for result in wait(results, return_when=FIRST_EXCEPTION).done if result.exception()]
        for process in pool._processes.values() if failed else ():
            process.kill()
        return [result.result() for result in failed or results]


def run_module(*words: object, **environment: str) -> str:
    """Runs `python -m WORDS` and returns its output."""
    return forked(_run_module, [str(word) for word in words], **environment)


def start_module(*words: object) -> BaseProcess:
    """Starts `python -m WORDS`. It leads a process group, so a test can kill it together with its engine."""
    process = _context().Process(target=_lead, args=(dict(os.environ), [str(word) for word in words]))
    process.start()
    return process


def _lead(environment: dict[str, str], words: list[str]) -> None:
    os.setsid()
    _call(environment, _run_module, words)


def _run_module(words: list[str]) -> str:
    sys.argv[:] = words
    with redirect_stdout(StringIO()) as output:
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            if e.code:
                raise RuntimeError(f"{' '.join(words)}: {e.code}\n{output.getvalue()}") from None
    return output.getvalue()


class Child:
    """A program in a fork of this process, with the slow imports done. It behaves like a `subprocess.Popen`.

    Args:
        run: The program, as a function.
        environment: Additional environment variables.
        stdout: The file for its output and errors; None = those of this process.
    """

    def __init__(self, run: Callable[[], Any], environment: dict[str, str] | None = None, stdout: Any = None) -> None:
        self._process = get_context("fork").Process(target=_be_child, args=(run, environment or {}, stdout))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that killed it; None while it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for the end and returns the exit code."""
        self._process.join(timeout)
        return self.returncode

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()


def _be_child(run: Callable[[], Any], environment: dict[str, str], stdout: Any) -> None:
    os.setsid()
    for number in (1, 2) if stdout else ():
        os.dup2(stdout.fileno(), number)
    # Replace pytest's streams.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ |= environment
    run()
