"""The methods: each can train and resume, and does what its paper says."""

import importlib
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import make_base
from conftest import SHARED, load_merged, stop_at, train
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trace_bench import evaluate, report
from trace_bench.packaged import methods
from trace_bench.run import Run, RunError, read_json
from trace_tasks import data
from trace_tasks.data.files import write_json
from trainers.base import CLConfig, CLTrainer, ConfigError, stages

THREE = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = {"bf16": False, "lora_dropout": 0.0, "dtype": "float32"}
TRAINING = [m for m in methods() if m != "icl"]


def method(name: str) -> tuple[type[CLTrainer], type[CLConfig]]:
    """The trainer and the config of a method's file."""
    module = importlib.import_module(f"trainers.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    trainers = [v for v in own if issubclass(v, CLTrainer)]
    configs = [v for v in own if issubclass(v, CLConfig)]
    if not configs:
        configs = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, CLConfig)][-1:]
    return (trainers or [CLTrainer])[0], configs[0]


def as_method(spy: type[CLTrainer]) -> type[CLTrainer]:
    """Gives a spy the module of its trainer, so that the manifest has the same method."""
    spy.__module__ = spy.__base__.__module__
    return spy


def small(options: dict, name: str, many: int = 2, **changes) -> dict:
    """Options for a method on a few tasks, with epochs instead of steps for methods that need them."""
    own = {
        "freeze": {"freeze_layers": 1},
        "hft": {"use_peft": False, "learning_rate": 1e-3},
        "joint": {"max_steps": -1, "num_train_epochs": 1.0},
        "replay": {"max_steps": -1, "num_train_epochs": 1.0, "alignment_rows": 5},
        "ogd": {"ogd_rows": 4, "ogd_size": 6},
        "osf": {"use_peft": False, "learning_rate": 1e-4},
        "pp": {"prompt_tokens": 4},
        "lfpt5": {"prompt_tokens": 4, "max_answer_length": 24},
        "seekr": {"attn_implementation": "eager", "replay_ratio": 0.25, "seekr_heads": 3, "seekr_queries": 20},
        "opr": {"replay_ratio": 0.5},
        "sdft": {"sdft_tokens": 6},
    }
    return {**options, "tasks": THREE[:many], "max_steps": 2, **own.get(name, {}), **changes}


@pytest.mark.parametrize("name", methods())
def test_a_method_checks_a_model_given_by_name_like_one_given_by_folder(name, options, tiny_model, monkeypatch):
    """SmolLM2-135M-Instruct is a name that only `resolve_model` knows."""

    class Prepared(Exception):
        pass

    def stop(*args):
        raise Prepared

    monkeypatch.setattr(stages.models, "resolve_model", {"a-name": str(tiny_model)}.__getitem__)
    monkeypatch.setattr(stages, "_manifest", lambda *args: {})
    monkeypatch.setattr(stages.preflight, "check_launch", stop)
    with pytest.raises(Prepared):
        train({**small(options, name), "model_name_or_path": "a-name"}, *method(name))


def weights(run: Run, stage: int) -> dict[str, torch.Tensor]:
    (file,) = run.stages[stage].checkpoint.glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def probe(options, name: str, stage: int, look, **changes):
    """Trains up to a stage and returns the result of `look` at its first step, before the gradient is adjusted."""
    trainer, config = method(name)
    seen = []

    class Probe(trainer):
        def adjust_gradients(self, model):
            if self.stage.index == stage and not seen:
                seen.append(look(self, super().adjust_gradients))
            else:
                super().adjust_gradients(model)

    train(small(options, name, stage, **changes), as_method(Probe), config)
    return seen[0]


def same_step(name: str, options, tmp_path, splits, base=None, many=2, atol=2e-6, first=(), **changes):
    """Takes one step in the last stage with each of two splits of its rows, and checks that the gradients are equal.

    Args:
        name: The method.
        options: The options of the run.
        tmp_path: The folder of the runs.
        splits: Pairs of (batch size, accumulation).
        base: A spy on the trainer.
        many: The number of stages. In earlier stages all rows are one batch in the first split; the steps are the same.
        atol: The tolerance for `assert_close`.
        first: Changed options of the first run only.
        **changes: Changed options of both runs.

    Returns:
        The second run, and the gradients of the first one.
    """
    trainer, config = method(name)
    gradients = []
    for batch, accumulation in splits:

        class Spy(as_method(base) if base else trainer):
            def adjust_gradients(self, model):
                super().adjust_gradients(model)
                if self.stage.index == many:
                    gradients.append({n: p.grad.clone() for n, p in self.trained().items() if p.grad is not None})

        step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": accumulation}
        step |= {"per_device_train_batch_size": batch, "output_dir": str(tmp_path / f"{batch}")}
        run = train(
            small(options, name, many, **step | changes | dict(() if gradients else first)), as_method(Spy), config
        )
    assert len(gradients) == 2 and gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=5e-3, atol=atol)
    return run, gradients[0]


@cache
def made(config: type[CLConfig], **changes) -> CLConfig:
    return config(output_dir="x", **changes)


def unbuilt(name: str, **changes) -> CLTrainer:
    """A method's trainer that has only its configuration."""
    trainer, config = method(name)
    instance = object.__new__(trainer)
    instance.config = made(config, **changes)
    return instance


# ------------------------------------------------------------------------------------------------------ every method


#: The measured cells of methods that do not measure exactly the seen tasks, and of one whose adapter is a soft prompt.
EVALUATED = {"single": np.eye(2), "joint": np.ones((1, 2)), "pp": np.tril(np.ones((2, 2)))}


@pytest.mark.usefixtures("written_here")
@pytest.mark.parametrize("name", TRAINING)
def test_a_method_killed_and_resumed_ends_in_the_same_bytes(name, options):
    trainer, config = method(name)
    options = small(options, name, test_rows=1, max_new_tokens=2)
    run = train(options, trainer, config)
    last = run.stages[-1]

    def left():
        files = [*last.checkpoint.glob("*.safetensors"), *last.method_state.glob("*.safetensors")]
        return {f.name: f.read_bytes() for f in files}

    whole = left()
    assert whole and last.checkpoint.name == ("model" if name in ("hft", "osf") else "adapter")
    last.train_file.unlink()
    with pytest.raises(KeyboardInterrupt):
        train(options, stop_at(last.index, trainer), config)
    assert not last.is_trained and not (last.path / "adapter").exists()
    train(options, trainer, config)
    assert left() == whole
    if name in EVALUATED:
        evaluate.evaluate(run)
        R = report.Results(run).R
        assert not np.isnan(R[0]).any() and (np.isnan(R[1:]) == (EVALUATED[name] == 0)).all()


