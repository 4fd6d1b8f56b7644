"""Faults of real machines: killed programs, full disks, damaged files, a second process, no memory.

The tests do what a message says, and then the command must work.
"""

import errno
import fcntl
import glob
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
from conftest import command_line, error, interrupted, lock_holder, quick_options, train
from judge_server import Server, with_key
from kill_harness import TIMES
from pydantic import BaseModel, PositiveInt
from safetensors.torch import load_file, save_file

from judges import judging
from trace_bench import cli, ending, engine, evaluate, report, status
from trace_bench.evaluate import cells
from trace_bench.judgements import judge_file
from trace_bench.records import stale
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_bench.waiting import locked
from trace_tasks import data
from trace_tasks.data.files import fingerprint, write_json, write_jsonl
from trace_tasks.errors import TraceError, advice
from trainers import base, ewc, gem, olora, osf, pp, sdft
from trainers.base import CLConfig, CLTrainer

ROOT = Path(__file__).parents[1]
FIRST, SECOND, JUDGED = "trace_fomc", "trace_numglue_ds", "instruct_lima"
DEFAULT_DTYPE = "float32" if engine.bf16_is_slow() else "absent"


class Case:
    """A finished run in its own folder, and the commands that made it."""

    def __init__(self, folder: Path, model: Path, url: str) -> None:
        self.path, self.ask = folder / "run", ["--model", "fake/judge", "--base-url", url]
        judged = {"judged": [JUDGED], "judged_rows": 3, "judged_max_new_tokens": 4, "general_stages": "all"}
        self.options = {**quick_options(model, self.path), "test_rows": 4, "max_steps": 2, **judged}

    @property
    def run(self) -> Run:
        return Run.open(self.path)

    def stage(self, index: int):
        return self.run.stages[index]

    def __call__(self, command: str, *argv: object) -> None:
        if command == "train":
            train(self.options)
        else:
            asked = self.ask if command == "judge" else []
            cli.main([str(word) for word in (command, self.path, *asked, *argv)])

    def error(self, command: str, *argv: object) -> str:
        """The message with which a command ends."""
        with pytest.raises((SystemExit, TraceError)) as e:
            self(command, *argv)
        message = str(e.value.code if isinstance(e.value, SystemExit) else e.value)
        assert isinstance(e.value, TraceError) or message.startswith("error: "), message
        return message


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory, server) -> Case:
    """A run of two stages, trained, evaluated, judged and reported, by a model that writes letters."""
    folder = tmp_path_factory.mktemp("finished")
    case = Case(folder, tiny_models["pieces"], server.url)
    with pytest.MonkeyPatch.context() as patch, with_key(patch, folder):
        for command in ("train", "evaluate", "judge", "report"):
            case(command)
    return case


@pytest.fixture
def case(finished, tiny_models, server, tmp_path, monkeypatch, demo_data):
    shutil.copytree(finished.path.parent, tmp_path / "runs")
    with with_key(monkeypatch, tmp_path):
        yield Case(tmp_path / "runs", tiny_models["pieces"], server.url)


# ------------------------------------------------------------------------------------------------ a second process


def test_a_lock_names_its_process_and_ends_with_it(options):
    folder = options["output_dir"]
    process = lock_holder(folder)
    with locked(Path(folder), "judge"), pytest.raises(RunError, match=rf"process {process.pid} on .*`train`"):
        train(options)
    assert not (Path(folder) / "manifest.json").exists()
    process.kill()
    process.wait()
    with locked(Path(folder), "train"):
        pass


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
    with locked(tmp_path, "train"), locked(tmp_path, "train"):
        assert "the file system has no locks" in caplog.text


def test_concurrent_evaluations_take_different_stages_and_readers_never_wait(case):
    for stage in case.run.stages[1:]:
        stage.eval_file(FIRST).unlink()
    with locked(case.stage(1).path, "evaluate"), locked(case.path, "train"), locked(case.path, "judge"):
        assert "in use" in case.error("evaluate")
        case("evaluate", "--stages", "2")
        assert case.stage(2).eval_file(FIRST).exists()
        case("report")
        case("status")
        judge_file(case.stage(2), JUDGED).unlink()
        assert "in use" in case.error("judge")


