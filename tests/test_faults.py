"""What goes wrong on real machines: killed programs, full disks, damaged files, a second process, no memory.

`python tests/test_faults.py FOLDER [--kills 100] [--signals 30] [--seed 0]` is the fault harness by itself: it kills
every command at random file operations and moments until that many kills, then sends that many signals (SIGINT, SIGTERM
and SIGKILL) to processes of the command line, and compares each resumed run with an uninterrupted one.
"""

import argparse
import errno
import fcntl
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # bitwise equality is promised for one number of threads, and threads do not survive forks
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from conftest import command_line, make_tiny_model, pieces_tokenizer, train
from judge_server import Server, judge, with_key
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from judges import judging
from trace_bench import cli, engine, evaluate, report, results, status
from trace_bench import run as run_module
from trace_bench import study as study_module
from trace_bench.run import Run, RunError, locked, read_json
from trace_tasks import data
from trace_tasks.data.files import write_json
from trainers import base, ewc, gem, olora, osf, pp
from trainers.base import CLConfig, CLTrainer

ROOT = Path(__file__).parents[1]
JUDGED = {"judged": ["instruct_lima"], "judged_rows": 3, "judged_max_new_tokens": 4}
#: What differs from time to time in files that are otherwise the same (a checkout may be edited meanwhile).
TIMES = {"commit", "seconds", "seconds_around_steps", "tokens_per_second", "peak_memory_bytes", "mean_loss"}


def weights(run: Run, stage: int) -> dict[str, torch.Tensor]:
    (file,) = run.stages[stage].checkpoint.glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def tiny_model(tiny_models) -> Path:
    """One that writes letters: what is no text is not judged."""
    return tiny_models["pieces"]