@pytest.mark.parametrize(
    ("name", "change", "record"),
    [
        *(("anchor", {"anchor_weight": "one", "anchor_lambda": 0.0, "use_peft": lora}, {}) for lora in (True, False)),
        ("freeze", {"freeze_from": 9}, {"frozen_parameters": 0}),
        ("migu", {"migu_quantile": 0.0}, {"masked_units": 0}),
        ("mofo", {"mofo_fraction": 1.0}, {"moved_share": 1}),
        ("stm", {"stm_threshold": 1e30}, {"masked_share": 0}),
    ],
)
def test_a_method_that_does_nothing_is_sequential_to_the_byte(name, change, record, options, tmp_path):
    plain = {"output_dir": str(tmp_path / "plain"), "use_peft": change.get("use_peft", True)}
    sequential = train(small(options, "sequential", **plain), *method("sequential"))
    run = train(small(options, name, **change), *method(name))
    assert all(same(weights(sequential, stage), weights(run, stage)) for stage in (1, 2))
    found = read_json(run.stages[2].train_file)
    assert "divergence" not in found and {key: found[key] for key in record} == record


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *((name, False) for name in ("lwf", "gem", "anchor")),
        *((name, True) for name in ("ewc", "agem", "anchor", "olora", "inclora", "nlora", "milora", "inflora")),
    ],
)
def test_the_gradient_is_the_same_for_different_batch_sizes_and_accumulation(name, lora, options, tmp_path):
    """Compares the method's gradient for 1 x 8 and 4 x 2 rows, of adapters or of all parameters."""
    own = {"gem": {"memory_rows": 8}, "agem": {"memory_rows": 8}, "anchor": {"anchor_lambda": 2.0}}.get(name, {})
    run, _ = same_step(name, options, tmp_path, ((8, 1), (2, 4)), **EXACT, **own, use_peft=lora, train_rows=8)
    assert run.stages[2].checkpoint.name == ("adapter" if lora else "model")
    assert not same(weights(run, 1), weights(run, 2))


@pytest.mark.parametrize("weights", ["rows", "tokens"])
def test_the_weights_of_rows_or_tokens_do_not_depend_on_the_split_of_a_batch(weights, options, tmp_path):
    """Compares a step's gradient with that of the losses of its single rows, with answers of 2 to 180 tokens."""
    trainer, config = method("joint")
    splits = {"8 x 1": (9, 1, "random"), "1 x 9": (1, 9, "random"), "3 x 3, by length": (3, 3, "group_by_length")}
    for name, (batch, accumulation, order) in splits.items():
        pairs = []

        class Spy(trainer):
            def adjust_gradients(self, model, pairs=pairs):
                seen = {n: p.grad.clone() for n, p in self.trained().items()}
                self.model.zero_grad()
                items = 0
                for row in self.batches(self.train_dataset, 1):
                    weight = int((row["labels"] != -100).sum()) if weights == "tokens" else 1
                    (self.model(**row).loss * weight).backward()  # transformers' own loss, of one row
                    items += weight
                pairs += [(seen[n], p.grad / items) for n, p in self.trained().items()]

        changes = {"train_rows": 3, "max_answer_length": 180, "loss_weights": weights, "max_steps": 1}
        changes |= {"tasks": ["trace_fomc", "trace_py150", "trace_meetingbank"], "output_dir": str(tmp_path / name)}
        changes |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run = train({**options, **EXACT, **changes, "train_sampling_strategy": order}, as_method(Spy), config)
        assert read_json(run.stages[1].train_file)["rows"] == 9
        for seen, wanted in pairs:
            torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "nothing"),
    [
        ("lwf", {"lwf_lambda": 1e-30}),  # with 0 it would have no teacher
        ("anchor", {"anchor_lambda": 0.0, "anchor_weight": "one"}),
    ],
)
def test_the_loss_of_a_method_includes_the_router_loss_of_a_mixture_of_experts(name, nothing, options, tmp_path):
    losses = []

    class Both(method(name)[0]):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ours = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            plain = CLTrainer.compute_loss(self, model, dict(inputs), return_outputs, num_items_in_batch)
            losses.append((ours.item(), plain.item(), self.router_loss.item()))
            return ours

    base = make_base("mixtral", tmp_path / "moe")
    changes = {"model_name_or_path": str(base), "lora_target_modules": ["q_proj", "v_proj"], **nothing}
    train({**small(options, name), **EXACT, **changes}, as_method(Both), method(name)[1])
    assert len(losses) == 4, "two steps of two stages, with a teacher in the second one"
    for ours, plain, router in losses:
        assert ours == pytest.approx(plain, rel=1e-5) and router > 0.001


def test_the_gradient_on_other_rows_includes_the_router_loss_of_a_mixture_of_experts(options, tmp_path):
    seen = []

    class Look(CLTrainer):
        def end_stage(self):
            rows = self.train_dataset.select(range(6))
            found, (batch,) = self.loss_gradient(rows), self.batches(rows)
            self.current_gradient_accumulation_steps = 1
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, batch, num_items_in_batch=6)
            wanted = torch.autograd.grad(loss, list(self.trained().values()))
            seen.append(self.router_loss.item())
            for one, other in zip(found.values(), wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)

    base = make_base("mixtral", tmp_path / "moe")
    changes = {"model_name_or_path": str(base), "lora_target_modules": ["q_proj", "v_proj"], "max_steps": 1}
    train({**options, **EXACT, **changes, "tasks": THREE[:1]}, Look)
    assert seen[0] > 0.001


def flattened(architecture, layers, options, tmp_path):
    """Options of a model in which the named layers get the positions of a batch as one list."""
    base = make_base(architecture, tmp_path / architecture)
    return {**options, **EXACT, "model_name_or_path": str(base), "lora_target_modules": layers}


@pytest.mark.parametrize("name", ["ewc", "ogd"])
def test_row_gradients_are_right_in_layers_that_get_all_positions_as_one_list(name, options, tmp_path):
    trainer, config = method(name)

    class Look(trainer):
        def end_stage(self):
            self.model.eval()  # without dropout
            found = {}
            for parameter, gradients in self.row_gradients(self.train_dataset, lambda logits, *_: logits.logsumexp(-1)):
                found[parameter] = found.get(parameter, 0) + gradients.sum(0)
            wanted = dict.fromkeys(found, 0)
            for batch in self.batches(self.train_dataset, 1):
                with self.compute_loss_context_manager():
                    total = self.answer_logits(self.model, batch)[0].logsumexp(-1).sum()
                for parameter, p in zip(wanted, torch.autograd.grad(total, list(self.trained().values())), strict=True):
                    wanted[parameter] += p
            for parameter, gradient in wanted.items():
                torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-4)
            super().end_stage()

    run = train(small(flattened("opt", ["q_proj", "fc1"], options, tmp_path), name), as_method(Look), config)
    assert run.stages[2].is_trained


