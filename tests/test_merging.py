"""Adapters merged into weights of less precision than their update: nothing is lost in the mean, or it is said."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trace_bench import models
from trace_bench.engine import merging


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_right_in_the_mean(dtype):
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
    """A bf16 base, and an adapter with updates of about a tenth of what bf16 can tell apart."""
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
    """The share of what an adapter does to the logits that a merged model does, too, in float32."""
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


def test_what_is_lost_is_measured_and_said(small, monkeypatch, caplog):
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


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_tensor_is_untied_before_one_of_its_uses_changes(target, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", target], task_type="CAUSAL_LM"))
    save_lively(adapted, tmp_path / "adapter", seed=0)
    ids = torch.randint(3, 250, (2, 20))
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        models.save_merged(str(tiny_model), tmp_path / "adapter", str(tmp_path / "merged"), None, False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4), "saved and loaded again"
    assert not merged.config.tie_word_embeddings


def test_the_adapters_below_are_merged_in_their_order(tiny_model, checkpoints, tmp_path):
    """Of a chain: each adapter was trained on the model that those before it were merged into."""
    first = checkpoints["adapter"]
    merged = models.load_merged(str(tiny_model), first, dtype=torch.float32)
    second = get_peft_model(merged, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    save_lively(second, tmp_path / "second", seed=3)
    ids = torch.randint(3, 250, (2, 20))
    with torch.no_grad():
        expected = second.eval()(ids).logits
        for load in (models.load_model, models.load_merged):
            model = load(str(tiny_model), tmp_path / "second", below=[first], dtype=torch.float32)
            assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-4)
            alone = load(str(tiny_model), tmp_path / "second", dtype=torch.float32)
            assert not torch.allclose(alone.eval()(ids).logits, expected, atol=1e-2)
