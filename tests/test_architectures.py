"""The evaluated model is the trained model, for a table of architectures and kinds of checkpoint.

Every cell is compared with a plain greedy loop over the unmerged PEFT model (see architectures.py): one row at a time,
no cache, float32. All answers must be equal.
"""

import shutil
from collections.abc import Callable
from functools import cache
from operator import ne
from pathlib import Path

import pytest
from architectures import (
    ARCHITECTURES,
    KINDS,
    MORE_KINDS,
    PROMPTS,
    by_transformers,
    by_vllm,
    generate,
    likelihoods,
    make_base,
    make_checkpoint,
    reference,
    reference_likelihoods,
    reload,
    served,
)
from conftest import UNCHANGED, byte_tokenizer, pieces_tokenizer, train
from forks import forked
from method_runs import EXACT, as_method, method, small
from transformers import AutoTokenizer

from trace_bench.engine import EngineError, open_engine
from trace_bench.packaged import methods
from trainers.base import ConfigError

#: Contexts with texts of one or several tokens, as in MMLU and PIQA.
PAIRS = [
    *(("Which of them is it?\nAnswer:", f" {letter}") for letter in "ABCD"),
    ("A", " longer text, of several words."),
    ("Die Straße ist", " naß"),
]
ALL_KINDS = (*KINDS, *MORE_KINDS)
#: One architecture for each kind of positions, attention, experts and state. The others are slow tests.
QUICK = ("llama", "llama_tied", "gpt2", "gptj", "falcon_alibi", "gemma3", "mamba", "mixtral")
_SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]
CELLS = [
    *(
        pytest.param(
            *(by_transformers, name, ALL_KINDS if "llama" in name else ("lora", "modules_to_save")),
            id=f"hf-{name}",
            marks=[] if name in QUICK else _SLOW,
        )
        for name in ARCHITECTURES
    ),
    pytest.param(by_vllm, "llama", KINDS, id="vllm-llama", marks=_SLOW),
    pytest.param(by_vllm, "llama_tied", ALL_KINDS, id="vllm-llama_tied", marks=_SLOW),
    # vLLM runs it with transformers' code and builds the class again for each stage.
    pytest.param(by_vllm, "gpt_neox", ["full", "lora"], id="vllm-gpt_neox", marks=_SLOW),
    # vLLM's kernel for CPUs would rotate only one of its heads.
    pytest.param(by_vllm, "lfm2", ["full", "lora"], id="vllm-lfm2", marks=_SLOW),
    # An engine for each, since experts cannot be swapped on a CPU.
    pytest.param(by_vllm, "mixtral", ["lora"], id="vllm-mixtral", marks=_SLOW),
    # A swap does not change its sinks and the biases of its experts, although it passes the check of the first swap.
    pytest.param(by_vllm, "gpt_oss", ["full"], id="vllm-gpt_oss", marks=_SLOW),
]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], tuple[Path, list[str]]]:
    """The base model of an architecture and its answers, made once."""
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def make(architecture: str) -> tuple[Path, list[str]]:
        # transformers makes the tokenizer of a Qwen byte-level, regardless of its files.
        tokenizer = byte_tokenizer() if architecture.startswith("qwen") else pieces_tokenizer()
        base = make_base(architecture, folder / architecture, tokenizer)
        UNCHANGED.add(str(base))
        answers = reference(reload(base, None), AutoTokenizer.from_pretrained(base), PROMPTS)
        assert len(set(answers)) == len(PROMPTS), "lively texts, or nothing is shown"
        return base, answers

    return make


@pytest.mark.parametrize(("answers_of", "architecture", "kinds"), CELLS)
def test_an_engine_answers_like_the_trained_model(answers_of, architecture, kinds, base_of, tmp_path):
    """One engine loads all kinds of checkpoint, and the base model between any two of them."""
    base, answers_of_base = base_of(architecture)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def answered(model) -> dict:
        answers = reference(model, tokenizer, PROMPTS)
        return {"answers": answers, "likelihoods": reference_likelihoods(model, tokenizer, PAIRS)}

    loads, expected = [None], [answered(reload(base, None))]
    for kind in kinds:
        checkpoint, model = make_checkpoint(kind, base, tmp_path / kind)
        loads += [checkpoint, None]
        expected += [answered(model), expected[0]]
        assert all(map(ne, expected[-2]["answers"], answers_of_base)), "another model"
    found = answers_of(base, loads, PROMPTS, PAIRS)
    assert [each["answers"] for each in found] == [each["answers"] for each in expected]
    for each, wanted in zip(found, expected, strict=True):
        precision = 1e-4 if answers_of is by_transformers else 1e-3
        assert each["likelihoods"] == pytest.approx(wanted["likelihoods"], rel=precision)


