"""What this machine computes with: whether there is a GPU, and whether bfloat16 is fast."""

from __future__ import annotations

import os


def has_gpu() -> bool:
    """Whether this process can use a GPU.

    Asked through NVML, as vLLM does once it is imported: torch's own way bars the GPU to forks such as vLLM's engine.
    """
    import torch

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG"):  # for these torch asks CUDA all the same
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return torch.cuda.is_available()


def bf16_is_slow() -> bool:
    """Whether bfloat16 takes many times longer than float32: on a CPU for which torch has no fast products of it.

    On x86 they need AVX-512. With AVX2 alone a product took 16 times as long as in float32.
    """
    import torch

    return not has_gpu() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
