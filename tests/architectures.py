"""Small models of many architectures, several kinds of checkpoint, and reference answers by a plain greedy loop.

The random weights are large enough for varied texts, so that any mistake changes the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from conftest import byte_tokenizer
from forks import forked
from lm_eval.api.instance import Instance
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trace_bench.engine import open_engine

#: Two layers, and heads of 64, a size that every attention kernel supports.
_LAYERS = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_LAYERS, "num_key_value_heads": 1, "max_position_embeddings": 512, "head_dim": 64}
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
#: Name of an architecture -> arguments of `AutoConfig.for_model`, without those that follow from the tokenizer.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA, **_UNTIED},
    "llama_tied": {"model_type": "llama", **_LLAMA, **_TIED},
    "mistral": {"model_type": "mistral", **_LLAMA, **_UNTIED, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **_LLAMA, **_TIED},
    "qwen3": {"model_type": "qwen3", **_LLAMA, **_UNTIED},
    "gemma": {"model_type": "gemma", **_LLAMA, **_TIED},
    "gemma2": {"model_type": "gemma2", **_LLAMA, **_TIED, "sliding_window": 16, "query_pre_attn_scalar": 64},
    "gemma3": {"model_type": "gemma3_text", **_LLAMA, **_TIED, "sliding_window": 16, "query_pre_attn_scalar": 64},
    "phi": {"model_type": "phi", **_LAYERS, **_UNTIED, "max_position_embeddings": 512},
    "phi3": {"model_type": "phi3", **_LLAMA, **_UNTIED},
    "gpt2": {"model_type": "gpt2", **_GPT, **_TIED},
    "gpt_neox": {"model_type": "gpt_neox", **_LAYERS, **_UNTIED, "max_position_embeddings": 512},
    "gptj": {"model_type": "gptj", **_GPT, **_UNTIED, "rotary_dim": 32},
    "opt": {
        **{"model_type": "opt", "hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128, **_TIED},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512},
    },
    "falcon": {"model_type": "falcon", **_LAYERS, **_TIED, "ffn_hidden_size": 128},
    "falcon_alibi": {"model_type": "falcon", **_LAYERS, **_TIED, "alibi": True, "parallel_attn": False},
    "bloom": {"model_type": "bloom", "hidden_size": 128, "n_layer": 2, "n_head": 2, **_TIED},
    "mpt": {"model_type": "mpt", "d_model": 128, "n_layers": 2, "n_heads": 2, "max_seq_len": 512, **_TIED},
    "stablelm": {"model_type": "stablelm", **_LLAMA, **_UNTIED},
    "olmo2": {"model_type": "olmo2", **_LLAMA, **_UNTIED},
    "cohere": {"model_type": "cohere", **_LLAMA, **_TIED, "logit_scale": 0.25},
    "smollm3": {"model_type": "smollm3", **_LLAMA, **_TIED, "no_rope_layers": [1, 0]},
    "granite": {"model_type": "granite", **_LLAMA, **_TIED, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **_TIED},
    "mixtral": {"model_type": "mixtral", **_LLAMA, **_UNTIED, "num_local_experts": 4},
    "qwen2_moe": {"model_type": "qwen2_moe", **_LLAMA, **_UNTIED, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"model_type": "qwen3_moe", **_LLAMA, **_UNTIED, **_EXPERTS},
    "gpt_oss": {
        **{"model_type": "gpt_oss", **_LLAMA, **_UNTIED, "sliding_window": 16},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "lfm2": {
        **{"model_type": "lfm2", **_LLAMA, **_TIED, "layer_types": ["full_attention", "conv"]},
        **{"block_auto_adjust_ff_dim": False, "block_dim": 128, "conv_dim": 128},
    },
    "olmoe": {"model_type": "olmoe", **_LLAMA, **_UNTIED, "num_experts": 4, "num_experts_per_tok": 2},
}
#: The kinds of checkpoint that every architecture is tested with.
KINDS = ("lora", "full", "modules_to_save")
#: More kinds, which only one tied and one untied model are tested with.
MORE_KINDS = (
    *("rslora", "dora", "lora_embeddings", "lora_head", "saved_embeddings"),
    *("full_other_tying", "full_other_rope", "full_with_buffers"),
)
#: Prompts of different lengths, so that a batch of them is padded.
PROMPTS = [
    "Now: ",
    "A word or two, and then some more of them, until the window of the attention is passed. Answer:",
    "What is 7 + 5? ",
    "?",
    "Die Straße ist naß, 你好.\nAnswer:",
]
NEW_TOKENS = 8


def make_base(architecture: str, path: Path, tokenizer: Any = None) -> Path:
    """Writes a model of an architecture with random weights, and a byte-level tokenizer, to a folder."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        **ARCHITECTURES[architecture], vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed=crc32(f"base {architecture}".encode()))
    return _save(model, path, tokenizer)


