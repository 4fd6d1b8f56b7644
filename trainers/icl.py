"""In-context learning: nothing is trained; the base model is evaluated with demonstrations in front of each prompt.

A baseline of the paper ("ICL", section 4.1): six demonstrations, balanced over the answers on classification tasks,
no answer twice elsewhere, in half of the length budget. They are drawn from training rows that are no test prompt
(`trace_tasks.utils.Demonstrations`). `--num_fewshot 0` is the base model alone.

    python -m trainers.icl --config trainers/configs/quickstart.yaml --output_dir runs/icl
"""

from dataclasses import dataclass, field

from trainers.base import CLConfig, CLTrainer, ConfigError, main


@dataclass
class ICLConfig(CLConfig):
    """As CLConfig, of which only what concerns evaluation is used.

    Args:
        num_fewshot: Demonstrations in each prompt.
    """

    num_fewshot: int = field(default=6, metadata={"help": "Demonstrations in each prompt; 0 = the base model alone."})

    def __post_init__(self) -> None:
        """Checks the number of demonstrations."""
        super().__post_init__()
        if self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot} is not allowed: use 0 or more.")

    @property
    def stages(self) -> list[str]:
        """No stage is trained."""
        return []


class ICLTrainer(CLTrainer):
    """Never asked to train."""


if __name__ == "__main__":
    main(ICLTrainer, ICLConfig)
