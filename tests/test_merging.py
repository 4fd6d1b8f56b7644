"""Merging an adapter into weights of lower precision than its update loses nothing on average, or warns."""

import io
import logging
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import load_merged
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trace_bench.engine import merging, models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_unbiased(dtype):
    torch.manual_seed(0)

    def rounded_by(exact, seed=0):
        return models.round_unbiased(exact, dtype, torch.Generator().manual_seed(seed))

    known = torch.randn(2000).to(dtype).float()
    assert torch.equal(rounded_by(known).float(), known), "what the type has stays what it is"
    exact = torch.full((100_000,), 1.0) + torch.finfo(dtype).eps * 0.1
    rounded = rounded_by(exact)
    assert not torch.equal(rounded, rounded_by(exact, seed=1))
    assert set(rounded.float().tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}, "one of the two neighbours"
    share = (rounded.float() > 1).float().mean()
    assert share == pytest.approx(0.1, abs=4 * (0.09 / 100_000) ** 0.5)
    assert torch.equal(rounded_by(-exact), -rounded), "the same for both signs"


@pytest.fixture
def small(tiny_model, tmp_path):
    """A bf16 base model, and an adapter whose updates are about a tenth of bf16's precision."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    base = tmp_path / "bf16"
    model.save_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1 if "lora_A" in name else 5e-5)
    adapted.save_pretrained(tmp_path / "small")
    return base, tmp_path / "small"


@torch.no_grad()
def survived(base, adapter, merged) -> float:
    """The share of an adapter's effect on the logits that a merged model keeps, in float32."""
    ids = torch.randint(3, 250, (32, 40), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(ids).logits
    wanted = PeftModel.from_pretrained(plain, adapter)(ids).logits - before
    found = merged.float()(ids).logits - before
    return float((found * wanted).sum() / (wanted * wanted).sum())


def test_an_update_far_below_the_weights_precision_survives_merging(small):
    base, adapter = small
    model, lost = models.merge(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    again, _ = models.merge(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert abs(lost) < 0.05 and survived(base, adapter, model) == pytest.approx(1, abs=0.15)
    nearest = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    nearest = PeftModel.from_pretrained(nearest, adapter).merge_and_unload()
    assert survived(base, adapter, nearest) < 0.8, "to the nearest value much of it is lost"


def test_the_loss_of_a_merge_is_measured_and_warned_about(small, monkeypatch, caplog):
    base, adapter = small
    monkeypatch.setattr(models, "round_unbiased", lambda exact, dtype, draws: exact.to(dtype))  # to the nearest
    with caplog.at_level(logging.WARNING), merging.Merging(str(base), None, False).full_model(adapter) as (_, lost):
        pass
    assert 0.1 < lost < 1 and f"loses {100 * lost:.0f} % of its update" in caplog.text


def save_lively(adapted, folder, seed: int) -> None:
    """Saves an adapter with random weights that change all answers."""
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)


@pytest.fixture
def with_images(tmp_path) -> Path:
    """A base model that also takes images: its config has the one of the language model as a part."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    parts = {"vision_config": {**sizes, "image_size": 28, "patch_size": 14}}
    parts["text_config"] = {**sizes, "vocab_size": 259, "num_key_value_heads": 1, "head_dim": 32}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **parts)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("base", ["tiny_model", "with_images"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_tensor_is_untied_before_one_of_its_uses_changes(target, base, request, tmp_path):
    base = request.getfixturevalue(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", target], task_type="CAUSAL_LM"))
    save_lively(adapted, tmp_path / "adapter", seed=0)
    ids = torch.randint(3, 250, (2, 20))
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        models.save_merged(str(base), tmp_path / "adapter", str(tmp_path / "merged"), None, False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4), "saved and loaded again"
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert not config.tie_word_embeddings and not config.get_text_config().tie_word_embeddings, "as an engine reads it"


def test_a_partly_matching_adapter_is_refused(tiny_model, checkpoints, tmp_path):
    """PEFT only warns about a tensor with a wrong name, and does not change its layer."""
    file = checkpoints["adapter"] / "adapter_model.safetensors"
    renamed = {name.replace("0.mlp.up_proj", "0.mlp..up_proj"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file)
    for load in (models.load_model, load_merged):
        with pytest.raises(models.ModelError, match=r"would load only a part of .*layers\.0\.mlp\.up_proj\.lora_A"):
            load(str(tiny_model), checkpoints["adapter"])


def test_the_adapters_of_a_chain_are_merged_in_order(tiny_model, checkpoints, tmp_path):
    """Each adapter of a chain was trained on the model into which the earlier ones were merged."""
    first = checkpoints["adapter"]
    merged = load_merged(str(tiny_model), first, dtype=torch.float32)
    second = get_peft_model(merged, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    save_lively(second, tmp_path / "second", seed=3)
    ids = torch.randint(3, 250, (2, 20))
    with torch.no_grad():
        expected = second.eval()(ids).logits
        for load in (models.load_model, load_merged):
            model = load(str(tiny_model), tmp_path / "second", below=[first], dtype=torch.float32)
            assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-4)
            alone = load(str(tiny_model), tmp_path / "second", dtype=torch.float32)
            assert not torch.allclose(alone.eval()(ids).logits, expected, atol=1e-2)


def test_the_next_checkpoint_is_merged_ahead_if_there_are_free_resources(tiny_model, checkpoints, monkeypatch):
    adapter, merger = checkpoints["adapter"], merging.Merging(str(tiny_model), None, False)

    def merged() -> dict:
        with merger.full_model(adapter) as (folder, lost):
            tensors = load_file(Path(folder) / "model.safetensors")
        assert not Path(folder).exists() and lost == 0, "in float32"
        return tensors

    class InHere:
        """Runs the program at once, in this process: imports take seconds."""

        def __init__(self, command, **_):
            self.stdout = io.StringIO()
            with monkeypatch.context() as patch, redirect_stdout(self.stdout):
                patch.setattr(sys, "argv", ["-c", *command[3:]])
                exec(command[2], {})
            self.stdout.seek(0)

        def wait(self):
            return 0

        kill = wait

    merger.prepare(adapter)
    assert merger._ahead is None, "on a CPU merging would slow the engine down"
    known = merged()
    with monkeypatch.context() as patch:
        patch.setattr(merging, "has_gpu", lambda: True)
        patch.setattr(merging.subprocess, "Popen", InHere)
        merger.prepare(adapter)
        merger.forget()
        assert merged().keys() == known.keys(), "its folder is gone: merged here"
        merger.prepare(adapter)
        patch.setattr(models, "merge", lambda *a, **k: pytest.fail("it was merged already"))
        ahead = merged()
    assert ahead.keys() == known.keys() and all(torch.equal(ahead[name], known[name]) for name in known)
    merger._ahead = adapter, Path("gone"), subprocess.Popen(["false"])
    assert merged().keys() == known.keys(), "it failed: merged here"


HOLD = """
from trace_bench.engine import merging
merging.has_gpu = lambda: True
merging._MERGE = "import time; time.sleep(600)"
one = merging.Merging("base", None, False)
one.prepare(merging.Path("adapter"))
print(one._ahead[2].pid, one._ahead[1])
"""


def test_a_program_that_ends_stops_and_removes_its_merge_ahead():
    out = subprocess.check_output([sys.executable, "-c", HOLD], cwd=Path(__file__).parents[1], text=True)
    child, folder = out.split()
    assert not Path(f"/proc/{child}").exists() and not Path(folder).exists()
