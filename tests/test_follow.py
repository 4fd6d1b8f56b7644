"""`trace-bench evaluate RUN --follow`: a second process evaluates stages as soon as they are trained."""

import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from architectures import PROMPTS, generate, make_base, make_checkpoint, reference
from conftest import command_line, interrupted, lock_holder, pieces_tokenizer, train
from forks import Child, forked
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_bench import cli, engine, evaluate
from trace_bench.evaluate import following
from trace_bench.run import Run, RunError, read_json
from trace_bench.waiting import in_use, locked
from trace_tasks.data.files import fingerprint, write_json
from trainers.base import CLTrainer

THREE = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(following, "POLL", 0.05)


def cells(run: Run) -> dict[str, tuple[dict, str]]:
    """Path -> content of each cell without time and date, and of its samples."""
    found = {}
    for stage in run.stages:
        for file in sorted(stage.path.glob("eval/*.json")):
            cell = {k: v for k, v in read_json(file).items() if k not in ("seconds", "date")}
            cell["likelihood"] = {k: v for k, v in cell["likelihood"].items() if k != "seconds"}
            found[f"{stage.name}/{file.name}"] = cell, stage.samples_file(file.stem).read_text()
    return found


@pytest.fixture
def starts(monkeypatch):
    """How many engines were started."""
    found, original = [], engine.open_engine
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: found.append(a) or original(*a, **k))
    return found


def test_following_a_training_gives_the_same_cells_as_evaluating_afterwards(options, tmp_path, capfd, starts):
    """A second process trains. Before each stage it waits until the previous one is evaluated."""
    options |= {"tasks": THREE, "cells": "all"}
    script = tmp_path / "waits.py"
    script.write_text(WAITS)

    def training():
        os.chdir(tmp_path)
        sys.argv[:] = [str(script), *command_line(options)]
        runpy.run_path(str(script), run_name="__main__")

    process = Child(training)
    try:
        made = evaluate.follow(options["output_dir"])
    finally:
        process.kill()
        code = process.wait()
    run = Run.open(options["output_dir"])
    assert made == 12 and code in (0, -signal.SIGKILL) and len(starts) == 1
    said = capfd.readouterr().out
    assert f"waiting for {run.path} to begin\n" in said
    assert all(f"waiting for the training of {stage.name}\n" in said for stage in run.stages[2:])
    there = cells(run)
    for stage in run.stages:
        shutil.rmtree(stage.path / "eval")
    evaluate.evaluate(run)
    assert len(there) == 12 and cells(run) == there


#: A training that begins a stage only when the base model and the stages before are evaluated.
WAITS = """
import time
from trainers.base import CLConfig, CLTrainer, main

class Waits(CLTrainer):
    def begin_stage(self):
        super().begin_stage()
        before = self.run.stages[: self.stage.index] if self.stage.index > 1 else []
        while not all(stage.eval_file(task).exists() for stage in before for task in self.run.tasks):
            time.sleep(0.05)

if __name__ == "__main__":
    main(Waits, CLConfig)
"""


def test_a_training_that_ends_early_is_reported_after_evaluating_its_stages(options, monkeypatch):
    monkeypatch.setattr(following, "GRACE", 0.2)

    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(CLTrainer, 0))
    run = Run.open(options["output_dir"])
    with pytest.raises(SystemExit, match=rf"ended before {run.stages[2].name} was trained.*the training command") as e:
        cli.main(["evaluate", str(run.path), "--follow"])
    assert f"trace-bench evaluate {run.path} --follow" in e.value.code
    assert len(cells(run)) == 3, "two of the base model, and one of the first stage"
    train(options)
    assert evaluate.follow(run.path) == 2 and evaluate.follow(run.path) == 0


