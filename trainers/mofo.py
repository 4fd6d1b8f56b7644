r"""MoFO (momentum-filtered optimizer): of each tensor only the entries with the largest momentum move.

Chen et al. 2024 (arXiv 2407.20999): Adam keeps its moments of all entries. In each step the entries whose first moment
is among the largest `mofo_fraction` of their tensor, by absolute value, take Adam's step. All others stay where they
are. The model stays closer to what it was, without rows of earlier tasks and without another loss.

`mofo_fraction` = 0.15 is the example of the authors' code, which recommends 0.05 to 0.2. As there, norms and biases
move as a whole, and entries of equal momentum at the border move together. With LoRA the tensors are those of the
adapter. Differences from the authors' code: an entry that does not move has no weight decay either, at least one entry
of each tensor moves, and none without momentum.

It needs AdamW, and a copy of the trained parameters during each step.

    python -m trainers.mofo --config trainers/configs/quickstart.yaml --output_dir runs/mofo
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from trainers.base import CLConfig, CLTrainer, ConfigError, main, option, refuse_shards

_ADAM = ["adamw_torch", "adamw_torch_fused"]


@dataclass
class MoFOConfig(CLConfig):
    """As CLConfig, and how much moves."""

    mofo_fraction: float = option(0.15, "Share of each tensor's entries to update in a step; 1 = all.", above=0, most=1)


class MoFOTrainer(CLTrainer):
    """A stage whose steps move few entries."""

    config: MoFOConfig
    counters = ("entries_moved", "entries")
    #: Entries of filtered tensors that moved, and all of them, over the steps of the stage.
    entries_moved = 0
    entries = 0

    @classmethod
    def prepare(cls, config: MoFOConfig, model_args: Any) -> dict[str, Any]:
        """Refuses other optimizers, and shards of its moments."""
        optim = OptimizerNames(config.optim).value
        if optim not in _ADAM:
            raise ConfigError(f"optim={optim} has no momentum that MoFO can use. Use {' or '.join(_ADAM)}.")
        refuse_shards(config, "mofo needs whole moments", "with LoRA if memory is short")
        return {}

    def before_step(self) -> None:
        """Keeps the parameters; vectors, which norms and biases are, move as a whole."""
        self.held = {p: p.detach().clone() for p in self.trained().values() if p.dim() > 1}

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts the entries with less momentum back."""
        states: Any = self.optimizer.state  # type: ignore[union-attr]
        for parameter, before in self.held.items():
            if parameter in states:
                moves = largest(states[parameter]["exp_avg"].abs(), self.config.mofo_fraction)
                parameter.copy_(torch.where(moves, parameter, before))
                self.entries_moved += int(moves.sum())
                self.entries += moves.numel()
        self.held = {}

    def record(self) -> dict[str, Any]:
        """The share of entries that moved in a step, of all but norms and biases."""
        return {"moved_share": self.entries_moved / self.entries} if self.entries else {}


def largest(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """Where values are among the largest `fraction` of a tensor, at least one, and all that equal the last of them.

    Zeros are not, whatever the fraction below 1: the rows of an embedding whose tokens never came would decay together.
    """
    if fraction == 1:
        return torch.ones_like(values, dtype=torch.bool)
    count = max(1, int(fraction * values.numel()))
    return (values >= values.flatten().kthvalue(values.numel() - count + 1).values) & (values > 0)


if __name__ == "__main__":
    main(MoFOTrainer, MoFOConfig)