# -------------------------------------------------------------------------------------------------- trained by a method

#: A dense model with as many key heads as query heads, one with tied embeddings, one with grouped queries, and experts.
TRAINED_ON = ("phi", "llama_tied", "llama", "mixtral")
METHODS = [m for m in methods() if m != "icl"]
#: Methods that do not fit an architecture, and their error before training.
_FAMILY = ("olora", "inclora", "nlora", "milora", "inflora")
UNFIT = {
    **{(name, "mixtral"): r"mlp\.(experts|gate) is not a linear layer.*Name linear layers" for name in _FAMILY},
    ("merge", "mixtral"): r"mlp\.(experts|gate) is not a linear layer",
    ("migu", "mixtral"): r"outputs of .*mlp\.(experts|gate).*Name linear layers",
}


def _cells():
    """Pairs each method with one architecture in turn. The other pairs are slow tests."""
    for i, name in enumerate(METHODS):
        for n, architecture in enumerate(TRAINED_ON):
            quick = n == i % len(TRAINED_ON)
            yield pytest.param(name, architecture, id=f"{name}-{architecture}", marks=[] if quick else _SLOW)


@pytest.mark.usefixtures("written_here")
@pytest.mark.parametrize(("name", "architecture"), _cells())
def test_the_evaluated_model_is_the_one_that_the_method_trained(name, architecture, base_of, options):
    """Compares the tokens after two stages, or checks the method's error that the model does not fit."""
    base, answers_of_base = base_of(architecture)
    trainer, config = method(name)
    trained = []

    class Spy(trainer):
        def end_stage(self):
            super().end_stage()
            trained[:] = [self.accelerator.unwrap_model(self.model)]

    settings = {**EXACT, "model_name_or_path": str(base), "train_rows": 4, "per_device_train_batch_size": 4}
    settings |= {"max_prompt_length": 48, "max_answer_length": 16, "max_new_tokens": 2, "learning_rate": 0.05}
    if architecture == "mixtral":
        settings["lora_target_modules"] = "all-linear"  # with its experts
    settings = small(options, name, 2, **settings)
    if (name, architecture) in UNFIT:
        with pytest.raises(ConfigError, match=UNFIT[name, architecture]):
            train(settings, as_method(Spy), config)
        assert not trained
        return
    run = train(settings, as_method(Spy), config)
    checkpoint = run.stages[-1].checkpoint
    # `merge` leaves an average, not the model that it trained.
    model = reload(base, checkpoint) if name == "merge" else trained[0].eval()
    expected = reference(model, AutoTokenizer.from_pretrained(base), PROMPTS)
    (found,) = by_transformers(base, [checkpoint], PROMPTS)
    assert found["answers"] == expected
    assert expected != answers_of_base, "another model"


# ------------------------------------------------------------------------------------------ vllm's unmerged adapters