# ------------------------------------------------------------------------------------------ damaged and other files


def follow(message: str) -> None:
    """Deletes what a message says to delete: the files that it names, or "it" with the files that belong to it."""
    before, _, after = re.sub(r"\s+", " ", message).partition("elete ")
    assert after, f"the message gives no such advice: {message}"
    named = [path for path in re.findall(r"/[^\s,;:()]+", after) if glob.glob(path.rstrip("."))]
    if not named:
        named = re.findall(r"/[^\s,;:()]+", before)[: 2 if after.startswith("both") else 1]
    for path in (Path(p) for pattern in named for p in glob.glob(pattern.rstrip("."))):
        if "its score" in after or "their scores" in after:
            (path.parents[1] / f"{path.stem}.json").unlink(missing_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file: Path, **changes: object) -> None:
    write_json(file, {**read_json(file), **changes})


def other_answer(file: Path) -> None:
    rows = read_jsonl(file)
    write_jsonl(file, [{**rows[0], "response": "x"}, *rows[1:]])


def change_weights(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(file).items()}, file)


def retrain(case: Case) -> None:
    """Changes the first stage as if another machine had trained it: different weights with the same settings."""
    change_weights(case.stage(1).checkpoint)
    change(case.stage(1).train_file, checkpoint=fingerprint(case.stage(1).checkpoint))


