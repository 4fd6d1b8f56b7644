r"""Dark experience replay: on replayed rows the model is also held to its own outputs right after their task.

Buzzega et al. 2020 (DER++, arXiv 2004.07211), in the form that He et al. 2024 have for language models (SEEKR, arXiv
2411.06171, equation 13 without its term for attention). The loss is CE on rows of the new task, and \lambda CE +
(1 - \lambda) KL(p_old || p) on replayed rows, at the answer tokens. p_old is the model at the end of the stage of the
row's own task; it is not refreshed later. \lambda = 0.5 is SEEKR's (`logits_distill_weight` of its code), \lambda = 1
is `replay: mixed`. Rows and tokens weigh as in the loss of all methods. `replay_ratio` 0.1 is that of `replay`; SEEKR
has 0.01 and 0.1.

Of p_old the K likeliest tokens are kept, and the mass r of all others as one more class. The divergence between these
K + 1 classes is the full one less r KL(p_old(.|others) || p(.|others)). It is zero where p = p_old, and never above the
full divergence. It does not see how p divides the mass of the others among them: where it is zero, the full divergence
is r times that of the others. train.json has the mean of 1 - r (`kept_mass`).

State: for each answer token of a row K token ids (int32) and K + 1 log-probabilities (float32), which is 8 K + 4 bytes
whatever the vocabulary, and 4 bytes for each row. K is less than the vocabulary. The state of a stage holds the rows of
all tasks so far. It does not hold their texts, which are chosen again from the data.

Differences: DER++ takes the squared error of whole logits, and draws twice for each step from a reservoir of rows.
SEEKR's code keeps the first rows of a task and whole logits, and takes separate steps on them. It distils one position
late: its logits predict the token after each answer token, ours the answer token. p_old is computed without dropout.

    python -m trainers.der --config trainers/configs/quickstart.yaml --output_dir runs/der
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy, kl_div

from trace_bench.run import Stage
from trainers.base import CHOICES, CLConfig, CLTrainer, choose_rows, main, option, refuse_losses, refuse_shards

#: A column of the training set: which kept row this is, in the order of the state; -1 = a row of the stage's own task.
KEPT = "kept_row"


@dataclass
class DERConfig(CLConfig):
    """As CLConfig, and how replayed rows are trained."""

    replay_ratio: float = option(0.1, "Share of each earlier task's rows to replay.", above=0, most=1)
    replay_choice: str = option("random", "Which rows are replayed: first, random or balanced.", choices=CHOICES)
    der_lambda: float = option(
        0.5, "Weight of the loss of replayed rows; the rest is the weight of the distillation.", least=0, most=1
    )
    der_top: int = option(64, "Number of tokens whose probabilities are kept at each answer position.", least=1)


class DERTrainer(CLTrainer):
    """A stage with rows of earlier tasks, and the model's outputs on them from then."""

    config: DERConfig
    own_memory = True
    columns = (KEPT,)
    #: What of the state is large and needed by the row, and so does not go to the GPU.
    on_cpu: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, config: DERConfig, model_args: Any) -> dict[str, Any]:
        """Refuses shards, and losses other than the cross entropy that it computes."""
        refuse_shards(config, "der needs whole weights for what it keeps", "with LoRA if memory is short")
        refuse_losses(config, "is not the cross entropy that der computes. Use ")
        return {}

    def remembered(self, task: str) -> Dataset:
        """The rows of a task that are replayed: those that `replay` would take."""
        c, rows = self.config, self.task_dataset(task)
        return choose_rows(rows, max(1, round(c.replay_ratio * len(rows))), c.replay_choice, c.seed)

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The task's own rows first, then the replayed ones, in the order of the state."""
        rows = super().stage_dataset(stage)
        rows = rows.add_column(KEPT, [-1] * len(rows))
        self.replayed = {task: self.remembered(task) for task in self.run.tasks[: stage.index - 1]}
        if self.replayed:
            kept = concatenate_datasets(list(self.replayed.values()))
            # Not `add_column`: on rows that were selected it copies all of them, and shows a progress bar.
            rows = concatenate_datasets([rows, Dataset.from_dict({**kept[:], KEPT: range(len(kept))})])
        return rows

    def begin_stage(self) -> None:
        """Loads the outputs on the replayed rows."""
        self.said = self.load_state(self.on_cpu)
        self.ends = self.said["lengths"].cumsum(0).tolist() if self.said else []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss, and on replayed rows the distillation with it, per answer token."""
        kept = inputs[KEPT]
        inputs = {name: value for name, value in inputs.items() if name != KEPT}
        if return_outputs or not self.said:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, target = self.answer_logits(model, inputs)
        losses = cross_entropy(logits, target, reduction="none")
        replayed = (kept >= 0).repeat_interleave((inputs["labels"][:, 1:] != -100).sum(dim=1))
        if replayed.any():
            both = self.config.der_lambda * losses[replayed] + self.distillation(logits[replayed], kept)
            losses = losses.masked_scatter(replayed, both)
        return self.whole_loss(losses, model, inputs, num_items_in_batch)

    def distillation(self, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """What the answer tokens of replayed rows have in addition to their loss; `kept` is the batch's column."""
        return (1 - self.config.der_lambda) * self.divergence(logits, kept[kept >= 0])

    def divergence(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """KL(p_old || p) between the K + 1 classes, of each answer token of kept rows.

        Args:
            logits: The model's at the rows' answer tokens, (tokens, vocabulary).
            rows: Which kept rows these are.
        """
        ends = [0, *self.ends]
        places = torch.cat([torch.arange(ends[row], ends[row + 1], device=logits.device) for row in rows.tolist()])
        now = class_logs(logits, self.said["ids"][places])
        return kl_div(now, self.said["logs"][places], reduction="none", log_target=True).sum(dim=-1)

    def end_stage(self) -> None:
        """Adds the model's present outputs on the rows of its own task that later stages replay."""
        assert self.stage.task is not None
        self.model.eval()  # without dropout
        new = self.said_of(self.remembered(self.stage.task))
        old = {name: tensor.cpu() for name, tensor in self.said.items()}
        self.said = {name: torch.cat([old[name], part]) if old else part for name, part in new.items()}
        self.save_state(self.said)

    @torch.no_grad()
    def said_of(self, rows: Dataset) -> dict[str, torch.Tensor]:
        """The model's present outputs on rows: tensors on the CPU, to be appended to those of earlier tasks."""
        share: list[tuple[torch.Tensor, torch.Tensor]] = []  # ids and logs of each row that this process works on
        for batch in self.batches(self.own_share(rows)):
            with self.compute_loss_context_manager():
                logits, _ = self.answer_logits(self.model, batch)
            ids = logits.topk(min(self.config.der_top, logits.shape[-1] - 1)).indices
            parts = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
            share += zip(ids.int().cpu().split(parts), class_logs(logits, ids).cpu().split(parts), strict=True)
        shares = gather_object([share])
        of_rows = [shares[i % len(shares)][i // len(shares)] for i in range(len(rows))]
        ids, logs = (torch.cat(part) for part in zip(*of_rows, strict=True))
        self.kept_mass = float(1 - logs[:, -1].exp().mean())
        lengths = torch.tensor([len(part) for part, _ in of_rows], dtype=torch.int32)
        return {"ids": ids, "logs": logs, "lengths": lengths}

    def record(self) -> dict[str, Any]:
        """How many rows were replayed; the state's size; the mean probability of the own rows' kept tokens together."""
        return {
            "replayed": {task: len(rows) for task, rows in self.replayed.items()},
            "kept_bytes": sum(tensor.nbytes for tensor in self.said.values()),
            "kept_mass": self.kept_mass,
        }


def class_logs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of some tokens, and of all others together as the last class.

    Args:
        logits: (tokens, vocabulary).
        ids: (tokens, K), K below the vocabulary's size.
    """
    ids = ids.long()
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], dim=-1).log_softmax(dim=-1)


if __name__ == "__main__":
    main(DERTrainer, DERConfig)
