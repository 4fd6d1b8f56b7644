"""`trace-bench evaluate RUN --devices ...` and `--share`: several processes evaluate the stages of one run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trace_bench import cli, evaluate
from trace_bench.evaluate import devices
from trace_bench.run import Run, RunError, in_use, locked, read_json

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


def cells(run: Run) -> dict[str, tuple[dict, str]]:
    """Each cell by its path, without its times, and its samples."""
    found = {}
    for file in sorted(run.path.glob("stages/*/eval/*.json")):
        cell = {k: v for k, v in read_json(file).items() if k != "seconds"}
        cell["likelihood"] = {k: v for k, v in cell["likelihood"].items() if k != "seconds"}
        found[str(file.relative_to(run.path))] = cell, (file.parent / "samples" / f"{file.stem}.jsonl").read_text()
    return found


def test_two_processes_share_the_stages_and_make_what_one_makes(run, capfd):
    cli.main(["evaluate", str(run.path), "--cells", "all", "--devices", "cpu,cpu", "--distance"])
    said = capfd.readouterr().out
    made = [line for line in said.splitlines() if ": evaluated " in line]
    assert len(made) == 2 and said.count("evaluated") == 3, "each of the processes did something"
    assert "evaluated 13 cells on 2 devices" in said, "each cell once: six, and seven distances"
    assert sum(int(line.split(": evaluated ")[1].split()[0]) for line in made) == 13
    found = cells(run)
    distances = {
        f: read_json(f)["kl" if "0_base" not in str(f) else "n"] for f in run.path.glob("stages/*/distance/*.json")
    }
    for file in [*run.path.glob("stages/*/eval/*.json"), *distances]:
        file.unlink()
    assert evaluate.evaluate(run, cells="all", extra={"distance": True}) == 13
    assert cells(run) == found and len(found) == 6
    assert {f: read_json(f)["kl" if "0_base" not in str(f) else "n"] for f in distances} == distances
