r"""STM (selective token masking): answer tokens that surprise the model before the stage are not trained on.

Wu et al. 2025 (arXiv 2501.14315): training on tokens of high perplexity is what makes a model forget. Before a stage
the model that it starts from reads the training rows once; tokens y of an answer with the perplexity
exp(CE(y)) = 1 / p(y) above `stm_threshold` are left out of the loss, and stay in the context. 2.5, the paper's and the
authors' default, is a probability of 0.4.

Differences from the authors' code, which measures with the base model of its only stage, and masks any token:

- The end of an answer (EOS) is never masked. The paper's models are tuned for chats and know how to end a turn; of a
  base model's rows nearly all ends would be masked, and it would never learn to stop.
- No whole answer is masked: if all its other tokens would be, the one with the lowest perplexity is trained on. Tasks
  of TRACE have answers of one token, of which nothing would be left to learn.

With `replay_ratio` the replayed rows are masked in the same way. The tokens that remain weigh as in any loss: with
`loss_weights: rows` every row weighs the same.

    python -m trainers.stm --config trainers/configs/quickstart.yaml --output_dir runs/stm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.functional import cross_entropy

from trainers.base import CLConfig, CLTrainer, main, option, refuse_shards


@dataclass
class STMConfig(CLConfig):
    """As CLConfig, and which tokens are masked."""

    stm_threshold: float = option(2.5, "Answer tokens with a perplexity above this are not trained.", least=1)


class STMTrainer(CLTrainer):
    """A stage that leaves out the tokens that its first model finds unlikely."""

    config: STMConfig

    @classmethod
    def prepare(cls, config: STMConfig, model_args: Any) -> dict[str, Any]:
        """Refuses shards, which are put together for the training only."""
        refuse_shards(config, "stm needs whole weights before a stage begins", "with LoRA if memory is short")
        return {}

    def begin_stage(self) -> None:
        """Masks the tokens of the training set."""
        rows: Any = self.train_dataset
        perplexities = self.perplexities(rows)
        old = [list(labels) for labels in rows["labels"]]
        new = [self.masked(labels, found) for labels, found in zip(old, perplexities, strict=True)]
        answers = sum(label != -100 for labels in old for label in labels)
        left = sum(label != -100 for labels in new for label in labels)
        self.masked_record = {"answer_tokens": answers, "masked_share": (answers - left) / answers}
        self.train_dataset = rows.remove_columns("labels").add_column("labels", new)

    @torch.no_grad()
    def perplexities(self, rows: Dataset) -> list[list[float]]:
        """Of each answer token of each row, under the model as it is now."""
        self.model.eval()  # without dropout
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)  # rows of a batch have similar lengths
        mine = order[self.accelerator.process_index :: self.accelerator.num_processes]
        found: list[tuple[int, list[float]]] = []
        places = iter(mine)
        for batch in self.batches(rows.select(mine)):
            with self.accelerator.autocast():  # as the training, for which the model is prepared later
                logits, target = self.answer_logits(self.model, batch)
            each = cross_entropy(logits, target, reduction="none").exp()
            answers = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
            found += [(next(places), part.tolist()) for part in each.split(answers)]
        return [values for _, values in sorted(gather_object(found))]

    def masked(self, labels: list[int], perplexities: list[float]) -> list[int]:
        """The labels of a row without the tokens above the threshold."""
        places = [i for i, label in enumerate(labels) if i and label != -100]  # nothing predicts the first token
        found = {i: p for i, p in zip(places, perplexities, strict=True) if labels[i] != self.tokenizer.eos_token_id}
        above = {i for i, p in found.items() if p > self.config.stm_threshold}
        if above and len(above) == len(found):
            above.remove(min(found, key=found.__getitem__))
        return [-100 if i in above else label for i, label in enumerate(labels)]

    def record(self) -> dict[str, Any]:
        """The answer tokens of the training set, and the share of them that was masked."""
        return self.masked_record


if __name__ == "__main__":
    main(STMTrainer, STMConfig)
