"""Averaged gradient episodic memory: a step never goes against the mean loss of the earlier tasks' remembered rows.

Chaudhry et al. 2019 (arXiv 1812.00420), equation 11: with g the gradient of the step and m the one on a batch drawn
from the memory of all earlier tasks, g - (g.m / m.m) m is taken instead of g where g.m < 0, else g as it is.

The promise is about the gradient; an optimizer with moments (Adam) turns it into a step of its own.

    python -m trainers.agem --config trainers/configs/quickstart.yaml --output_dir runs/agem
"""

from __future__ import annotations

from typing import Any

from datasets import concatenate_datasets

from trainers.base import main
from trainers.memory import MemoryConfig, MemoryTrainer, dot


class AGEMTrainer(MemoryTrainer):
    """A stage whose gradient is projected once, against the mean of the memory."""

    def adjust_gradients(self, model: Any) -> None:
        """Takes the part of the gradient off that would raise the loss on the memory."""
        if not self.memory:
            return
        memory = self.loss_gradient(self.drawn(concatenate_datasets(list(self.memory.values()))))
        gradient = self.gradient()
        product = dot(gradient, memory)
        if product < 0:
            self.conflicts += 1
            factor = float(product / dot(memory, memory))
            for name, parameter in self.trained().items():
                parameter.grad = gradient[name].sub(memory[name], alpha=factor)


if __name__ == "__main__":
    main(AGEMTrainer, MemoryConfig)
