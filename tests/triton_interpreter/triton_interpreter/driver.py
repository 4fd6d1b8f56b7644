"""The driver: it is there, and its device is the CPU."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """What vLLM asks of a driver."""

    is_active = classmethod(lambda cls: True)

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Types are those of Python."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """See Triton's `DriverBase`."""
        return GPUTarget("cpu", 0, 32)

    def get_active_torch_device(self) -> torch.device:
        """See Triton's `DriverBase`."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Nothing is tuned."""
        raise NotImplementedError
