r"""Anchor: the loss of the new rows, and a divergence that holds the model to a reference.

Zhu et al. 2025, "Anchored Supervised Fine-Tuning" (ASFT, arXiv 2509.23753). The loss of an answer token y is

    w CE(y) + \lambda KL(reference || student),    w = the student's own probability of y, without a gradient

The first part with this w is DFT (`anchor_weight: probability`): tokens that the model finds unlikely pull less.
`anchor_weight: one` is cross entropy, the "SFT + KL" of the paper. \lambda = 0.1 is the default of the authors' code
and of LLaMA-Factory (`asft_alpha`); the authors' README trains with 0.05. The divergence is over the whole vocabulary,
in the direction of both codes, and is weighed over tokens and rows as the loss itself is.

`anchor_reference` is "base", the model before all training, as in the paper; or "previous", the model of the stage
before, which the paper has no case of: this is `lwf` at temperature 1, with the weight w. At the first stage both are
the base model.

With LoRA the base model is the trained one with its adapter switched off: no second model. Full fine-tuning, and the
model of the stage before, take a second model in memory.

    python -m trainers.anchor --config trainers/configs/quickstart.yaml --output_dir runs/anchor
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trainers.base import CLConfig, CLTrainer, divergences, main, option, refuse_losses, refuse_shards


@dataclass
class AnchorConfig(CLConfig):
    """As CLConfig, and the anchor."""

    anchor_lambda: float = option(0.1, "Weight of the divergence from the reference; 0 = no reference.", least=0)
    anchor_weight: str = option("probability", "Factor on a token's cross entropy.", choices=["probability", "one"])
    anchor_reference: str = option(
        "base", "The reference model: the base model, or the stage before.", choices=["base", "previous"]
    )

    def __post_init__(self) -> None:
        """Refuses losses of TRL's that this one replaces."""
        super().__post_init__()
        refuse_losses(self, "has no effect, since anchor has its own loss. Use ")


class AnchorTrainer(CLTrainer):
    """A stage that is held to a reference."""

    config: AnchorConfig
    counters = ("divergence", "tokens")
    #: The sums of the divergence over the answer tokens of the stage, and of the tokens, of this process.
    divergence = 0.0
    tokens = 0

    @classmethod
    def prepare(cls, config: AnchorConfig, model_args: Any) -> dict[str, Any]:
        """Refuses shards: only the trained model would be put together from them, not the reference."""
        refuse_shards(config, "anchor needs whole weights for its reference", "with LoRA if memory is short")
        return {}

    def begin_stage(self) -> None:
        """Loads the reference, unless there is none or it is the trained model without its adapter."""
        self.reference = None
        checkpoint = self.previous.checkpoint if self.config.anchor_reference == "previous" else None
        if self.config.anchor_lambda and (checkpoint is not None or not self.model_args.use_peft):
            self.reference = self.frozen_model(checkpoint)

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """The reference, without dropout."""
        if self.reference is not None:
            yield self.reference
            return
        training = self.model.training
        with self.model.disable_adapter():
            yield self.model.eval()
        self.model.train(training)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighed cross entropy and the divergence from the reference, per answer token."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        held = None
        if self.config.anchor_lambda:
            with torch.no_grad(), self.accelerator.autocast(), self.reference_model() as reference:
                held, _ = self.answer_logits(reference, inputs)
        logits, target = self.answer_logits(model, inputs)
        losses = cross_entropy(logits, target, reduction="none")
        if self.config.anchor_weight == "probability":
            losses = losses * torch.exp(-losses.detach())
        if held is not None:
            divergence = divergences(logits, held)
            losses = losses + self.config.anchor_lambda * divergence
            self.divergence += float(divergence.detach().sum())
            self.tokens += len(divergence)
        return self.whole_loss(losses, model, inputs, num_items_in_batch)

    def record(self) -> dict[str, Any]:
        """The mean divergence from the reference over the steps of the stage, per answer token of this process."""
        return {"divergence": self.divergence / self.tokens} if self.tokens else {}


if __name__ == "__main__":
    main(AnchorTrainer, AnchorConfig)
