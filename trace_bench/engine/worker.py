"""What runs inside vLLM's worker processes: loading a checkpoint into the engine in place."""

from __future__ import annotations

from typing import Any


class SwapWorker:
    """Methods for vLLM's worker, mixed into it by `worker_extension_cls` and called by `collective_rpc`."""

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
