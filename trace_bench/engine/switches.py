"""Models that vLLM computes differently from transformers, and so from training, without saying so."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from trace_bench.engine import gpu
from trace_bench.engine.hub import ModelError

#: Types that vLLM computes differently, whatever their entries -> how; then those that it does only without a GPU.
_OTHER_IN_VLLM = {
    "gemma3n_text": "leaves out the embeddings of its layers",
    "hrm_text": "reads its prompts in both directions",
}
_OTHER_ON_CPU = {"ernie4_5_moe": "chooses its experts without their correction bias"}
_SILU, _NO_BIAS, _NO_LIMIT = {"hidden_act": "silu"}, {"attention_bias": False}, {"time_step_limit": [0.0, float("inf")]}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
#: Type -> entry of config.json -> the only value that vLLM has code for: it takes it whatever the entry says.
_FIXED_IN_VLLM: dict[str, dict[str, Any]] = {
    "cohere": {**_SILU, **_NO_BIAS, **_TIED},
    "cohere2": {**_SILU, **_NO_BIAS, **_TIED},
    "cohere2_moe": {**_SILU, **_NO_BIAS, **_TIED},
    "deepseek_v2": {**_NO_BIAS, **_UNTIED, "mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "falcon": {"activation": "gelu"},
    "falcon_h1": {**_NO_LIMIT, **_NO_BIAS, "mlp_bias": False, "projectors_bias": False},
    "gemma": {**_NO_BIAS, "hidden_act": "gelu_pytorch_tanh"},
    "gemma4_text": {"hidden_activation": "gelu_pytorch_tanh"},
    "glm4_moe": _UNTIED,
    "gpt2": {"scale_attn_weights": True},
    "gpt_oss": {**_UNTIED, "rms_norm_eps": 1e-5, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
    "granitemoe": {**_SILU, **_NO_BIAS},
    "granitemoe_swa": _NO_BIAS,
    "granitemoehybrid": _NO_LIMIT,
    "granitemoeshared": _NO_BIAS,
    "lfm2": _TIED,
    "lfm2_moe": _TIED,
    "mamba2": _NO_LIMIT,
    "minicpm3": {**_NO_BIAS, "mlp_bias": False},
    "mixtral": _SILU,
    "olmoe": {
        **{"norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5, "sliding_window": None},
        **{**_SILU, **_NO_BIAS, **_UNTIED},
    },
    "qwen2_moe": {"qkv_bias": True},
    "qwen3": _NO_BIAS,
    "qwen3_moe": {**_SILU, **_NO_BIAS},
    "stablelm": _SILU,
}


def ropes(config: Any) -> list[dict[str, Any]]:
    """The entries of a model's rotary positions: one dict, or one for each type of its layers, as in Gemma 3."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def refuse_other_in_vllm(model: str | Path, config: Any) -> None:
    """Refuses a model for which vLLM's answers would not be those of transformers.

    Raises:
        ModelError: saying what vLLM computes.
    """
    kind, others = config.model_type, _OTHER_IN_VLLM | ({} if gpu.has_gpu() else _OTHER_ON_CPU)
    if why := others.get(kind) or _other_value(config.get_text_config(decoder=True)):
        raise ModelError(
            f"{model} ({kind}): here vLLM {why}, so its answers would be those of a different model. Use --backend hf."
        )


def _other_value(config: Any) -> str:
    """What vLLM computes if it ignores an entry of this model's config.json, or reads one that transformers ignores."""
    for name, value in _FIXED_IN_VLLM.get(config.model_type, {}).items():
        said = getattr(config, name, value)
        if (list(said) if isinstance(said, tuple) else said) != value:
            return f"computes as with {name}={value}, but its config.json says {said}"
    context = getattr(config, "max_position_embeddings", None)
    # vLLM reads these in parts that many types share, transformers in the code of some types alone; those of
    # proportional positions (Gemma 4) in a shared part, too.
    rotary = [rope for rope in ropes(config) if rope.get("rope_type") != "proportional"]
    if config.model_type == "falcon_h1":  # vLLM replaces the entry
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if (said := getattr(config, "attn_rotary_emb", width)) != width:
            return f"obeys attn_rotary_emb={said} of its config.json, but transformers does not"
        rotary = []
    for name, entries, harmless in (
        *(("partial_rotary_factor", rope, lambda part: part == 1.0) for rope in rotary),
        ("sliding_window", config.to_dict(), lambda window: context and isinstance(window, int) and window >= context),
        ("logit_scale", config.to_dict(), lambda scale: scale == 1.0),
    ):
        if (said := entries.get(name)) and not harmless(said) and name not in _code(config):
            return f"obeys {name}={said} of its config.json, but transformers does not"
    if config.model_type == "falcon_h1" and config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "computes as with mamba_norm_before_gate=False, but its config.json says True"
    if config.model_type == "cohere2_moe" and config.expert_selection_fn == "softmax" and not config.norm_topk_prob:
        return "obeys norm_topk_prob=False of its config.json, but transformers does not with a softmax"
    if config.model_type == "deepseek_v2":
        for name, usual in {"norm_topk_prob": False, "scoring_func": "softmax"}.items():
            if (said := getattr(config, name, None) or usual) != usual:
                return f"obeys {name}={said} of its config.json, but transformers does not"
    if config.model_type == "qwen2_moe" and "sliding_attention" in (config.layer_types or ()):
        return "has no sliding windows for some of the layers only, but its config.json asks for them"
    if config.model_type == "gpt_oss" and any(
        (kind == "sliding_attention") != (i % 2 == 0) for i, kind in enumerate(config.layer_types)
    ):
        return "gives every other layer a sliding window, but its config.json gives them to others"
    return ""


def _code(config: Any) -> str:
    """The code of transformers that computes a model; of one that it has no class for, nothing is known."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "partial_rotary_factor sliding_window logit_scale"
    return inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