def test_row_gradients_recognise_a_layer_that_is_called_twice_or_gets_a_list():
    one, layer = unbuilt("ewc"), torch.nn.Linear(2, 2)
    one.batches, one.compute_loss_context_manager = lambda rows: [{}], nullcontext
    for shapes, plain in (([(1, 5, 2)], True), ([(5, 2)], False), ([(1, 5, 2)] * 2, False), ([], True)):
        one.model, one.answer_logits = None, lambda model, batch, shapes=shapes: [layer(torch.ones(s)) for s in shapes]
        assert one._see_rows({"layer": layer}, None) is plain


def test_ogd_trains_a_model_with_parameters_that_no_text_reaches(options):
    """An example is the vision tower of a model for pictures and text, which gets adapters by name."""
    trainer, config = method("ogd")
    unseen = []

    class Blind(trainer):
        def row_gradients(self, rows, value):
            unseen.append(next(iter(self.trained())))
            yield from ((name, g) for name, g in super().row_gradients(rows, value) if name != unseen[0])

        def adjust_gradients(self, model):
            self.trained()[next(iter(self.trained()))].grad = None
            super().adjust_gradients(model)

    run = train(small(options, "ogd"), as_method(Blind), config)
    state = load_file(run.stages[2].method_state / "state.safetensors")
    assert not state[unseen[0]].any() and sum(bool(rows.any()) for rows in state.values()) == len(state) - 1


def test_osf_keeps_a_direction_of_a_layer_with_one_output_and_needs_a_layer_to_train(options, tmp_path):
    moe = flattened("qwen2_moe", None, options, tmp_path)
    run = train(small({k: v for k, v in moe.items() if k != "lora_target_modules"}, "osf"), *method("osf"))
    assert run.stages[2].is_trained
    gpt2 = flattened("gpt2", None, options, tmp_path) | {"output_dir": str(tmp_path / "gpt2_run")}
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layers that PEFT's OSF can decompose"):
        train(small({k: v for k, v in gpt2.items() if k != "lora_target_modules"}, "osf"), *method("osf"))


def test_the_default_weight_of_the_loss_is_by_rows():
    assert {made(method(name)[1]).loss_weights for name in methods()} == {"rows"}
    for change in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        CLConfig(output_dir="x", loss_weights="tokens", **change)


#: Changes of the options. The second one stands for a launch that divides the model.
FULL, FSDP = {"use_peft": False}, {"FSDP": True}
OWN_LOSS = ["agem", "anchor", "der", "gem", "lwf", "sdft"]
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
SIDE_BY_SIDE = ["inclora", "olora", "nlora", "milora", "inflora"]
WHOLE = ["lwf", "osf", "der", "sdft", "anchor", "stm"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        *(
            (name, {"loss_type": "dft", "loss_weights": "tokens"}, "loss_type=dft .*Use loss_type: ")
            for name in OWN_LOSS
        ),
        *(
            (
                name,
                {"label_smoothing_factor": 0.1, "loss_weights": "tokens"},
                "factor=0.1 .*Use label_smoothing_factor: ",
            )
            for name in OWN_LOSS
        ),
        ("joint", {"epochs": [1.0, 1.5]}, "whole numbers"),
        ("replay", {"replay": "before"}, "replay='before'"),
        ("replay", {"replay_choice": "last"}, "replay_choice='last'"),
        ("replay", {"replay_ratio": 0.0, "alignment_data": "none"}, "nothing to replay"),
        ("replay", {"alignment_data": "no.json"}, "no alignment set"),
        ("replay", {"max_steps": 3}, "max_steps=3"),
        *((name, FULL, "use_peft=false") for name in SIDE_BY_SIDE),
        *((name, {"use_dora": True}, "use_dora=True") for name in (*SIDE_BY_SIDE, "merge")),
        *((name, {"lora_target_parameters": ["mlp.experts.down_proj"]}, "cannot be added") for name in SIDE_BY_SIDE),
        ("osf", {"use_peft": True}, "use_peft=false"),
        ("osf", {"dtype": "bfloat16"}, "Use dtype=float32"),
        ("pp", FULL, "use_peft=true"),
        ("pp", {"prompt_mlp": 1}, "prompt_mlp=1"),
        ("pp", {"padding_free": True}, "padding_free"),
        *((name, REENTRANT, "the memory then has no gradient") for name in ("gem", "agem")),
        ("seekr", REENTRANT, "use_reentrant=true: attention weights then have no gradient"),
        *(
            (
                "seekr",
                {"attn_implementation": kernel},
                f"attn_implementation={kernel}: seekr needs.*Use attn_impl.*eager",
            )
            for kernel in ("sdpa", None)
        ),
        ("der", {"replay_ratio": 0.0}, "replay_ratio=0.0 is not allowed: use a number above 0 and of at most 1"),
        *(
            (name, {"padding_free": True, "loss_weights": "tokens"}, "padding_free=true joins")
            for name in ("der", "sdft")
        ),
        ("sdft", {"sdft_tokens": 500, "max_answer_length": 500}, "a sample .sdft_tokens. are 1096 tokens, more than"),
        ("opr", {"opr_samples": 4, "opr_temperature": 0.0}, "opr_samples=4: at opr_temperature=0"),
        ("opr", {"opr_score": "judge"}, "opr_score='judge'"),
        ("lfpt5", FULL, "use_peft=true"),
        ("lfpt5", {"prompt_mlp": 16}, "prompt_mlp=16: lfpt5 trains the prompt directly"),
        ("lfpt5", {"loss_weights": "tokens"}, "loss_weights=tokens: lfpt5 adds two losses"),
        ("lfpt5", {"max_answer_length": 1000}, "pseudo row are 1132 tokens, more than the model's context of 1024"),
        (
            "lfpt5",
            {"engine_args": {"max_length": 130}},
            "row are 156 tokens, but engine_args has max_length=130",
        ),
        ("anchor", {"anchor_weight": "half"}, "anchor_weight='half' is not allowed: use probability or one"),
        ("freeze", {"freeze_layers": 2}, "freeze_layers=2, but the model has 2 blocks. Use at most 1"),
        ("freeze", {"lora_target_modules": r".*\.layers\.0\..*q_proj"}, "stage 2 would train nothing"),
        ("hft", {"use_peft": True}, "Set use_peft=false"),
        ("mofo", {"optim": "sgd"}, "optim=sgd has no momentum that MoFO can use. Use adamw_torch or"),
        ("migu", {"use_dora": True}, "use_dora=true: MIGU can mask only the outputs"),
        ("merge", {"merge": "mean"}, "merge='mean'"),
        ("merge", {"merge_alpha": 1.5}, "share of at most 1"),
        ("merge", {"merge": "average", "merge_alpha": 0.5}, "not merge=average"),
        ("merge", {"merge_density": 0.5}, "merge_density=0.5: only .* not merge=wise"),
        ("merge", {"merge": "ties", "merge_with": "base"}, "merge_with=base"),
        ("merge", {"merge": "slao", "merge_rank": 2}, "merge=slao does not use it"),
        ("merge", {"merge": "magmax", "keep": "last"}, "Use keep=all"),
        ("merge", {"merge": "slao", **FULL}, "merge=slao works only on LoRA"),
        ("merge", {"merge_rank": 4, **FULL}, "merge_rank=4 works only on LoRA"),
        *(
            (name, FSDP, f"{name} needs whole gradients, but FSDP")
            for name in ("ewc", "gem", "agem", "ogd", "olora", "migu")
        ),
        *((name, FSDP, "whole weights.*FSDP gives each process only a part") for name in WHOLE),
        *(
            (name, FSDP, "prompts are saved as a whole.*FSDP gives each process only a part")
            for name in ("pp", "lfpt5")
        ),
        *((name, FSDP, "FSDP gives each process only a part") for name in SIDE_BY_SIDE if name != "olora"),
        ("mofo", FSDP, "mofo needs whole moments.*FSDP gives each process only a part"),
        ("merge", {**FSDP, **FULL}, "FSDP gives each process only a part"),
    ],
)
def test_options_that_a_method_cannot_support_are_refused_before_training(name, change, words, options, monkeypatch):
    if "FSDP" in change:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    change = {option: value for option, value in change.items() if option != "FSDP"}
    with pytest.raises((ConfigError, data.DataError), match=words):
        train(small(options, name, **change), *method(name))
    assert not Path(options["output_dir"]).exists()


