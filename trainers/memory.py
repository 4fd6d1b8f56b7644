"""The memory of earlier tasks that replay, GEM and A-GEM keep: which rows, and gradients on them.

The rows are not copied. They are chosen again from the training data at every stage, the same ones each time: the
choice depends on the data and the seed alone, and the data is checked against the fingerprint of the run.

Gradients on the memory are taken as that of the step is, with dropout where the model has it (LoRA's own): they
are gradients of the loss that is trained. The code of GEM and Avalanche (`model.train()` before both) and of Mammoth
does so, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from trainers.base import CHOICES, CLConfig, CLTrainer, choose_rows, option, refuse_losses, refuse_reentrant


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar product of two gradients: of each parameter in float32, their sum in float64."""
    products = [torch.dot(a[name].flatten().float(), b[name].flatten().float()) for name in a]
    return torch.stack(products).double().sum()


class StepTrainer(CLTrainer):
    """A trainer that has its say on what the optimizer did, where `projects_steps` is set."""

    projects_steps = False

    def project(self, descent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The allowed way downhill for the one that the optimizer took: parameters before less those after the step."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Notes where the step begins."""
        if self.projects_steps:
            self.begin = {name: p.detach().clone() for name, p in self.trained().items()}

    def after_step(self) -> None:
        """Goes the allowed way from there."""
        if self.projects_steps:
            parameters = self.trained()
            descent = self.project({name: self.begin[name] - p.detach() for name, p in parameters.items()})
            for name, p in parameters.items():
                p.data.copy_(self.begin[name] - descent[name])


@dataclass
class MemoryConfig(CLConfig):
    """What the methods with a gradient memory share."""

    memory_rows: int = option(256, "Rows kept of each earlier task.", least=1)
    memory_choice: str = option("random", "Which rows are kept: first, random or balanced.", choices=CHOICES)
    memory_batch_size: int | None = option(
        None, "Rows drawn from a memory for each gradient; default: those of a step.", least=1
    )
    # The papers use plain SGD, whose step is the gradient; that of Adam may go against the memory though it does not.
    project_step: bool = option(False, "Project what the optimizer makes of the projected gradient, too.")


class MemoryTrainer(StepTrainer):
    """A trainer that knows some rows of each earlier task, and projects its steps with gradients on them."""

    config: MemoryConfig
    own_memory = True
    memory: dict[str, Dataset]
    #: Gradients and, with project_step, steps of the optimizer that were projected.
    conflicts = 0
    step_conflicts = 0
    counters = (*CLTrainer.counters, "conflicts", "step_conflicts")

    @classmethod
    def prepare(cls, config: Any, model_args: Any) -> dict[str, Any]:
        """Refuses losses of the step that are not those of the memory, and what its gradients would be zero with."""
        refuse_reentrant(config, "the memory then has no gradient")
        refuse_losses(config, "is not the cross entropy of the memory's rows: use ")
        return {}

    def begin_stage(self) -> None:
        """Chooses the rows of the earlier tasks."""
        c = self.config
        self.memory = {
            task: choose_rows(self.task_dataset(task), c.memory_rows, c.memory_choice, c.seed)
            for task in self.run.tasks[: self.stage.index - 1]
        }
        self.projects_steps = bool(self.memory) and c.project_step

    def memory_gradients(self) -> list[dict[str, torch.Tensor]]:
        """The gradients on the memory that a step may not go against."""
        raise NotImplementedError

    def projected(self, vector: dict[str, torch.Tensor], of_step: bool = False) -> dict[str, torch.Tensor] | None:
        """A direction of descent that does not go against `self.against`, or None where `vector` does not.

        Args:
            vector: The gradient, or the optimizer's step downhill.
            of_step: Whether it is the step.
        """
        raise NotImplementedError

    def adjust_gradients(self, model: Any) -> None:
        """Projects the gradient, so that the optimizer's moments hold nothing against the memory either."""
        if not self.memory:
            return
        self.against = self.memory_gradients()
        parameters = self.trained()
        allowed = self.projected({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})
        if allowed is not None:
            self.conflicts += 1
            for name, parameter in parameters.items():
                parameter.grad = allowed[name]

    def project(self, descent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is made of the optimizer's step."""
        allowed = self.projected(descent, of_step=True)
        if allowed is None:
            return descent
        self.step_conflicts += 1
        return allowed

    def drawn(self, rows: Dataset, size: int | None = None) -> Dataset:
        """The rows of a memory that serve this step; the same ones on every process."""
        size = self.batch_size if size is None else size
        return rows.select(torch.randperm(len(rows), generator=self.generator())[:size].tolist())

    @property
    def batch_size(self) -> int:
        """How many rows of a memory serve a step."""
        return self.config.memory_batch_size or (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )

    def generator(self) -> torch.Generator:
        """Random numbers of this step, the same ones on every process and in a resumed run."""
        return torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)

    def record(self) -> dict[str, object]:
        """How many rows of each task were in the memory, and in how many steps the gradient was projected."""
        rows = {task: len(rows) for task, rows in self.memory.items()}
        found: dict[str, object] = {"memory_rows": rows, "projected_steps": self.conflicts}
        return found | ({"projected_optimizer_steps": self.step_conflicts} if self.config.project_step else {})
