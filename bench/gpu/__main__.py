"""Measures on a GPU, in under eight minutes on one H100, without network or hub: `make gpu-check`.

    python -m bench.gpu                    # all parts; finished measurements are skipped
    python -m bench.gpu --parts a b        # two of them
    python -m bench.gpu --parts b --again  # repeat finished measurements
    python -m bench.gpu --tiny             # the same program with tiny shapes, on a CPU

It needs torch, transformers, peft, accelerate and pydantic. A measurement whose packages are missing is skipped and
named. On a machine without a network, bring wheels and install them with `pip install --no-index --no-deps
--find-links FOLDER NAME ...`. With `--target`, the folder must be named site-packages: datasets hashes functions by
dill, which takes modules in other folders for the program's own and fails on them. TRL's loss and liger-kernel are
Triton kernels, which need a C compiler and Python's headers; ours needs neither.

A part consists of measurements. Each runs in its own process, so a crash or lack of memory does not affect the others.
All parts together have SECONDS; each part leaves the LIMIT of every later part. Results are written after each
measurement, under the name of the card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from bench.common import ROOT, WORK, machine
from bench.gpu import engines, large, methods, resume, small
from trace_bench.report import Table, markdown
from trace_tasks.data.files import write_json

RESULTS = ROOT / "bench" / "results_gpu.json"
PARTS: dict[str, ModuleType] = {"a": small, "b": large, "c": methods, "d": resume, "e": engines}
NEEDED = ("torch", "transformers", "peft", "accelerate")
#: Packages whose versions are compared with those in pyproject.toml.
COMPARED = (*NEEDED, "trl", "datasets", "lm-eval")
#: Seconds of all parts together, without the start of this program.
SECONDS = 460
#: The keys that a measurement without a result has instead.
NOT_DONE = ("skipped", "failed", "stopped")


def main(argv: list[str] | None = None) -> None:
    """Measures the chosen parts and prints the tables."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    titles = ", ".join(f"{name}: {part.TITLE}" for name, part in PARTS.items())
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help=titles)
    parser.add_argument("--again", action="store_true", help="repeat measurements that have a result")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; results go to runs/bench/gpu/tiny.json")
    parser.add_argument("--results", type=Path, help="the file of results; default: bench/results_gpu.json")
    given = parser.parse_args(argv)
    if lacking := missing(NEEDED):
        sys.exit(f"{', '.join(lacking)}: not installed, and nothing can be measured without.")
    if old := outdated():
        sys.exit(f"{', '.join(old)}: too old, and one measurement after the other would fail.")
    about = machine()
    if about["gpu"] is None and not given.tiny:
        sys.exit("There is no GPU that torch can use. --tiny tries the program with tiny shapes on a CPU.")
    file = given.results or (WORK / "gpu" / "tiny.json" if given.tiny else RESULTS)
    check({name: PARTS[name] for name in given.parts}, file, about, given.tiny, given.again)


def missing(packages: Sequence[str]) -> list[str]:
    """The packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]


def outdated() -> list[str]:
    """The packages that are older than in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        f"{needs.name} {version(needs.name)} (at least {bound.version})"
        for needs in map(Requirement, project["dependencies"])
        for bound in needs.specifier
        if needs.name in COMPARED and not missing([needs.name]) and bound.operator == ">="
        if Version(version(needs.name)) < Version(bound.version)
    ]


