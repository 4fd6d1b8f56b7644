"""OSF: the directions that a stage preserves and trains, and its files."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import train
from method_runs import weights
from peft.tuners.osf import OSFLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trace_bench.evaluate import evaluate
from trace_bench.run import read_json
from trainers.osf import OSFConfig, OSFTrainer


@pytest.fixture
def options(options) -> dict:
    return {**options, "use_peft": False, "bf16": False, "learning_rate": 1e-3}


def linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def leak(before: torch.Tensor, after: torch.Tensor, rank: int) -> float:
    """The share of a weight's change in its earlier top directions, from 0 to 1."""
    u, _, v = torch.linalg.svd(before.double(), full_matrices=False)
    change = after.double() - before.double()
    high = max((u[:, :rank].T @ change).norm(), (change @ v[:rank].T).norm())
    return float(high / change.norm())


def test_sgd_with_osf_does_not_change_the_top_directions(options, tiny_model):
    run = train({**options, "optim": "sgd", "learning_rate": 1.0}, OSFTrainer, OSFConfig)
    states = [load_file(tiny_model / "model.safetensors"), weights(run, 1), weights(run, 2)]
    for (before, after), rank in zip(pairwise(states), (1, 64), strict=True):  # at least one direction; then 1/2 of 128
        assert before.keys() == after.keys() and sum(map(linear, before)) == 14
        for name, weight in before.items():
            if not linear(name):
                assert torch.equal(weight, after[name]), "embeddings and norms are not trained"
                continue
            assert (after[name] - weight).abs().max() > 1e-5, "it moved"
            assert leak(weight, after[name], rank) < 2e-3, "no more than the rounding of float32"
            assert leak(weight, after[name], rank + 32) > 0.5, "and what is not preserved is free"


def test_adam_with_osf_changes_the_top_directions_a_little(options, tiny_model):
    """The gradient is projected, but Adam's step is not the gradient, as OSF's docstring says."""
    run = train({**options, "tasks": ["trace_fomc"], "osf_preserved": 0.5}, OSFTrainer, OSFConfig)
    before, after = load_file(tiny_model / "model.safetensors"), weights(run, 1)
    assert 0.05 < max(leak(before[name], after[name], 64) for name in before if linear(name)) < 0.5


def test_osf_saves_the_trained_model_and_trains_less_in_each_stage(options):
    class Look(OSFTrainer):
        def save_checkpoint(self):
            layers = [m for m in self.model.modules() if isinstance(m, OSFLayer)]
            assert len(layers) == 14 and not isinstance(self.model.get_output_embeddings(), OSFLayer)
            for layer in layers:
                factors = layer.osf_svd_params["default"]
                assert not torch.equal(factors["U_low"], layer._osf_U_low_init["default"])
            ids = torch.arange(3, 60)[None]
            with torch.no_grad():
                trained = self.model(ids).logits
                path = super().save_checkpoint()
                saved = AutoModelForCausalLM.from_pretrained(path)
                torch.testing.assert_close(saved(ids).logits, trained, rtol=1e-4, atol=1e-5)
            assert type(saved).__name__ == "LlamaForCausalLM" and saved.dtype == torch.float32
            return path

    run = train({**options, "max_steps": 2, "test_rows": 1}, Look, OSFConfig)
    for stage, preserved in ((1, 0.0), (2, 0.5)):
        record = read_json(run.stages[stage].train_file)
        assert record["preserved"] == preserved
        rank = 128 - max(1, int(128 * preserved))
        # Each matrix (out, in) has U_low, S_low, V_low. Both layers have q, k, v, o (128 x 128) and the MLP's three.
        assert record["trainable_parameters"] == 2 * rank * (4 * (128 + 1 + 128) + 3 * (256 + 1 + 128))
        assert record["parameters"] == sum(w.numel() for w in weights(run, stage).values())
    assert run.stages[1].checkpoint.name == "model" and run.manifest["trains"] == "full"
    assert not list(run.path.rglob("adapter_config.json"))
    assert evaluate(run) == 2 + 1 + 2


def test_osf_decomposes_weights_on_the_device_of_training(monkeypatch):
    """On a CPU the decompositions of a large model take hours."""
    seen = []
    monkeypatch.setattr(
        "trainers.osf.get_peft_model", lambda model, config: seen.append(model[0].weight.device) or model
    )
    config = SimpleNamespace(osf_preserved=None, stages=["a"], device=torch.device("meta"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    trainer = SimpleNamespace(config=config, previous=SimpleNamespace(checkpoint=None), load_model=lambda path: model)
    OSFTrainer.stage_model(trainer, SimpleNamespace(index=1))
    assert seen == [config.device]
