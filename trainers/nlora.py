r"""N-LoRA: each task learns its own adapter, kept sparse so that the tasks change different weights.

Yang et al. 2024 (arXiv 2410.10179): the adapters of earlier tasks are frozen and stay active; the new one is trained
with \lambda ||\Delta W_t||_1 added to the loss, \Delta W_t = B_t A_t: the sum of the absolute values of its entries,
over all adapted weights, without PEFT's factor lora_alpha / lora_r. (The paper calls the factors A_t B_t.) It holds at
every task, the first one included. The stages and their checkpoints are those of `inclora`, which is \lambda = 0.

The paper's \lambda belongs to another norm. The official code multiplies the factors the other way round: its
||A_t B_t||_1 has r^2 entries instead of d^2, and fits square weights only. Its 0.4 (orders 1 to 3 of the scripts; up to
1.8 in the others) lets nothing be learned with the norm of \Delta W (tests' model: the loss stays at 5.6, which ends at
4.9 without a penalty). At random factors the gradient of \Delta W's norm is 0.8 d/r times as long. The default, 0.004,
is 0.4 divided by this at the scripts' model (d = 1024, r = 8).

    python -m trainers.nlora --config trainers/configs/quickstart.yaml --output_dir runs/nlora
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainers.base import CLConfig, main, option
from trainers.inclora import NEW, IncLoRATrainer, adapted


@dataclass
class NLoRAConfig(CLConfig):
    """As CLConfig, and the strength of the sparsity."""

    nlora_lambda: float = option(0.004, "Weight of the L1 norm of the new adapter's product.", least=0)


class NLoRATrainer(IncLoRATrainer):
    """A stage whose adapter is held sparse."""

    config: NLoRAConfig

    def factors(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """The new A and B of each layer, of shapes (rank, in features) and (out features, rank)."""
        return [(layer.lora_A[NEW].weight, layer.lora_B[NEW].weight) for layer in adapted(self.model).values()]

    def adjust_gradients(self, model: Any) -> None:
        """Adds the gradient of the L1 norm: with S the signs of B A, B^T S for A and S A^T for B."""
        for a, b in self.factors() if self.config.nlora_lambda else ():
            signs = (b.detach() @ a.detach()).sign_()
            of_a, of_b = b.detach().T @ signs, signs @ a.detach().T
            for parameter, gradient in ((a, of_a), (b, of_b)):
                if parameter.grad is not None:
                    parameter.grad.add_(gradient, alpha=self.config.nlora_lambda)

    def record(self) -> dict[str, Any]:
        """The L1 norm at the end of the stage."""
        return {"l1_norm": sum(float((b.detach() @ a.detach()).abs().sum()) for a, b in self.factors())}


if __name__ == "__main__":
    main(NLoRATrainer, NLoRAConfig)
