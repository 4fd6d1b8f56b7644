"""SEEKR: `der` plus the attention of the important heads."""

import shutil

import pytest
import torch
from architectures import make_base
from conftest import train
from method_runs import EXACT, as_method, method, probe, same, same_step, small, weights
from safetensors.torch import load_file

from trace_bench.run import read_json
from trace_tasks.data.files import write_json
from trainers.base import ConfigError

CHANGES = {**EXACT, "replay_ratio": 0.5, "train_rows": 8, "max_prompt_length": 64}


def test_seekr_without_its_weight_is_der(options, tmp_path):
    changes = {**CHANGES, "lora_dropout": 0.1}
    run = train(small(options, "seekr", **changes, seekr_weight=0.0), *method("seekr"))
    held = train(small(options, "seekr", **changes, output_dir=str(tmp_path / "held")), *method("seekr"))
    der = {**changes, "attn_implementation": "eager", "output_dir": str(tmp_path / "der")}
    other = train(small(options, "der", **der), *method("der"))
    for stage in (1, 2):
        assert same(weights(run, stage), weights(other, stage)), "the same bytes"
    assert not same(weights(held, 2), weights(other, 2))


def test_kept_attention_is_that_of_the_rows_own_stage_with_divergence_zero_there(options):
    def look(trainer, adjust):
        trainer.model.eval()
        rows = trainer.train_dataset
        (batch,) = trainer.batches(rows.select(range(8, 12)), 4)
        found, _ = trainer.attention(trainer.model, batch)
        divergences = [trainer.attention_divergence([a[i] for a in found], i).item() for i in range(4)]
        others = [trainer.attention_divergence([a[1 - i] for a in found], i).item() for i in range(2)]
        # Computed by hand for attention weights that differ from the kept ones.
        moved = [(a[2] * 3).softmax(-1) for a in found]
        heads, queries = trainer.said["heads"][0].tolist(), trainer.said["queries"][40:60].tolist()
        by_layer: dict[int, list[float]] = {}
        length = len(rows[10]["input_ids"])
        for layer, head in heads:
            old, new = found[layer][2, head, queries, :length], moved[layer][head, queries, :length]
            terms = torch.where(old > 0, old * (old.clamp_min(1e-30).log() - new.log()), 0)
            by_layer.setdefault(layer, []).append(terms.sum(-1).mean().item())
        wanted = sum(sum(v) / len(v) for v in by_layer.values()) / len(by_layer)
        return divergences, others, trainer.attention_divergence(moved, 2).item(), wanted, len(by_layer)

    divergences, others, found, wanted, layers = probe(options, "seekr", 2, look, **CHANGES, max_steps=1)
    assert max(map(abs, divergences)) < 1e-4 < min(others) and layers == 2
    assert found == pytest.approx(wanted, rel=1e-3)


def test_seekr_keeps_the_attention_of_the_most_important_heads(options):
    trainer, config = method("seekr")
    made_of = []

    class Spy(trainer):
        def importance(self, rows):
            made_of.append(super().importance(rows))
            if len(made_of) <= 2:
                made_of[-1] = torch.tensor([[[4.0, 0.0], [1.0, 2.0]], [[0.0, 2.5], [0.5, 0.0]]][len(made_of) - 1])
            return made_of[-1]

    run = train(small(options, "seekr", 3, **CHANGES, seekr_heads=2), as_method(Spy), config)
    state = load_file(run.stages[3].method_state / "state.safetensors")
    assert read_json(run.stages[1].train_file)["heads"] == [[0, 0], [1, 1]]
    assert read_json(run.stages[2].train_file)["heads"] == [[0, 0], [0, 1]], "of the sums over the tasks"
    assert state["importance"].shape == (3, 2, 2) and state["heads"].shape == (3, 2, 2)
    assert state["of_row"][:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    queries, lengths = state["of_row"][:, 1], state["of_row"][:, 2]
    assert queries.tolist() == [20] * 12 and len(state["attention"]) == 2 * int((queries * lengths).sum())
    for key, tensor in load_file(run.stages[2].method_state / "state.safetensors").items():
        assert torch.equal(state[key][: len(tensor)], tensor), "as it was"
    one = train(
        small(
            options, "seekr", **{**CHANGES, "output_dir": options["output_dir"] + "1"}, seekr_layers=1, seekr_heads=9
        ),
        as_method(Spy),
        config,
    )
    assert {layer for layer, _ in read_json(one.stages[2].train_file)["heads"]} in ({0}, {1})


def test_only_heads_that_the_loss_depends_on_have_importance(options):
    """It is zero only for a head whose output is not read."""
    trainer, config = method("seekr")
    seen = []

    class Spy(trainer):
        def importance(self, rows):
            seen.append(super().importance(rows))
            (o_proj,) = [m for n, m in self.model.named_modules() if n.endswith("layers.0.self_attn.o_proj")]
            weight = o_proj.weight.data.clone()
            o_proj.weight.data[:, 64:] = 0  # nothing reads the second head
            seen.append(super().importance(rows))
            o_proj.weight.data = weight
            return seen[0]

    train(small(options, "seekr", 1, **CHANGES), as_method(Spy), config)
    assert (seen[0] > 0).all() and seen[1][0, 1] == 0 < seen[1][0, 0] and (seen[1][1] > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_takes_the_same_step(checkpointing, options, tmp_path):
    class Spy(method("seekr")[0]):
        def begin_stage(self):
            super().begin_stage()
            if self.said:
                self.said["attention"] = self.said["attention"].flip(0)  # what is of others

    first = {"gradient_checkpointing": checkpointing}
    same_step("seekr", options, tmp_path, ((12, 1), (3, 4)), Spy, first=first, **CHANGES, seekr_weight=10.0)


def test_seekr_refuses_attention_dropout(options, tmp_path):
    """Weights after dropout differ much from the kept ones."""
    folder = shutil.copytree(options["model_name_or_path"], tmp_path / "dropping")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "attention_dropout": 0.1})
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.1 .* a copy of the model with attention_dropout 0\.0"):
        train(small(options, "seekr", model_name_or_path=str(folder)), *method("seekr"))


@pytest.mark.slow
def test_seekr_refuses_a_model_without_attention(options, tmp_path):
    base = make_base("mamba", tmp_path / "mamba")
    changes = {"model_name_or_path": str(base), "lora_target_modules": ["x_proj"], "max_prompt_length": 8}
    with pytest.raises(ConfigError, match=r"a model with the same number of attention heads in each layer\. Use der"):
        train(small(options, "seekr", **changes), *method("seekr"))


def test_kept_attention_is_never_moved_to_the_device(options):
    """It is many times larger than the memory of a GPU."""
    went = []

    class Spy(method("seekr")[0]):
        def begin_stage(self):
            super().begin_stage()
            if self.said:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(type(self.config), "device", torch.device("meta"))
                    went.append({name: t.device.type for name, t in self.load_state(self.on_cpu).items()})

    train(small(options, "seekr", **CHANGES), as_method(Spy), method("seekr")[1])
    assert {name for name, device in went[0].items() if device == "cpu"} == {"attention"} and "heads" in went[0]
