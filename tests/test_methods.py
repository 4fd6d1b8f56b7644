"""What holds for all methods: they resume, take one step for any split of a batch, refuse what they cannot do."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import make_base
from conftest import quick_options, stop_at, train
from method_runs import (
    EXACT,
    FSDP,
    FULL,
    SIDE_BY_SIDE,
    THREE,
    as_method,
    flattened,
    made,
    method,
    same,
    same_step,
    small,
    unbuilt,
    weights,
)
from safetensors.torch import load_file

from trace_bench import evaluate, report
from trace_bench.packaged import methods
from trace_bench.run import read_json
from trace_tasks import data
from trainers.base import CLConfig, CLTrainer, ConfigError, stages

TRAINING = [m for m in methods() if m != "icl"]


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


@pytest.fixture(scope="module")
def plain(tiny_models, tmp_path_factory):
    """Gives the run of `sequential` with or without LoRA, each trained once."""

    @cache
    def trained(lora: bool):
        options = quick_options(tiny_models["bytes"], tmp_path_factory.mktemp("plain") / "run")
        return train(small(options, "sequential", use_peft=lora), *method("sequential"))

    return trained


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
def test_a_method_that_does_nothing_is_sequential_to_the_byte(name, change, record, options, plain):
    sequential = plain(change.get("use_peft", True))
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


OWN_LOSS = ["agem", "anchor", "der", "gem", "lwf", "sdft"]
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
WHOLE = ["lwf", "osf", "der", "sdft", "anchor", "stm"]
WHOLE_GRADIENTS = ["ewc", "gem", "agem", "ogd", "olora", "migu"]
TOKENS = {"loss_weights": "tokens"}
SMOOTH = {"label_smoothing_factor": 0.1, **TOKENS}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        *((name, {"loss_type": "dft", **TOKENS}, "loss_type=dft .*Use loss_type: ") for name in OWN_LOSS),
        *((name, SMOOTH, "factor=0.1 .*Use label_smoothing_factor: ") for name in OWN_LOSS),
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
        ("seekr", {"attn_implementation": "sdpa"}, "attn_implementation=sdpa: seekr needs.*Use attn_impl.*eager"),
        ("seekr", {"attn_implementation": None}, "attn_implementation=None: seekr needs.*Use attn_impl.*eager"),
        ("der", {"replay_ratio": 0.0}, "replay_ratio=0.0 is not allowed: use a number above 0 and of at most 1"),
        *((name, {"padding_free": True, **TOKENS}, "padding_free=true joins") for name in ("der", "sdft")),
        ("sdft", {"sdft_tokens": 500, "max_answer_length": 500}, "a sample .sdft_tokens. are 1096 tokens, more than"),
        ("opr", {"opr_samples": 4, "opr_temperature": 0.0}, "opr_samples=4: at opr_temperature=0"),
        ("opr", {"opr_score": "judge"}, "opr_score='judge'"),
        ("lfpt5", FULL, "use_peft=true"),
        ("lfpt5", {"prompt_mlp": 16}, "prompt_mlp=16: lfpt5 trains the prompt directly"),
        ("lfpt5", TOKENS, "loss_weights=tokens: lfpt5 adds two losses"),
        ("lfpt5", {"max_answer_length": 1000}, "pseudo row are 1132 tokens, more than the model's context of 1024"),
        ("lfpt5", {"engine_args": {"max_length": 130}}, "row are 156 tokens, but engine_args has max_length=130"),
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
        *((name, FSDP, f"{name} needs whole gradients, but FSDP") for name in WHOLE_GRADIENTS),
        *((name, FSDP, "whole weights.*FSDP gives each process only a part") for name in WHOLE),
        *((name, FSDP, "prompts are saved as a whole.*FSDP gives each process") for name in ("pp", "lfpt5")),
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
