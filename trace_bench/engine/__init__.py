"""One inference engine for all stages: the weights are swapped in place.

`lm_eval --model vllm` once per checkpoint pays the start of an engine every time. Here one lm-eval LM object is
opened on the base model, and `load` puts the weights of a stage into it. It answers what the trained model answers,
decoded greedily, or there is an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.ends import end_ids
from trace_bench.engine.gpu import bf16_is_slow, has_gpu
from trace_bench.engine.start import bound_context, importing, lora_args, prepare_vllm, starting_vllm
from trace_bench.engine.swap import EngineError, SwapLM
from trace_tasks.errors import TraceError, advice, brief

log = logging.getLogger(__name__)

__all__ = [
    "SPEED_ONLY_ARGS",
    "EngineError",
    "SwapLM",
    "bf16_is_slow",
    "importing",
    "open_engine",
    "prepare_vllm",
    "starting_vllm",
    "with_dtype",
]

#: Engine arguments that may differ between the cells of a matrix: memory and speed. All others are settings.
SPEED_ONLY_ARGS = {
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "device"),
    *("batch_size", "max_batch_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_length"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "swap_space", "block_size"),
    *("enforce_eager", "compilation_config", "enable_prefix_caching", "enable_chunked_prefill"),
    *("enable_prompt_embeds", "disable_log_stats", "logits_cache", "max_loras", "max_cpu_loras", "max_lora_rank"),
}
#: Arguments of lm-eval's HFLM that also apply to the models of later stages.
_HF_ARGS = {
    *("batch_size", "max_batch_size", "device", "dtype", "max_length", "revision", "trust_remote_code"),
    *("prefix_token_id", "softmax_dtype", "mixed_precision_dtype", "think_end_token", "logits_cache"),
}
#: Arguments that the engine decides by itself -> why.
_REFUSED = {
    ("pretrained", "worker_extension_cls", "kv_transfer_config", "peft", "lora_local_path"): (
        "is not allowed, since the engine swaps weights. Leave it out."
    ),
    ("chat_template_args", "enable_thinking"): (
        "would change the prompts of the evaluation, but not those of training. Use --chat_template_args in training, "
        "or --chat-template-args with --checkpoint."
    ),
    ("add_bos_token", "tokenizer", "use_fast_tokenizer", "truncation", "truncation_side"): (
        "would encode prompts differently from training. Change it in the tokenizer's files."
    ),
}


def with_dtype(args: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments with a dtype of float32 where bfloat16 would be slow, unless they have a dtype."""
    return {"dtype": "float32", **args} if bf16_is_slow() else dict(args)


def open_engine(
    backend: str,
    base: str,
    *,
    revision: str | None = None,
    max_prompt_length: int | None = None,
    engine_args: dict[str, Any] | None = None,
    checkpoints: Sequence[Path] = (),
    forced: bool = False,
) -> SwapLM:
    """Starts an engine with the weights of the base model.

    Args:
        backend: "vllm", or "hf" for transformers' generate.
        base: What `models.resolve_model` returned.
        revision: The commit of a base model of the hub.
        max_prompt_length: Prompts of generation tasks are cut to their last `max_prompt_length` tokens, as in training.
        engine_args: Arguments of lm-eval's VLLM (which hands them on to vLLM's LLM) or HFLM.
        checkpoints: The checkpoints that will be loaded: vLLM has to know their adapters at its start.
        forced: Whether `SwapLM.token_logprobs` will be asked for many answers.

    Raises:
        EngineError: if the backend is not installed, or an argument cannot be given.
    """
    if Path(base).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else loading waits for a hub that may not be there
    args = with_dtype(engine_args or {})
    if args.get("dtype") in ("auto", "bfloat16", "half", "float16") and bf16_is_slow() and not has_gpu():
        log.warning("dtype=%s is many times slower on this CPU than float32, the default here.", args["dtype"])
    for names, why in _REFUSED.items():
        for name in sorted(args.keys() & set(names)):
            raise EngineError(f"engine_args: {name} {why}")
    trusted = args.get("trust_remote_code", False)
    if revision and not Path(base).is_dir():
        args["revision"] = revision
        if backend == "vllm":
            args.setdefault("tokenizer_revision", revision)
    tokenizer = models.load_tokenizer(base, revision, trusted)  # lm-eval may add a padding token to its own
    lm = _open_vllm(base, args, checkpoints, forced) if backend == "vllm" else _open_hf(base, args)
    lm.base, lm.revision, lm.max_prompt_length, lm.trust_remote_code = base, revision, max_prompt_length, trusted
    lm.tokenizer = tokenizer
    lm.ends = end_ids(tokenizer, base, revision)
    if backend == "hf":
        lm.decode_greedily()
    return lm


