"""`trace-bench evaluate RUN --devices all`: one process on each device, each taking the next free stage.

The processes are ordinary `trace-bench evaluate RUN --share` commands, which share the run by the locks of its stages
(`filling`). This process starts them, shows their progress and stops them.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trace_bench.ending import start_child
from trace_bench.evaluate.plan import Plan, check_trained, make_plan
from trace_bench.run import Run, RunError
from trace_bench.text import printable

log = logging.getLogger(__name__)

CPU = "cpu"
#: Seconds between two looks at the processes, and seconds that they get to end after SIGTERM.
POLL, PATIENCE = 0.2, 20.0
#: Lines of a process's output that are shown when it failed.
_SHOWN = 12


def find_devices(asked: Sequence[str]) -> list[str]:
    """The devices by the names that CUDA_VISIBLE_DEVICES takes; "cpu" once for each process on the CPU.

    Args:
        asked: "all", or GPUs as torch counts them, or names that CUDA_VISIBLE_DEVICES has now, or "cpu" several times.

    Raises:
        RunError: if there is no such device, or one is named twice.
    """
    if set(asked) == {CPU}:
        return list(asked)
    import torch

    given = "--devices " + ",".join(asked)
    if not torch.cuda.is_available():
        raise RunError(
            f"{given}: torch finds no GPU here. Leave --devices out, or use --devices cpu,cpu to start two processes "
            "on the CPU."
        )
    visible = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    if list(asked) == ["all"]:
        return visible
    numbered = {**{name: name for name in visible}, **{str(n): name for n, name in enumerate(visible)}}
    if unknown := [name for name in asked if name not in numbered]:
        raise RunError(
            f"{given}: there is no {', '.join(unknown)}. Use all, or numbers from 0 to {len(visible) - 1} for the "
            f"visible GPUs, or their names ({', '.join(visible)})."
        )
    found = [numbered[name] for name in asked]
    if len(set(found)) < len(found):
        raise RunError(f"{given}: name each GPU only once, since one engine needs all of its memory.")
    return found


def _visible(variable: str | None, count: int) -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES, at most as many as GPUs exist; MIG slices all, since torch counts one."""
    if variable is None:
        return [str(n) for n in range(count)]
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return names if any(name.startswith("MIG") for name in names) else names[:count]