@pytest.fixture(scope="module")
def done(tiny_models, tmp_path_factory) -> Path:
    """A run of two stages, trained, evaluated and judged once for all tests of this file."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch, with_key(patch, folder), Server() as server:
        patch.setenv("TRACE_DATA", "demo")
        run = train(
            {
                **{"model_name_or_path": str(tiny_models["pieces"]), "output_dir": str(folder / "run"), "data": "demo"},
                **{"tasks": ["trace_fomc", "trace_numglue_ds"], "train_rows": 16, "test_rows": 6, "max_steps": 2},
                **{"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_prompt_length": 96},
                **{"max_new_tokens": 4, "gradient_checkpointing": False, "use_peft": True, "lora_r": 4},
                **{"backend": "hf", "disable_tqdm": True, **JUDGED},
            }
        )
        evaluate.evaluate(run)
        cli.main(["judge", str(run.path), "--model", "fake", "--base-url", server.url])
        report.write_report(run)
    return run.path


@pytest.fixture
def run(done, tmp_path, demo_data) -> Run:
    return Run.open(shutil.copytree(done, tmp_path / "runs" / "run"))


def error(*argv: object) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in argv])
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: "), e.value.code
    return e.value.code


def asking(run: Run) -> list[str]:
    """The options of the judge of `done`, which answers no more."""
    judged = read_json(run.stages[0].path / "judge" / "instruct_lima.json")
    return ["--model", "fake", "--base-url", judged["endpoint"]]


# ------------------------------------------------------------------------------------------------ a second process


def test_of_two_processes_the_second_is_told_which_the_first_is(tmp_path):
    refused = pytest.raises(RunError, match=rf"process {os.getpid()} on .*`train`")
    with locked(tmp_path, "train"), locked(tmp_path, "judge"), refused, locked(tmp_path, "train"):
        pass
    with locked(tmp_path, "train"):
        pass


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    hold = "import sys, time; from pathlib import Path; from trace_bench.run import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'train'): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"process {process.pid} "), locked(tmp_path, "train"):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path, "train"):
        pass


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path, "train"), locked(tmp_path, "train"):
        assert "no locks on this file system" in caplog.text


def test_two_trainings_of_one_run_are_refused(options):
    folder = Path(options["output_dir"])
    with locked(folder, "train"), pytest.raises(RunError, match="in use"):
        train(options)
    assert not (folder / "manifest.json").exists()


def test_stages_are_evaluated_at_once_but_none_twice_and_readers_never_wait(run, capsys):
    for stage in run.stages[1:]:
        stage.eval_file("trace_fomc").unlink()
    with locked(run.stages[1].path, "evaluate"), locked(run.path, "train"), locked(run.path, "judge"):
        assert "in use" in error("evaluate", run.path)
        cli.main(["evaluate", str(run.path), "--stages", "2"])
        assert run.stages[2].eval_file("trace_fomc").exists()
        cli.main(["report", str(run.path)])
        cli.main(["status", str(run.path)])
        run.stages[1].path.joinpath("judge/instruct_lima.json").unlink(missing_ok=True)
        run.stages[2].path.joinpath("judge/instruct_lima.json").unlink()
        assert "in use" in error("judge", run.path, *asking(run))


# ------------------------------------------------------------------------------------------ damaged and other files


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_checkpoint_is_neither_evaluated_nor_trained_upon(run, options):
    adapter = run.stages[1].checkpoint / "adapter_model.safetensors"
    run.stages[1].eval_file("trace_fomc").unlink()
    for damage in (truncate, Path.unlink):
        damage(adapter)
        assert "fingerprint differs" in error("evaluate", run.path)
    run.stages[2].train_file.unlink()
    with pytest.raises(RunError, match=r"1_trace_fomc/adapter is not what the training of the stage wrote"):
        train({**options, "max_steps": 2, **JUDGED, "output_dir": str(run.path)})


def test_a_damaged_checkpoint_from_elsewhere_is_refused_before_the_engine_starts(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run.stages[1].checkpoint, tmp_path / "copy")
    command = ["evaluate", tmp_path / "theirs", "--model", run.manifest["model"]["name"], "--tasks", "trace_fomc"]
    command += ["--checkpoint", f"trace_fomc={copy}", "--backend", "hf", "--data", "demo", "--test-rows", "2"]
    begun = [*command[:1], tmp_path / "begun", *command[2:]]
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: (_ for _ in ()).throw(engine.EngineError("started")))
    assert "started" in error(*begun), "a run whose checkpoint is whole when it is recorded"
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("the engine was started"))
    truncate(copy / "adapter_model.safetensors")
    for damaged in (command, ["evaluate", tmp_path / "begun"]):
        assert re.search(r"adapter_model.safetensors is missing or damaged .* Copy", error(*damaged))
    (copy / "adapter_model.safetensors").unlink()
    assert "no .safetensors file" in error(*command)
    assert "its weights are gone" in error("evaluate", tmp_path / "begun")
    assert not (tmp_path / "theirs").exists(), "nothing is recorded of what cannot be evaluated"


@pytest.mark.parametrize(
    ("file", "commands"),
    [
        ("manifest.json", ["evaluate", "report", "status", "judge"]),
        ("stages/2_trace_numglue_ds/train.json", ["evaluate", "report", "status", "judge"]),
        ("stages/1_trace_fomc/eval/trace_fomc.json", ["evaluate", "report"]),
        ("stages/2_trace_numglue_ds/eval/samples/trace_fomc.jsonl", ["report"]),
        ("stages/0_base/eval/samples/instruct_lima.jsonl", ["judge"]),
        ("stages/2_trace_numglue_ds/judge/instruct_lima.json", ["report", "judge"]),
        ("stages/2_trace_numglue_ds/judge/instruct_lima.jsonl", ["report"]),
    ],
)
def test_json_that_is_cut_is_named_with_what_to_do(run, file, commands):
    judge_of_run = asking(run)
    truncate(run.path / file)
    for command in commands:
        asked = judge_of_run if command == "judge" else []
        assert file in (line := error(command, run.path, *asked)) and re.search("[Dd]elete|damaged", line), line


def test_samples_that_lost_whole_lines_are_not_judged(run):
    stage = run.stages[2]
    file = stage.samples_file("instruct_lima")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    (stage.path / "judge" / "instruct_lima.json").unlink()
    line = error("judge", run.path, *asking(run))
    assert "holds 2 rows" in line and "Delete both" in line


def test_a_cut_cache_of_replies_costs_the_cut_line_alone(run, monkeypatch, tmp_path):
    cache = judging.cache_file(run.path.parent)
    for stage in run.stages:
        shutil.rmtree(stage.path / "judge", ignore_errors=True)
    with with_key(monkeypatch, tmp_path), Server() as server:
        command = ["judge", str(run.path), "--model", "fake", "--base-url", server.url]
        cli.main(command)
        asked, before = sum(server.succeeded.values()), read_json(run.stages[2].path / "judge/instruct_lima.json")
        lines = cache.read_bytes().splitlines(keepends=True)
        lines[0] = lines[0][:50] + b"\n"
        cache.write_bytes(b"".join(lines)[:-20])
        for stage in run.stages:
            shutil.rmtree(stage.path / "judge", ignore_errors=True)
        cli.main(command)
        assert sum(server.succeeded.values()) == asked + 2
        assert read_json(run.stages[2].path / "judge/instruct_lima.json") == before


def test_another_base_model_behind_the_same_path_is_refused(options, tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "base")
    options = {**options, "model_name_or_path": str(copy), "max_steps": 1}

    class Swaps(CLTrainer):
        def end_stage(self):
            tensors = load_file(copy / "model.safetensors")
            save_file({k: v + 1 for k, v in tensors.items()}, copy / "new", {"format": "pt"})
            (copy / "new").replace(copy / "model.safetensors")

    Swaps.__module__ = CLTrainer.__module__
    with pytest.raises(RunError, match=r"another base model than the run began with.*Restore it"):
        train(options, Swaps)
    run = Run.open(options["output_dir"])
    assert run.stages[1].is_trained and not run.stages[2].is_trained
    assert "another base model" in error("evaluate", run.path)
    with pytest.raises(RunError, match=r"model\.revision"):
        train(options)


def test_other_data_between_two_stages_is_refused(options, tmp_path):
    copy = shutil.copytree(data.find_data("demo"), tmp_path / "data")
    file = copy / "NumGLUE-ds" / "train.json"

    class Swaps(CLTrainer):
        def end_stage(self):
            file.write_text(json.dumps(json.loads(file.read_text())[:-1]))

    with pytest.raises(RunError, match="holds other data than the run began with"):
        train({**options, "data": str(copy), "max_steps": 1}, Swaps)
    assert Run.open(options["output_dir"]).stages[1].is_trained


def test_clocks_and_times_of_files_decide_nothing(run, options, monkeypatch, capsys):
    before = (run.path / "scores.csv").read_bytes()
    for i, file in enumerate(sorted(run.path.rglob("*"))):
        os.utime(file, (i * 7919 % 100 * 1e8,) * 2)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    train({**options, "max_steps": 2, **JUDGED, "output_dir": str(run.path)})
    assert capsys.readouterr().out.count("trained already") == 2
    assert evaluate.evaluate(run) == 0
    report.write_report(run)
    assert (run.path / "scores.csv").read_bytes() == before and "trained" in status.status(run)


# ---------------------------------------------------------------------------------- no room, no permission, no memory


class Room:
    """Lets so many files be written, then the disk is full."""

    def __init__(self, monkeypatch, files: int) -> None:
        self.left, sync = files, os.fsync

        def fsync(fd: int) -> None:
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(fd)

        monkeypatch.setattr(os, "fsync", fsync)


def test_on_a_full_disk_every_write_fails_in_turn_and_nothing_that_is_done_is_lost(run, monkeypatch, tmp_path):
    """Each attempt has room for no file, for one, or for some."""
    scores = (run.path / "scores.csv").read_bytes()
    for folder in ("eval", "judge"):
        for stage in run.stages:
            shutil.rmtree(stage.path / folder, ignore_errors=True)
    shutil.rmtree(run.path / "figures")
    judging.cache_file(run.path.parent).unlink(missing_ok=True)
    fulls = Counter()
    with with_key(monkeypatch, tmp_path), Server() as server:
        ask = ["--model", "fake", "--base-url", server.url, "--concurrency", "1"]
        for command in (["evaluate", run.path], ["judge", run.path, *ask], ["report", run.path]):
            for attempt in range(60):
                kept = {p: p.read_bytes() for p in run.path.rglob("eval/*.json")}
                with monkeypatch.context() as patch:
                    Room(patch, 4 * attempt if command[0] == "report" else (0, 1, 5)[attempt % 3])
                    try:
                        cli.main([str(c) for c in command])
                        break
                    except SystemExit as e:
                        assert re.fullmatch("error: .*No space left on device.*make room and run.*", e.code), e.code
                        fulls[command[0]] += 1
                assert all(p.read_bytes() == content for p, content in kept.items())
                assert not list(run.path.rglob("*.tmp"))
            else:
                pytest.fail(f"{command} never ended")
    assert fulls["evaluate"] >= 5 and fulls["judge"] >= 2 and fulls["report"] >= 2, fulls
    assert (run.path / "scores.csv").read_bytes() == scores


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_read_all_the_same(run, options, monkeypatch, number):
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if mode[0] in "wax" and run.path in self.parents:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "access", lambda *a: False)
    train({**options, "max_steps": 2, **JUDGED, "output_dir": str(run.path)})
    assert evaluate.evaluate(run) == 0
    assert "2 stages" in status.status(run)
    run.stages[1].eval_file("trace_fomc").unlink()
    for command in ("evaluate", "report"):
        line = error(command, run.path)
        assert os.strerror(number) in line and "make the folder writable" in line and str(run.path) in line


def test_without_memory_a_training_says_what_to_change_and_keeps_its_stages(options, monkeypatch):
    class Hungry(CLTrainer):
        def training_step(self, *args):
            if self.stage.index == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
            return super().training_step(*args)

    with pytest.raises(SystemExit) as e:
        base.main(Hungry, CLConfig, command_line(options))
    assert re.fullmatch("error: Not enough memory: CUDA out .*per_device_train_batch_size.*", e.value.code)
    assert Run.open(options["output_dir"]).stages[1].is_trained


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_without_memory_an_evaluation_keeps_what_it_has(run, monkeypatch, problem):
    for stage in run.stages[1:]:
        stage.eval_file("trace_fomc").unlink()
    original = evaluate._evaluate_cells

    def hungry(lm, stage, *args):
        if stage.index == 2:
            raise problem
        original(lm, stage, *args)

    monkeypatch.setattr(evaluate, "_evaluate_cells", hungry)
    assert "batch_size" in error("evaluate", run.path)
    assert [s.eval_file("trace_fomc").exists() for s in run.stages] == [True, True, False]


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("To serve at least one request with the models's max seq len (32768), (16.0 GiB KV cache is needed"),
        ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
        ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)"),
        RuntimeError("Engine core initialization failed. See root cause above."),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_what_vllm_says_of_memory_is_one_line_with_what_to_change(problem):
    clear = pytest.raises(engine.EngineError, match=r"cannot start.*max_model_len.*gpu_memory_utilization")
    with clear, engine.starting_vllm():
        raise problem


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match="unknown argument"), engine.starting_vllm():
        raise ValueError("unknown argument")
    assert run_module.advice(ValueError("x"), "") is None and run_module.advice(FileNotFoundError(2, "x"), "") is None


# ------------------------------------------------------------------------------------------- going on within a stage


def interrupted(trainer: type, step: int, stage: int = 2) -> type:
    """The same method, stopped before it takes the step after `step`."""

    class Stopped(trainer):
        def training_step(self, *args):
            if (self.stage.index, self.state.global_step) == (stage, step):
                raise KeyboardInterrupt
            return super().training_step(*args)

    Stopped.__module__ = trainer.__module__
    return Stopped


METHODS = {
    "lora": (CLTrainer, CLConfig, {"lora_dropout": 0.1}),
    "full": (CLTrainer, CLConfig, {"use_peft": False, "learning_rate": 1e-3}),
    "grouped": (CLTrainer, CLConfig, {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}),
    "ewc": (ewc.EWCTrainer, ewc.EWCConfig, {"ewc_rows": 4}),
    "gem": (gem.GEMTrainer, gem.GEMConfig, {"memory_rows": 4}),
    "olora": (olora.OLoRATrainer, olora.OLoRAConfig, {}),
    "osf": (osf.OSFTrainer, osf.OSFConfig, {"use_peft": False, "learning_rate": 1e-3, "dtype": "float32"}),
    "pp": (pp.PPTrainer, pp.PPConfig, {"prompt_tokens": 4, "prompt_mlp": 4}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_goes_on_at_its_last_checkpoint_to_the_same_bytes(options, tmp_path, capsys, method):
    """In the third epoch, with dropout, as the optimizer, the schedule and the order of the rows were."""
    trainer, config, changes = METHODS[method]
    options = {
        **options,
        **{"max_steps": 12, "train_rows": 40, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine"},
        **changes,
    }
    whole = train({**options, "output_dir": str(tmp_path / "whole")}, trainer, config)
    options |= {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(trainer, 11), config)
    run = Run.open(options["output_dir"])
    assert [p.name for p in run.stages[2].attempt.glob("checkpoint-*")] == ["checkpoint-9"]
    assert not run.stages[1].attempt.exists()
    capsys.readouterr()
    train(options, trainer, config)
    assert "goes on at step 9" in capsys.readouterr().out
    assert same(weights(whole, 1), weights(run, 1)) and same(weights(whole, 2), weights(run, 2))
    records = [read_json(r.stages[2].train_file) for r in (whole, run)]
    assert records[0].pop("mean_loss") == pytest.approx(records[1].pop("mean_loss"), rel=1e-6)
    first, second = ({k: v for k, v in r.items() if k not in TIMES} for r in records)
    assert first == second
    for state in whole.stages[2].method_state.glob("*"):
        assert state.read_bytes() == (run.stages[2].method_state / state.name).read_bytes()
    assert not list(run.path.rglob("checkpoint-*")) and not list(run.path.rglob("*.pt"))


@pytest.fixture
def stopped(options):
    """A run that was stopped at step 5 of 6 of its only stage, with checkpoints of steps 2 and 4."""
    options |= {"tasks": ["trace_fomc"], "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train({**options, "save_total_limit": 2}, interrupted(CLTrainer, 5, stage=1))
    attempt = Run.open(options["output_dir"]).stages[1].attempt
    assert sorted(p.name for p in attempt.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return options, attempt


@pytest.mark.parametrize("missing", ["whole.json", "optimizer.pt", "trainer_state.json", "trained.safetensors"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_half_written_checkpoint_is_not_gone_on_from(stopped, capsys, missing, damage):
    options, attempt = stopped
    damage(attempt / "checkpoint-4" / missing)
    train(options)
    assert "goes on at step 2" in capsys.readouterr().out


def test_a_checkpoint_of_another_start_is_not_gone_on_from(stopped, capsys):
    options, attempt = stopped
    for folder in attempt.glob("checkpoint-*"):
        whole = read_json(folder / "whole.json")
        write_json(folder / "whole.json", {**whole, "of": {**whole["of"], "processes": 2}})
    train(options)
    assert "goes on" not in capsys.readouterr().out


def test_how_often_checkpoints_are_saved_may_change(stopped, capsys):
    options, _ = stopped
    train({**options, "save_strategy": "no", "save_steps": 500})
    assert "goes on at step 4" in capsys.readouterr().out


def test_the_state_of_a_method_that_is_damaged_is_not_trained_with(options):
    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(ewc.EWCTrainer, 0), ewc.EWCConfig)
    file = Run.open(options["output_dir"]).stages[1].method_state / "state.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file.with_name("new"))
    file.with_name("new").replace(file)
    with pytest.raises(RunError, match=r"1_trace_fomc/method_state is not what the training"):
        train(options, ewc.EWCTrainer, ewc.EWCConfig)


@pytest.mark.parametrize("change", [{"save_only_model": True}, {"save_total_limit": 0}])
def test_checkpoints_that_no_stage_could_go_on_from_are_refused(options, change):
    with pytest.raises(base.ConfigError, match=next(iter(change))):
        train({**options, "save_strategy": "steps", "save_steps": 2, **change})


# -------------------------------------------------------------------------------------------------- determinism

TWICE = """
import sys
from trace_bench.cli import main
from trainers import base
base.main(base.CLTrainer, base.CLConfig, sys.argv[1:])
main(["evaluate", sys.argv[sys.argv.index("--output_dir") + 1]])
"""


@pytest.mark.slow
def test_two_fresh_processes_give_the_same_bytes(options, tmp_path):
    """Each with another order of Python's sets."""
    found = []
    for seed in ("1", "2"):
        run = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", TWICE, *command_line({**options, "output_dir": run, "lora_dropout": 0.1})],
            cwd=ROOT,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        found.append({p.relative_to(run): p.read_bytes() for p in run.rglob("adapter/*")})
        found[-1] |= {p.relative_to(run): p.read_bytes() for p in run.rglob("samples/*.jsonl")}
        found[-1] |= {"R": results.score_matrix(Run.open(run)).tobytes()}
    assert len(found[0]) >= 2 * 2 + 5 + 1 and found[0] == found[1]