def _open_vllm(base: str, args: dict[str, Any], checkpoints: Sequence[Path], forced: bool) -> Any:
    if args.get("data_parallel_size", 1) != 1:
        raise EngineError(
            f"data_parallel_size={args['data_parallel_size']} is not allowed: lm-eval starts its own engines for it, "
            "and their weights cannot be swapped. Use tensor_parallel_size, or evaluate several stages at once, each "
            "on its own GPU (CUDA_VISIBLE_DEVICES=1 trace-bench evaluate RUN --stages 1)."
        )
    if "speculative_config" in args and not has_gpu():
        raise EngineError(
            "speculative_config is not allowed without a GPU: vLLM then gives no token probabilities, which "
            "likelihoods and suites need. Leave it out."
        )
    config = models.load_config(base, args.get("revision"), args.get("trust_remote_code", False)).get_text_config()
    bound_context(base, config, args)
    if any(models.soft_prompt(path) is not None for path in checkpoints):
        args.setdefault("enable_prompt_embeds", True)
    with importing():
        prepare_vllm(args)
        from trace_bench.engine.vllm import FORCING, SwapVLLM

    if "speculative_config" not in args:
        if _has_newer_runner():
            args.setdefault("enable_trace_replay", True)
        elif forced:
            args.setdefault("logits_processors", [FORCING])
    if not has_gpu():
        # With vLLM's default of 128 short prompts are never cached. The kernels want multiples of 32.
        args.setdefault("block_size", 32)
        if any(name.startswith(("mamba_", "state_size")) for name in config.to_dict()):
            # With prefix caching, state-space models (Mamba-2, Granite 4) fail at prompts longer than a chunk.
            args.setdefault("enable_prefix_caching", False)
    # For Mistral's models "auto" would take their own tokenizer, config and weights, which training does not use.
    args = {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf", **args}
    with_lora = dict(args)
    adapters = lora_args(with_lora, checkpoints)
    try:
        with starting_vllm():
            return SwapVLLM(adapters=adapters, pretrained=base, **with_lora)
    except EngineError as e:
        if not adapters or "enable_lora" in args:
            raise
        log.warning(
            "vLLM does not start with LoRA, which it does not support for all models, so adapters are merged: %s",
            brief(e.__cause__ or e),
        )
    with starting_vllm():
        return SwapVLLM(pretrained=base, **args, enable_lora=False)


def _has_newer_runner() -> bool:
    """Whether vLLM uses Model Runner V2, its default where there is Triton, as on GPUs.

    V2 itself can give known tokens (trace replay). It does not accept `FORCING`.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if asked is None else asked


def _open_hf(base: str, args: dict[str, Any]) -> Any:
    from trace_bench.engine.hf import SwapHF

    if "max_model_len" in args:  # so that a run's arguments for vLLM work with both backends
        args.setdefault("max_length", args["max_model_len"])
    args = {k: v for k, v in args.items() if k in _HF_ARGS or k not in SPEED_ONLY_ARGS}
    if unknown := sorted(args.keys() - _HF_ARGS):
        raise EngineError(
            f"engine_args: {', '.join(unknown)}: not allowed with --backend hf, which would not use it for the weights "
            f"of later stages. Use only {', '.join(sorted(_HF_ARGS))}."
        )
    for name in ("batch_size", "max_batch_size", "max_length"):
        value = args.get(name, 1)
        if not (isinstance(value, int) and value > 0) and not (name == "batch_size" and str(value).startswith("auto")):
            raise EngineError(f"engine_args: {name}={value!r} is not allowed: use a number of at least 1.")
    try:
        return SwapHF(pretrained=base, **{"batch_size": 16, "device": "cuda" if has_gpu() else "cpu", **args})
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        if not args or isinstance(e, TraceError) or advice(e, ""):
            raise
        # lm-eval and torch check the values, and raise any of these errors.
        raise EngineError(f"The engine does not start with engine_args {json.dumps(args)}: {brief(e)}") from e
