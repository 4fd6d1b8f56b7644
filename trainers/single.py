"""A fresh model per task: every stage starts from the base model, so nothing is carried over and nothing forgotten.

An upper bound: the mean over the tasks, each measured with its own model, is what a method would reach that learns as
well as fine-tuning and forgets nothing. Each stage is evaluated on its own task alone.

    python -m trainers.single --config trainers/configs/quickstart.yaml --output_dir runs/single
"""

from dataclasses import dataclass
from typing import Any

from trace_bench.run import Stage
from trainers.base import CLConfig, CLTrainer, main, option


@dataclass
class SingleConfig(CLConfig):
    """As CLConfig, with one changed default."""

    cells: str = option("own", "The tasks each stage is evaluated on.", choices=["seen", "all", "own"])


class SingleTrainer(CLTrainer):
    """One task, from the base model."""

    own_memory = True

    def stage_model(self, stage: Stage) -> Any:
        """The base model, at every stage."""
        return self.trainable_model(None)


if __name__ == "__main__":
    main(SingleTrainer, SingleConfig)
