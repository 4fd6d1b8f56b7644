"""The gradient memory of GEM and A-GEM: which rows of earlier tasks it holds, and projections with gradients on them.

The rows are not copied. Every stage chooses the same rows again from the training data: the choice depends on the data
and the seed only, and the data is checked against the run's fingerprint.

Gradients on the memory are computed with dropout (LoRA's own), as that of the step is, so both are gradients of the
loss that is trained. The codes of GEM, Avalanche and Mammoth do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from trace_tasks.data.files import digest
from trainers.base import CHOICES, CLConfig, CLTrainer, choose_rows, option, refuse_losses, refuse_reentrant


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar product of two gradients, in float32 for each parameter and summed in float64."""
    products = [torch.dot(a[name].flatten().float(), b[name].flatten().float()) for name in a]
    return torch.stack(products).double().sum()


class StepTrainer(CLTrainer):
    """A trainer that can change each step of the optimizer afterwards, if `projects_steps` is set."""

    projects_steps = False

    def project(self, descent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the allowed descent for the optimizer's: the parameters before the step minus those after it."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Keeps the parameters before the step."""
        if self.projects_steps:
            self.begin = {name: p.detach().clone() for name, p in self.trained().items()}

    def after_step(self) -> None:
        """Replaces the optimizer's step by the allowed one."""
        if self.projects_steps:
            parameters = self.trained()
            descent = self.project({name: self.begin[name] - p.detach() for name, p in parameters.items()})
            for name, p in parameters.items():
                p.data.copy_(self.begin[name] - descent[name])


@dataclass
class MemoryConfig(CLConfig):
    """The options of the methods with a gradient memory."""

    memory_rows: int = option(256, "Number of rows to keep of each earlier task.", least=1)
    memory_choice: str = option("random", "Which rows to keep: first, random or balanced.", choices=CHOICES)
    memory_batch_size: int | None = option(
        None, "Number of rows drawn from a memory for each gradient; default: as many as in a step.", least=1
    )
    # The papers use plain SGD, whose step is the gradient. A step of Adam may go against the memory although the
    # gradient does not.
    project_step: bool = option(False, "Also project the optimizer's step.")


class MemoryTrainer(StepTrainer):
    """A trainer that remembers some rows of each earlier task, and projects its steps with gradients on them."""

    config: MemoryConfig
    own_memory = True
    memory: dict[str, Dataset]
    #: How many gradients and, with project_step, optimizer steps were projected.
    conflicts = 0
    step_conflicts = 0
    counters = ("conflicts", "step_conflicts")

    @classmethod
    def prepare(cls, config: Any, model_args: Any) -> dict[str, Any]:
        """Refuses other losses than the memory's cross entropy, and checkpointing that hides the memory's gradients."""
        refuse_reentrant(config, "the memory then has no gradient")
        refuse_losses(config, "is not the cross entropy of the memory's rows. Use ")
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
        """The gradients on the memory that a step must not oppose."""
        raise NotImplementedError

    def projected(self, vector: dict[str, torch.Tensor], of_step: bool = False) -> dict[str, torch.Tensor] | None:
        """The direction of descent nearest to `vector` that does not oppose `self.against`.

        Args:
            vector: The gradient, or the optimizer's descent.
            of_step: Whether it is the optimizer's descent.

        Returns:
            The projected direction; None if `vector` opposes nothing.
        """
        raise NotImplementedError

    def adjust_gradients(self, model: Any) -> None:
        """Projects the gradient, so that the optimizer's moments do not oppose the memory either."""
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
        """Projects the optimizer's step."""
        allowed = self.projected(descent, of_step=True)
        if allowed is None:
            return descent
        self.step_conflicts += 1
        return allowed

    def drawn(self, task: str, size: int | None = None) -> Dataset:
        """Draws the rows of a task's memory for this step, the same ones on every process."""
        rows, size = self.memory[task], self.batch_size if size is None else size
        return rows.select(torch.randperm(len(rows), generator=self.generator(task))[:size].tolist())

    @property
    def batch_size(self) -> int:
        """How many rows of a memory are drawn for a step."""
        return self.config.memory_batch_size or (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.accelerator.num_processes
        )

    def generator(self, of: str) -> torch.Generator:
        """A random generator for this step, the same on every process and in a resumed run.

        Every stage and every memory has other numbers. Otherwise the rows that short stages do not reach would be the
        same in all of them, and would never be drawn.
        """
        step = [self.args.seed, self.stage.index, self.state.global_step, of]
        return torch.Generator().manual_seed(int(digest(step)[:15], 16))

    def record(self) -> dict[str, object]:
        """The rows of each task in the memory, and how many gradients and optimizer steps were projected."""
        rows = {task: len(rows) for task, rows in self.memory.items()}
        found: dict[str, object] = {"memory_rows": rows, "projected_steps": self.conflicts}
        return found | ({"projected_optimizer_steps": self.step_conflicts} if self.config.project_step else {})
