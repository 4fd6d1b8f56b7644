"""A method for `bench.deviations`: the optimizer's moments carry over from stage to stage, as in the official code."""

from __future__ import annotations

from typing import Any

import torch

from trainers.base import CLConfig, CLTrainer, main


class CarriedTrainer(CLTrainer):
    """Sequential training with one AdamW for all stages. Each stage has its own learning rate schedule."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Starts with the moments of the previous stage."""
        optimizer = super().create_optimizer(*args, **kwargs)
        before = self.run.stages[self.stage.index - 1].path / "moments.pt"
        if before.is_file():
            moments = torch.load(before, weights_only=True)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return optimizer

    def end_stage(self) -> None:
        """Saves the moments."""
        assert self.optimizer is not None
        torch.save(self.optimizer.state_dict()["state"], self.stage.path / "moments.pt")


if __name__ == "__main__":
    main(CarriedTrainer, CLConfig)