#: Fault -> how it is made, the commands that notice it, their messages, and the commands that work after doing what the
#: first message says.
DAMAGE = {
    "manifest cut": (
        lambda c: cut(c.path / "manifest.json"),
        *("evaluate report status judge", "manifest.json is damaged", "train evaluate"),
    ),
    "record of the first stage cut": (
        lambda c: cut(c.stage(1).train_file),
        *("train report status judge", "1_trace_fomc/train.json is damaged", "train evaluate"),
    ),
    "record of another stage": (
        lambda c: shutil.copy(c.stage(1).train_file, c.stage(2).train_file),
        *("train evaluate", "was written for {'stage': 1, 'task': 'trace_fomc'}, but is at stage 2", "train evaluate"),
    ),
    "weights cut": (
        lambda c: [cut(c.stage(2).checkpoint / "adapter_model.safetensors"), c.stage(2).eval_file(FIRST).unlink()],
        *("evaluate", "fingerprint differs", "train evaluate"),
    ),
    "first stage trained again": (
        retrain,
        *("train evaluate judge", "2_trace_numglue_ds is stale", "train evaluate judge"),
    ),
    "cell cut": (
        lambda c: cut(c.stage(1).eval_file(FIRST)),
        *("evaluate report", "trace_fomc.json is damaged", "evaluate"),
    ),
    "cell of another task": (
        lambda c: shutil.copy(c.stage(2).eval_file(FIRST), c.stage(2).eval_file(SECOND)),
        *("report", "was written for {'task': 'trace_fomc'}", "evaluate"),
    ),
    "samples changed": (
        lambda c: other_answer(c.stage(1).samples_file(FIRST)),
        *("report", "has changed since it was written", "evaluate"),
    ),
    "judged samples changed": (
        lambda c: other_answer(c.stage(1).samples_file(JUDGED)),
        *("judge", "has changed since it was written", "evaluate judge"),
    ),
    "judged samples cut": (
        lambda c: cut(c.stage(0).samples_file(JUDGED)),
        *("judge", f"{JUDGED}.jsonl, line", "evaluate judge"),
    ),
    "judgement cut": (
        lambda c: cut(judge_file(c.stage(1), JUDGED)),
        *("judge report", f"judge/{JUDGED}.json is damaged", "judge"),
    ),
    "judgement that does not add up": (
        lambda c: change(judge_file(c.stage(1), JUDGED), direct={"n": 7}),
        *("report", "judge again", "judge"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_doing_what_the_message_says_makes_the_command_work(case, damage):
    damaging, noticing, said, again = DAMAGE[damage]
    damaging(case)
    messages = [case.error(command) for command in noticing.split()]
    assert all(said in message for message in messages), messages
    follow(messages[0])
    for step in [*again.split(), "report"]:
        case(step)
    assert stale(case.run) == {} and (case.path / "report.md").exists()


@pytest.mark.parametrize(
    "command, argv, said",
    [
        ("evaluate", ["--engine-args", '{"dtype": "float64"}'], f"engine.dtype: '{DEFAULT_DTYPE}' -> 'float64'"),
        ("judge", ["--sampling", '{"temperature": 1}'], "temperature"),
    ],
)
def test_doing_what_the_message_on_settings_says_makes_the_command_work(case, command, argv, said):
    case.stage(2).eval_file(FIRST).unlink()  # what a stage evaluated by itself shares with the others
    message = case.error(command, *argv)
    assert said in message
    follow(message)
    case("evaluate", *(argv if command == "evaluate" else []))
    case(command, *argv)
    case("report")


def test_training_does_not_continue_from_a_damaged_checkpoint(case):
    change_weights(case.stage(1).checkpoint)
    case.stage(2).train_file.unlink()
    assert "1_trace_fomc/adapter has changed since the training of the stage" in case.error("train")


def test_a_damaged_external_checkpoint_is_refused_before_the_engine_starts(case, tmp_path, monkeypatch):
    copy = shutil.copytree(case.stage(1).checkpoint, tmp_path / "copy")
    command = ["evaluate", tmp_path / "theirs", "--model", case.options["model_name_or_path"], "--tasks", FIRST]
    command += ["--checkpoint", f"{FIRST}={copy}", "--backend", "hf", "--data", "demo", "--test-rows", "2"]
    begun = [*command[:1], tmp_path / "begun", *command[2:]]
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: (_ for _ in ()).throw(engine.EngineError("started")))
    assert "started" in error(*begun), "a run whose checkpoint is whole when it is recorded"
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("the engine was started"))
    cut(copy / "adapter_model.safetensors")
    for damaged in (command, ["evaluate", tmp_path / "begun"]):
        assert re.search(r"adapter_model.safetensors is missing or damaged .* Copy", error(*damaged))
    (copy / "adapter_model.safetensors").unlink()
    assert "no .safetensors file" in error(*command)
    assert "has no adapter_model.safetensors" in error("evaluate", tmp_path / "begun")
    assert not (tmp_path / "theirs").exists(), "nothing is recorded of what cannot be evaluated"


def test_a_base_model_or_data_changed_between_two_stages_are_refused(options, tiny_model, tmp_path):
    model, rows = (
        shutil.copytree(tiny_model, tmp_path / "base"),
        shutil.copytree(data.find_data("demo"), tmp_path / "d"),
    )
    weights, file = model / "model.safetensors", rows / "NumGLUE-ds" / "train.json"
    before, swapped = file.read_text(), []
    options |= {"model_name_or_path": str(model), "data": str(rows), "max_steps": 1, "train_rows": 8}

    class Swaps(CLTrainer):
        def end_stage(self):
            file.write_text(json.dumps(json.loads(before)[:-1]))
            swapped.append(self.stage.index)

    Swaps.__module__ = CLTrainer.__module__
    with pytest.raises(RunError, match="has different data than the run began with"):
        train(options, Swaps)
    file.write_text(before)
    run = Run.open(options["output_dir"])
    assert swapped == [1] and run.stages[1].is_trained and not run.stages[2].is_trained
    save_file({k: v + 1 for k, v in load_file(weights).items()}, model / "new", {"format": "pt"})
    (model / "new").replace(weights)
    assert "is not the base model that the run began with" in error("evaluate", run.path)
    with pytest.raises(RunError, match=r"model\.revision"):
        train(options)


def test_clocks_and_times_of_files_do_not_matter(case, monkeypatch, capsys):
    before = (case.path / "scores.csv").read_bytes()
    for i, file in enumerate(sorted(case.path.rglob("*"))):
        os.utime(file, (i * 7919 % 100 * 1e8,) * 2)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    case("train")
    assert capsys.readouterr().out.count("already trained") == 2
    assert evaluate.evaluate(case.run) == 0
    case("report")
    assert (case.path / "scores.csv").read_bytes() == before and "trained" in status.status(case.run)


# ---------------------------------------------------------------------------------- no room, no permission, no memory


class Room:
    """A disk that is full after this many written files."""

    def __init__(self, monkeypatch, files: int) -> None:
        self.left, sync = files, os.fsync

        def fsync(fd: int) -> None:
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                self.left -= 1
                if self.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(fd)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_at_any_write_loses_no_finished_work(case, monkeypatch):
    """Each attempt has room for no file, one, or a few."""
    scores = (case.path / "scores.csv").read_bytes()
    for stage in case.run.stages:
        shutil.rmtree(stage.path / "judge", ignore_errors=True)
    for stage in case.run.stages[1:]:
        stage.eval_file(FIRST).unlink()
    shutil.rmtree(case.path / "figures")
    judging.cache_file(case.path.parent).unlink()
    fulls = Counter()
    for command in ("evaluate", "judge", "report"):
        for attempt in range(30):
            kept = {p: p.read_bytes() for p in case.path.rglob("eval/*.json")}
            with monkeypatch.context() as patch:
                Room(patch, (0, 3, 99)[attempt] if command == "report" else (0, 1, 5)[attempt % 3])
                try:
                    case(command, *(["--concurrency", "1"] if command == "judge" else []))
                    break
                except SystemExit as e:
                    assert re.fullmatch("error: .*No space left on device.*make room and run.*", e.code), e.code
                    fulls[command] += 1
            assert all(p.read_bytes() == content for p, content in kept.items())
            assert not list(case.path.rglob("*.tmp"))
        else:
            pytest.fail(f"{command} never ended")
    assert fulls["evaluate"] >= 2 and fulls["judge"] >= 2 and fulls["report"] >= 2, fulls
    assert (case.path / "scores.csv").read_bytes() == scores


def test_a_read_only_folder_can_be_read(case, monkeypatch):
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if mode[0] in "wax" and case.path in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(os, "access", lambda *a: False)
    case("train")
    assert evaluate.evaluate(case.run) == 0
    assert "2 stages" in status.status(case.run)
    costly = ["trace_bench.evaluate.filling.start_engine", "trace_bench.report.write.sections"]
    costly += ["judges.judging.judge_jobs", "trainers.relearn._check_sources", "trainers.base.stages.Loop.train"]
    for work in costly:  # it is said before
        monkeypatch.setattr(work, lambda *a, **k: pytest.fail("time is spent"))
    for command in ("relearn", "evaluate", "report", "judge"):
        line = case.error(command)
        assert os.strerror(errno.EROFS) in line and "(writable)" in line and str(case.path) in line
        case.stage(1).eval_file(FIRST).unlink(missing_ok=True)
        for file in case.path.glob("stages/*/judge/*"):
            file.unlink()
    case.stage(2).train_file.unlink()
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        case("train")


def test_a_training_without_memory_says_what_to_change_and_keeps_its_stages(case):
    case.stage(2).train_file.unlink()

    class Hungry(CLTrainer):
        def training_step(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    Hungry.__module__ = CLTrainer.__module__
    with pytest.raises(SystemExit) as e:
        base.main(Hungry, CLConfig, command_line(case.options))
    assert re.fullmatch("error: Not enough memory: CUDA out .*per_device_train_batch_size.*", e.value.code)
    assert case.stage(1).is_trained


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")])
def test_an_evaluation_without_memory_keeps_its_cells(case, monkeypatch, problem):
    for stage in case.run.stages[1:]:
        stage.eval_file(FIRST).unlink()
    original = cells.evaluate_batch

    def hungry(plan, tasks, lm, stage, *args):
        if stage.index == 2:
            raise problem
        original(plan, tasks, lm, stage, *args)

    monkeypatch.setattr(cells, "evaluate_batch", hungry)
    assert "batch_size" in case.error("evaluate")
    assert [s.eval_file(FIRST).exists() for s in case.run.stages] == [True, True, False]


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("To serve at least one request with the models's max seq len (32768), (16.0 GiB KV cache is needed"),
        ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)"),
        torch.OutOfMemoryError("Tried to allocate 1 GiB"),
        MemoryError(),
    ],
)
def test_vllms_memory_errors_are_one_line_with_the_fix(problem):
    clear = pytest.raises(engine.EngineError, match=r"cannot start.*max_model_len.*gpu_memory_utilization")
    with clear, engine.starting_vllm():
        raise problem


