"""Methods that freeze a part of the model or mask a part of the loss: anchor, freeze, hft, stm."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from architectures import ARCHITECTURES
from conftest import train
from method_runs import EXACT, FULL, LINEAR, as_method, made, method, probe, same, small, unbuilt, weights
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from trace_bench.run import read_json
from trainers import hft
from trainers.base import decoder_blocks, divergences
from trainers.freeze import freeze

DECAY = {"learning_rate": 1e-2, "weight_decay": 0.1}
MOMENTUM = {**DECAY, "optim": "sgd", "optim_args": "momentum=0.9"}


def empty(architecture: str, layers: int = 2):
    """A model without weights."""
    settings = dict(ARCHITECTURES[architecture])
    settings |= {name: layers for name in ("n_layer", "n_layers", "num_hidden_layers") if name in settings}
    if "layer_types" in settings:
        settings["layer_types"] = (settings["layer_types"] * layers)[:layers]
    if architecture == "smollm3":
        settings["no_rope_layers"] = [1, 0] * (layers // 2)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings, vocab_size=100, pad_token_id=0))


def moved(run, stage: int) -> dict[str, bool]:
    """Whether each tensor differs from the previous stage."""
    before, after = weights(run, stage - 1), weights(run, stage)
    return {name: not torch.equal(before[name], after[name]) for name in after}


# ------------------------------------------------------------------------------------------------------------- anchor


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_the_divergence_of_anchor_is_zero_only_at_its_reference(reference, lora, options, monkeypatch):
    trainer, config = method("anchor")
    seen = {}

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            # With LoRA the base is the trained model without its adapter.
            assert (self.reference is None) == (lora and (reference == "base" or self.stage.index == 1))
            seen[self.stage.index] = []

    def spied(logits, held):
        found = divergences(logits, held)
        seen[max(seen)].append(float(found.detach().abs().max()))
        return found

    monkeypatch.setattr("trainers.anchor.divergences", spied)
    changes = {**EXACT, "use_peft": lora, "anchor_reference": reference, "max_steps": 3}
    changes["lora_dropout"] = 0.3 if reference == "base" else 0.0  # the reference has none
    run = train(small(options, "anchor", **changes), as_method(Spy), config)
    assert seen[1][0] == 0 and seen[1][-1] > 1e-4
    # The second stage begins at the end of the first one. This is the previous stage, but not the base model.
    assert seen[2][0] == 0 if reference == "previous" else seen[2][0] > 1e-4
    record = read_json(run.stages[2].train_file)
    assert record["divergence"] > 0 and record["trainable_parameters"] > 0


def test_the_base_model_of_anchor_is_the_one_without_the_adapter(options):
    """Afterwards dropout and gradients must be as before."""

    def look(trainer, adjust):
        (batch, *_) = trainer.batches(trainer.train_dataset)
        plain = trainer.load_model(None).eval()
        trainer.model.train()
        flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        with torch.no_grad():
            with trainer.reference_model() as reference:
                held, _ = trainer.answer_logits(reference, batch)
            wanted, _ = trainer.answer_logits(plain, batch)
            own, _ = trainer.answer_logits(trainer.model.eval(), batch)
        assert flags == {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        assert not torch.allclose(own, wanted, atol=1e-3)
        return held, wanted

    held, wanted = probe(options, "anchor", 2, look, **EXACT)
    torch.testing.assert_close(held, wanted)


@pytest.mark.parametrize("weight", ["one", "probability"])
def test_the_loss_of_anchor_equals_values_worked_by_hand(weight, options):
    """There are two rows with answers of one and three tokens, and a vocabulary of two."""
    anchor = unbuilt("anchor", anchor_weight=weight, anchor_lambda=0.5)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]], requires_grad=True)
    held = torch.zeros(4, 2)
    labels = torch.tensor([[-100, 1, -100, -100], [-100, 0, 0, 1]])
    target = torch.tensor([1, 0, 0, 1])
    answers = iter([(held, target), (logits, target)])
    anchor.answer_logits = lambda model, inputs: next(answers)
    anchor.count_tokens = lambda *args: None
    anchor.reference, anchor.router_loss, anchor.current_gradient_accumulation_steps = "reference", 0.0, 1
    anchor.args = made(method("anchor")[1])
    anchor.accelerator = Accelerator(cpu=True)
    loss = anchor.compute_loss(None, {"labels": labels}, num_items_in_batch=torch.tensor(2))
    p = torch.tensor([0.75, 0.5, 0.75, 0.5])
    w = p if weight == "probability" else torch.ones(4)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    each = -w * p.log() + 0.5 * torch.tensor([kl, 0.0, kl, 0.0])
    torch.testing.assert_close(loss, (each[0] + each[1:].mean()) / 2)
    assert anchor.record() == {"divergence": pytest.approx(2 * kl / 4)}
    # The weight has no gradient: d/dz of w CE = w (softmax - one-hot); of KL(q || p) it is p - q.
    loss.backward()
    wanted = w[0] * torch.tensor([0.25, -0.25]) + 0.5 * torch.tensor([0.25 - 0.5, 0.75 - 0.5])
    torch.testing.assert_close(logits.grad[0], wanted / 2)


# ------------------------------------------------------------------------------------------------------------- freeze


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_of_every_architecture_are_found(architecture):
    model = empty(architecture, 4)
    blocks = decoder_blocks(model)
    assert len(blocks) == 4 == model.config.get_text_config().num_hidden_layers
    freeze(model, 3)
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = {id(p) for p in blocks[3].parameters()}
    assert inside <= {id(p) for p in left.values()}
    others = [name for name, p in left.items() if id(p) not in inside]
    # The last norm, and an untied head, but no table of tokens or positions.
    assert others and all("norm" in name or "ln_f" in name or "lm_head" in name for name in others)
    assert model.get_input_embeddings().weight.requires_grad is False


@pytest.mark.parametrize(("lora", "optimizer"), [(True, DECAY), (False, MOMENTUM)])
def test_frozen_weights_keep_every_bit_from_the_second_task_on(lora, optimizer, options):
    changes = {**optimizer, "use_peft": lora, "freeze_layers": 1, "lora_target_modules": LINEAR}
    run = train(small(options, "freeze", 3, **changes), *method("freeze"))
    records = [read_json(stage.train_file) for stage in run.stages[1:]]
    assert [record["frozen_parameters"] > 0 for record in records] == [False, True, True]
    total = {record["trainable_parameters"] + record["frozen_parameters"] for record in records}
    assert total == {records[0]["trainable_parameters"]}
    for stage in (2, 3):
        for name, it_moved in moved(run, stage).items():
            frozen = "layers.0." in name or "embed_tokens" in name  # the head is tied to the embeddings
            assert it_moved != frozen, name
    assert records[1]["losses"]


def test_freeze_with_no_layers_freezes_only_embeddings_from_the_given_stage_on(options):
    run = train(small(options, "freeze", 2, **FULL, freeze_layers=0, freeze_from=1), *method("freeze"))
    tokens = run.stages[0].index == 0 and weights(run, 1)["model.embed_tokens.weight"]
    plain = AutoModelForCausalLM.from_pretrained(options["model_name_or_path"]).get_input_embeddings().weight
    assert torch.equal(tokens.float(), plain.detach().float())
    assert {name for name, it_moved in moved(run, 2).items() if not it_moved} == {"model.embed_tokens.weight"}


def test_adapters_of_embeddings_and_saved_embeddings_are_frozen(options):
    changes = {"lora_target_modules": ["q_proj", "v_proj", "embed_tokens"], "freeze_layers": 1}
    run = train(small(options, "freeze", 2, **changes), *method("freeze"))
    still = {name for name, it_moved in moved(run, 2).items() if not it_moved}
    assert still == {n for n in weights(run, 2) if "layers.0." in n or "embed_tokens" in n} and len(still) == 7


@pytest.mark.parametrize("lora", [True, False])
def test_frozen_blocks_work_with_gradient_checkpointing(lora, options):
    changes = {"use_peft": lora, "gradient_checkpointing": True, "freeze_from": 1}
    run = train(small(options, "freeze", 2, **changes), *method("freeze"))
    assert {"layers.1." in n or "norm" in n for n, it_moved in moved(run, 2).items() if it_moved} == {True}
    assert any(moved(run, 2).values())


# ---------------------------------------------------------------------------------------------------------------- hft


def test_hft_freezes_the_halves_of_the_paper():
    """Llama: two of four matrices of the attention, one or two of three of the MLP, one of two norms."""
    drawn = []
    for stage in (1, 1, 2):
        blocks = decoder_blocks(empty("llama", 4))
        frozen = {id(p) for p in hft.frozen_half(blocks, torch.Generator().manual_seed(stage))}
        drawn.append([{n for n, p in block.named_parameters() if id(p) in frozen} for block in blocks])
        counts = {part: [sum(part in n for n in names) for names in drawn[-1]] for part in ("self_attn", "mlp", "norm")}
        assert counts["self_attn"] == [2] * 4 and counts["norm"] == [1] * 4
        assert sorted(counts["mlp"]) == [1, 1, 2, 2]
        assert len({frozenset(names) for names in drawn[-1]}) > 1, "the blocks draw by themselves"
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["hft", "freeze"])
def test_the_same_weights_are_frozen_under_zero3(name):
    found = []
    for divided in (False, True):
        model = empty("mixtral", 4)
        for parameter in model.parameters() if divided else ():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0, device="meta")
        trainer = object.__new__(method(name)[0])
        trainer.config = SimpleNamespace(seed=0, freeze_layers=1, freeze_from=1)
        trainer.stage = SimpleNamespace(index=1)
        trainer.run = SimpleNamespace(stages=[SimpleNamespace(checkpoint=None)])
        trainer.trainable_model = lambda checkpoint, model=model: model
        trainer.stage_model(trainer.stage)
        found.append((trainer.record(), [n for n, p in model.named_parameters() if not p.requires_grad]))
    assert found[0] == found[1] and min(found[0][0].values()) > 0.4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_of_each_category_is_frozen_in_every_architecture(architecture):
    model = empty(architecture, 4)
    blocks = decoder_blocks(model)
    frozen = {id(p) for p in hft.frozen_half(blocks, torch.Generator().manual_seed(0))}
    for name in {name for block in blocks for name in hft.categories(block)}:
        units = [unit for block in blocks for unit in hft.categories(block).get(name, [])]
        held = [unit for unit in units if id(unit[0]) in frozen]
        assert all((id(p) in frozen) == (id(unit[0]) in frozen) for unit in units for p in unit), "a bias as its matrix"
        assert len(held) * 2 == len(units), name
    assert len(frozen) < len(list(blocks.parameters()))


def test_the_frozen_half_keeps_every_bit_and_differs_between_stages(options, tmp_path):
    run = train(small(options, "hft", 3, **MOMENTUM), *method("hft"))
    again = train(small(options, "hft", 3, **MOMENTUM, output_dir=str(tmp_path / "again")), *method("hft"))
    halves = []
    for stage in (2, 3):
        changed = moved(run, stage)
        assert same(weights(run, stage), weights(again, stage))
        assert changed["model.embed_tokens.weight"] and changed["model.norm.weight"]
        halves.append({name for name, it_moved in changed.items() if not it_moved})
        assert sum("self_attn" in name for name in halves[-1]) == 4 and sum("mlp" in name for name in halves[-1]) == 3
        record = read_json(run.stages[stage].train_file)
        assert record["frozen_share"] == pytest.approx(0.5, abs=0.1)
    assert halves[0] != halves[1]


# ---------------------------------------------------------------------------------------------------------------- stm


def test_exactly_the_tokens_above_the_threshold_are_masked():
    stm = unbuilt("stm")

    class Tokenizer:
        eos_token_id = 2

    stm.tokenizer = Tokenizer
    prompt = [-100, -100]
    assert stm.masked([*prompt, 7, 8, 9, 2], [2.5, 2.51, 1.0, 99.0]) == [*prompt, 7, -100, 9, 2], "EOS stays"
    assert stm.masked([*prompt, 7, 8, 9], [9.0, 1.0, 9.0]) == [*prompt, -100, 8, -100], "an answer that was cut"
    assert stm.masked([*prompt, 7, 8, 2], [9.0, 8.0, 1.0]) == [*prompt, -100, 8, 2], "never a whole answer"
    assert stm.masked([*prompt, 7, 2], [9.0, 9.0]) == [*prompt, 7, 2], "nor an answer of one token"
    assert stm.masked([*prompt, 2], [9.0]) == [*prompt, 2]
    assert stm.masked([7, 8, 9], [9.0, 1.0]) == [7, -100, 9], "nothing predicts a first token"


def test_the_tokens_are_measured_with_the_model_before_the_stage(options):
    trainer, config = method("stm")
    seen = {}

    class Spy(trainer):
        def begin_stage(self):
            rows = self.train_dataset
            super().begin_stage()
            model = self.load_model(self.previous.checkpoint).eval()
            wanted = []
            for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
                ppl = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").exp()
                content = [i for i, label in enumerate(labels) if label not in (-100, self.tokenizer.eos_token_id)]
                hard = [i for i in content if ppl[i - 1] > 40.0]
                if len(hard) == len(content):
                    hard.remove(min(hard, key=lambda i: float(ppl[i - 1])))
                wanted.append([-100 if i in hard else label for i, label in enumerate(labels)])
            assert self.train_dataset["labels"][:] == wanted
            assert self.train_dataset["input_ids"][:] == rows["input_ids"][:]
            before, after = ([x != -100 for row in rows for x in row] for rows in (rows["labels"], wanted))
            seen[self.stage.index] = 1 - sum(after) / sum(before)

    changes = {**EXACT, "tasks": ["trace_numglue_ds", "trace_py150"], "stm_threshold": 40.0, "max_steps": 6}
    run = train(small(options, "stm", **changes), as_method(Spy), config)
    for stage, share in seen.items():
        record = read_json(run.stages[stage].train_file)
        assert record["masked_share"] == pytest.approx(share) and 0 < share < 1
        assert record["answer_tokens"] > 0
