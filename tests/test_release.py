"""The release: wheel and source archive contain all files that the program reads, and work from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import make_tiny_model
from judge_server import Server, with_key
from test_own import METHOD

ROOT = Path(__file__).parents[1]
PACKAGES = ("trace_tasks", "trace_bench", "trainers", "judges")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source archive of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(out), str(sdist)], cwd=out, check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command in an empty folder with only the wheel and the libraries."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty folder ü")
    pip = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)

    def run(*command: str, **more: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(site), "TRACE_CACHE": str(empty / "cache"), "TRACE_DATA": "demo"}
        env |= {"PWD": str(empty), **more}
        done = subprocess.run(
            [sys.executable, *command], cwd=empty, env=env, capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        return done.stdout

    run.site, run.folder = site, empty
    return run


def test_the_wheel_contains_every_file_of_the_packages(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert set(tracked.splitlines()) <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_installed_package_finds_its_own_files(installed):
    where = "import trace_tasks, trace_bench, trainers, judges as j; print(j.__file__, trainers.__file__)"
    assert installed("-c", where).count(str(installed.site)) == 2, "the wheel, and not the checkout, is tried"
    assert installed("-m", "trace_bench", "tasks-path").strip() == str(installed.site / "trace_tasks")
    assert "--ewc_lambda" in installed("-m", "trainers.ewc", "--help")
    assert "Complete." in installed("-m", "trace_bench", "data", "demo")
    study = installed.site / "trainers" / "configs" / "studies" / "replay.yaml"
    assert "train replay" in installed("-m", "trace_bench", "study", str(study), "--dry-run")


# ----------------------------------------------------------------------------------------------------- the first hour

CONFIG = """\
{model_name_or_path: tiny, data: demo, tasks: [mine, trace_fomc], train_rows: 8, test_rows: 3, max_steps: 2,
 use_peft: true, lora_r: 2, learning_rate: 0.01, max_prompt_length: 96, max_new_tokens: 4, backend: hf,
 per_device_train_batch_size: 4, gradient_checkpointing: false,
 judged: [instruct_koala], judged_rows: 2, judged_max_new_tokens: 4}
"""
STUDY = "{config: config.yaml, runs: {half: {method: half.py, seed: {each: [1, 2]}}, sequential: {method: sequential}}}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_newcomers_commands_work_from_the_wheel(installed, monkeypatch):
    """The commands run in a folder whose name has a space and an umlaut."""
    folder = installed.folder

    def bench(*words: str, **more: str) -> str:
        return installed("-P", "-m", "trace_bench", *words, **more)

    make_tiny_model(folder / "tiny")
    assert "trace-bench 0." in bench("--version") and "quickstart" in bench("configs")
    turns = [[{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": str(i + 1)}] for i in range(12)]
    (folder / "mine.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    assert "0+1?" in bench("task", "new", "mine.jsonl")
    for name, text in (("half.py", METHOD), ("config.yaml", CONFIG), ("study.yaml", STUDY)):
        (folder / name).write_text(text)
    own = {"TRACE_TASKS": "."}
    bench("train", "half.py", "--config", "config.yaml", "--output_dir", "runs/mine", **own)
    assert "evaluated" in bench("evaluate", "runs/mine")
    assert "5 cells of 5" in bench("report", "runs/mine") and "evaluated 2 of 2 tasks" in bench("status", "runs/mine")

    adapters = [folder / "runs/mine/stages" / stage / "adapter" for stage in ("1_mine", "2_trace_fomc")]
    shutil.copytree(adapters[0], folder / "v1")
    begin = ["--model", "tiny", "--tasks", "trace_fomc", "--backend", "hf"]
    begin += ["--test-rows", "2", "--max-prompt-length", "96"]
    bench("evaluate", "runs/theirs", *begin, "--checkpoint", "v1=v1")
    assert "evaluated 1 cell" in bench("evaluate", "runs/theirs", "--checkpoint", f"v2={adapters[1]}")
    (folder / "v1").rename(folder / "moved")
    assert "nothing to evaluate" in bench("evaluate", "runs/theirs", "--checkpoint", "v1=moved")
    assert "the run now has 1 checkpoint\n" in bench("evaluate", "runs/theirs", "--drop", "v1")
    bench("report", "runs/theirs")

    bench("study", "study.yaml", "--output_dir", "runs/study", **own)
    summary = (folder / "runs/study/summary.md").read_text(encoding="utf-8")
    assert "| half | 2 |" in summary and "Failed" not in summary
    with Server() as server, with_key(monkeypatch, folder):
        judged = bench("judge", "runs/mine", "--model", "fake", "--base-url", server.url)
    assert "0 failed" in judged
    bench("report", "runs/mine", "runs/study/sequential", "--output", "both.html")
    assert (folder / "both.html").is_file()
