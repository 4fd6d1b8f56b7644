r"""Replay: rows of earlier tasks, and of an alignment set, are trained on again.

Two variants (`replay`):

- "after", as in the paper (section 4.1) and the official code (`training/replay.py`): first the stage's own rows, then
  one epoch over a share of every earlier task and the whole alignment set. At the first task the alignment set alone
  is replayed.
- "mixed": the replayed rows are part of the stage's training set, and are seen in each of its epochs.

The paper does not say how many rows are replayed, and which. `replay_ratio` is the share of each earlier task (0.1 in
the official scripts). `replay_choice` selects the rows: "first" (the official code) or "random" (our default). The
alignment set is LIMA, the folder `Lima` of the official data. `alignment_data` takes any JSON list of prompts and
answers; "none" leaves it out.

    python -m trainers.replay --config trainers/configs/quickstart.yaml --output_dir runs/replay
    python -m trainers.replay --config trainers/configs/quickstart_rcl.yaml --tasks reasoning_order1 \
        --output_dir runs/rcl-replay    # RCL + replay
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import RandomSampler, Sampler

from trace_bench.run import Stage
from trace_tasks import data
from trace_tasks.data.files import digest
from trace_tasks.tokens import questions
from trainers.base import CHOICES, CLConfig, CLTrainer, ConfigError, LengthGrouped, main, option


@dataclass
class ReplayConfig(CLConfig):
    """CLConfig with the choice of replayed rows."""

    replay: str = option(
        "after", "When to replay rows: after a stage's own rows, or mixed with them.", choices=["after", "mixed"]
    )
    replay_ratio: float = option(0.1, "Share of each earlier task's rows; 0 = none.", least=0, most=1)
    replay_choice: str = option(
        "random", "Which rows to replay: first (official code), random or balanced.", choices=CHOICES
    )
    alignment_data: str | None = option(
        None, "Alignment set: a JSON file, a folder with train.json, or none; default: Lima in the data."
    )
    alignment_rows: int | None = option(None, "Number of rows of the alignment set (the first); default: all.", least=1)

    def __post_init__(self) -> None:
        """Refuses settings that leave nothing to replay, or with which the replay would be mixed in or cut off."""
        super().__post_init__()
        if self.replay_ratio == 0 and self.alignment_data == "none":
            raise ConfigError("replay_ratio=0 and alignment_data=none leave nothing to replay. Use sequential instead.")
        if self.replay == "after" and self.shuffle_dataset:
            raise ConfigError("shuffle_dataset=true would mix own and replayed rows too early. Leave it out.")
        if self.replay == "after" and self.max_steps > 0:
            raise ConfigError(f"max_steps={self.max_steps} would cut off the replay, which comes last. Use epochs.")


def alignment_rows(config: ReplayConfig) -> list[dict[str, str]]:
    """Reads the alignment set.

    Raises:
        DataError: if there is none, or a row is not a prompt and an answer.
    """
    if config.alignment_data == "none":
        return []
    if config.alignment_data is not None:
        path = Path(config.alignment_data).expanduser()
    else:
        if not data.needs_data(config.tasks):
            raise data.DataError("alignment_data is not set. Give a JSON file of prompts and answers, or none.")
        path = data.find_data(os.environ.get("TRACE_DATA") or config.data) / data.LIMA
    file = path / "train.json" if path.is_dir() else path
    if not file.is_file():
        raise data.DataError(
            f"There is no alignment set at {file}. Set alignment_data to a JSON file (a list of objects with prompt "
            "and answer), to a folder with such a train.json, or to none."
        )
    return data.read_rows(file)[: config.alignment_rows]


class ReplayTrainer(CLTrainer):
    """A stage with replayed rows, after its own rows or mixed with them."""

    config: ReplayConfig
    own_memory = True

    @classmethod
    def prepare(cls, config: ReplayConfig, model_args: Any) -> dict[str, Any]:
        """Reads the alignment set, and adds its fingerprint to the manifest."""
        rows = alignment_rows(config)
        return {"alignment": {"rows": len(rows), "fingerprint": digest(json.dumps(rows))}}

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The task's own rows first, then the replayed ones."""
        own = super().stage_dataset(stage)
        replayed = self.replayed(stage)
        self.own_rows = len(own)
        self.replay_record = {name: len(rows) for name, rows in replayed.items()}
        return concatenate_datasets([own, *replayed.values()])

    def replayed(self, stage: Stage) -> dict[str, Dataset]:
        """Earlier task, or "alignment" -> its replayed rows at a stage."""
        c = self.config
        parts = self.earlier_rows(stage, c.replay_ratio, c.replay_choice)
        aligned = alignment_rows(c)
        if aligned:
            prompts = questions([row["prompt"] for row in aligned], self.chat)
            parts["alignment"] = self.text_dataset([(p, r["answer"]) for p, r in zip(prompts, aligned, strict=True)])
        return parts

    def stage_args(self, stage: Stage) -> CLConfig:
        """With `replay: after` HF's trainer makes one epoch, in which `_OwnThenReplayed` repeats the own rows."""
        args = super().stage_args(stage)
        self.own_epochs = args.num_train_epochs
        if self.config.replay == "after":
            args.num_train_epochs = 1
        return args

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.config.replay == "mixed":
            return super()._get_train_sampler(rows)
        assert isinstance(rows, Dataset)
        own, replayed = range(self.own_rows), range(self.own_rows, len(rows))
        return _OwnThenReplayed(
            super()._get_train_sampler(rows.select(own)),
            max(1, round(self.own_epochs * len(own))),  # plain training also takes at least one step
            super()._get_train_sampler(rows.select(replayed)) if replayed else [],
            len(own),
            self.order_seed,
        )

    def record(self) -> dict[str, Any]:
        """How many own rows and replayed rows there were."""
        return {"own_rows": self.own_rows, "own_epochs": self.own_epochs, "replayed": self.replay_record}


class _OwnThenReplayed(Sampler):
    """The own rows, shuffled again in each of their epochs, then the replayed rows once.

    The orders depend on the seed and the epoch only, so they are the same on every process and after a resume.
    """

    def __init__(self, own: Any, steps: int, replayed: Any, offset: int, seed: int) -> None:
        self.own, self.steps, self.replayed, self.offset, self.seed = own, steps, replayed, offset, seed

    def __len__(self) -> int:
        return self.steps + len(self.replayed)

    def __iter__(self) -> Iterator[int]:
        left, epoch = self.steps, 0
        while left:
            rows = self._order(self.own, epoch)[:left]
            yield from rows
            left -= len(rows)
            epoch += 1
        yield from (self.offset + i for i in self._order(self.replayed, epoch))

    def _order(self, sampler: Any, epoch: int) -> list[int]:
        if isinstance(sampler, LengthGrouped):
            sampler.set_epoch(epoch)
        elif isinstance(sampler, RandomSampler):
            sampler.generator = torch.Generator().manual_seed(self.seed + epoch)
        return list(sampler)


if __name__ == "__main__":
    main(ReplayTrainer, ReplayConfig)
