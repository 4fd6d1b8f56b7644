"""The promises of `CLTrainer` to methods: hooks around a step, saved tensors, replay, and written rows."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import train
from method_runs import method
from safetensors.torch import load_file

from trace_bench import evaluate
from trace_bench.run import read_json, read_jsonl
from trace_tasks.data import DataError
from trainers import base, gem, joint, replay, single
from trainers.base import progress, writing

TASKS = ["trace_fomc", "trace_numglue_ds"]


class AverageTrainer(base.CLTrainer):
    """Keeps a moving average of the trained parameters, and counts its steps."""

    counters = ("averaged",)

    def begin_stage(self):
        self.averaged = 0
        self.kept = {name: p.detach().clone() for name, p in self.trained().items()}

    def after_step(self):
        self.averaged += torch.tensor(1)
        for name, p in self.trained().items():
            self.kept[name].lerp_(p.detach(), 0.5)

    def end_stage(self):
        self.save_state({**self.kept, "steps": self.state.global_step})

    def record(self):
        return {"averaged": self.averaged}


#: Method -> the values in its paper or code, or ours if they have none; see the docstrings of the methods.
PUBLISHED = {
    "anchor": {"anchor_lambda": 0.1, "anchor_weight": "probability"},
    "der": {"der_lambda": 0.5, "der_top": 64, "replay_ratio": 0.1},
    "ewc": {"ewc_online": True, "ewc_gamma": 1.0},
    "gem": {"gem_margin": 0.5},
    "icl": {"num_fewshot": 6, "icl_prompt_length": 3584},
    "inflora": {"inflora_threshold": 0.95},
    "lfpt5": {
        **{"lfpt5_lm": 0.1, "lfpt5_kl": 0.1, "lfpt5_temperature": 0.7, "replay_ratio": 0.1},
        **{"prompt_tokens": 20, "virtual_tokens": 20},
    },
    "lwf": {"lwf_lambda": 1.0, "lwf_temperature": 2.0},
    "migu": {"migu_quantile": 0.7},
    "mofo": {"mofo_fraction": 0.15},
    "ogd": {"ogd_size": 200},
    "olora": {"olora_lambda": 0.5},
    "opr": {"replay_ratio": 0.01, "opr_temperature": 0.1},
    "rewrite": {"rewrite_temperature": 0.95, "rewrite_top_p": 0.7},
    "sdft": {"sdft_ema": 0.01},
    "seekr": {
        "replay_ratio": 0.01,
        "seekr_weight": 1000.0,
        "seekr_layers": 24,
        "seekr_heads": 128,
        "seekr_queries": 100,
    },
    "stm": {"stm_threshold": 2.5},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_defaults_of_a_method_are_those_of_its_publication(name):
    config = method(name)[1](output_dir="unused", use_cpu=True)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_tensors_of_a_method_survive_a_kill_within_a_stage(options, tmp_path, monkeypatch, caplog):
    options |= {"tasks": TASKS[:1], "max_steps": 6, "save_strategy": "steps", "save_steps": 2}

    class Killed(AverageTrainer):
        def after_step(self):
            super().after_step()
            if self.state.global_step == 4:  # during the fifth step; the checkpoint after the fourth is complete
                raise KeyboardInterrupt

    Killed.__module__ = AverageTrainer.__module__
    whole = train({**options, "output_dir": str(tmp_path / "whole"), "save_strategy": "no"}, AverageTrainer)
    with pytest.raises(KeyboardInterrupt):
        train(options, Killed)
    steps = []

    class Resumed(AverageTrainer):
        counters = ()

        def after_step(self):
            super().after_step()
            steps.append(self.state.global_step)

    Resumed.__module__ = AverageTrainer.__module__
    monkeypatch.setattr(base.checkpoints, "method_code", lambda trainer: "another")
    run = train(options, Resumed)
    assert "has changed since step 4 of stage 1_trace_fomc, so the stage mixes two methods" in caplog.text
    assert len(steps) == 2, "it went on at step 4"
    a, b = (read_json(r.stages[1].train_file) for r in (whole, run))
    assert (a["averaged"], a["tokens"]) == (b["averaged"], b["tokens"]), "also those of the classes that it extends"
    assert a["averaged"] == 6
    a, b = (load_file(r.stages[1].method_state / "state.safetensors") for r in (whole, run))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    (weights,) = whole.stages[1].checkpoint.glob("*.safetensors")
    assert not any(torch.equal(t, a[k]) for k, t in load_file(weights).items() if k in a), "an average of the weights"


def test_hooks_are_called_in_the_order_of_a_step(options):
    seen = []

    class Spy(base.CLTrainer):
        def look(self, name):
            first = list(self.trained().values())[-1]  # a matrix B of the adapter: its gradient is not zero at first
            seen.append((name, first.detach().clone(), first.grad.norm().item()))

        def adjust_gradients(self, model):
            self.look("adjust")

        def before_step(self):
            self.look("before")

        def after_step(self):
            self.look("after")

    train({**options, "tasks": TASKS[:1], "max_steps": 2, "max_grad_norm": 1e-6}, Spy)
    assert [name for name, *_ in seen] == ["adjust", "before", "after"] * 2
    (_, p0, g0), (_, p1, g1), (_, p2, _) = seen[:3]
    assert g1 < 1e-5 < g0, "before the step gradients are clipped"
    assert torch.equal(p0, p1) and not torch.equal(p1, p2)


def test_a_training_resumed_within_an_epoch_has_the_order_of_that_epoch():
    told = []
    watched = SimpleNamespace(grouped=SimpleNamespace(set_epoch=told.append))
    for epoch in (None, 1.0, 2.5):
        progress._ProgressFile(watched).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert told == [0, 1, 2]


def test_a_row_without_answer_tokens_does_not_count_in_the_loss():
    trainer = object.__new__(base.CLTrainer)
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, -100], [-100, -100, -100, 7]])
    losses = torch.tensor([1.0, 3.0, 5.0])
    assert trainer.weighted(losses, {"labels": labels}, "rows") == (2 + 5, 2)
    assert trainer.weighted(losses, {"labels": labels}, "tokens") == (9, 3)


@pytest.mark.parametrize("full", [False, True])
def test_trained_parameters_that_would_not_be_saved_are_refused(options, full):
    """The next stage would not have them, and the evaluation would measure a different model."""

    class Beside(base.CLTrainer):
        def stage_model(self, stage):
            model = super().stage_model(stage)
            if full:
                model.gate = torch.nn.Linear(2, 2)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or "norm" in name)
            return model

    class Saved(Beside):
        def save_checkpoint(self):
            return super().save_checkpoint()

    full_options = {"use_peft": False, "learning_rate": 1e-3} if full else {}
    options |= {"tasks": TASKS[:1], "max_steps": 1, **full_options}
    lost = r"2 trained parameters, such as gate.weight" if full else r"\d trained parameters, such as base_model.*norm"
    with pytest.raises(base.ConfigError, match=lost):
        train(options, Beside)
    train(options, Saved)  # a method that writes its own checkpoints may train them


def test_a_record_with_odd_values_does_not_lose_a_trained_stage(options, caplog):
    class Recorder(base.CLTrainer):
        def record(self):
            odd = {"total": torch.ones(2).sum(), "rows_of": {3: np.arange(2)}, "ratio": float("nan")}
            return {**odd, "seen": {"b", "a"}, "where": Path("x"), "losses": [1.0], "task": "mine"}

    run = train({**options, "tasks": TASKS[:1], "max_steps": 2}, Recorder)
    found = read_json(run.stages[1].train_file)
    kept = {key: found[key] for key in ("total", "rows_of", "ratio", "seen", "where", "task")}
    assert kept == {
        **{"total": 2.0, "rows_of": {"3": [0, 1]}, "ratio": None, "seen": ["a", "b"], "where": "x"},
        **{"task": TASKS[0]},
    }
    assert len(found["losses"]) == 2 and "left out losses, task of" in caplog.text
    run.stages[1].train_file.unlink()
    Recorder.record = lambda self: None
    Recorder.prepare = classmethod(lambda cls, config, model_args: None)
    assert train({**options, "tasks": TASKS[:1], "max_steps": 2}, Recorder).stages[1].is_trained
    assert "record() returned a NoneType, not a dict" in caplog.text


def test_a_method_can_read_its_state_when_it_chooses_rows(options):
    found = []

    class Chooser(base.CLTrainer):
        def stage_dataset(self, stage):
            found.append(self.load_state())
            return super().stage_dataset(stage)

        def end_stage(self):
            self.save_state({"rows": torch.tensor([self.stage.index])})

    train({**options, "max_steps": 1}, Chooser)
    assert found == [{}, {"rows": torch.tensor([1])}]


# -------------------------------------------------------------------------------------------------------------- replay


def test_a_method_without_a_memory_can_replay_rows(options, tmp_path):
    rows = {}

    class Spy(base.CLTrainer):
        def begin_stage(self):
            rows[self.stage.index] = self.train_dataset["input_ids"]

    class Own(replay.ReplayTrainer):
        def begin_stage(self):
            rows[self.stage.index, "replay"] = self.train_dataset["input_ids"]

    run = train({**options, "replay_ratio": 0.25}, Spy)
    assert {key: run.manifest["config"][key] for key in ("replay_ratio",)} == {"replay_ratio": 0.25}
    assert len(rows[1]) == 16 and len(rows[2]) == 16 + 4
    assert read_json(run.stages[2].train_file)["replayed"] == {run.tasks[0]: 4}
    mixed = {"replay": "mixed", "replay_ratio": 0.25, "alignment_data": "none", "output_dir": str(tmp_path / "mixed")}
    train({**options, **mixed}, Own, replay.ReplayConfig)
    assert rows[2] == rows[2, "replay"], "the same rows as the method's that is named after it"


def test_replay_is_refused_for_methods_that_choose_rows_and_only_recorded_if_set(options):
    for trainer, config in (
        (gem.GEMTrainer, gem.MemoryConfig),
        (joint.JointTrainer, joint.JointConfig),
        (single.SingleTrainer, single.SingleConfig),
    ):
        with pytest.raises(base.ConfigError, match=r"replay_ratio=0.1 is not allowed: \w+ itself chooses"):
            train({**options, "replay_ratio": 0.1}, trainer, config)
    with pytest.raises(base.ConfigError, match="replay_choice='best' is not allowed: use first or random"):
        base.CLConfig(output_dir="x", replay_choice="best")
    assert not {"replay_ratio", "replay_choice"} & base.CLConfig(output_dir="x").manifest().keys()
    assert replay.ReplayConfig(output_dir="x").manifest()["replay_ratio"] == 0.1


def test_an_alignment_set_must_be_named_if_the_tasks_have_no_trace_data():
    with pytest.raises(DataError, match="alignment_data is not set"):
        replay.alignment_rows(SimpleNamespace(alignment_data=None, tasks=["mine"], data=None))


# -------------------------------------------------------------------------------------------------------- written rows


@pytest.mark.slow  # the model writes in its own process
def test_a_stage_can_train_on_answers_of_the_previous_model(options, monkeypatch, request):
    """The answers equal those of the evaluation. They are written once, and again only for different prompts."""
    run = train({**options, "max_new_tokens": 6, "max_steps": 8, "tasks": TASKS})
    evaluate.evaluate(run, stages=[0, 1])
    samples = read_jsonl(run.stages[1].samples_file(TASKS[0]))
    rows = [(row["prompt"], "not read") for row in samples]
    asked, answers = [], []

    class Writer(base.CLTrainer):
        def stage_dataset(self, stage):
            if stage.index == 2:
                found = self.answers("own", self.previous, {TASKS[0]: [prompt for prompt, _ in rows]})
                answers.append([answer.text for (answer,) in found[TASKS[0]]])
            return super().stage_dataset(stage)

    Writer.__module__ = base.CLTrainer.__module__
    alone = writing.run_alone
    monkeypatch.setattr(writing, "run_alone", lambda words: asked.append(words) or alone(words))
    for _ in range(2):
        run.stages[2].train_file.unlink()
        train({**options, "max_new_tokens": 6, "max_steps": 8, "tasks": TASKS}, Writer)
    assert answers == [[row["response"] for row in samples]] * 2 and any(answers[0])
    assert len(asked) == 1, "the second attempt finds what the first one wrote"
    here = request.getfixturevalue("written_here")
    file = run.stages[2].path / "written" / "own_trace_fomc.json"
    assert [p.name for p in file.parent.iterdir()] == ["own_trace_fomc.json"]
    file.write_text(json.dumps(read_json(file))[:-9])  # damaged
    rows.pop()
    run.stages[2].train_file.unlink()
    train({**options, "max_new_tokens": 6, "max_steps": 8, "tasks": TASKS}, Writer)
    assert len(here) == 1 and answers[2] == answers[0][:-1]


def test_an_engine_that_cannot_write_answers_ends_the_run_before_training(options, monkeypatch):
    class Writer(base.CLTrainer):
        def stage_dataset(self, stage):
            self.answers("own", self.previous, {TASKS[0]: ["a prompt"]})
            return super().stage_dataset(stage)

    monkeypatch.setattr(writing, "run_alone", lambda words: 1)
    with pytest.raises(base.stages.RunError, match=re.escape("0_base could not answer the 1 prompts of trace_fomc")):
        train({**options, "tasks": TASKS[:1]}, Writer)


@pytest.mark.parametrize(
    "begin, said",
    [
        (lambda self: setattr(self, "seen", []), "counters has seen, which is a list: use only finite numbers"),
        (lambda self: None, "counters has seen, which is a NoneType: .*set them in begin_stage"),
        (lambda self: setattr(self, "seen", float("inf")), "counters has seen, which is inf: use only finite numbers"),
        (lambda self: self.__dict__.update(seen=0, kept={"n": 0}), "kept has n, which is a int: use only tensors"),
    ],
)
def test_a_counter_that_is_no_number_and_kept_values_that_are_no_tensors_are_refused(options, begin, said):
    """Otherwise a checkpoint within the stage could not be written, or training could not resume from it."""

    class Listing(base.CLTrainer):
        counters = ("seen",)
        begin_stage = begin

    Listing.__module__ = base.CLTrainer.__module__
    with pytest.raises(base.ConfigError, match=said):
        train(options, Listing, base.CLConfig)


def test_what_a_method_sets_in_its_settings_lasts_for_one_stage(options):
    """After a kill the process begins with the settings of the run."""

    class Halving(base.CLTrainer):
        def stage_args(self, stage):
            self.config.learning_rate /= 2
            self.model_args.lora_r += 1
            ranks.append(self.model_args.lora_r)
            return super().stage_args(stage)

    ranks = []
    run = train({**options, "max_steps": 1}, Halving)
    assert ranks == [options["lora_r"] + 1] * 2
    rates = [read_json(stage.train_file)["losses"][0]["learning_rate"] for stage in run.stages[1:]]
    assert rates == [options["learning_rate"] / 2] * 2


@pytest.mark.parametrize("weights", ["rows", "tokens"])
def test_a_loss_without_the_items_of_the_step_is_refused_where_it_would_be_scaled(options, weights):
    class Plain(base.CLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs, return_outputs)

    options |= {"tasks": TASKS[:1], "max_steps": 1, "loss_weights": weights}
    train({**options, "output_dir": options["output_dir"] + "1"}, Plain)
    with pytest.raises(base.ConfigError, match="gradient_accumulation_steps=2 would multiply the gradient"):
        train({**options, "gradient_accumulation_steps": 2}, Plain)


def test_a_method_that_gives_the_step_no_items_takes_the_mean_of_its_micro_batches(options):
    class Means(base.CLTrainer):
        def get_batch_samples(self, *args):
            return super().get_batch_samples(*args)[0], None

    options |= {"tasks": TASKS[:1], "max_steps": 2, "gradient_accumulation_steps": 2, "bf16": False}
    own, ours = (
        train({**options, "output_dir": options["output_dir"] + t.__name__}, t) for t in (Means, base.CLTrainer)
    )
    own, ours = (load_file(next(run.stages[1].checkpoint.glob("*.safetensors"))) for run in (own, ours))
    assert all(torch.allclose(own[name], ours[name], atol=1e-6) for name in ours)


def test_a_checkpoint_where_nothing_would_find_it_leaves_the_stage_untrained(options):
    class Own(base.CLTrainer):
        def save_checkpoint(self):
            self.change(super().save_checkpoint())

    options |= {"tasks": TASKS[:1], "max_steps": 1}
    for change, said in (
        (lambda self, folder: folder.rename(folder.parent / "merged"), "left no checkpoints of stage 1_trace_fomc"),
        (lambda self, folder: (folder.parent / "model").mkdir(), "left 2 checkpoints of stage 1_trace_fomc"),
    ):
        Own.change = change
        with pytest.raises(base.stages.RunError, match=said):
            train(options, Own)
        assert not (Path(options["output_dir"]) / "stages/1_trace_fomc/train.json").exists()
    Own.change = lambda self, folder: None
    assert train(options, Own).stages[1].checkpoint.name == "adapter", "it need not return the folder"


@pytest.mark.parametrize(
    "hook, change, said",
    [
        ("stage_model", lambda model: model.requires_grad_(False), "without trained parameters"),
        ("stage_model", lambda model: model.merge_and_unload().requires_grad_(True), "without an adapter"),
        ("stage_dataset", lambda rows: rows.select([]), "returned no rows for stage 1_trace_fomc"),
        ("task_texts", lambda rows: rows[:0], "returned no rows for stage 1_trace_fomc"),
    ],
)
def test_a_hook_that_leaves_nothing_to_train_or_save_is_refused_before_the_first_step(options, hook, change, said):
    class Empty(base.CLTrainer):
        def begin_stage(self):
            raise AssertionError

    setattr(Empty, hook, lambda self, *args: change(getattr(base.CLTrainer, hook)(self, *args)))
    with pytest.raises((base.ConfigError, base.stages.RunError), match=said):
        train(options, Empty)


def test_options_of_a_class_that_is_no_dataclass_are_refused(options):
    class Forgotten(base.CLConfig):
        strength: float = base.option(0.5, "a Field, not a number")

    with pytest.raises(base.ConfigError, match="Forgotten would not be read: put @dataclass above"):
        train(options, config=Forgotten)


def test_a_default_without_a_type_is_refused(options):
    """A dataclass leaves it out, so the method would train with the default of the class that it extends."""

    @dataclass
    class Untyped(base.CLConfig):
        weight_decay = 0.5

    with pytest.raises(base.ConfigError, match=r"Untyped sets weight_decay without a type.* weight_decay: TYPE = 0\.5"):
        train(options, config=Untyped)
