"""A method for `bench.deviations` alone: the optimizer's moments carry over from stage to stage, as officially."""

from __future__ import annotations

from typing import Any

import torch

from trainers.base import CLConfig, CLTrainer, main


class CarriedTrainer(CLTrainer):
    """Sequential training with one AdamW for all stages; each stage has its own schedule of the learning rate."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Begins with the moments of the stage before."""
        optimizer = super().create_optimizer(*args, **kwargs)
        before = self.run.stages[self.stage.index - 1].path / "moments.pt"
        if before.is_file():
            moments = torch.load(before, weights_only=True)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        return optimizer

    def end_stage(self) -> None:
        """Keeps the moments."""
        assert self.optimizer is not None
        torch.save(self.optimizer.state_dict()["state"], self.stage.path / "moments.pt")


if __name__ == "__main__":
    main(CarriedTrainer, CLConfig)
