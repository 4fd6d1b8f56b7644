"""Progressive Prompts: the trained and the unchanged parts, and that the engines run the same model as PEFT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import NEW_TOKENS, generate, likelihoods
from conftest import both_tokenizers, command_line, train
from forks import forked, run_module
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_bench import cli, engine
from trace_bench.engine import models
from trace_bench.run import Run, read_json
from trainers.pp import PPConfig, PPTrainer

ROOT = Path(__file__).parents[1]
PROMPTS = ["12 + 3 is equal to", "Hello", "What is the monetary policy stance of the following text?"]


@pytest.fixture
def options(options) -> dict:
    return {**options, "prompt_tokens": 4}


@pytest.fixture
def lively(checkpoints, tmp_path) -> tuple[Path, Path]:
    """A base model that writes varied texts, and a soft prompt that changes them."""
    base, adapter = checkpoints["full model"], tmp_path / "a_prompt"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    )
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.3)
    model.save_pretrained(adapter)
    return base, adapter


def by_hand(model, soft: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The logits of a text after a soft prompt, without the prompt's own positions."""
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    with torch.no_grad():
        return model(inputs_embeds=torch.cat([soft[None], embeds], dim=1)).logits[0, len(soft) :]


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("mlp", [0, 16])
def test_every_stage_adds_a_new_prompt_before_the_unchanged_earlier_ones(options, tiny_model, mlp):
    base, ids, trained = load_file(tiny_model / "model.safetensors"), torch.arange(3, 60)[None], 4 * 128
    if mlp:
        trained += 128 * 16 + 16 + 16 * 8 + 8 + 8 * 128 + 128
    logits = []

    class Look(PPTrainer):
        def end_stage(self):
            now = self.model.base_model.state_dict()
            assert all(torch.equal(now[name], base[name]) for name in base)
            with torch.no_grad():
                logits.append(self.model.eval()(ids).logits)

    Look.__module__ = PPTrainer.__module__
    changes = {"tasks": [*options["tasks"], "trace_numglue_cm"], "prompt_mlp": mlp, "bf16": False}
    run = train({**options, **changes, "weight_decay": 0.1, "max_steps": 2}, Look, PPConfig)
    prompts = [load_file(s.checkpoint / "adapter_model.safetensors")["prompt_embeddings"] for s in run.stages[1:]]
    assert [p.shape for p in prompts] == [(4, 128), (8, 128), (12, 128)]
    assert torch.equal(prompts[1][4:], prompts[0]) and torch.equal(prompts[2][4:], prompts[1])
    starts = set()
    for stage, prompt, logit in zip(run.stages[1:], prompts, logits, strict=True):
        distance = torch.cdist(prompt[:4], base["model.embed_tokens.weight"])
        assert (distance.min(dim=1).values > 1e-3).all(), "every row moved"
        starts.add(tuple(distance.argmin(dim=1).tolist()))
        assert read_json(stage.train_file)["trainable_parameters"] == trained, "the new prompt alone"
        config = read_json(stage.checkpoint / "adapter_config.json")
        assert config["peft_type"] == "PROMPT_TUNING" and config["num_virtual_tokens"] == 4 * stage.index
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), stage.checkpoint
        )
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, logit, rtol=1e-5, atol=1e-6)
    assert mlp or len(starts) == 3, "each stage begins with other random tokens"


def test_the_loss_with_a_soft_prompt_equals_that_by_hand_and_trls(options):
    from trl import SFTTrainer

    checked = []

    class Look(PPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ours = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            theirs = SFTTrainer.compute_loss(self, model, dict(inputs), return_outputs, num_items_in_batch)
            soft = model.get_prompt(batch_size=1)[0].detach()
            assert len(soft) == 4 * self.stage.index
            total = 0.0
            for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
                ids, labels = ids[mask.bool()], labels[mask.bool()]
                logits = by_hand(model.base_model, soft, ids.tolist())[:-1]
                total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            assert ours.item() == pytest.approx(total / float(num_items_in_batch), rel=1e-5)
            assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
            checked.append(self.stage.index)
            return ours

    train({**options, "bf16": False, "loss_weights": "tokens", "max_steps": 1}, Look, PPConfig)
    assert checked == [1, 2]


def test_the_configuration_of_pp_prepares_vllm_for_prompts():
    from trl import ModelConfig, TrlParser

    config = str(ROOT / "trainers/configs/quickstart.yaml")
    args, model_args = TrlParser([PPConfig, ModelConfig]).parse_args_and_config(["--config", config])
    assert PPTrainer.prepare(args, model_args) == {"trains": "prompts"}
    assert args.backend == "vllm"
    assert args.engine_args == {"max_model_len": 1024, "enable_prompt_embeds": True}
    assert PPConfig(output_dir="x", backend="hf").engine_args is None


# --------------------------------------------------------------------------------------------------------- evaluation


def test_the_hf_engine_generates_like_peft_and_a_loop_by_hand(lively):
    base, adapter = lively
    lm = engine.open_engine("hf", str(base), engine_args={"dtype": "float32", "batch_size": 8})
    plain, longest = generate(lm, PROMPTS), lm.max_length
    lm.load(adapter)
    together = generate(lm, PROMPTS)
    assert together != plain and len(set(together)) == 3, "lively texts, or nothing is shown"
    assert lm.max_length == longest - 6, "the prompt takes its part of the context"
    assert [generate(lm, [p])[0] for p in PROMPTS] == together, "whatever else is in the batch"

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    soft = models.soft_prompt(adapter)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    for text, output in zip(PROMPTS, together, strict=True):
        start = ids = tokenizer(text).input_ids
        while len(ids) < len(start) + NEW_TOKENS and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, int(by_hand(model, soft, ids)[-1].argmax())]
        assert tokenizer.decode(ids[len(start) :], skip_special_tokens=True) == output
        tokens = torch.tensor([start])
        by_peft = peft.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        assert tokenizer.decode(by_peft[0, len(start) :], skip_special_tokens=True) == output
    lm.load(None)
    assert generate(lm, PROMPTS) == plain and lm.max_length == longest, "and back"


