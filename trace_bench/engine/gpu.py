"""What this machine computes with: whether there is a GPU, and whether bfloat16 is fast."""

from __future__ import annotations

import ctypes
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
    """Whether bfloat16 takes longer than float32: on CPUs for which torch has no fast products of it, and old GPUs.

    On x86 they need AVX-512. With AVX2 alone a product took 16 times as long as in float32. GPUs before Ampere (T4,
    V100) emulate it in torch, and have none in vLLM.
    """
    import torch

    if has_gpu():
        return 0 < _compute_capability() < 8
    return not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _compute_capability() -> int:
    """The major number of the first GPU's compute capability, by NVML as in `has_gpu`; 0 if it does not tell."""
    import torch

    major, minor, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    try:
        index = torch.cuda._get_nvml_device_index(0)
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        nvml.nvmlInit()
        nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    except (AttributeError, IndexError, OSError, RuntimeError):  # ROCm, a MIG slice, another version of torch
        return 0
    return major.value
