r"""O-LoRA: each task learns a new adapter, in a subspace orthogonal to those of the earlier adapters.

Wang et al. 2023 (arXiv 2310.14152): the adapters of earlier tasks are frozen and stay active. The new one is trained
with \lambda_1 \sum_{k<t} \sum_{ij} |(A_k A_t^T)_{ij}| added to the loss. The absolute values and \lambda_1 = 0.5 are
those of the method's published code and of the official TRACE code; the paper's formula has squares. Both codes also
have \lambda_2 times the norms of the new A and B. It is left out: \lambda_2 is 0 in the TRACE code and for the four
tasks of orders 1 to 3. With 15 tasks the published scripts have up to 0.3, and \lambda_1 = 5 from the tenth task on.

Checkpoints are as in `inclora`: one ordinary LoRA adapter with the A and B of all tasks side by side. Its rank grows by
lora_r with each stage. The next stage reads the A_k from it.

    python -m trainers.olora --config trainers/configs/quickstart.yaml --output_dir runs/olora
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainers.base import CLConfig, main, option
from trainers.inclora import NEW, PAST, IncLoRATrainer, adapted


@dataclass
class OLoRAConfig(CLConfig):
    """CLConfig with the strength of the orthogonality loss."""

    olora_lambda: float = option(0.5, "Weight of the orthogonality loss.", least=0)


class OLoRATrainer(IncLoRATrainer):
    """A stage whose adapter is held orthogonal to the frozen adapter of all earlier stages."""

    config: OLoRAConfig

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.nn.Parameter]]:
        """Name of a new A -> the A of all earlier tasks and the new A of the same layer, shapes (rank, in features)."""
        return {
            f"{name}.lora_A.{NEW}.weight": (layer.lora_A[PAST].weight, layer.lora_A[NEW].weight)
            for name, layer in adapted(self.model).items()
            if PAST in layer.lora_A
        }

    def orthogonality_loss(self) -> float:
        """The sum of |A_k A_t^T| over all entries, layers and earlier tasks: 0 if the subspaces are orthogonal."""
        return sum(float((past @ new.detach().T).abs().sum()) for past, new in self.pairs().values())

    def adjust_gradients(self, model: Any) -> None:
        """Adds the gradient of the orthogonality loss."""
        for past, new in self.pairs().values():
            if new.grad is not None:
                # d/dA_t of sum |A_k A_t^T|
                new.grad.add_((past @ new.detach().T).sign().T @ past, alpha=self.config.olora_lambda)

    def record(self) -> dict[str, Any]:
        """The orthogonality loss at the end of the stage."""
        return {"orthogonality_loss": self.orthogonality_loss()}


if __name__ == "__main__":
    main(OLoRATrainer, OLoRAConfig)
