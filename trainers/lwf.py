r"""Learning without forgetting: on the new task's rows, the model is held to the outputs of the model before the stage.

Li and Hoiem 2016 (arXiv 1606.09282): the loss of the new task plus \lambda times a distillation loss from the model of
the stage before (the teacher), on the new rows. For a language model the outputs are the distributions over the next
token at the answer's positions. The distillation loss is KL(teacher || student) at temperature T, averaged over tokens
and rows like the loss itself. \lambda = 1 and T = 2 are the paper's, whose cross entropy has the same gradient; the
official TRACE code also has T = 2. The factor T^2 of Hinton et al. 2015 (arXiv 1503.02531) is in neither of them, nor
here: `lwf_lambda: 4` has the effect of T^2 at T = 2. The first stage has no teacher and is plain training, as is every
stage with `lwf_lambda: 0`.

Differences: the official TRACE code exchanges the arguments of the divergence, and sums over all positions of a row,
including prompt and padding; ours is a mean over the answer's tokens. It compares with logits of batches that it keeps
in memory, which fit the rows only while the batches come in the same order.

    python -m trainers.lwf --config trainers/configs/quickstart.yaml --output_dir runs/lwf
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trainers.base import CLConfig, CLTrainer, divergences, main, option, refuse_losses, refuse_shards


@dataclass
class LwFConfig(CLConfig):
    """As CLConfig, and the distillation."""

    lwf_lambda: float = option(1.0, "Weight of the distillation loss (it is not multiplied by T^2).", least=0)
    lwf_temperature: float = option(2.0, "Temperature of both distributions.", above=0)


class LwFTrainer(CLTrainer):
    """A stage with the model of the stage before as its teacher."""

    config: LwFConfig

    @classmethod
    def prepare(cls, config: LwFConfig, model_args: Any) -> dict[str, Any]:
        """Refuses other losses, and shards: only the trained model would be put together from them, not the teacher."""
        refuse_shards(config, "lwf needs whole weights for its teacher", "with LoRA if memory is short")
        refuse_losses(config, "is not the cross entropy that lwf computes. Use ")
        return {}

    def begin_stage(self) -> None:
        """Loads the teacher, a second model in memory; not without need, since loading draws random numbers."""
        teaches = self.stage.index > 1 and self.config.lwf_lambda
        self.teacher = self.frozen_model(self.previous.checkpoint) if teaches else None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss and the distillation from the teacher, per answer token."""
        if self.teacher is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():  # as the student, whose forward HF wraps
            taught, _ = self.answer_logits(self.teacher, inputs)
        logits, target = self.answer_logits(model, inputs)
        losses = cross_entropy(logits, target, reduction="none")
        losses = losses + self.config.lwf_lambda * self.distillation(logits, taught)
        return self.whole_loss(losses, model, inputs, num_items_in_batch)

    def distillation(self, logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) at temperature T, of each position."""
        t = self.config.lwf_temperature
        return divergences(logits / t, taught / t)


if __name__ == "__main__":
    main(LwFTrainer, LwFConfig)
