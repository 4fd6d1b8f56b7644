"""The peak of memory on a CPU, where no allocator counts it: the bytes of all tensors that are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storage of each tensor from the operation that makes it until the last reference to it is gone.

    On a GPU this would be `torch.cuda.max_memory_allocated`, apart from rounding and the workspaces of kernels.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = 0
        #: The most bytes that were alive at once.
        self.peak = 0
        self._add([*model.parameters(), *model.buffers()])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        return made

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self._sizes:
                self._sizes[address] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self._now -= self._sizes.pop(address)
