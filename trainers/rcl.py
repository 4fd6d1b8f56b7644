"""Reasoning-augmented continual learning (RCL): train on the reasoning that leads to each answer, then on the answer.

Source: TRACE, section 5, "Reasoning-augmented Continual Learning" (arXiv 2310.06762). Sequential fine-tuning on another
form of the data, which asks for the reasoning and has it in the training answers; what is scored is the answer alone
(`trace_tasks/_reasoning_yaml`). In the paper 500 examples a task do the work of 5000 plain ones, hence `train_rows`.

    python -m trainers.rcl --config trainers/configs/quickstart_rcl.yaml

Any config of the plain tasks does: trace_fomc becomes reasoning_fomc, and so on. The rows are those of TRACE_REASONING,
or of the folder LLM-CL-Benchmark_Reasoning in or beside TRACE_DATA; `trace-bench annotate` makes one from plain rows.
RCL with replay is `python -m trainers.replay ... --tasks reasoning_order1 --train_rows 500`.
"""

from dataclasses import dataclass

from trace_tasks import data
from trace_tasks.errors import suggestion
from trainers.base import CLConfig, CLTrainer, ConfigError, main, option


@dataclass
class RCLConfig(CLConfig):
    """Configuration of RCL: that of every run, with the tasks in their reasoning form and 500 training rows each."""

    train_rows: int | None = option(500, "Number of training rows of each task (the first); 500 in the paper.", least=1)

    def _read_lists(self) -> None:
        """Replaces every plain task by its reasoning variant.

        Raises:
            ConfigError: for a task without a reasoning form.
        """
        super()._read_lists()
        self.tasks = [f"reasoning_{t.removeprefix('trace_')}" if t in data.FOLDERS else t for t in self.tasks]
        without = [t for t in self.tasks if t not in data.REASONING]
        if without:
            raise ConfigError(
                f"{', '.join(without)}: no such task with reasoning. Use order1, order2 or tasks of "
                f"{', '.join(data.REASONING)}."
                + "".join(suggestion(t, [*data.FOLDERS, *data.REASONING]) for t in without)
            )


class RCLTrainer(CLTrainer):
    """Sequential fine-tuning: the data makes the difference."""


if __name__ == "__main__":
    main(RCLTrainer, RCLConfig)
