"""Lost or hidden knowledge: relearning old tasks at the end of a run, answers with given first tokens, the report."""

import json
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from architectures import reload
from conftest import train
from method_runs import method
from safetensors.torch import load_file

from trace_bench import cli, ending, evaluate, metrics
from trace_bench.engine import models
from trace_bench.measures.hidden import share_interval, share_recovered
from trace_bench.report import Results
from trace_bench.report.relearn import sections
from trace_bench.report.tables import Table
from trace_bench.run import Run, RunError, read_json
from trace_tasks.data.files import write_json
from trace_tasks.errors import TraceError
from trace_tasks.tokens import prompt_ids
from trainers import relearn as module
from trainers.relearn import RelearnTrainer, relearn

PLACE = "relearn/4_rows_2_steps"


@pytest.fixture
def in_this_process(monkeypatch):
    """Evaluates in this process, instead of one of its own."""

    def run_child(words, environment):
        assert words[:3] == [sys.executable, "-m", "trace_bench"]
        cli.main(words[3:])
        AcceleratorState._reset_state()  # what the engine left
        return 0

    monkeypatch.setattr(ending, "run_child", run_child)


def table(run):
    """The rows of the last table of the section, by task."""
    tables = [block for block in sections(Results(run)) if isinstance(block, Table)]
    return {row[0]: dict(zip(tables[-1].header, row, strict=True)) for row in tables[-1].rows}


def text(run):
    return " ".join(block for block in sections(Results(run)) if isinstance(block, str))


def scores(run):
    """All measurements of the relearned tasks, without times."""
    files = sorted(run.path.glob("relearn/*/*/stages/*/eval/*.json"))
    return {
        str(f.relative_to(run.path)): [read_json(f)[k] for k in ("metrics", "checkpoint", "samples")] for f in files
    }


# ------------------------------------------------------------------------------------------------------------ measure


def test_share_recovered_is_the_regained_part_of_what_was_lost():
    assert share_recovered([0.8, 0.2, 0.65]) == pytest.approx(0.75)
    assert share_recovered([3.0, 7.0, 4.0]) == pytest.approx(0.75), "of errors, of which less is better"
    assert np.isnan(share_recovered([0.5, 0.5, 0.9])), "nothing was lost"
    assert share_recovered([[0.8, 0.2, 0.2], [1, 0, 1]]).tolist() == [0, 1]


def test_the_interval_of_the_share_recovered_covers_it_and_is_open_if_the_loss_is_uncertain():
    rng = np.random.default_rng(0)
    own, last = rng.normal(0.8, 0.2, 400), rng.normal(0.2, 0.2, 400)
    rows = np.stack([own, last, last + 0.5 * (own - last) + rng.normal(0, 0.3, 400)], axis=1)
    bootstrap = metrics.bootstrap_interval([rows], lambda R: share_recovered(R[..., 0]))
    assert share_interval(rows) == pytest.approx(bootstrap, abs=0.01)
    for n in (8, 40):
        drawn = rng.random((1000, n, 3)) < (0.9, 0.1, 0.6)  # rows that are right or wrong: five eighths come back
        found = np.array([share_interval(rows) for rows in drawn])
        low, high = found[~np.isnan(found[:, 0])].T
        assert 0.93 < np.mean((low <= 5 / 8) & (high >= 5 / 8)) < 0.97, n
    unsure = rng.random((40, 2))  # how much was lost; that half came back is certain
    unsure = np.column_stack([unsure, unsure[:, 1] + 0.5 + rng.normal(0, 0.01, 40)])
    for none in (unsure, rows * [1, 1, np.nan], np.zeros((40, 3)), rng.random((40, 3)), rows[:1]):
        assert np.isnan(share_interval(none)).all()


# ------------------------------------------------------------------------------------------------------------- relearn


def test_a_forgotten_task_comes_back_faster_than_the_base_model_learns_it(options, in_this_process):
    options |= {"use_peft": False, "max_steps": 25, "train_rows": 24, "test_rows": 16, "learning_rate": 5e-3}
    run = train({**options, "max_new_tokens": 2, "max_prompt_length": 24})
    evaluate.evaluate(run)
    relearn(run.path, 10, 8)
    own, last, back, control = (float(x) for x in list(table(run)["FOMC"].values())[1:5])
    assert last < own and last + 15 < back <= own + 20 and control + 15 < back
    assert not list(run.path.glob("relearn/*/*/stages/*/model")), "measured checkpoints go"
    losses = [read_json(f)["losses"][0]["loss"] for f in sorted(run.path.glob("relearn/*/*/stages/*/train.json"))]
    base, first = losses[0], read_json(run.stages[1].train_file)["losses"][0]["loss"]
    # How far apart the losses are depends on the machine's rounding.
    assert base == pytest.approx(first, rel=0.1) and abs(losses[1] - first) > 5 * abs(base - first)
    begins = [read_json(f)["begins_with"]["stage"] for f in sorted(run.path.glob("relearn/*/*/manifest.json"))]
    assert begins == ["0_base", run.stages[-1].name], "the control begins with the base model"