def check(parts: Mapping[str, ModuleType], file: Path, about: dict[str, Any], tiny: bool, again: bool) -> None:
    """Makes the measurements that have no result yet, and writes the file after each."""
    results = json.loads(file.read_text()) if file.exists() else {}
    of_card = results.setdefault(about["gpu"] or "no GPU, tiny shapes", {})
    todo = []
    for name, part in parts.items():
        before = of_card.get(name, {}).get("measurements", {})
        wanted = [item for item in part.ITEMS if again or not _done(before.get(item))]
        todo += [(name, part, item) for item in wanted]
        if wanted:
            kept = {item: before[item] for item in part.ITEMS if item not in wanted}
            of_card[name] = {"title": part.TITLE, "machine": about, "date": time.strftime("%Y-%m-%d")}
            of_card[name] |= {"seconds": 0.0, "measurements": kept}
    ready: subprocess.Popen[bytes] | None = None
    end = time.perf_counter() + SECONDS * (slow := 10 if tiny else 1)  # a CPU is slow
    try:
        for n, (name, part, item) in enumerate(todo):
            found = of_card[name]
            began = time.perf_counter()
            process, ready = ready or _start(name, part, item, tiny), None
            if n + 1 < len(todo):  # start its imports now, as they take as long as some measurements
                ready = _start(*todo[n + 1], tiny)
            later = {after: p.LIMIT for after, p, i in todo[n:] if p is not part and not missing(p.ITEMS[i])}
            outcome = _finish(process, name, part, item, end - slow * sum(later.values()) - began)
            spent = time.perf_counter() - began
            found["seconds"] = round(found["seconds"] + spent, 1)
            found["measurements"][item] = {"took": round(spent, 1), **outcome}
            done = {i: found["measurements"][i] for i in part.ITEMS if _done(found["measurements"].get(i))}
            found["goals"] = part.goals(done)
            write_json(file, results)
            brief = next((f"{key}: {outcome[key]}" for key in NOT_DONE if key in outcome), "done")
            print(f"{name}, {item}: {brief.strip().splitlines()[-1]} ({spent:.0f} s)", flush=True)
    finally:
        if ready is not None:
            _kill(ready)
    print(tables({name: of_card[name] for name in parts}))


def _done(outcome: Mapping[str, Any] | None) -> bool:
    return outcome is not None and not any(key in outcome for key in NOT_DONE)


def _output(name: str, item: str) -> Path:
    return WORK / "gpu" / f"{name}-{item.replace(' ', '-').replace(',', '')}.json"


def _start(name: str, part: ModuleType, item: str, tiny: bool) -> subprocess.Popen[bytes] | None:
    """Starts the process of a measurement, which imports and then waits for a line. None if packages are missing."""
    if missing(part.ITEMS[item]):
        return None
    out = _output(name, item)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "bench.gpu.item", part.__name__, item, str(out), *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # NVIDIA's containers round float32 products
    environment.setdefault("TRITON_CACHE_DIR", str(WORK / "gpu" / "triton"))  # a home may be read-only
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU of several
    if item.endswith(" CPU"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0
        )


def _finish(
    process: subprocess.Popen[bytes] | None, name: str, part: ModuleType, item: str, left: float
) -> dict[str, Any]:
    """Lets a measurement begin, and waits for its result for at most this many seconds."""
    if process is None:
        return {"skipped": f"{', '.join(missing(part.ITEMS[item]))} not installed"}
    out = _output(name, item)
    assert process.stdin is not None
    try:
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.wait(timeout=max(left, 0))
    except subprocess.TimeoutExpired:
        return {"stopped": f"not done in the {max(left, 0):.0f} s that were left"}
    except BrokenPipeError:
        process.wait()
    finally:
        _kill(process)
    if process.returncode == 0 and out.exists():
        result: dict[str, Any] = json.loads(out.read_text())
        return result
    said = out.with_suffix(".log").read_text(errors="replace")[-1500:].strip()
    return {"failed": f"exit code {process.returncode}: {said or 'no output'}"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tables(found: Mapping[str, dict[str, Any]]) -> str:
    """The parts as Markdown: the numbers of each measurement, and the goals."""
    lines = []
    for name, part in found.items():
        lines += [f"### ({name}) {part['title']}", ""]
        rows = [
            [item, key.replace("_", " "), value]
            for item, outcome in part["measurements"].items()
            for key, value in outcome.items()
            if not isinstance(value, list | dict) and key != "failed"
        ]
        lines += [markdown(Table(["measurement", "what", "value"], rows)), ""]
        met = {None: "", True: "yes", False: "no"}
        goals = [[goal, g["goal"], g["found"], met[g["met"]]] for goal, g in part["goals"].items()]
        lines += [markdown(Table(["compared", "wanted", "found", "met"], goals)), ""] if goals else []
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no measurement is left on the GPU
    main()
