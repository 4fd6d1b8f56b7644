"""Joint (multi-task) training: one stage on the rows of all tasks at once.

An upper bound for continual learning, since nothing comes before anything else. With `epochs` per task, the rows of
a task are repeated that often and all of them are passed once, shuffled: the budget of the sequential run.

    python -m trainers.joint --config trainers/configs/quickstart.yaml --output_dir runs/joint
"""

from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from trace_bench.run import Stage
from trainers.base import CLConfig, CLTrainer, ConfigError, main


@dataclass
class JointConfig(CLConfig):
    """As CLConfig; the run has the one stage "joint"."""

    def __post_init__(self) -> None:
        """Checks that the rows can be repeated as `epochs` asks."""
        super().__post_init__()
        if any(e != int(e) for e in self.epochs or []):
            raise ConfigError(f"epochs={self.epochs}: joint training repeats rows, so use whole numbers.")

    @property
    def stages(self) -> list[str]:
        """One stage."""
        return ["joint"]


class JointTrainer(CLTrainer):
    """All tasks at once."""

    own_memory = True

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The rows of all tasks, each as often as its epochs."""
        times = self.config.epochs or [1] * len(self.config.tasks)
        parts = []
        for task, n in zip(self.config.tasks, times, strict=True):
            parts += [self.task_dataset(task)] * int(n)
        return concatenate_datasets(parts)

    def stage_args(self, stage: Stage) -> CLConfig:
        """One epoch where the rows are repeated already."""
        args = super().stage_args(stage)
        if self.config.epochs is not None:
            args.num_train_epochs = 1
        return args


if __name__ == "__main__":
    main(JointTrainer, JointConfig)