def test_likelihoods_follow_the_soft_prompt(lively):
    base, adapter = lively
    lm = engine.open_engine("hf", str(base), engine_args={"dtype": "float32", "batch_size": 4})
    pairs = [("12 + 3 is", " 15"), ("A", " longer answer than question")]
    plain = likelihoods(lm, pairs)
    lm.load(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for (context, answer), found, without in zip(pairs, likelihoods(lm, pairs), plain, strict=True):
        ids, n = tokenizer(context + answer).input_ids, len(tokenizer(answer).input_ids)
        logits = by_hand(model, models.soft_prompt(adapter), ids)[:-1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[-n:].sum()
        assert found == pytest.approx(float(expected), rel=1e-5) and found != pytest.approx(without, rel=1e-2)


def test_an_external_soft_prompt_counts_towards_the_context(lively, tmp_path):
    words = ["evaluate", str(tmp_path / "run"), "--model", str(lively[0]), "--checkpoint", f"pt={lively[1]}"]
    words += ["--tasks", "trace_fomc", "--data", "demo", "--test-rows", "2", "--backend", "hf"]
    words += ["--max-prompt-length", "96", "--max-new-tokens", "4", "--engine-args"]
    with pytest.raises(
        SystemExit, match=r"96 tokens of a prompt and 4 of an answer, after 6 tokens of a soft prompt, do not"
    ):
        cli.main([*words, '{"max_length": 105}'])
    cli.main([*words, '{"max_length": 106}'])
    assert len(Run.open(tmp_path / "run").stages) == 2


def test_only_prompt_tuning_adapters_are_soft_prompts(checkpoints, lively):
    assert models.soft_prompt(lively[1]).shape == (6, 128)
    assert [models.soft_prompt(c) for c in (None, *checkpoints.values())] == [None] * 3


def vllm_outputs(base: Path, adapter: Path, soft: bool) -> list:
    args = {"max_model_len": 256, "dtype": "float32", **({"enable_prompt_embeds": True} if soft else {})}
    lm = engine.open_engine("vllm", str(base), engine_args=args)
    outputs = [generate(lm, PROMPTS)]
    try:
        lm.load(adapter)
        outputs += [generate(lm, PROMPTS), generate(lm, PROMPTS[::-1])[::-1]]
        try:
            likelihoods(lm, [("a", "b")])
        except engine.EngineError as e:
            outputs.append(str(e))
        outputs.append(lm.log_likelihoods(PROMPTS, PROMPTS[::-1]))
        lm.load(None)
        outputs.append(generate(lm, PROMPTS))
    except engine.EngineError as e:
        outputs.append(str(e))
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
@both_tokenizers
def test_vllm_generates_after_a_soft_prompt_like_transformers(lively):
    lm = engine.open_engine("hf", str(lively[0]), engine_args={"dtype": "float32"})
    plain = generate(lm, PROMPTS)
    lm.load(lively[1])
    # After embeddings, vLLM leaves out the bytes of an incomplete character at the end.
    expected = [text.rstrip("\ufffd") for text in generate(lm, PROMPTS)]
    base, soft, cached, refused, references, back = forked(vllm_outputs, *lively, True)
    assert base == back == plain
    assert [text.rstrip("\ufffd") for text in soft] == expected and cached == soft
    assert "--backend hf" in refused
    assert np.array(references) == pytest.approx(np.array(lm.log_likelihoods(PROMPTS, PROMPTS[::-1])), rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_unprepared_vllm_is_an_error_that_says_what_to_do(lively):
    _, refused = forked(vllm_outputs, *lively, False)
    assert "enable_prompt_embeds: true" in refused and "--backend hf" in refused


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_prompts_is_evaluated_through_vllm(options):
    options = {**options, "backend": "vllm", "engine_args": '{"max_model_len": 256, "dtype": "float32"}'}
    run_module("trainers.pp", *command_line(options))
    run_module("trace_bench", "evaluate", options["output_dir"])
    assert [len(list((s.path / "eval").glob("*.json"))) for s in Run.open(options["output_dir"]).stages] == [2, 1, 2]