@pytest.mark.parametrize(
    ("name", "changes", "rank"), [("inclora", {}, 8), ("milora", {}, 8), ("merge", {"merge_rank": 6}, 6)]
)
def test_a_grown_adapter_learns_as_fast_as_the_control(name, changes, rank, options, in_this_process, monkeypatch):
    """The grown adapter is frozen below a new one of the run's rank and dropout. Both are saved."""
    run = train({**options, "lora_dropout": 0.1, "bf16": False, "dtype": "float32", **changes}, *method(name))
    evaluate.evaluate(run)
    file = "adapter_model.safetensors"
    last, seen = load_file(run.stages[-1].checkpoint / file), {}

    def end_stage(self):
        active = self.model.peft_config["default"]
        seen[self.start.name] = active.r, active.lora_dropout, sum(p.numel() for p in self.trained().values())
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            logits = self.model.eval()(input_ids=ids).logits
            folder = self.save_checkpoint()
            torch.testing.assert_close(reload(options["model_name_or_path"], folder)(input_ids=ids).logits, logits)
        if self.start.index:
            config, saved = models.adapter_config(folder), load_file(folder / file)
            assert config["r"] == rank + 4 and models.adapter_config(run.stages[-1].checkpoint)["r"] == rank
            for name, tensor in last.items():
                dim = 0 if "lora_A" in name else 1
                assert torch.equal(saved[name].narrow(dim, 0, rank), tensor)

    monkeypatch.setattr(RelearnTrainer, "end_stage", end_stage)
    relearn(run.path, 4, 2)
    control = seen.pop("0_base")
    assert control[:2] == (4, 0.1) and list(seen.values()) == [control]


def test_a_killed_and_resumed_relearning_equals_an_uninterrupted_one(run, in_this_process, monkeypatch):
    evaluate.evaluate(run)
    relearn(run.path, 4, 2)
    whole = scores(run)
    assert len(whole) == 2
    (run.path / PLACE).rename(run.path / "whole")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_alone", killed)  # trained, not measured
        with pytest.raises(KeyboardInterrupt):
            relearn(run.path, 4, 2)
    trained = run.path / PLACE / "last/stages/1_trace_fomc/train.json"
    before = trained.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(RelearnTrainer, "begin_stage", killed)  # measured; the control is not trained
        with pytest.raises(KeyboardInterrupt):
            relearn(run.path, 4, 2)
    assert trained.stat().st_mtime_ns == before and not (trained.parent / "adapter").exists()
    assert table(run)["FOMC"]["control"] == "–"
    relearn(run.path, 4, 2)
    assert scores(run) == whole
    monkeypatch.setattr(module, "train", killed)
    relearn(run.path, 4, 2)  # nothing is left to do
    monkeypatch.undo()
    (run.path / PLACE / "base/stages/1_trace_fomc/eval/trace_fomc.json").unlink()
    monkeypatch.setattr(module, "run_alone", killed)
    with pytest.raises(KeyboardInterrupt):
        relearn(run.path, 4, 2)  # its checkpoint is gone, so it is trained again
    assert (run.path / PLACE / "base/stages/1_trace_fomc/adapter").is_dir()


def test_relearning_uses_the_batch_of_all_processes_of_the_run(run, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def train(kind, config, model_args):
        raise Seen(config)

    monkeypatch.setattr(module, "train", train)
    write_json(run.path / "manifest.json", run.manifest | {"processes": 4})
    with pytest.raises(Seen) as seen:
        arguments = run.stages[-1], tmp_path / "relearned", 5, 7, {"settings": {"backend": "hf"}}
        module._train_and_measure(Run.open(run.path), *arguments)
    config = seen.value.args[0]
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 4)
    assert (config.train_rows, config.max_steps, config.replay_ratio) == (5, 7, None)