# ------------------------------------------------------------------------------------------------------------- bounds


def test_single_does_not_depend_on_the_previous_stage(options, tmp_path):
    both = train(small(options, "single"), *method("single"))
    alone = small(options, "single", tasks=THREE[1:2], output_dir=str(tmp_path / "alone"))
    assert same(weights(both, 2), weights(train(alone, *method("single")), 1))


def test_joint_is_one_stage_on_all_rows(options):
    run = train(small(options, "joint", epochs=[1.0, 2.0], num_train_epochs=3.0), *method("joint"))
    assert [s.name for s in run.stages] == ["0_base", "1_joint"]
    record = read_json(run.stages[1].train_file)
    assert record["rows"] == 16 + 2 * 16 and record["epochs"] == 1 and record["steps"] == 6
    twice = train(small(options, "joint", num_train_epochs=2.0, output_dir=f"{run.path}-2"), *method("joint"))
    assert read_json(twice.stages[1].train_file)["epochs"] == 2


# ------------------------------------------------------------------------------------------------------------- replay


def replay_spy():
    """A replay trainer that records the rows of each stage and their order in the batches."""
    trainer, config = method("replay")

    class Spy(trainer):
        sets, order = {}, {}

        def stage_dataset(self, stage):
            dataset = super().stage_dataset(stage)
            self.sets[stage.index] = [tuple(r) for r in dataset["input_ids"]]
            return dataset

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = self.order.setdefault(self.stage.index, [])
            rows += [
                tuple(ids[mask.bool()].tolist())
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            return super().training_step(model, inputs, num_items_in_batch)

    return Spy, config


def test_replay_sees_exactly_its_rows_after_the_stage_s_own(options):
    spy, config = replay_spy()
    changes = {"replay_ratio": 0.25, "replay_choice": "first", "num_train_epochs": 2.0, "replay": "after"}
    run = train(small(options, "replay", 3, train_rows=8, **changes), spy, config)
    for stage in (1, 2, 3):
        record, rows, order = read_json(run.stages[stage].train_file), spy.sets[stage], spy.order[stage]
        assert record["replayed"] == {**dict.fromkeys(THREE[: stage - 1], 2), "alignment": 5}
        assert rows[8:-5] == [row for k in range(1, stage) for row in spy.sets[k][:2]]
        assert sorted(order[:16]) == sorted(2 * rows[:8]), "two epochs of its own rows first"
        assert sorted(order[:8]) == sorted(order[8:16]) and order[:8] != order[8:16], "shuffled anew"
        assert sorted(order[16:]) == sorted(rows[8:]), "then the replayed rows once"


def test_a_share_of_an_epoch_below_one_row_is_one_row_before_the_replayed_rows(monkeypatch):
    monkeypatch.setattr(CLTrainer, "_get_train_sampler", lambda self, rows: list(range(len(rows))))
    trainer = method("replay")[0].__new__(method("replay")[0])
    vars(trainer).update(own_rows=8, own_epochs=0.01, train_dataset=Dataset.from_list([{"a": 0}] * 8))
    vars(trainer).update(config=SimpleNamespace(replay="after"), args=SimpleNamespace(seed=0, data_seed=None))
    assert len(list(trainer._get_train_sampler())) == 1, "and no stage without a step"


def test_mixed_replay_is_in_every_epoch_and_takes_plain_and_reasoning_rows(options):
    """RCL with replay: tasks of both families may follow each other in any order."""
    spy, config = replay_spy()
    tasks = ["reasoning_fomc", "trace_numglue_cm", "reasoning_numglue_ds"]
    changes = {"tasks": tasks, "max_answer_length": 256, "max_prompt_length": 512, "train_rows": 8}
    changes |= {"replay": "mixed", "replay_ratio": 0.5, "alignment_data": "none", "num_train_epochs": 2.0}
    run = train(small(options, "replay", **changes), spy, config)
    record = read_json(run.stages[3].train_file)
    assert record["rows"] == 8 + 4 + 4 and record["replayed"] == dict.fromkeys(tasks[:2], 4)
    assert sorted(spy.order[3]) == sorted(2 * spy.sets[3])
    assert len(spy.sets[1]) == 8, "nothing to replay at the first stage"
    decode = AutoTokenizer.from_pretrained(options["model_name_or_path"]).decode
    texts = [decode(row) for row in spy.sets[3]]
    assert all("Give your reasoning first" in t and "\nAnswer:" in t for t in texts[:12])
    assert not any("Give your reasoning" in t for t in texts[12:])


@pytest.mark.skipif(
    not (SHARED / "data/trace_lima").is_dir(), reason="the official alignment set is not here (../shared)"
)
def test_the_official_alignment_set_is_read_from_a_folder_or_a_file():
    from trainers.replay import alignment_rows

    for path in (SHARED / "data/trace_lima", SHARED / "data/trace_lima/train.json"):
        rows = alignment_rows(method("replay")[1](output_dir="x", alignment_data=str(path), alignment_rows=100))
        assert len(rows) == 100 and all(r["prompt"] and r["answer"] for r in rows)


def test_a_changed_alignment_set_at_the_same_path_is_refused(options, tmp_path):
    file = tmp_path / "own.json"
    write_json(file, [{"prompt": "Say hello.", "answer": "Hello."}] * 3)
    options = small(options, "replay", 1, alignment_data=str(file))
    run = train(options, *method("replay"))
    assert read_json(run.stages[1].train_file)["replayed"] == {"alignment": 3}
    write_json(file, [{"prompt": "Say hello.", "answer": "Hi."}] * 3)
    with pytest.raises(RunError, match=r"alignment\.fingerprint"):
        train(options, *method("replay"))


@pytest.mark.parametrize("how", ["first", "random", "balanced"])
def test_remembered_rows_are_the_first_or_seeded_random_or_balanced_over_answers(how):
    from trainers.memory import choose_rows

    # Answer 1 is rare: 4 of 40 rows. All prompts have different lengths.
    rows = [{"input_ids": [i] * i + [i, 9], "labels": [-100] * i + [-100, 1 + (i % 10 != 7)]} for i in range(40)]
    rows = Dataset.from_list(rows)
    chosen = choose_rows(rows, 8, how, seed=3)
    assert chosen["input_ids"] == sorted(chosen["input_ids"]) and len({r[0] for r in chosen["input_ids"]}) == 8
    assert choose_rows(rows, 8, how, seed=3)["input_ids"] == chosen["input_ids"], "the same ones at every stage"
    assert len(choose_rows(rows, 100, how, seed=3)) == 40
    other = choose_rows(rows, 8, how, seed=4)["input_ids"] != chosen["input_ids"]
    assert other if how != "first" else [r[0] for r in chosen["input_ids"]] == list(range(8))
    assert how != "balanced" or sum(labels[-1] == 1 for labels in chosen["labels"]) == 4


# --------------------------------------------------------------------------------------------------------------- EWC


@pytest.mark.parametrize("online", [True, False])
def test_the_penalty_gradient_of_ewc_is_that_of_autograd_and_zero_at_the_anchor(options, online):
    """Both variants keep two tensors per parameter. Offline these are the sums over the anchors of all tasks."""
    trainer, config = method("ewc")
    fishers, anchors, errors = [], [], []

    class Spy(trainer):
        def fisher(self):
            fishers.append(super().fisher())
            anchors.append({n: p.detach().clone() for n, p in self.trained().items()})
            return fishers[-1]

        def adjust_gradients(self, model):
            before = {n: p.grad.clone() for n, p in self.trained().items()}
            super().adjust_gradients(model)
            if self.stage.index == 2 and not errors:
                for n, p in self.trained().items():
                    # The first step of stage 2 is at the anchor, the end of stage 1.
                    torch.testing.assert_close(p.grad, before[n], rtol=0, atol=1e-5 * float(before[n].abs().max()))
                    moved = (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_()
                    penalty = self.config.ewc_lambda / 2 * (fishers[0][n] * (moved - p.detach()) ** 2).sum()
                    (wanted,) = torch.autograd.grad(penalty, moved)
                    errors.append((self.penalty_gradient(n, moved) - wanted).abs().max() / wanted.abs().max())

    changes = {**EXACT, "ewc_online": online, "ewc_gamma": 0.5, "ewc_lambda": 1.0}
    run = train(small(options, "ewc", **changes), as_method(Spy), config)
    assert errors and max(errors) < 1e-3 and all(f.min() >= 0 and f.max() > 0 for f in fishers[0].values())
    state = load_file(run.stages[2].method_state / "state.safetensors")
    assert len(state) == 2 * len(fishers[0])
    for name in fishers[0]:
        (a, b), (x, y) = (f[name] for f in fishers), (c[name] for c in anchors)
        P, Q = (0.5 * a + b, (0.5 * a + b) * y) if online else (a + b, a * x + b * y)
        torch.testing.assert_close(state[f"P/{name}"], P)
        torch.testing.assert_close(state[f"Q/{name}"], Q)


@pytest.mark.parametrize(
    ("weights", "change"),
    [
        pytest.param("rows", {}, id="adapters, rows together"),
        pytest.param("tokens", {}, id="adapters, rows together, weighed by tokens"),
        pytest.param("rows", {"gradient_checkpointing": True}, id="row by row, since there is no room"),
        pytest.param("tokens", {"use_peft": False}, id="all parameters, row by row"),
        pytest.param("rows", {"lora_modules_to_save": ["lm_head"]}, id="a head, which sees answers alone"),
    ],
)
def test_the_fisher_information_is_the_squared_gradient_of_the_task_s_rows(options, change, weights):
    trainer, config = method("ewc")
    pairs = []

    class Spy(trainer):
        def fisher(self):
            result = super().fisher()
            rows = self.task_dataset(self.stage.task)
            by_hand = {n: torch.zeros_like(p) for n, p in self.trained().items()}
            for batch in self.batches(rows, 1):
                self.model.zero_grad()
                self.model(**batch).loss.backward()  # transformers' own loss, of one row
                length = int((batch["labels"] != -100).sum())
                items = sum(x != -100 for r in rows["labels"] for x in r) if weights == "tokens" else len(rows) * length
                for n, p in self.trained().items():
                    by_hand[n] += (length * p.grad) ** 2 / items
            self.model.zero_grad()
            pairs.extend((result[n], by_hand[n]) for n in result)
            return result

    # Rows of different lengths in one batch, the last batch not full.
    rows = {"loss_weights": weights, "tasks": ["trace_py150"], "train_rows": 10}
    train(small(options, "ewc", **EXACT, **rows, **change), Spy, config)
    assert pairs
    for result, by_hand in pairs:
        torch.testing.assert_close(result, by_hand, rtol=1e-3, atol=1e-9)


class Known(torch.nn.Module):
    """A language model of six words. Only a hidden layer is trained. The next word depends only on the last one."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = torch.nn.Embedding(6, 5), torch.nn.Linear(5, 5, bias=False)
        self.head = torch.nn.Linear(5, 6, bias=False)
        self.words.requires_grad_(False)
        self.head.weight.requires_grad_(False)
        self.head.weight *= 4  # far from uniform

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(self.words(input_ids)))))

    def fisher_after(self) -> torch.Tensor:
        """The true Fisher information of the next word after each word: the mean over all six, by their probability."""
        found = []
        for word in range(6):
            logp = self(torch.tensor([[word]])).logits[0, 0].log_softmax(-1)
            parts = [torch.autograd.grad(x, self.hidden.weight, retain_graph=True)[0] for x in logp]
            found.append(sum(x.exp().detach() * part**2 for x, part in zip(logp, parts, strict=True)))
        return torch.stack(found)


def known_fisher(rows: list[list[int]], model: Known, **changes) -> torch.Tensor:
    """The trainer's Fisher information for rows whose prompt is one word."""
    from accelerate import Accelerator
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    instance = unbuilt("ewc", per_device_train_batch_size=64, ewc_rows=10**6, **changes)
    instance.args = instance.config
    instance.config.gradient_checkpointing = instance.aux_loss_enabled = False
    instance.model, instance.accelerator, instance.stage = model, Accelerator(cpu=True), SimpleNamespace(task="known")
    instance.model_args = SimpleNamespace(lora_modules_to_save=None, lora_target_parameters=None)
    instance.compute_loss_context_manager = nullcontext
    instance.task_dataset = lambda _: Dataset.from_list([{"input_ids": r, "labels": [-100, *r[1:]]} for r in rows])
    instance.data_collator = DataCollatorForLanguageModeling(pad_token_id=0)
    return instance.fisher()["hidden.weight"]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("weights", ["rows", "tokens"])
@pytest.mark.parametrize("lengths", [[2], [2, 20, 180]], ids=str)
def test_the_fisher_information_equals_the_enumerated_one_for_all_lengths_of_answers(lengths, weights, fisher):
    """On text of the model itself, both kinds must equal the true curvature of the loss, which is enumerated."""
    torch.manual_seed(0)
    model = Known()
    true = model.fisher_after()
    with torch.no_grad():
        follows = model(torch.arange(6)[None]).logits[0].softmax(-1)
    rows, wanted, tokens = [], [], 0
    for n in lengths:
        text = [torch.arange(800) % 6]
        for _ in range(n):
            text.append(torch.multinomial(follows[text[-1]], 1)[:, 0])
        rows += torch.stack(text, 1).tolist()
    for row in rows:
        positions = true[row[:-1]]
        tokens += len(positions)
        wanted.append(positions.sum(0) if weights == "tokens" else positions.mean(0))
    wanted = sum(wanted) / (tokens if weights == "tokens" else len(rows))
    found = known_fisher(rows, model, loss_weights=weights, ewc_fisher=fisher)
    assert float(found.sum() / wanted.sum()) == pytest.approx(1, abs=0.1)
    assert float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > 0.98


def test_on_fitted_data_only_the_sampled_fisher_information_stays_large():
    """After the three words that the model is surest about, the labels of the data have nearly no gradient."""
    torch.manual_seed(0)
    model = Known()
    probability, following = model(torch.arange(6)[None]).logits[0].softmax(-1).max(-1)
    words = probability.argsort()[-3:].tolist()
    rows = 800 * [[word, int(following[word])] for word in words]
    empirical, sampled = (float(known_fisher(rows, model, ewc_fisher=k).sum()) for k in ("empirical", "sampled"))
    assert sampled == pytest.approx(float(model.fisher_after()[words].mean(0).sum()), rel=0.15)
    assert empirical < 0.4 * sampled
    one, same_seed, other = (known_fisher(rows[:30], model, ewc_fisher="sampled", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same_seed) and not torch.equal(one, other), "the run's seed decides what is drawn"


# --------------------------------------------------------------------------------------------------------------- LwF


def test_the_teacher_of_lwf_is_the_previous_stage(options):
    trainer, config = method("lwf")
    seen = []

    class Spy(trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if len(seen) < self.stage.index:
                plain = CLTrainer.compute_loss(self, model, inputs, False, num_items_in_batch)
                seen.append((loss.item(), plain.item()))
                if self.teacher is not None:
                    # At the first step the student is still the previous stage, so its logits equal the teacher's.
                    logits, taught = (self.answer_logits(m, inputs)[0].detach() for m in (self.model, self.teacher))
                    torch.testing.assert_close(logits, taught, rtol=1e-3, atol=1e-4)
                    assert not any(p.requires_grad for p in self.teacher.parameters())
            return loss

    train(small(options, "lwf", 3, **EXACT), as_method(Spy), config)
    assert len(seen) == 3 and seen[0][0] == seen[0][1], "no teacher at the first stage"
    assert all(loss == pytest.approx(plain, rel=1e-3) for loss, plain in seen)


def test_lwf_without_weight_loads_no_teacher():
    instance = unbuilt("lwf", lwf_lambda=0.0)
    instance.stage = SimpleNamespace(index=2)
    instance.begin_stage()
    assert instance.teacher is None, "so it is sequential training to the byte"


def test_the_distillation_loss_is_the_divergence_from_the_teacher():
    instance = unbuilt("lwf")
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    loss = instance.distillation(student, teacher)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert instance.distillation(teacher, teacher).abs().max() < 1e-5
    # The paper's loss is the cross entropy of both distributions at temperature T. Neither loss has a factor T^2.
    paper = -(p * q.log()).sum()
    gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss.sum(), paper)]
    torch.testing.assert_close(gradients[0], ((q - p) / 2).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- GEM and A-GEM


def gem_step(name: str, gradients: list[torch.Tensor], step: torch.Tensor, **changes) -> torch.Tensor:
    """The gradient that a method makes from a step's gradient and the gradients on the memories."""
    instance = unbuilt(name, **changes)
    parameter = torch.nn.Parameter(torch.zeros_like(step))
    parameter.grad = step.clone()
    instance.trained = lambda: {"w": parameter}
    instance.memory = {f"task {i}": [i] for i in range(len(gradients))}
    instance.drawn, instance.drawn_evenly = lambda rows: rows, lambda: range(len(gradients))
    instance.loss_gradient = lambda rows, weights=None: {"w": torch.stack([gradients[i] for i in rows]).mean(0)}
    instance.adjust_gradients(None)
    return parameter.grad


@pytest.mark.parametrize("seed", range(20))
def test_the_projection_of_gem_is_that_of_a_qp_solver(seed):
    from scipy.optimize import minimize

    torch.manual_seed(seed)
    memory = list(torch.randn(1 + seed % 4, 12))
    if seed % 5 == 0:
        memory.append(memory[0].clone())  # two tasks with one gradient: the dual has no unique solution
    step = torch.randn(12)
    step *= 10.0 ** -(seed % 7)  # gradients of language models are small
    memory = [m * 10.0 ** -(seed % 7) for m in memory]
    x = gem_step("gem", memory, step, gem_margin=0.0)
    scale = float(step.norm())
    M = torch.stack(memory).double().numpy() / scale
    g = step.double().numpy() / scale
    if (M @ g >= 0).all():
        assert torch.equal(x, step), "a gradient that does not conflict is left alone"
        return
    # The primal problem of the paper (equation 8): the nearest vector with no negative product.
    wanted = minimize(
        lambda z: ((z - g) ** 2).sum() / 2,
        g,
        jac=lambda z: z - g,
        constraints={"type": "ineq", "fun": lambda z: M @ z, "jac": lambda z: M},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    np.testing.assert_allclose(x.double().numpy() / scale, wanted.x, atol=2e-4)
    assert (M @ (x.double().numpy() / scale) > -1e-5).all()


def test_the_margin_of_gem_is_the_least_weight():
    from trainers.gem import solve_dual

    rng = np.random.default_rng(0)
    for _ in range(20):
        M, g = rng.normal(size=(3, 10)), rng.normal(size=10)
        P, c = M @ M.T, M @ g
        v = solve_dual(P, c, 0.5)
        assert (v >= 0.5).all()
        # Optimal: the slope is zero where v is free and not negative where it is at its bound.
        slope = P @ v + c
        assert (slope > -1e-8).all() and np.abs(slope[v > 0.5 + 1e-9]).max(initial=0) < 1e-8


@pytest.mark.parametrize("seed", range(10))
def test_agem_removes_only_the_conflicting_part_of_a_gradient(seed):
    torch.manual_seed(seed)
    memory, step = torch.randn(2, 8), torch.randn(8)
    mean = memory.mean(0)
    for g in (step, -step):
        x = gem_step("agem", list(memory), g)
        if g @ mean >= 0:
            assert torch.equal(x, g)
        else:
            assert abs(x @ mean) < 1e-5
            torch.testing.assert_close(x - g, -(g @ mean) / (mean @ mean) * mean)


def test_the_memory_gradient_is_the_loss_gradient_of_remembered_rows(options):
    def look(trainer, adjust):
        rows = trainer.drawn(next(iter(trainer.memory.values())))
        kept = {n: p.grad.clone() for n, p in trainer.trained().items()}
        found = trainer.loss_gradient(rows)
        assert same(kept, {n: p.grad for n, p in trainer.trained().items()}), "the step's own gradient is left alone"
        trainer.model.zero_grad()
        (batch,) = trainer.batches(rows, len(rows))
        trainer.model(**batch).loss.backward()
        for n, p in trainer.trained().items():
            torch.testing.assert_close(found[n], p.grad, rtol=1e-3, atol=1e-7)
            p.grad = kept[n]
        modes = []
        with trainer.model.register_forward_pre_hook(lambda model, *_: modes.append(model.training)):
            adjust(trainer.model)
        assert modes and all(modes), "with dropout, as the step's own"
        after = sum(float((found[n] * p.grad).sum()) for n, p in trainer.trained().items())
        assert after > -1e-4 * sum(float((g**2).sum()) for g in found.values()), "no step against the memory"
        return [trainer.tokenizer.decode(r["input_ids"]) for r in rows]

    texts = probe(options, "gem", 2, look, **EXACT, memory_rows=8)
    assert len(texts) == 8 and all("Stance:" in t for t in texts), "rows of the first task"


def test_the_memory_gradient_of_agem_weighs_all_tasks_equally(options):
    """The tasks have answers of 2 and of 180 tokens. Weighed by tokens, the long ones would decide alone."""

    def look(trainer, adjust):
        texts = [(f"Write about {i}. ", f"{i} is the number that this is about. " * 10) for i in range(12)]
        trainer.memory["long"] = trainer.text_dataset(texts)
        adjust(trainer.model)
        drawn = trainer.drawn_evenly()
        lengths = [sum(x != -100 for x in labels) for labels in drawn["labels"]]
        tasks = [trainer.loss_gradient(drawn.select(rows), weights="rows") for rows in (range(6), range(6, 12))]
        trainer.config.memory_batch_size = 13
        odd = [sum(x != -100 for x in labels) for labels in trainer.drawn_evenly()["labels"]]
        assert sorted([odd.count(2), odd.count(180)]) == [6, 7], "one row more of either, and not one less"
        return trainer.against[0], tasks, lengths

    changes = {**EXACT, "max_answer_length": 180, "learning_rate": 1e-3, "memory_rows": 12, "memory_batch_size": 12}
    memory, (short, long), lengths = probe(options, "agem", 2, look, **changes)
    assert lengths == [2] * 6 + [180] * 6, "as many rows of each"
    for name, gradient in memory.items():
        torch.testing.assert_close(gradient, (short[name] + long[name]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_the_step_of_the_optimizer_is_projected_too_if_the_option_is_set(name, options):
    from trainers.memory import dot

    trainer, config = method(name)
    free, bound, conflicts = [], [], []

    class Spy(trainer):
        def project(self, descent):
            start = {n: p.detach() + descent[n] for n, p in self.trained().items()}
            allowed = super().project(descent)
            for step, worst in ((descent, free), (allowed, bound)):
                worst.append(min(float(dot(m, step) / (dot(m, m) * dot(step, step)).sqrt()) for m in self.against))
            self.wanted = {n: start[n] - allowed[n] for n in start}
            return allowed

        def training_step(self, *args, **kwargs):
            self.reached()
            return super().training_step(*args, **kwargs)

        def end_stage(self):
            self.reached()
            conflicts.append(self.record()["projected_optimizer_steps"])

        def reached(self):
            for n, wanted in getattr(self, "wanted", {}).items():
                torch.testing.assert_close(self.trained()[n].detach(), wanted, rtol=0, atol=1e-6)

    changes = {**EXACT, "memory_rows": 8, "max_steps": 5, "learning_rate": 3e-2, "project_step": True}
    run = train(small(options, name, 3, **changes), as_method(Spy), config)
    assert len(free) == 10, "every step from the second task on"
    assert min(free) < -0.01, "Adam goes against the memory, after a gradient that does not"
    assert min(bound) > -1e-3 and sum(conflicts) == sum(f < 0 for f in free)
    assert max(b for f, b in zip(free, bound, strict=True) if f < 0) < 1e-3, "the nearest one, without a margin"
    assert read_json(run.stages[3].train_file)["projected_optimizer_steps"] == conflicts[2]


# --------------------------------------------------------------------------------------------------------------- OGD


@pytest.mark.parametrize(
    ("optimizer", "size", "lora"), [("sgd", 200, True), ("adamw_torch", 200, True), ("sgd", 3, False)]
)
def test_every_step_of_ogd_is_orthogonal_to_the_gradients_of_the_answers_logits(options, optimizer, size, lora):
    trainer, config = method("ogd")
    products, sizes = [], {}

    class Spy(trainer):
        def train(self, **kwargs):
            before = {n: p.detach().clone() for n, p in self.trained().items()}
            result = super().train(**kwargs)
            sizes[self.stage.index] = len(next(iter(self.basis.values()))) if self.basis else 0
            if self.basis:
                step = {n: (p.detach() - before[n]).double() for n, p in self.trained().items()}
                along = sum(self.basis[n].flatten(1).double() @ step[n].flatten() for n in step)
                products.append(float(along.abs().max()) / sum(float((s**2).sum()) for s in step.values()) ** 0.5)
                basis = sum(b.flatten(1).double() @ b.flatten(1).double().T for b in self.basis.values())
                torch.testing.assert_close(basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-4, rtol=0)
            return result

        def end_stage(self):
            super().end_stage()
            state = load_file(self.stage.method_state / "state.safetensors")
            (batch,) = self.batches(self.train_dataset.select([0]))
            answer = batch["labels"][0, 1:] != -100
            logits, target = self.model(**batch).logits[0, :-1][answer], batch["labels"][0, 1:][answer]
            output = logits.gather(1, target[:, None]).mean()
            gradients = torch.autograd.grad(output, list(self.trained().values()))
            parts = {name: g.double() for name, g in zip(self.trained(), gradients, strict=True)}
            inside = sum(state[n].flatten(1).double() @ part.flatten() for n, part in parts.items())
            whole = float(sum(part.square().sum() for part in parts.values()))
            # If all directions are kept, the gradient of a remembered row lies in their span.
            assert size == 3 or float(inside.square().sum()) == pytest.approx(whole, rel=1e-3)

    kept = min(size, 4)
    changes = {**EXACT, "optim": optimizer, "learning_rate": 1e-2, "ogd_size": size, "train_rows": 4}
    run = train(small(options, "ogd", 3, use_peft=lora, **changes), as_method(Spy), config)
    assert sizes == {1: 0, 2: kept, 3: 2 * kept}, "the bound is of each task, and four rows have four gradients"
    assert max(products) < 1e-4
    record = read_json(run.stages[3].train_file)
    assert record["directions"] == 2 * kept
    assert record["directions_bytes"] == 2 * kept * 4 * record["trainable_parameters"]


def test_ogd_refuses_a_size_that_does_not_fit_into_memory(options, monkeypatch, tmp_path):
    trainer, config = method("ogd")
    options = {**options, "max_steps": 1}
    # The size that the message names does fit.
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(ConfigError, match=r"ogd_rows=200 needs .* GiB are free") as refused:
        train(options, trainer, config)
    fits = int(re.search(r"--ogd_size (\d+) --ogd_rows \1\.", str(refused.value))[1])
    assert 0 < fits < 64
    assert train({**options, "ogd_size": fits, "ogd_rows": fits}, trainer, config).stages[2].is_trained
    with pytest.raises(ConfigError, match="GiB are free"):
        train({**options, "output_dir": f"{tmp_path}/b", "ogd_size": fits + 1, "ogd_rows": fits + 1}, trainer, config)


# ------------------------------------------------------------------------------------------------------------ O-LoRA


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_adds_an_adapter_in_its_own_subspace_to_frozen_adapters(options, rslora):
    trainer, config = method("olora")
    begins, logits = {}, []

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            begins[self.stage.index] = {n: p.detach().clone() for n, p in self.trained().items() if "lora_A" in n}

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.stage.index == 3 and not logits:
                checkpoint = self.run.stages[2].checkpoint
                before = load_merged(options["model_name_or_path"], checkpoint, dtype=torch.float32)
                with torch.no_grad():
                    logits.extend(self.answer_logits(m, inputs)[0] for m in (model, before))
            return super().training_step(model, inputs, num_items_in_batch)

    changes = {**EXACT, "use_rslora": rslora, "lora_target_modules": LINEAR}
    run = train(small(options, "olora", 3, **changes), as_method(Spy), config)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)  # a stage begins as the merged model before
    for name, a in begins[1].items():
        # Random subspaces of this size share no direction.
        assert torch.linalg.matrix_rank(torch.cat([a, begins[2][name]])) == 2 * len(a)
    for stage in (2, 3):
        saved = read_json(run.stages[stage].checkpoint / "adapter_config.json")
        # PEFT keeps the names in a set, whose order differs between processes.
        assert saved["target_modules"] == sorted(LINEAR) and saved["r"] == 4 * stage
        # PEFT's factor on the product stays the same.
        assert saved["lora_alpha"] / (saved["r"] ** 0.5 if rslora else saved["r"]) == 32 / (2 if rslora else 4)
        assert read_json(run.stages[stage].train_file)["orthogonality_loss"] > 0
        old, new = weights(run, stage - 1), weights(run, stage)
        for name, tensor in new.items():
            before, own = (tensor[:-4], tensor[-4:]) if "lora_A" in name else (tensor[:, :-4], tensor[:, -4:])
            assert torch.equal(before, old[name]), "the earlier adapters are frozen"
            assert own.shape[0 if "lora_A" in name else 1] == 4


def test_the_orthogonality_loss_of_olora_is_that_of_the_paper(options):
    def look(trainer, adjust):
        loss = trainer.orthogonality_loss()
        before = {n: p.grad.clone() for n, p in trainer.trained().items()}
        adjust(trainer.model)
        added = {n: p.grad - before[n] for n, p in trainer.trained().items()}
        for name, (past, new) in trainer.pairs().items():
            leaf = new.detach().clone().requires_grad_()
            (wanted,) = torch.autograd.grad((past.detach() @ leaf.T).abs().sum(), leaf)
            torch.testing.assert_close(added.pop(name), wanted, rtol=1e-3, atol=1e-4)
        assert added and not any(g.any() for g in added.values()), "B is left alone"
        assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".past." in n)
        for past, new in trainer.pairs().values():  # rows of its own space: nothing overlaps
            new.data -= new.data @ torch.linalg.pinv(past.data) @ past.data
        return loss, trainer.orthogonality_loss()

    loss, orthogonal = probe(options, "olora", 2, look, **EXACT, olora_lambda=1.0)
    assert loss > 1 and orthogonal < 1e-3 * loss