class Limits(BaseModel):
    """As vLLM's configurations are."""

    max_num_seqs: PositiveInt


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (lambda: Limits(max_num_seqs=0), "ValidationError: max_num_seqs Input should be greater than 0"),
        (lambda: next(iter(())), r"StopIteration\)"),
        (lambda: torch.no_selective_scan, "AttributeError: .*no_selective_scan"),
    ],
)
def test_vllms_errors_on_unsupported_models_are_one_line_with_the_fix(start, said):
    clear = pytest.raises(engine.EngineError, match=rf"cannot serve this model here \({said}.*; otherwise use")
    with clear, engine.starting_vllm():
        start()


def test_an_ended_process_of_vllm_is_not_taken_for_a_lack_of_memory():
    """On a GPU the engine is a process of its own. vLLM then raises one and the same error, whatever the cause is."""
    with (
        pytest.raises(engine.EngineError, match=r"error of its process above.*If .*memory.*Otherwise use --backend hf"),
        engine.starting_vllm(),
    ):
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "float17"}, r"does not start with engine_args .*\"float17\".*: module .* 'float17'"),
        ({"batch_size": 0}, "batch_size=0 is not allowed: use a number"),
        ({"max_length": "x"}, "max_length='x' is not allowed: use a number"),
    ],
)
def test_arguments_that_transformers_refuses_are_one_line(arguments, said, tiny_model):
    with pytest.raises(engine.EngineError, match=said):
        engine.open_engine("hf", str(tiny_model), engine_args=arguments)