def test_relearning_of_different_weights_or_settings_is_left_out(run, in_this_process):
    def edit(file, **changes):
        file.write_text(json.dumps({**read_json(file), **changes}))

    evaluate.evaluate(run)
    relearn(run.path, 4, 2)
    stage = run.path / PLACE / "last/stages/1_trace_fomc"
    cell = read_json(stage / "eval/trace_fomc.json")
    assert table(run)["FOMC"]["after 4 rows"] != "–"
    edit(stage / "eval/trace_fomc.json", settings={**cell["settings"], "backend": "vllm"})
    assert "Left out" in text(run)
    with pytest.raises(RunError, match=r"different settings(.|\n)*backend: .vllm. -> .hf.(.|\n)*Remove it"):
        relearn(run.path, 4, 2)
    edit(stage / "eval/trace_fomc.json", settings=cell["settings"])
    assert "Left out" not in text(run)
    edit(run.path / PLACE / "last/manifest.json", begins_with={"stage": run.stages[2].name, "checkpoint": "another"})
    assert "Left out" in text(run)
    with pytest.raises(RunError, match=r"began with different weights .*Remove it"):
        relearn(run.path, 4, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "icl", "stages": []}, "no old tasks to relearn: .* method is icl"),
        ({"method": "single"}, "no old tasks to relearn"),
        ({"method": "joint", "stages": ["joint"]}, "no old tasks to relearn"),
        ({"tasks": ["trace_fomc"]}, "no old tasks to relearn"),
        ({"trains": "prompts"}, "soft prompts"),
        ({"checkpoints": {"v1": "somewhere"}}, "from elsewhere"),
        ({"config": {"train_rows": 5}}, "first 5 rows of each task; use at most 5"),
        ({}, "not measured at 1_trace_cstance. First run: trace-bench evaluate"),
    ],
)
def test_runs_that_cannot_be_relearned_are_refused_at_once(make, changes, words):
    run = make(np.full((4, 3), np.nan), **changes)
    with pytest.raises(TraceError, match=words):
        relearn(run.path, 10, 2)


def test_relearning_refuses_too_many_rows_and_untrained_stages(run):
    with pytest.raises(RunError, match=r"trace_fomc has [0-9]+ training rows; use at most"):
        module._check_sources(run, 10_000)
    run.stages[2].train_file.unlink()
    with pytest.raises(RunError, match="2_trace_numglue_ds: not trained yet"):
        relearn(run.path)


# -------------------------------------------------------------------------------------------------------- given tokens


def test_an_answer_continues_the_given_tokens(options, tiny_model):
    tasks = ["trace_fomc", "trace_meetingbank", "trace_numglue_ds"]
    run = train({**options, "tasks": tasks, "max_steps": 1, "test_rows": 3, "max_new_tokens": 6})
    assert evaluate.evaluate(run, cells="own", given=3) == 3 + 3 + 6
    assert evaluate.evaluate(run, cells="own", given=3) == 0
    name, stage = "trace_meetingbank.given3", run.stages[2]
    cell, samples = read_json(stage.eval_file(name)), stage.samples_file(name).read_text().splitlines()
    assert cell["n"] == len(samples) == 3 and cell["n_short"] == 0 and cell["settings"]["given"] == 3
    tokenizer, model = models.load_tokenizer(str(tiny_model)), models.load_model(str(tiny_model), stage.checkpoint)
    for row in map(json.loads, samples):
        given = tokenizer(row["target"]).input_ids[:3]
        ids = torch.tensor([prompt_ids(tokenizer, [row["prompt"]], 96)[0] + given])
        answer = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        assert row["response"] == tokenizer.decode([*given, *answer], skip_special_tokens=True)
        assert row["response"].startswith(row["target"][:3])
    letters = read_json(run.stages[3].eval_file("trace_fomc.given3"))
    assert (letters["n"], letters["n_short"]) == (0, 3) and letters["metrics"]["accuracy"]["value"] is None
    evaluate.evaluate(run)
    assert table(run).keys() == {"MeetingBank"} and table(run)["MeetingBank"]["rows"] == "3 of 3"
    assert "No score for FOMC" in text(run)


def test_given_tokens_need_an_old_task(make):
    run = make(np.full((4, 3), np.nan), method="single")
    with pytest.raises(RunError, match=r"--given 2: .* has no old tasks"):
        evaluate.evaluate(run, given=2)


def test_relearn_takes_ten_rows_and_ten_steps_by_default(monkeypatch):
    given = []
    monkeypatch.setattr(module, "relearn", lambda *words: given.append(words))
    cli.main(["relearn", "runs/mine"])
    cli.main(["relearn", "runs/mine", "--rows", "3", "--steps", "2"])
    assert given == [("runs/mine", 10, 10), ("runs/mine", 3, 2)]
