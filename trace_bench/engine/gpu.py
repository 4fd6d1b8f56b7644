"""Whether there is a GPU."""

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