def unmerged(base: Path, adapters: list[Path]) -> tuple:
    args = {"max_model_len": 256, "dtype": "float32", "enable_lora": True}
    lm = open_engine("vllm", str(base), engine_args=args, checkpoints=adapters)
    calls, found = [], []
    original = lm.model.generate
    lm.model.generate = lambda ps, *rest, **kwargs: calls.append(len(ps)) or original(ps, *rest, **kwargs)
    for i, adapter in enumerate(adapters):
        lm.load(adapter)
        lm.answer_together(adapters[i + 1 :])
        found.append({"answers": generate(lm, PROMPTS), "served": lm.served["weights"], "likelihoods": None})
    asked = list(calls)
    lm.load(adapters[0])
    found[0]["likelihoods"] = likelihoods(lm, PAIRS)
    lm.load(None)
    return found, {"answers": generate(lm, PROMPTS), "served": lm.served["weights"]}, asked


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_serves_unmerged_adapters_of_several_stages_in_one_batch(base_of, tmp_path):
    """This is the default on a GPU. A kind of adapter that LoRA requests cannot contain is merged."""
    base, answers_of_base = base_of("llama_tied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Their folders have the same name, like those of the stages of a run.
    made = {kind: make_checkpoint(kind, base, tmp_path / kind / "adapter") for kind in ("lora", "rslora", "dora")}
    expected = {kind: reference(model, tokenizer, PROMPTS) for kind, (_, model) in made.items()}
    adapters = [made["lora"][0], made["rslora"][0], tmp_path / "third" / "adapter", made["dora"][0]]
    shutil.copytree(made["lora"][0], adapters[2])
    found, again, calls = forked(unmerged, base, adapters)
    assert [f["served"] for f in found] == ["adapter", "adapter", "adapter", "merged adapter"]
    assert [f["answers"] for f in found] == [expected[kind] for kind in ("lora", "rslora", "lora", "dora")]
    assert again == {"answers": answers_of_base, "served": "base"}
    # The three answer at once when the first is loaded, and the next two ask nothing; then the merged one, with the
    # short prompts by which its swap proves itself.
    assert calls[0] == 3 * len(PROMPTS) and calls[1:] in ([len(PROMPTS)], [2, 2, len(PROMPTS)])
    likelihoods_of_lora = reference_likelihoods(made["lora"][1], tokenizer, PAIRS)
    assert found[0]["likelihoods"] == pytest.approx(likelihoods_of_lora, rel=1e-3)


MINICPM3 = {
    **{"model_type": "minicpm3", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True},
    **{"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64},
}


def mixed(base: Path, adapter: Path, model: Path) -> list[dict]:
    args = {"max_model_len": 256, "dtype": "float32", "enable_lora": True}
    lm = open_engine("vllm", str(base), engine_args=args, checkpoints=[adapter])
    found = []
    for checkpoint in (adapter, model, adapter, None):
        lm.load(checkpoint)
        found.append({"answers": generate(lm, PROMPTS), **lm.served})
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_is_started_again_where_it_fails_to_swap_weights(monkeypatch, tmp_path):
    """VLLM's class finds no weights of its own by name once there is LoRA, as there is on a GPU; so does DeepSeek's."""
    monkeypatch.setitem(ARCHITECTURES, "minicpm3", MINICPM3)
    base = make_base("minicpm3", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    (adapter, adapted), (full, model) = (make_checkpoint(kind, base, tmp_path / kind) for kind in ("lora", "full"))
    lora, other, own = (reference(m, tokenizer, PROMPTS) for m in (adapted, model, reload(base, None)))
    found = forked(mixed, base, adapter, full)
    assert [f["answers"] for f in found] == [lora, other, lora, own]
    assert ["own_engine" in f for f in found] == [False, True, True, False]


def refused(base: Path, adapters: list[Path]) -> list[dict]:
    args = {"max_model_len": 256, "dtype": "float32", "enable_lora": True}
    with pytest.raises(EngineError, match="takes no LoRA requests"):
        open_engine("vllm", str(base), engine_args=args, checkpoints=adapters[1:])
    lm = open_engine("vllm", str(base), engine_args=args, checkpoints=adapters)
    return [
        {**each, "served": lm.served["weights"]} for path in adapters for each in served(lm, [path], PROMPTS, PAIRS)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_merges_an_adapter_for_whose_layers_it_has_no_lora(monkeypatch, tmp_path):
    """It runs GLM-4 by transformers' code, and looks for LoRA of other layers than that has in its MLP."""
    monkeypatch.setitem(ARCHITECTURES, "glm4", {**ARCHITECTURES["qwen3"], "model_type": "glm4"})
    base = make_base("glm4", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = [make_checkpoint(kind, base, tmp_path / kind) for kind in ("lora_attention", "lora")]
    found = forked(refused, base, [path for path, _ in made])
    assert [f["served"] for f in found] == ["adapter", "merged adapter"]
    for each, (_, model) in zip(found, made, strict=True):
        assert each["answers"] == reference(model, tokenizer, PROMPTS)
        assert each["likelihoods"] == pytest.approx(reference_likelihoods(model, tokenizer, PAIRS), rel=1e-3)
