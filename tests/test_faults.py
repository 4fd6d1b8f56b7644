"""What goes wrong on real machines: killed programs, full disks, damaged files, a second process, no memory."""

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import command_line, quick_options, train
from judge_server import Server, with_key
from kill_harness import TIMES
from safetensors.torch import load_file, save_file

from judges import judging
from trace_bench import cli, engine, evaluate, report, status
from trace_bench.evaluate import cells
from trace_bench.run import Run, RunError, locked, read_json
from trace_tasks import data
from trace_tasks.data.files import write_json
from trace_tasks.errors import advice
from trainers import base, ewc, gem, olora, osf, pp
from trainers.base import CLConfig, CLTrainer

ROOT = Path(__file__).parents[1]
JUDGED = {"judged": ["instruct_lima"], "judged_rows": 3, "judged_max_new_tokens": 4}


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
    options = {**quick_options(tiny_models["pieces"], folder / "run"), "max_steps": 2, **JUDGED}
    with pytest.MonkeyPatch.context() as patch, with_key(patch, folder), Server() as server:
        patch.setenv("TRACE_DATA", "demo")
        run = train(options)
        evaluate.evaluate(run)
        cli.main(["judge", str(run.path), "--model", "fake", "--base-url", server.url])
        report.write_report(run)
    return run.path


@pytest.fixture
def again(options) -> dict:
    """The options with which `done` was trained, in the folder of `run`."""
    return {**options, "max_steps": 2, **JUDGED}


@pytest.fixture
def run(done, options, demo_data) -> Run:
    options["output_dir"] = str(Path(options["output_dir"]).parent / "runs" / "run")
    return Run.open(shutil.copytree(done, options["output_dir"]))


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


def test_the_lock_of_a_process_is_said_to_be_its_own_and_ends_with_it(options, tmp_path):
    hold = "import sys, time; from pathlib import Path; from trace_bench.run import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'train'): print('held', flush=True); time.sleep(60)"
    folder = options["output_dir"]
    process = subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with locked(Path(folder), "judge"), pytest.raises(RunError, match=rf"process {process.pid} on .*`train`"):
        train(options)
    assert not (Path(folder) / "manifest.json").exists()
    process.kill()
    process.wait()
    with locked(Path(folder), "train"):
        pass


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
    with locked(tmp_path, "train"), locked(tmp_path, "train"):
        assert "no locks on this file system" in caplog.text


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


def test_a_damaged_checkpoint_is_neither_evaluated_nor_trained_upon(run, again):
    adapter = run.stages[1].checkpoint / "adapter_model.safetensors"
    run.stages[1].eval_file("trace_fomc").unlink()
    for damage in (truncate, Path.unlink):
        damage(adapter)
        assert "fingerprint differs" in error("evaluate", run.path)
    run.stages[2].train_file.unlink()
    with pytest.raises(RunError, match=r"1_trace_fomc/adapter is not what the training of the stage wrote"):
        train(again)


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
        ("stages/0_base/eval/samples/instruct_lima.jsonl", ["judge"]),
        ("stages/2_trace_numglue_ds/judge/instruct_lima.json", ["report", "judge"]),
    ],
)
def test_json_that_is_cut_is_named_with_what_to_do(run, file, commands):
    judge_of_run = asking(run)
    truncate(run.path / file)
    for command in commands:
        asked = judge_of_run if command == "judge" else []
        assert file in (line := error(command, run.path, *asked)) and re.search("[Dd]elete|damaged", line), line


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


def test_clocks_and_times_of_files_decide_nothing(run, again, monkeypatch, capsys):
    before = (run.path / "scores.csv").read_bytes()
    for i, file in enumerate(sorted(run.path.rglob("*"))):
        os.utime(file, (i * 7919 % 100 * 1e8,) * 2)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    train(again)
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


def test_a_folder_that_cannot_be_written_is_read_all_the_same(run, again, monkeypatch):
    number = errno.EROFS
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if mode[0] in "wax" and run.path in self.parents:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "access", lambda *a: False)
    train(again)
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


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_without_memory_an_evaluation_keeps_what_it_has(run, monkeypatch, problem):
    for stage in run.stages[1:]:
        stage.eval_file("trace_fomc").unlink()
    original = cells.evaluate_batch

    def hungry(plan, tasks, lm, stage, *args):
        if stage.index == 2:
            raise problem
        original(plan, tasks, lm, stage, *args)

    monkeypatch.setattr(cells, "evaluate_batch", hungry)
    assert "batch_size" in error("evaluate", run.path)
    assert [s.eval_file("trace_fomc").exists() for s in run.stages] == [True, True, False]


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("To serve at least one request with the models's max seq len (32768), (16.0 GiB KV cache is needed"),
        ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)"),
        RuntimeError("Engine core initialization failed. See root cause above."),
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
    assert advice(ValueError("x"), "") is None and advice(FileNotFoundError(2, "x"), "") is None


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


QUICK = ("lora", "grouped", "ewc", "olora", "pp")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
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


@pytest.mark.parametrize(
    "missing, damage",
    [
        ("whole.json", Path.unlink),
        ("whole.json", truncate),
        ("optimizer.pt", truncate),
        ("trained.safetensors", Path.unlink),
    ],
)
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
        found[-1] |= {"R": report.Results(Run.open(run)).R.tobytes()}
    assert len(found[0]) >= 2 * 2 + 5 + 1 and found[0] == found[1]


# ---------------------------------------------------------------------------------------------------- the harness


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_stopped_commands_end_in_the_same_files(tmp_path, record_property):
    record_property("counts", kill_harness(tmp_path, ["--kills", "8", "--signals", "4"], seconds=1400))


def kill_harness(folder: Path, options: list[str], seconds: float) -> dict[str, int]:
    """Runs the harness as a program; how many kills, signals and full disks there were."""
    command = [sys.executable, str(ROOT / "tests" / "kill_harness.py"), str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