def make_checkpoint(kind: str, base: Path, path: Path) -> tuple[Path, Any]:
    """Writes a checkpoint of a base model to a folder. Returns the path, and the model in memory as after training."""
    model = _plain(base).eval()
    seed = crc32(f"{kind} {model.config.model_type}".encode())
    if kind.startswith("full"):
        config = model.config
        if kind == "full_other_tying":
            config.tie_word_embeddings = not config.tie_word_embeddings
        if kind == "full_other_rope":
            config.rope_parameters = {**config.rope_parameters, "rope_theta": 3.0}
        model = _with_cap(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        randomise(model, seed)
        _save(model, path, AutoTokenizer.from_pretrained(base))
        if kind == "full_with_buffers":  # like the files of LLaMA-2 and Pythia
            file = path / "model.safetensors"
            buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(32) for i in range(2)}
            save_file({**load_file(file), **buffers}, file, {"format": "pt"})
        return path, model
    torch.manual_seed(seed)
    adapted = get_peft_model(model, _lora_config(kind, model)).eval()
    for name, parameter in adapted.named_parameters() if kind != "no change" else ():
        if "lora_magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "modules_to_save" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(path)
    return path, adapted


def _lora_config(kind: str, model: Any) -> LoraConfig:
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    embeddings, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    # PEFT refuses Mamba's other projections, because its fused kernel would ignore an adapter.
    targets: str | list[str] = ["in_proj", "x_proj"] if model.config.model_type == "mamba" else "all-linear"
    settings = {
        "lora": {},
        "no change": {},
        "lora_attention": {"target_modules": ["q_proj", "v_proj"]},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": [head]},
        "saved_embeddings": {"modules_to_save": [embeddings]},
        "lora_embeddings": {"target_modules": ["q_proj", "v_proj", embeddings]},
        "lora_head": {"target_modules": ["q_proj", "v_proj", head]},
    }[kind]
    return LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", **{"target_modules": targets, **settings}
    )