# ---------------------------------------------------------------------------------------------------- the harness


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_stopped_commands_end_in_the_same_files(tmp_path, record_property):
    record_property("counts", kill_harness(tmp_path, kills=8, signals=4, seconds=1400))


def kill_harness(folder: Path, kills: int, signals: int, seconds: float) -> dict[str, int]:
    """Runs this file as a program; how many kills, signals and full disks there were."""
    command = [sys.executable, __file__, str(folder), "--kills", str(kills), "--signals", str(signals)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = {name: sum(c.values()) for name, c in json.loads(done.stdout.splitlines()[-1]).items()}
    assert counts["kills"] >= kills and counts["signals"] >= signals
    return counts


def call(module: str, arguments: list[str]) -> None:
    """What `python -m MODULE ARGUMENTS` does, without its imports."""
    if module == "trace_bench.cli":
        cli.main(arguments)
    else:
        base.main(ewc.EWCTrainer, ewc.EWCConfig, arguments)


def forked(words: list[str], environment: object = None) -> int:
    """`ending.run_child` in a fork, which has its imports already."""
    pid = os.fork()
    if pid == 0:
        code: object = 0
        try:
            call(words[2], words[3:])
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):
                print(code, file=sys.stderr, flush=True)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(int(code or 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Commands:
    """The commands of a run, as functions to be called in a process of their own, and as words of a command line."""

    def __init__(self, folder: Path, options: dict, url: str) -> None:
        self.folder, self.run, self.out = folder, folder / "run", folder / "annotated"
        asking = ["--model", "fake", "--base-url", url, "--concurrency", "2"]
        training = command_line({**options, "output_dir": self.run})
        annotating = ["--data", "demo", "--tasks", "trace_fomc", "--rows", "6", "--attempts", "2"]
        self.archive, self.study, self.cache = folder.parent / "archive.zip", folder / "study", folder / "cache"
        if not self.archive.exists():
            shutil.make_archive(str(self.archive.with_suffix("")), "zip", data.find_data("demo"))
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
            write_json(folder.parent / "config.yaml", plain)  # JSON is YAML
            study = {"config": "config.yaml", "runs": {"mine": {"method": "ewc"}}}
            write_json(folder.parent / "study.yaml", study)
        study = ["study", str(folder.parent / "study.yaml"), "--output_dir", str(self.study)]
        self.words = {
            "data": ["trace_bench.cli", "data", str(self.archive)],
            "train": ["trainers.ewc", *training],
            "evaluate": ["trace_bench.cli", "evaluate", str(self.run)],
            "judge": ["trace_bench.cli", "judge", str(self.run), *asking],
            "annotate": ["trace_bench.cli", "annotate", str(self.out), *asking, *annotating],
            "report": ["trace_bench.cli", "report", str(self.run)],
            "study": ["trace_bench.cli", *study],
        }
        self.all = {name: partial(self._call, name) for name in self.words}

    def environment(self, name: str) -> dict[str, str]:
        """What makes the unpacked archive, and temporary files of the system's folder, be found again."""
        cache = {"TRACE_CACHE": str(self.cache)} if name == "data" else {}
        return {"TMPDIR": str(self.folder / "temporary"), **cache}

    def _call(self, name: str) -> None:
        os.environ |= self.environment(name)
        study_module.run_child = forked
        module, *arguments = self.words[name]
        call(module, arguments)

    def finished(self) -> dict[Path, tuple]:
        """What is done and may not be done again: files with what tells one writing of them from another."""
        files: list[Path] = []
        files += self.cache.glob("data-*/*/*")
        for trained in (*self.run.glob("stages/*/train.json"), *self.study.glob("*/stages/*/train.json")):
            files += [trained, *trained.parent.glob("adapter/*"), *trained.parent.glob("method_state/*")]
        for cell in (*self.run.glob("stages/*/eval/*.json"), *self.study.glob("*/stages/*/eval/*.json")):
            files += [cell, cell.parent / "samples" / f"{cell.stem}.jsonl"]
        files += self.run.glob("stages/*/judge/*.json")
        return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}

    def replies(self) -> list[str]:
        """The keys of the replies that were paid, as often as they are in a cache."""
        found = []
        for cache in (judging.cache_file(self.folder), self.out / "annotate-cache.jsonl"):
            for line in cache.read_bytes().split(b"\n") if cache.exists() else ():
                try:
                    found.append(json.loads(line)["key"])
                except (ValueError, KeyError):
                    continue
        return found

    def outcome(self) -> dict[str, object]:
        """All that a run comes to, without times."""
        found: dict[str, object] = {"scores.csv": (self.run / "scores.csv").read_bytes()}
        found["study"] = (self.study / "mine" / "scores.csv").read_bytes()
        places = (
            (self.run, "stages/**/*"),
            (self.study, "*/stages/**/*"),
            (self.out, "**/*"),
            (self.cache, "data-*/*/*"),
        )
        for file in sorted(p for folder, pattern in places for p in folder.glob(pattern) if p.is_file()):
            name = file.relative_to(self.folder).as_posix()
            if file.name.startswith(".") or "annotate-cache" in file.name:
                continue
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                found[name] = {k: v for k, v in content.items() if k not in TIMES} if type(content) is dict else content
            else:
                found[name] = file.read_bytes()
        return found


def in_child(command, folder: Path, *, at: int = 0, torn: int = 0, after: float = 60.0, limit: int | None = None):
    """Runs a command in a fork.

    Args:
        command: A function.
        folder: The folder whose file operations are counted.
        at: Kill it at this one of them; 0 = at none.
        torn: Bytes cut from the end of the file that is being written when it is killed.
        after: Kill it after so many seconds.
        limit: The longest file that can be written, as on a disk that is full.

    Returns:
        How it ended ("killed", "done", "error"), its output, and the number of file operations.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()  # killed with its children, as `kill -9 -PID` and a machine that goes off do
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        count = 0

        def operation(fd: int | None = None) -> None:
            nonlocal count
            count += 1
            if count == at:
                if fd is not None and torn:
                    os.truncate(f"/proc/self/fd/{fd}", max(0, os.fstat(fd).st_size - torn))
                os.killpg(0, signal.SIGKILL)

        def hook(event: str, args: tuple) -> None:
            if event == "open":
                path, _, flags = args
                if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, str):
                    return
            elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                return
            path = os.fspath(args[0])
            if isinstance(path, str) and (not path.startswith("/") or path.startswith(str(folder))):
                operation()

        sync = os.fsync

        def fsync(fd: int) -> None:
            operation(fd if not os.path.isdir(f"/proc/self/fd/{fd}") else None)
            sync(fd)

        code = 1
        try:
            os.fsync = fsync
            # tqdm's lock is shared with forked processes: one that is killed while it has it would stop all others.
            tqdm.set_lock(threading.RLock())
            sys.addaudithook(hook)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            command()
            code = 0
        except SystemExit as e:
            print(e.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        print(f"\noperations {count}", flush=True)
        os._exit(code)
    os.close(write)
    deadline, output = time.monotonic() + after, b""
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.killpg(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            continue
        part = os.read(read, 65536)
        if not part:
            break
        output += part
    os.close(read)
    _, status_ = os.waitpid(pid, 0)
    text = output.decode(errors="replace")
    counted = re.search(r"operations (\d+)", text)
    how = "killed" if os.WIFSIGNALED(status_) else "error" if os.WEXITSTATUS(status_) else "done"
    return how, text, int(counted[1]) if counted else 0


def interrupted_process(command: str, environment: dict[str, str], number: int, delay: float) -> tuple[int, str]:
    """Runs a command line in a shell and sends it a signal; a Ctrl-C goes to its children as well, as in a terminal.

    Returns:
        Its exit code, and what it wrote.
    """
    process = subprocess.Popen(
        f"exec {command}",
        shell=True,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    caught = re.compile(r"SigCgt:\s*(\w+)")
    while process.poll() is None:  # until it listens: before that nothing of ours has begun
        with suppress(FileNotFoundError, ProcessLookupError):
            found = caught.search(Path(f"/proc/{process.pid}/status").read_text())
            if found and int(found[1], 16) >> (signal.SIGTERM - 1) & 1:
                break
        time.sleep(0.002)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    try:
        text = process.communicate(timeout=60)[0]
        return process.returncode, text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def signals(commands: "Commands", names: list[str], seconds: dict[str, float], rng: random.Random) -> Counter:
    """Interrupts each command once by a signal, and goes on with the command that it says; which signals came."""
    came: Counter[str] = Counter()
    temporary = commands.folder / "temporary"
    temporary.mkdir(parents=True)
    for name in commands.words:
        if name not in names:
            how, text, _ = in_child(commands.all[name], commands.folder)
            assert how == "done", text
            continue
        command = shlex.join([sys.executable, "-m", *commands.words[name]])
        for number in (rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]), None):
            before, delay = commands.finished(), rng.uniform(0, seconds[name]) if number else 300
            code, text = interrupted_process(command, commands.environment(name), number or 0, delay)
            where = f"{name}, {number!r} after {delay:.2f} s: {code}\n{text}"
            again = [str(f) for f, mark in before.items() if commands.finished().get(f) != mark]
            assert not again, f"done again: {again}\n{where}"
            assert "Traceback" not in text and "Exception ignored" not in text, where
            if number is None:
                assert code == 0, where
            elif code == -number:  # killed, or while Python was ending
                came[number.name] += number == signal.SIGKILL
                if number == signal.SIGKILL:
                    shutil.rmtree(temporary)
                    temporary.mkdir()
            elif code:
                lines = [line for line in text.splitlines() if line.startswith("stopped: ")]
                assert code == 128 + number and len(lines) == 1, where
                left = [p for p in commands.folder.rglob("*") if ".tmp" in p.name] + list(temporary.iterdir())
                assert not left, f"{left}\n{where}"
                command = lines[0].partition("Go on with: ")[2]
                came[number.name] += 1
    return came


def serve() -> tuple[str, int]:
    """A judge and teacher in a process of its own: its address and number."""
    from judges.prompts import neutralise
    from trace_tasks.data import demo

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        rows = [row for splits in demo.make_reasoning().values() for row in splits["train"]]
        right = {neutralise(row["prompt"]): row["answer"] for row in rows}

        def answer(text: str) -> str:
            task = text.rpartition("<<<TASK>>>\n")[2].partition("\n<<<END OF TASK>>>")[0]
            return right.get(task, "") if "<<<TASK>>>" in text else judge(text)

        with Server(answer) as server:
            os.write(write, server.url.encode())
            signal.pause()
        os._exit(0)
    return os.read(read, 200).decode(), pid


def harness(folder: Path, kills: int, interruptions: int, seed: int) -> None:
    """Kills the commands that many times, sends them that many signals, and prints what it counted."""
    torch.set_num_threads(1)
    environment = {"TRACE_CACHE": str(folder / "cache"), "TRACE_DATA": "demo", "HF_HUB_OFFLINE": "1"}
    os.environ |= {**environment, "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "none", "TQDM_DISABLE": "1"}
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        os.environ.pop(name, None)

    model = make_tiny_model(folder / "tiny", pieces_tokenizer())
    import lm_eval.models.huggingface  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import openai.resources.chat  # noqa: F401

    data.find_data("demo")
    options = {
        **{"model_name_or_path": model, "data": "demo", "tasks": ["trace_fomc", "trace_numglue_ds"]},
        **{"train_rows": 16, "test_rows": 3, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        **{"max_prompt_length": 48, "max_new_tokens": 3, "gradient_checkpointing": False, "use_peft": True},
        **{"lora_r": 2, "lora_dropout": 0.1, "backend": "hf", "disable_tqdm": True, "ewc_rows": 2},
        **{"save_strategy": "steps", "save_steps": 2, "seed": 7, **JUDGED},
    }
    rng, began = random.Random(seed), time.monotonic()
    url, server = serve()
    counts = {name: Counter() for name in ("kills", "full disks", "ended by themselves", "signals")}
    went_on = 0
    try:
        reference = Commands(folder / "reference", options, url)
        operations, seconds = {}, {}
        for name, command in reference.all.items():
            started = time.monotonic()
            how, text, operations[name] = in_child(command, reference.folder)
            assert how == "done", text
            seconds[name] = time.monotonic() - started
        print("file operations:", operations, "seconds:", {k: round(v, 1) for k, v in seconds.items()}, flush=True)
        expected, paid = reference.outcome(), sorted(reference.replies())
        assert len(paid) == len(set(paid)) > 10
        rounds = 0
        while sum(counts["kills"].values()) < kills:
            rounds += 1
            commands = Commands(folder / f"round{rounds}", options, url)
            for name, command in commands.all.items():
                left = operations[name]
                if name == "study" and rounds % 3 != 1:
                    assert in_child(command, commands.folder)[0] == "done"  # most of it is what the others are
                    continue
                many = (2 if name == "train" else 1) * (4 if kills > 20 else 1)
                faults = ["full", *["kill"] * many]
                rng.shuffle(faults)
                for fault in [*faults, "none"]:
                    before, whole = commands.finished(), list(commands.run.glob("stages/*/.trainer/*/whole.json"))
                    how_to = {}
                    if fault == "full":
                        how_to = {"limit": rng.choice([0, 500, 5000])}
                    elif fault == "kill" and rng.random() < 0.7:
                        how_to = {"at": rng.randint(1, max(1, left // 2)), "torn": rng.choice([0, 1, 30])}
                    elif fault == "kill":
                        how_to = {"after": rng.uniform(0, seconds[name] * 0.8)}
                    how, text, _ = in_child(command, commands.folder, **how_to)
                    while fault == "none" and how == "killed":  # by its limit of time, on a busy machine
                        how, text, _ = in_child(command, commands.folder)
                    after = commands.finished()
                    again = [str(f) for f, mark in before.items() if after.get(f) != mark]
                    assert not again, f"round {rounds}, {name}, {fault} {how_to}: done again: {again}\n{text}"
                    if name == "train" and whole and how == "done":
                        assert "goes on at step" in text or "trained already" in text, text
                    went_on += "goes on at step" in text
                    if how == "killed":
                        counts["kills"][name] += 1
                        left = max(4, left - how_to.get("at", 0) // 2)
                    elif how == "error":
                        line = [x for x in text.splitlines() if x.startswith("error: ")]
                        clear = len(line) == 1 or (name == "study" and line)  # a study has its children's, and goes on
                        assert fault == "full" and clear and "Traceback" not in text, f"{name} {how_to}\n{text}"
                        assert all("run the command again" in x for x in line if "evaluation of" not in x), line
                        counts["full disks"][name] += 1
                    else:
                        counts["ended by themselves"][name] += 1
                        if fault != "none":
                            break
            found = commands.outcome()
            assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
            different = [name for name in expected if found[name] != expected[name]]
            assert not different, f"round {rounds}: {different}"
            assert sorted(commands.replies()) == paid, "every reply is paid once"
            assert not list(commands.folder.rglob(".trainer")), "nothing temporary stays"
            shutil.rmtree(commands.folder)
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import trainers.base"], cwd=ROOT, check=True)
        imports = time.monotonic() - started
        longest = {name: took + imports for name, took in seconds.items()}
        longest |= {"data": 0.5, "judge": 2.0, "annotate": 2.0, "study": seconds["study"] + 2 * imports}
        while sum(counts["signals"].values()) < interruptions:
            rounds += 1
            commands = Commands(folder / f"round{rounds}", options, url)
            some = ["data", "train", "judge", "study"] if interruptions < 10 else list(commands.words)
            counts["signals"] += signals(commands, some, longest, rng)
            found = commands.outcome()
            different = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
            assert not different, f"round {rounds}: {different}"
            assert sorted(commands.replies()) == paid, "every reply is paid once"
            shutil.rmtree(commands.folder)
        total, took = {name: sum(c.values()) for name, c in counts.items()}, time.monotonic() - began
        print(
            f"{total['kills']} kills, {total['signals']} signals and {total['full disks']} full disks "
            f"in {rounds} rounds, {took:.0f} s; a stage went on at a checkpoint {went_on} times"
        )
        print(json.dumps(counts))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    harness(given.folder, given.kills, given.signals, given.seed)
