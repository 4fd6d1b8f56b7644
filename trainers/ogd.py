"""Orthogonal gradient descent: a step does not change, to first order, what the model said on earlier tasks.

Farajtabar et al. 2020 (arXiv 1910.07104): after each task, the gradients of the model's outputs on some of its rows
are stored, and later steps are made orthogonal to all of them. The output here is the mean logit of the row's answer
tokens, the paper's OGD-GTL (the ground-truth logit) for a sequence.

Two things are added. The number of directions is bounded (`ogd_size`), whatever the number of tasks: when there
are more, the principal ones of the unit gradients are kept (PCA-OGD, Doan et al. 2021, arXiv 2010.04003). And the step
itself is projected, after the optimizer: the paper uses plain SGD, where projecting the gradient is the same, but Adam
makes another direction of it.

The memory is `ogd_size` times the trained parameters, in float32: for a LoRA adapter. With all parameters of a large
model it does not fit; the trainer refuses before it starts.

    python -m trainers.ogd --config trainers/configs/quickstart.yaml --output_dir runs/ogd
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from trainers.base import CLConfig, CLTrainer, ConfigError, main
from trainers.memory import choose_rows


@dataclass
class OGDConfig(CLConfig):
    """As CLConfig, and the stored directions.

    Args:
        ogd_rows: Rows of each task whose gradients are taken.
        ogd_size: The most directions kept, over all tasks.
    """

    ogd_rows: int = field(default=64, metadata={"help": "Rows of each task whose gradients are taken."})
    ogd_size: int = field(default=64, metadata={"help": "The most directions kept, over all tasks."})

    def __post_init__(self) -> None:
        """Checks the sizes."""
        super().__post_init__()
        for name in ("ogd_rows", "ogd_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: use a number of at least 1.")


class OGDTrainer(CLTrainer):
    """A stage whose steps are orthogonal to the stored directions.

    State: one tensor per parameter, of shape (directions, *parameter). Its rows over all parameters are orthogonal;
    their lengths say how much of the remembered gradients they hold.
    """

    config: OGDConfig

    def begin_stage(self) -> None:
        """Loads the directions and makes them a basis."""
        # At the end of a stage: the basis, the directions, the gradients beside them, and the new directions.
        rows = 4 * self.config.ogd_size + self.config.ogd_rows
        needed = 4 * rows * sum(p.numel() for p in self.trained().values())
        cuda = self.accelerator.device.type == "cuda"
        if needed > (torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total):
            raise ConfigError(
                f"OGD with ogd_size={self.config.ogd_size} and ogd_rows={self.config.ogd_rows} needs about "
                f"{needed / 2**30:.0f} GiB for these trained parameters, more than there is. Use LoRA, or fewer."
            )
        self.directions = self.load_state()
        lengths = _gram(self.directions).diagonal().sqrt() if self.directions else None
        self.basis = {
            name: rows / lengths.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))  # type: ignore[union-attr]
            for name, rows in self.directions.items()
        }
        if self.basis:
            self.add_callback(_ProjectStep(self))

    def project(self, vector: dict[str, torch.Tensor]) -> None:
        """Takes off, in place, what a vector has in the stored directions."""
        along = sum(rows.flatten(1) @ vector[name].flatten().to(rows.dtype) for name, rows in self.basis.items())
        for name, rows in self.basis.items():
            vector[name] -= torch.tensordot(along, rows, dims=1).to(vector[name].dtype)

    def adjust_gradients(self, model: Any) -> None:
        """Projects the gradient, so that the optimizer's moments hold nothing of the stored directions either."""
        if self.basis:
            self.project({n: p.grad for n, p in self.trained().items() if p.grad is not None})

    def end_stage(self) -> None:
        """Adds the directions of this task; keeps the principal ones if there are too many."""
        assert self.model is not None and self.stage.task is not None
        rows = choose_rows(self.task_dataset(self.stage.task), self.config.ogd_rows, "random", self.config.seed)
        self.model.eval()  # without dropout
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, gradients in self.row_gradients(rows, lambda logits, target: logits.gather(1, target[:, None])[:, 0]):
            parts[name].append(gradients)
        stacked = {name: torch.cat(parts.pop(name)) for name in self.trained()}
        squares = torch.stack([gradients.flatten(1).square().sum(1) for gradients in stacked.values()])
        for gradients in stacked.values():  # of length one
            gradients /= squares.sum(0).sqrt().view(-1, *[1] * (gradients.dim() - 1))
        if self.directions:
            stacked = {name: torch.cat([self.directions[name], s]) for name, s in stacked.items()}
        # The right singular vectors of the stack, times their singular values, from its small Gram matrix.
        values, vectors = torch.linalg.eigh(_gram(stacked))
        kept = vectors[:, values > values.max() * 1e-6][:, -self.config.ogd_size :]
        self.save_state(
            {n: torch.tensordot(kept.T.to(s.dtype), s, dims=1) for n, s in stacked.items()}  # (directions, *parameter)
        )

    def record(self) -> dict[str, Any]:
        """How many directions the steps of the stage were orthogonal to."""
        return {"directions": len(next(iter(self.basis.values()))) if self.basis else 0}


def _gram(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The products of all pairs of rows, over all parameters."""
    return sum(f @ f.T for f in (r.flatten(1).double() for r in rows.values()))  # type: ignore[return-value]


class _ProjectStep(TrainerCallback):
    """Projects what the optimizer did."""

    def __init__(self, trainer: OGDTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in self.trainer.trained().items()}

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        parameters = self.trainer.trained()
        step = {name: p.detach() - self.before[name] for name, p in parameters.items()}
        self.trainer.project(step)
        for name, p in parameters.items():
            p.data.copy_(self.before[name] + step[name])


if __name__ == "__main__":
    main(OGDTrainer, OGDConfig)