def test_other_errors_are_not_translated():
    with pytest.raises(TraceError, match="own"), engine.starting_vllm():
        raise TraceError("own")
    assert advice(ValueError("x"), "") is None and advice(FileNotFoundError(2, "x"), "") is None


def test_a_file_in_place_of_a_folder_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        one_line = pytest.raises(SystemExit, match=r"error: .*(name a different path|Use a shorter name)\.$")
        with one_line, ending.command("train"), locked(path, "train"):
            pass


# ------------------------------------------------------------------------------------------- going on within a stage


ACCUMULATED = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "train_rows": 32}
#: Method -> trainer, configuration, options, and the interrupted stage: 2 if the previous stage matters.
METHODS = {
    "full": (CLTrainer, CLConfig, {"use_peft": False, "learning_rate": 1e-3}, 1),
    "grouped": (
        CLTrainer,
        CLConfig,
        {"train_sampling_strategy": "group_by_length", "logging_strategy": "epoch", **ACCUMULATED},
        1,
    ),
    "ewc": (ewc.EWCTrainer, ewc.EWCConfig, {"ewc_rows": 4, "logging_steps": 3}, 2),
    "gem": (gem.GEMTrainer, gem.GEMConfig, {"memory_rows": 4}, 2),
    "olora": (olora.OLoRATrainer, olora.OLoRAConfig, {}, 2),
    "osf": (osf.OSFTrainer, osf.OSFConfig, {"use_peft": False, "learning_rate": 1e-3, "dtype": "float32"}, 2),
    "pp": (pp.PPTrainer, pp.PPConfig, {"prompt_tokens": 4, "prompt_mlp": 4}, 2),
    "sdft": (sdft.SDFTTrainer, sdft.SDFTConfig, {"sdft_tokens": 6, "sdft_ema": 0.5, "max_prompt_length": 64}, 1),
}
QUICK = ("grouped", "ewc", "sdft")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_a_stage_resumed_at_its_last_checkpoint_ends_in_the_same_bytes(options, tmp_path, capsys, method):
    """It is interrupted in the third epoch, with dropout. Optimizer, schedule and order of rows must be restored."""
    trainer, config, changes, stage = METHODS[method]
    options |= {"tasks": options["tasks"][:stage], "max_steps": 6, "lr_scheduler_type": "cosine", **changes}
    options |= {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(trainer, 5, stage), config)
    run = Run.open(options["output_dir"])
    assert not run.stages[stage - 1].attempt.exists()
    # The same from the beginning of the stage, without an interruption.
    shutil.copytree(run.path, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / run.stages[stage].attempt.relative_to(run.path))
    whole = train({**options, "output_dir": str(tmp_path / "whole"), "save_strategy": "no"}, trainer, config)
    assert "continues" not in capsys.readouterr().out
    train(options, trainer, config)
    assert "continues at step 4" in capsys.readouterr().out
    records = [read_json(r.stages[stage].train_file) for r in (whole, run)]
    assert records[0].pop("mean_loss") == pytest.approx(records[1].pop("mean_loss"), rel=1e-6)
    first, second = ({k: v for k, v in r.items() if k not in TIMES} for r in records)
    assert first == second, "the fingerprint of the checkpoint with them"
    for made in [*whole.stages[stage].method_state.glob("*"), *whole.stages[stage].checkpoint.glob("*.safetensors")]:
        assert made.read_bytes() == (run.path / made.relative_to(whole.path)).read_bytes()
    assert not list(run.path.rglob("checkpoint-*")) and not list(run.path.rglob("*.pt"))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "whole.json").unlink(), "continues at step 2"),
        (lambda folder: cut(folder / "whole.json"), "continues at step 2"),
        (lambda folder: cut(folder / "optimizer.pt"), "continues at step 2"),
        (lambda folder: (folder / "trained.safetensors").unlink(), "continues at step 2"),
        (lambda folder: of_other_processes(folder.parent), None),
    ],
)
def test_a_half_written_checkpoint_or_one_of_another_start_is_not_resumed_from(stopped, capsys, damage, said):
    damage(Run.open(stopped["output_dir"]).stages[1].attempt / "checkpoint-4")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, interrupted(CLTrainer, 2 if said else 0, stage=1))
    out = capsys.readouterr().out
    assert said in out if said else "continues" not in out


