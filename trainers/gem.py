r"""Gradient episodic memory: a step goes against the loss of no earlier task.

Lopez-Paz and Ranzato 2017 (arXiv 1706.08840): let g be the gradient of the step, and let the rows of M be the gradients
on the memories of the earlier tasks. If any entry of M g is negative, g is replaced by the nearest x for which none is:
x = M^T v + g, with v the solution of min_v 1/2 v^T M M^T v + (M g)^T v subject to v >= margin (equation 11; the margin
is the paper's memory strength, 0.5 in the official TRACE code).

The dual has one unknown per earlier task. It is solved exactly as non-negative least squares, without the original's
regularisation by 1e-3, which is not small compared with squared gradients of a language model.

Differences: the paper takes gradients on whole memories, we take them on a batch drawn from each. The official TRACE
code keeps the last gradient of each earlier task, and projects each parameter separately. It also passes the dual to a
solver that has q and h with the opposite sign. So v <= margin and, for one earlier task, M x = 2 M g: it turns against
the memory.

The guarantee holds for the gradient, and so for steps of plain SGD, as in the paper. Adam's step may still oppose the
memory, unless `project_step` projects the step, too.

    python -m trainers.gem --config trainers/configs/quickstart.yaml --output_dir runs/gem
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainers.base import main, option
from trainers.memory import MemoryConfig, MemoryTrainer, dot


@dataclass
class GEMConfig(MemoryConfig):
    """As MemoryConfig, and the margin."""

    gem_margin: float = option(
        0.5, "Smallest weight of each memory in a projected step; 0 = the nearest allowed gradient.", least=0
    )


def solve_dual(products: np.ndarray, conflicts: np.ndarray, margin: float) -> np.ndarray:
    """The v that minimises 1/2 v^T P v + c^T v subject to v >= margin.

    Args:
        products: P = M M^T, shape (tasks, tasks), symmetric and positive semi-definite.
        conflicts: c = M g, shape (tasks,).
        margin: Lower bound of every v.

    Returns:
        v, shape (tasks,).

    With v = margin + w and P = A^T A, this is min_w |A w + b|^2 over w >= 0, where A^T b = P margin + c. That has a
    solution since c = M g lies in the range of P = M M^T.
    """
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(products)
    kept = values > values.max() * 1e-12
    root = np.sqrt(values[kept])
    A = root[:, None] * vectors[:, kept].T
    b = (vectors[:, kept].T @ (products @ np.full(len(conflicts), margin) + conflicts)) / root
    return margin + nnls(A, -b)[0]


class GEMTrainer(MemoryTrainer):
    """A stage whose gradient is projected against the memory of every earlier task."""

    config: GEMConfig

    def memory_gradients(self) -> list[dict[str, torch.Tensor]]:
        """The gradient on each task's memory."""
        return [self.loss_gradient(self.drawn(task)) for task in self.memory]

    def projected(self, vector: dict[str, torch.Tensor], of_step: bool = False) -> dict[str, torch.Tensor] | None:
        """The nearest direction that raises no earlier task's loss."""
        memory = self.against
        c = np.array([float(dot(m, vector)) for m in memory])
        if (c >= 0).all():
            return None
        P = np.zeros((len(memory), len(memory)))
        for i, a in enumerate(memory):
            for j in range(i + 1):
                P[i, j] = P[j, i] = float(dot(a, memory[j]))
        # The margin is in units of the gradient; of the step the nearest allowed one is taken.
        weights = solve_dual(P, c, 0.0 if of_step else self.config.gem_margin)
        allowed = {name: v.clone() for name, v in vector.items()}
        for weight, m in zip(weights, memory, strict=True):
            for name, v in allowed.items():
                v.add_(m[name].to(v.dtype), alpha=float(weight))
        return allowed


if __name__ == "__main__":
    main(GEMTrainer, GEMConfig)
