"""Averaged gradient episodic memory: a step never goes against the mean loss of the earlier tasks' remembered rows.

Chaudhry et al. 2019 (arXiv 1812.00420), equation 11: with g the gradient of the step and m the one on a batch drawn
from the memory of all earlier tasks, g is replaced by g - (g.m / m.m) m if g.m < 0.

All rows weigh the same in m, whatever `loss_weights` is, and every task gives the same number of rows (up to one) to
the batch. So a task with long answers does not outweigh the others.

The guarantee holds for the gradient, and so for steps of plain SGD, as in the paper. Adam's step may still oppose the
memory, unless `project_step` projects the step, too.

    python -m trainers.agem --config trainers/configs/quickstart.yaml --output_dir runs/agem
"""

from __future__ import annotations

import torch
from datasets import Dataset, concatenate_datasets

from trainers.base import main
from trainers.memory import MemoryConfig, MemoryTrainer, dot


class AGEMTrainer(MemoryTrainer):
    """A stage whose gradient is projected once, against the mean of the memory."""

    def drawn_evenly(self) -> Dataset:
        """Draws the rows for this step: the same number from every task, up to one row."""
        each, left = divmod(self.batch_size, len(self.memory))
        first = torch.randperm(len(self.memory), generator=self.generator("tasks")).tolist()[:left]
        sizes = [each + (i in first) for i in range(len(self.memory))]
        return concatenate_datasets([self.drawn(task, n) for task, n in zip(self.memory, sizes, strict=True) if n])

    def memory_gradients(self) -> list[dict[str, torch.Tensor]]:
        """One gradient on all memories together, in which all rows weigh the same."""
        return [self.loss_gradient(self.drawn_evenly(), weights="rows")]

    def projected(self, vector: dict[str, torch.Tensor], of_step: bool = False) -> dict[str, torch.Tensor] | None:
        """Removes the part of a direction that would raise the loss on the memory."""
        (memory,) = self.against
        product = dot(vector, memory)
        if product >= 0:
            return None
        factor = float(product / dot(memory, memory))
        return {name: v.sub(memory[name], alpha=factor) for name, v in vector.items()}


if __name__ == "__main__":
    main(AGEMTrainer, MemoryConfig)
