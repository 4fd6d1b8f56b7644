"""Code that runs inside vLLM's worker processes: loads a checkpoint into the engine in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


class SwapWorker:
    """Methods that `worker_extension_cls` adds to vLLM's worker, called by `collective_rpc`."""

    def swap_weights(self, path: str) -> None:
        """Loads the full model at `path`.

        vLLM's reload leaves out a head that is tied to the embeddings. On GPUs both are one tensor; on CPUs the head
        has a packed copy of the former weights, which is packed again here.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        worker: Any = self
        worker.reload_weights(weights_path=path)
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


def _turning_all_heads(forward_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Rotary positions on CPUs, where the kernel turns the first head alone of queries whose heads are a dimension.

    LFM2 and DeepSeek's attention have such queries. vLLM's code in torch turns all heads.
    """

    @wraps(forward_cpu)
    def forward(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        return (forward_cpu if query.dim() == 2 else type(self).forward_native)(self, positions, query, key)

    return forward


# This module is imported in each worker before the model is made.
RotaryEmbedding.forward_cpu = _turning_all_heads(RotaryEmbedding.forward_cpu)  # type: ignore[method-assign]