def grouped(devices: Sequence[str], plan: Plan) -> list[list[str]]:
    """Divides the devices among processes: each gets as many as an engine of the plan needs.

    Raises:
        RunError: if they cannot be divided equally.
    """
    sizes = {name: plan.engine_args.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    size = sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"] if plan.backend == "vllm" else 1
    if len(devices) % size:
        said = " x ".join(f"{name} {value}" for name, value in sizes.items() if value != 1)
        raise RunError(
            f"--devices names {len(devices)} ({', '.join(devices)}), but each engine takes {size} ({said}). Name a "
            f"multiple of {size}, or change the number in --engine-args."
        )
    return [list(devices[i : i + size]) for i in range(0, len(devices), size)]


@dataclass
class _Process:
    """A process and its output."""

    name: str
    child: subprocess.Popen
    output: IO[str]
    lines: list[str] = field(default_factory=list)
    _rest: str = ""

    def read(self) -> list[str]:
        """The lines that it wrote since the last call."""
        *lines, self._rest = (self._rest + self.output.read()).split("\n")
        lines = [text for line in lines if (text := printable(line.rpartition("\r")[2]).rstrip())]
        self.lines += lines
        return lines

    @property
    def is_at_work(self) -> bool:
        """Whether it is running. Polling also reaps it, so that no zombie stays."""
        return self.child.poll() is None

    def end(self) -> None:
        """Kills it with all processes that it started, and waits for its end."""
        with suppress(ProcessLookupError):  # the group is gone with its last process
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


def evaluate_on(
    path: str | Path,
    devices: Sequence[str],
    options: Sequence[str],
    *,
    stages: Collection[int] | None = None,
    follow: bool = False,
    **asked: Any,
) -> int:
    """Evaluates a run with one process on each device, or on each group of devices that an engine needs.

    Args:
        path: The run. With `follow` it need not have begun.
        devices: As `find_devices` returns them.
        options: The options of `trace-bench evaluate` for the processes.
        stages: The numbers of stages; None = all.
        follow: Whether to wait for stages that are not trained yet.
        **asked: The same settings as in `options`, as arguments of `make_plan`.

    Returns:
        The number of cells and distances that were written now.

    Raises:
        RunError: if a process failed and cells are missing, or the plan has an error.
    """
    from tqdm import tqdm

    run = _begun(Path(path)) if follow else Run.open(path)
    if not follow:
        check_trained(run.chosen(stages), stages)
    plan = make_plan(run, run.chosen(stages), **asked)
    groups = grouped(devices, plan)
    if not follow:
        groups = groups[: len(plan.stages)]
    before, began, made = _signs(run), time.perf_counter(), 0
    with ExitStack() as stack:
        processes: list[_Process] = []
        stack.callback(_end, processes)
        bar = stack.enter_context(tqdm(total=None if follow else plan.cells, desc="evaluating", unit="cell"))
        for n, group in enumerate(groups):
            processes.append(_start(run.path, n, group, len(groups), options, follow, stack))
        said = set[str]()
        while True:
            working = [process for process in processes if process.is_at_work]
            for process in processes:
                for line in process.read():
                    if line not in said:
                        bar.write(f"{process.name}: {line}")
                    said.add(line)
            made = len(_signs(run) - before)
            if made > bar.n:
                bar.update(made - bar.n)
            if not working:
                break
            time.sleep(POLL)
    _check(run, processes, lambda: make_plan(run, run.chosen(stages), **asked).cells)
    if made:
        seconds = time.perf_counter() - began
        print(f"evaluated {made} cells on {len(groups)} devices in {seconds:.0f} s", flush=True)
    return made


def _begun(path: Path) -> Run:
    """Waits until the training has begun the run, and opens it."""
    if not (path / "manifest.json").exists():
        print(printable(f"waiting for {path} to begin"), flush=True)
    while not (path / "manifest.json").exists():
        time.sleep(POLL)
    return Run.open(path)


def _signs(run: Run) -> set[tuple[Path, int]]:
    """The files of cells and distances with their times, so that a file written again counts as new."""
    found = set()
    for kind in ("eval", "distance"):
        for file in run.path.glob(f"stages/*/{kind}/*.json"):
            with suppress(FileNotFoundError):
                found.add((file, file.stat().st_mtime_ns))
    return found


def _start(
    path: Path, n: int, group: list[str], number: int, options: Sequence[str], follow: bool, stack: ExitStack
) -> _Process:
    """Starts a process that sees only the devices of its group."""
    # Output to a file, not a pipe: if this process is killed, the others can still finish their work.
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace-evaluate-")))
    into = stack.enter_context((folder / "output").open("wb"))
    output = stack.enter_context((folder / "output").open(encoding="utf-8", errors="replace"))
    words = [sys.executable, "-m", "trace_bench", "evaluate", str(path), "--share", *options]
    on_cpu = group[0] == CPU
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if on_cpu else ",".join(group), "PYTHONUNBUFFERED": "1"}
    # A session of its own: it gets no signals from the terminal, and can be killed with all that it started.
    child = start_child(
        [*words, *(["--follow"] if follow else [])],
        environment,
        **{"stdin": subprocess.DEVNULL, "stdout": into, "stderr": subprocess.STDOUT, "start_new_session": True},
    )
    if on_cpu:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[n * len(cores) // number : (n + 1) * len(cores) // number]
        with suppress(ProcessLookupError):
            os.sched_setaffinity(child.pid, own or cores)
    return _Process(f"{CPU} {n}" if on_cpu else f"GPU {','.join(group)}", child, output)


def _end(processes: list[_Process]) -> None:
    """Sends SIGTERM to the running processes, and kills what is left after `PATIENCE` seconds."""
    for process in processes:
        if process.is_at_work:
            process.child.terminate()
    deadline = time.monotonic() + PATIENCE
    while any(process.is_at_work for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.end()


def _check(run: Run, processes: list[_Process], missing: Any) -> None:
    """Reports which processes failed, with the end of their output.

    Raises:
        RunError: naming the devices, if cells are missing.
    """
    failed: dict[str, list[str]] = {}
    for process in processes:
        if code := process.child.returncode:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            failed.setdefault("\n".join([how, *process.lines[-_SHOWN:]]), []).append(process.name)
    if not failed:
        return
    text = "\n".join(f"{', '.join(names)} {how}" for how, names in failed.items())
    left = missing()
    if not left and any(process.child.returncode == 0 for process in processes):
        log.warning("%s\nThe other processes have measured its cells.", text)
        return
    raise RunError(f"{text}\n{left} cells of {run.path} are missing. Run the same command again to measure them.")
