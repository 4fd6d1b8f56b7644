"""Adapters merged into weights of less precision than their update: nothing is lost in the mean, or it is said."""

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trace_bench.engine import merging, models


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


HOLD = """
import sys, time
from trace_bench.engine import merging
merging.has_gpu = lambda: True
merging._MERGE = "import time; time.sleep(600)"
one = merging.Merging("base", None, False)
one.prepare(merging.Path("adapter"))
print(one._ahead[2].pid, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def begun(how: str) -> tuple[subprocess.Popen, int]:
    """A program that merges ahead, and the number of its child."""
    command = [sys.executable, "-c", HOLD, how]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_merged_model_of_a_killed_program_goes_with_the_next_one(temporary, tiny_model, checkpoints):
    process, child = begun("wait")
    (left,) = temporary.iterdir()
    merger = merging.Merging(str(tiny_model), None, False)
    with merger.full_model(checkpoints["adapter"]) as (folder, _):
        assert left.exists() and Path(folder).parent == temporary, "it is in use"
    process.kill()
    process.wait()
    os.kill(child, 9)
    with merger.full_model(checkpoints["adapter"]) as (folder, _):
        assert not left.exists()
    assert not any(temporary.iterdir())


def test_a_program_that_ends_takes_what_it_merges_ahead_with_it(temporary):
    process, child = begun("end")
    process.wait(60)
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child) and not any(temporary.iterdir())