def test_a_living_training_is_waited_for_and_a_killed_one_is_not(run, monkeypatch):
    """The lock decides, not the time. Without locks the progress decides."""
    monkeypatch.setattr(following, "GRACE", 0.2)
    run.stages[2].train_file.unlink()
    process = lock_holder(run.path)
    found = []

    def follow():
        try:
            evaluate.follow(run.path)
        except RunError as e:
            found.append(str(e))

    thread = threading.Thread(target=follow)
    thread.start()
    deadline = time.monotonic() + 60
    while len(cells(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert thread.is_alive() and not found and in_use(run.path, "train")
    with pytest.raises(RunError, match="in use: process"), locked(run.path, "train"):
        pass
    assert not in_use(run.stages[1].path, "evaluate"), "nothing is locked while it waits"
    process.kill()
    process.wait()
    thread.join(60)
    assert re.search(f"ended before {run.stages[2].name} was trained", *found)


def test_a_stage_that_another_process_evaluates_is_waited_for(run, capfd):
    with locked(run.stages[1].path, "evaluate"):
        thread = threading.Thread(target=evaluate.follow, args=[run.path])
        thread.start()
        time.sleep(1)
        assert not cells(run), "of no stage, since one engine makes them"
    thread.join(60)
    assert len(cells(run)) == 5
    said = capfd.readouterr().out
    assert said.count(f"waiting for process {os.getpid()} on ") == 1 and "evaluated 5 cells" in said


def test_a_stage_that_is_trained_again_is_evaluated_again(run, monkeypatch, caplog):
    """If weights change during the evaluation, an error is ignored. Without a change the error is raised."""
    original, calls = following.fill, []

    def fill(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            (adapter,) = run.stages[2].checkpoint.glob("*.safetensors")
            save_file({k: v * 2 for k, v in load_file(adapter).items()}, adapter)
            record = read_json(run.stages[2].train_file) | {"checkpoint": fingerprint(run.stages[2].checkpoint)}
            write_json(run.stages[2].train_file, record)
        if len(calls) in (1, 3):
            raise RunError("the adapter is not what train.json says")
        return original(*args, **kwargs)

    monkeypatch.setattr(following, "fill", fill)
    assert evaluate.follow(run.path) == 5 and "trained again during its evaluation" in caplog.text
    made = {read_json(file)["checkpoint"] for file in run.stages[2].path.glob("eval/*.json")}
    assert made == {run.stages[2].fingerprint()}
    with pytest.raises(RunError, match=r"not what train\.json says"):
        evaluate.follow(run.path)


def answers_of_later(base: Path, first: Path, higher: Path, other: Path) -> tuple:
    """The answers of an engine that gets adapters later: one has a higher rank, and one is trained again."""
    args = {"max_model_len": 256, "dtype": "float32", "enable_lora": True}
    lm = engine.open_engine("vllm", str(base), engine_args=args, checkpoints=[first])
    found, restarts, counts, original = [], [], [], lm._restart
    lm._restart = lambda folder: restarts.append(folder) or original(folder)
    for path, new in ((first, None), (first, other), (higher, None), (None, None)):
        if new:
            shutil.copytree(new, path, dirs_exist_ok=True)
        if found:
            lm.reuse([path] if path else [])
        counts.append(len(restarts))
        lm.load(path)
        found.append([generate(lm, PROMPTS), lm.served["weights"]])
    return found, counts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_serves_later_adapters_like_those_known_at_the_start(tmp_path):
    base = make_base("llama", tmp_path / "base", pieces_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = [make_checkpoint(kind, base, tmp_path / kind) for kind in ("lora", "rslora")]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    higher = get_peft_model(plain, LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in higher.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    higher.save_pretrained(tmp_path / "higher")
    expected = [reference(model, tokenizer, PROMPTS) for model in (made[0][1], made[1][1], higher)]
    found, restarts = forked(answers_of_later, base, made[0][0], tmp_path / "higher", made[1][0])
    assert [served for _, served in found] == ["adapter", "adapter", "adapter", "base"]
    assert [answers for answers, _ in found[:3]] == expected
    assert restarts == [0, 0, 1, 1], "the engine was started for a smaller rank"