@pytest.fixture(scope="module")
def stopped_once(tiny_models, tmp_path_factory) -> dict:
    """A run that was stopped at step 5 of 6 of its only stage, with checkpoints of steps 2 and 4."""
    options = quick_options(tiny_models["bytes"], tmp_path_factory.mktemp("stopped") / "run")
    options |= {"tasks": [FIRST], "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("TRACE_DATA", "demo")
        train(options, interrupted(CLTrainer, 5, stage=1))
    attempt = Run.open(options["output_dir"]).stages[1].attempt
    assert sorted(p.name for p in attempt.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return options


@pytest.fixture
def stopped(stopped_once, tmp_path) -> dict:
    return {**stopped_once, "output_dir": str(shutil.copytree(stopped_once["output_dir"], tmp_path / "run"))}


def of_other_processes(attempt: Path) -> None:
    for file in attempt.glob("checkpoint-*/whole.json"):
        change(file, of={**read_json(file)["of"], "processes": 2})


def test_a_damaged_state_of_a_method_is_not_used(options):
    options |= {"max_steps": 1, "train_rows": 8}
    with pytest.raises(KeyboardInterrupt):
        train(options, interrupted(ewc.EWCTrainer, 0), ewc.EWCConfig)
    file = Run.open(options["output_dir"]).stages[1].method_state / "state.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file.with_name("new"))
    file.with_name("new").replace(file)
    with pytest.raises(RunError, match=r"1_trace_fomc/method_state has changed since the training"):
        train(options, ewc.EWCTrainer, ewc.EWCConfig)


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
    """The order of Python's sets differs between the processes."""
    found = []
    for seed in ("1", "2"):
        run = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", TWICE, *command_line({**options, "output_dir": run, "lora_dropout": 0.1})],
            cwd=ROOT,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
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
