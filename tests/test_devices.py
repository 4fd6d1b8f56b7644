"""`trace-bench evaluate RUN --devices ...` and `--share`: several processes evaluate the stages of one run."""

import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import Child

from trace_bench import cli, evaluate
from trace_bench.evaluate import devices, filling
from trace_bench.run import Run, RunError, read_json
from trace_bench.waiting import in_use, locked

ROOT = Path(__file__).parents[1]

#: Value of the variable DO -> what a process does in addition when it has a stage.
HELD = """
import os, signal, time
from pathlib import Path
from trace_bench.evaluate import filling

original, here, do = filling.evaluate_plan, Path(os.environ["HERE"]), os.environ.get("DO")

def evaluate_plan(plan, *args, **kwargs):
    (here / f"{os.getpid()}.pid").touch()
    deadline = time.monotonic() + 100
    while len(list(here.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)  # until each process has a stage
    if do == "die at 2" and plan.stages[0].index == 2:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "sleep":
        time.sleep(600)
    return original(plan, *args, **kwargs)

filling.evaluate_plan = evaluate_plan
"""


@pytest.fixture
def two(tmp_path, monkeypatch) -> list[str]:
    """Options for two processes on the CPU that begin together."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '--share' in sys.argv or '--share' in sys.orig_argv:\n    import held\n"
    )
    (tmp_path / "held.py").write_text(HELD)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return ["--devices", "cpu,cpu"]


def results(run: Run) -> dict[str, object]:
    """Path -> content of each cell and distance without times, and of samples and answers."""
    found = {}
    for file in sorted(run.path.glob("stages/*/*/**/*.json*")):
        if file.parent.name in ("eval", "distance") and file.suffix == ".json":
            content = {k: v for k, v in read_json(file).items() if k != "seconds"}
            content["likelihood"] = {k: v for k, v in content.get("likelihood", {}).items() if k != "seconds"}
            found[str(file.relative_to(run.path))] = content
        elif file.suffix == ".jsonl":
            found[str(file.relative_to(run.path))] = file.read_bytes()
    return found


def test_two_processes_share_the_stages_and_give_the_results_of_one(run, two, capfd, monkeypatch):
    def fork(words, environment, stdout, **_):
        def program():
            exec(HELD, {})
            sys.argv[:] = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)

        return Child(program, environment, stdout)

    monkeypatch.setattr(devices, "start_child", fork)
    alone = Run.open(shutil.copytree(run.path, run.path.parent / "alone"))
    cli.main(["evaluate", str(run.path), "--cells", "all", "--distance", *two])
    said = capfd.readouterr().out
    made = [line.split(": evaluated ")[1] for line in said.splitlines() if ": evaluated " in line]
    assert len(made) == 2 and sum(int(line.split()[0]) for line in made) == 13, "each cell once, by both processes"
    assert said.splitlines()[-1].startswith("evaluated 13 cells on 2 devices in ")
    assert evaluate.evaluate(alone, cells="all", extra={"distance": True}) == 13
    assert results(run) == results(alone) and len(results(run)) == 6 * 2 + 7 + 3


@pytest.mark.slow
def test_a_killed_process_is_reported_and_the_next_command_takes_its_stage(run, two, monkeypatch):
    monkeypatch.setenv("DO", "die at 2")
    with pytest.raises(SystemExit) as e:
        cli.main(["evaluate", str(run.path), *two])
    assert "cpu 0, cpu 1 was killed by signal 9" in e.value.code and "about to die" in e.value.code
    assert f"3 cells of {run.path} are missing" in e.value.code
    assert not in_use(run.stages[2].path, "evaluate") and len(results(run)) == 2 * 2
    assert evaluate.evaluate(run) == 3


@pytest.mark.slow
def test_a_signal_ends_all_processes(run, two, monkeypatch, tmp_path):
    monkeypatch.setenv("DO", "sleep")
    words = [sys.executable, "-m", "trace_bench", "evaluate", str(run.path), *two]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(pids := [p.stem for p in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.send_signal(signal.SIGINT)
    assert "stopped: finished cells are kept" in parent.communicate(timeout=60)[1] and parent.returncode == 130
    assert len(pids) == 2 and not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.slow
def test_several_processes_can_follow_a_training(run, two, capfd):
    later = run.stages[2].train_file.rename(run.path / "later.json")
    with locked(run.path, "train"):
        thread = threading.Thread(target=cli.main, args=[["evaluate", str(run.path), "--follow", *two]])
        thread.start()
        deadline = time.monotonic() + 120
        while len(results(run)) < 3 * 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        later.rename(run.stages[2].train_file)
        thread.join(120)
    said = capfd.readouterr().out
    assert "evaluated 5 cells on 2 devices" in said and len(results(run)) == 5 * 2


def test_a_stage_of_another_process_is_left_to_it_and_taken_if_that_process_ends(run, monkeypatch):
    with locked(run.stages[2].path, "evaluate"):
        assert evaluate.evaluate(run, stages=[1, 2], share=True) == 1
    lock, original = locked(run.stages[2].path, "evaluate"), filling.evaluate_plan
    lock.__enter__()

    def ends(plan, *args, **kwargs):  # the other process dies while this one is at work
        if plan.stages == [run.stages[0]]:
            lock.__exit__(None, None, None)
        return original(plan, *args, **kwargs)

    monkeypatch.setattr(filling, "evaluate_plan", ends)
    assert evaluate.evaluate(run, share=True) == 4 and evaluate.evaluate(run) == 0


def test_devices_without_a_gpu_are_an_immediate_error(tmp_path):
    with pytest.raises(SystemExit, match=r"--devices all: torch finds no GPU here\. .*--devices cpu,cpu to start two"):
        cli.main(["evaluate", str(tmp_path / "nothing"), "--devices", "all"])


@pytest.mark.parametrize(
    ("variable", "asked", "found"),
    [
        (None, "all", ["0", "1", "2", "3"]),
        (None, "0 2", ["0", "2"]),
        ("2,3", "all", ["2", "3"]),
        ("2,3", "1", ["3"]),
        ("GPU-aa,GPU-bb", "GPU-bb 0", ["GPU-bb", "GPU-aa"]),
        ("MIG-a,MIG-b,MIG-c,MIG-d,MIG-e", "all", ["MIG-a", "MIG-b", "MIG-c", "MIG-d", "MIG-e"]),
        (None, "0 4", "there is no 4. Use all, or numbers from 0 to 3"),
        ("2,3", "0 cpu", "there is no cpu"),
        ("2,3", "0 0", "name each GPU only once"),
    ],
)
def test_devices_may_have_the_names_of_torch_or_cuda(monkeypatch, variable, asked, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    if isinstance(found, list):
        assert evaluate.find_devices(asked.split()) == found
    else:
        with pytest.raises(RunError, match=found):
            evaluate.find_devices(asked.split())


def test_an_engine_on_several_devices_gets_that_many():
    plan = SimpleNamespace(backend="vllm", engine_args={"tensor_parallel_size": 2})
    assert devices.grouped(["0", "1", "3", "2"], plan) == [["0", "1"], ["3", "2"]]
    with pytest.raises(RunError, match=r"3 \(0, 1, 2\), but each engine takes 2 \(tensor_par"):
        devices.grouped(["0", "1", "2"], plan)
    plan.backend = "hf"
    assert devices.grouped(["0", "1", "2"], plan) == [["0"], ["1"], ["2"]]
