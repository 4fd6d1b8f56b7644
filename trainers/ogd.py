"""Orthogonal gradient descent: a step does not change, to first order, what the model said on earlier tasks.

Farajtabar et al. 2020 (arXiv 1910.07104): after each task, the gradients of the model's outputs on some of its rows
are stored, and later steps are made orthogonal to all of them. The output here is the mean logit of the row's answer
tokens, the paper's OGD-GTL (the ground-truth logit) for a sequence.

Of each task `ogd_size` directions are kept, the paper's 200, from the gradients of `ogd_rows` rows; of more rows than
directions the principal ones of the unit gradients (PCA-OGD, Doan et al. 2021, arXiv 2010.04003; their code centres
the gradients, by which the strongest direction, that of their mean, is lost). One thing is added:
the step itself is projected, after the optimizer. The paper uses plain SGD, where projecting the gradient is the same,
but Adam makes another direction of it. (The official TRACE code takes gradients of the loss on batches, and appends one
and the same tensor for each: what it keeps of a task is the last one.)

The memory grows with the tasks, by `ogd_size` times the trained parameters in float32 for each: 3.9 GB a task for the
quickstart's adapter of 4.9 million. Each process holds the directions of all tasks and, at the end of a stage, the
gradients of its rows. The trainer counts this before the first stage, and refuses with the numbers for which there is
room.

    python -m trainers.ogd --config trainers/configs/quickstart.yaml --output_dir runs/ogd
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from trainers.base import CLConfig, ConfigError, choose_rows, main, option
from trainers.memory import StepTrainer


@dataclass
class OGDConfig(CLConfig):
    """As CLConfig, and the stored directions."""

    ogd_rows: int = option(200, "Number of rows of each task whose gradients are used.", least=1)
    ogd_size: int = option(
        200, "Largest number of directions to keep of each task; at most the number of rows.", least=1
    )


class OGDTrainer(StepTrainer):
    """A stage whose steps are orthogonal to the stored directions.

    State: one tensor per parameter, of shape (directions, *parameter). Its rows over all parameters are orthonormal.
    """

    config: OGDConfig

    def begin_stage(self) -> None:
        """Loads the directions; at the first stage sees whether there is room for those of all."""
        #: Bytes of one direction.
        self.direction = 4 * sum(p.numel() for p in self.trained().values())
        if self.stage.index == 1:
            self.check_memory()
        self.basis = self.load_state()
        self.directions = len(next(iter(self.basis.values()))) if self.basis else 0
        self.projects_steps = bool(self.basis)

    def check_memory(self) -> None:
        """Refuses what the last stage would have no room for.

        Raises:
            ConfigError: with the settings for which there is room.
        """
        c, tasks = self.config, len(self.run.tasks)
        cuda = self.accelerator.device.type == "cuda"
        there = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
        needed = (tasks * min(c.ogd_size, c.ogd_rows) + c.ogd_rows) * self.direction
        if needed > there:
            fits = there // ((tasks + 1) * self.direction)
            raise ConfigError(
                f"OGD with ogd_size={c.ogd_size} and ogd_rows={c.ogd_rows} needs {needed / 2**30:.1f} GiB for the "
                f"directions of {tasks} tasks and the rows of one ({self.direction / 2**20:.1f} MiB each), but only "
                f"{there / 2**30:.1f} GiB are free. "
                + (f"Use --ogd_size {fits} --ogd_rows {fits}." if fits else "Use LoRA.")
            )

    def project(self, vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes off, in place, what a vector has in the stored directions."""
        there = [name for name in self.basis if name in vector]  # what no text reaches has no gradient
        along = sum(self.basis[name].flatten(1) @ vector[name].flatten().to(torch.float32) for name in there)
        for name in there:
            vector[name] -= torch.tensordot(along, self.basis[name], dims=1).to(vector[name].dtype)
        return vector

    def adjust_gradients(self, model: Any) -> None:
        """Projects the gradient, so that the optimizer's moments hold nothing of the stored directions either."""
        if self.basis:
            self.project({n: p.grad for n, p in self.trained().items() if p.grad is not None})

    def end_stage(self) -> None:
        """Adds the directions of this task that are not there yet; if there are too many the principal ones."""
        assert self.stage.task is not None
        rows = choose_rows(self.task_dataset(self.stage.task), self.config.ogd_rows, "random", self.config.seed)
        self.model.eval()  # without dropout
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, gradients in self.row_gradients(rows, _mean_logit):
            parts[name].append(gradients)
        stacked = {
            name: torch.cat(parts.pop(name)) if name in parts else p.new_zeros(len(rows), *p.shape, dtype=torch.float32)
            for name, p in self.trained().items()
        }
        squares = torch.stack([gradients.flatten(1).square().sum(1) for gradients in stacked.values()])
        for gradients in stacked.values():  # of length one
            gradients /= squares.sum(0).sqrt().view(-1, *[1] * (gradients.dim() - 1))
        for _ in range(2) if self.basis else ():  # twice, since the first leaves rounding behind
            along = sum(s.flatten(1) @ self.basis[name].flatten(1).T for name, s in stacked.items())
            for name, s in stacked.items():
                s -= torch.tensordot(along, self.basis[name], dims=1)
        # The right singular vectors of the stack from its small Gram matrix; what was stored before is left out.
        flat = (gradients.flatten(1).double() for gradients in stacked.values())
        values, vectors = torch.linalg.eigh(sum(f @ f.T for f in flat))  # type: ignore[arg-type]
        kept = (values > 1e-5)[-self.config.ogd_size :]
        values, vectors = values[-len(kept) :][kept], vectors[:, -len(kept) :][:, kept]
        new = vectors / values.sqrt()
        directions = {}
        for name in list(stacked):
            rows = torch.tensordot(new.T.to(torch.float32), stacked.pop(name), dims=1)
            directions[name] = torch.cat([self.basis.pop(name), rows]) if self.basis else rows
        self.save_state(directions)

    def record(self) -> dict[str, Any]:
        """How many directions the steps of the stage were orthogonal to, and what they took."""
        return {"directions": self.directions, "directions_bytes": self.directions * self.direction}


def _mean_logit(logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, target[:, None])[:, 0] / lengths


if __name__ == "__main__":
    main(OGDTrainer, OGDConfig)