def randomise(model: Any, seed: int) -> None:
    """Draws all weights except those of norms, and of the time parameters of a state-space model."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("norm", "ln_", "A_log", ".mixer.D", "dt_proj")):
            continue
        std = 0.25 if parameter.dim() > 1 else 0.1
        if "embed_tokens" in name and model.config.model_type in ("gemma2", "gemma3_text"):
            std = 0.02  # they multiply embeddings by the root of the width, and normalise the output of layers
        torch.nn.init.normal_(parameter, std=std)


def _save(model: Any, path: Path, tokenizer: Any) -> Path:
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_writer(path: Path, tokenizer: Any, follows: dict[str, str | list[str]], **config: Any) -> Path:
    """Writes a model with fixed answers: after each token comes the one that `follows` names.

    Its only layer adds nothing. A token's row of the head is the sum of the embeddings of the tokens before it.
    `follows` is token -> next token, as pieces, or -> a list of next tokens, the most likely one first.
    """
    settings = {**_LLAMA, **_UNTIED, "num_hidden_layers": 1, "pad_token_id": tokenizer.pad_token_id}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**settings, **ids, **config}), dtype=torch.float32
    )
    table, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    table.normal_()
    table /= table.norm(dim=1, keepdim=True)
    head.zero_()
    vocabulary = tokenizer.get_vocab()
    for before, after in follows.items():
        for rank, token in enumerate([after] if isinstance(after, str) else after, start=1):
            head[vocabulary[token]] += table[vocabulary[before]] / rank
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return _save(model, path, tokenizer)


def _plain(folder: Path) -> Any:
    """Loads the model of a folder in float32."""
    return _with_cap(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _with_cap(model: Any) -> Any:
    """Chooses an attention that applies the soft cap of the config, if it has one."""
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def reload(base: Path, checkpoint: Path | None) -> Any:
    """Loads the model of a checkpoint in float32, with an unmerged adapter."""
    if checkpoint is not None and not (checkpoint / "adapter_config.json").exists():
        return _plain(checkpoint).eval()
    model = _plain(base).eval()
    return model if checkpoint is None else PeftModel.from_pretrained(model, checkpoint).eval()


@torch.no_grad()
def greedy_ids(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> list[int]:
    """The ids that a model writes after a prompt: one row, no cache, the largest logit, up to but without an EOS.

    The EOS may be the tokenizer's or one of the model's.
    """
    ends = model.config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    start = ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(new_tokens):
        token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if int(token) in ends:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return ids[0, start.shape[1] :].tolist()


def reference(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int = NEW_TOKENS) -> list[str]:
    """The reference answers of a model, decoded as in the official code."""
    return [
        tokenizer.decode(
            greedy_ids(model, tokenizer, prompt, new_tokens),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        for prompt in prompts
    ]


@torch.no_grad()
def reference_likelihoods(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> list[float]:
    """The reference log-likelihood, in nats, of each text after its context."""
    sums = []
    for context, text in pairs:
        ids = tokenizer(context + text, return_tensors="pt").input_ids
        n = len(tokenizer(context).input_ids)
        logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        sums.append(float(logprobs[n - 1 : -1].gather(1, ids[0, n:, None]).sum()))
    return sums


def generate(lm: Any, prompts: Sequence[str], new_tokens: int = NEW_TOKENS, until: Sequence[str] = ()) -> list[str]:
    """The answers of an engine to one request with all prompts."""
    kwargs = {"until": list(until), "max_gen_toks": new_tokens, "do_sample": False}
    return lm.generate_until([Instance("generate_until", {}, (p, dict(kwargs)), i) for i, p in enumerate(prompts)])


def likelihoods(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """The log-likelihood, in nats, that an engine gives each text after its context."""
    return [ll for ll, _ in lm.loglikelihood([Instance("loglikelihood", {}, tuple(p), i) for i, p in enumerate(pairs)])]


def served(
    lm: Any,
    loads: Sequence[str | Path | None],
    prompts: Sequence[str],
    pairs: Sequence[tuple[str, str]] = (),
    new_tokens: int = NEW_TOKENS,
) -> list[dict[str, Any]]:
    """The answers and likelihoods of an engine for checkpoints that it loads one after the other."""
    found: list[dict[str, Any]] = []
    for checkpoint in loads:
        if found or checkpoint:
            lm.load(checkpoint and Path(checkpoint))
        found.append({"answers": generate(lm, prompts, new_tokens)})
        if pairs:
            found[-1]["likelihoods"] = likelihoods(lm, pairs)
    return found


def by_transformers(base: Path, loads: Sequence[Path | None], prompts: Sequence[str], *args: Any) -> list[dict]:
    """`served` with transformers in float32, four rows at a time."""
    lm = open_engine("hf", str(base), engine_args={"dtype": "float32", "batch_size": 4})
    return served(lm, loads, prompts, *args)


def by_vllm(base: Path, loads: Sequence[Path | None], prompts: Sequence[str], *args: Any) -> list[dict]:
    """`served` with vLLM in float32, in a process of its own."""
    return forked(_by_vllm, base, loads, prompts, *args)


def _by_vllm(base: Path, *args: Any) -> list[dict]:
    return served(open_engine("vllm", str(base), engine_args={"max_model_len": 256, "dtype": "float32"}), *args)


#: The engines, which must give the same answers.
BACKENDS = [
    pytest.param(by_transformers, id="hf"),
    pytest.param(by_vllm, id="vllm", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]
