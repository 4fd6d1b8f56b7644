r"""Self-distillation fine-tuning: the model learns from its own answers what it would say if it had seen the gold ones.

Shenfeld et al. 2026, "Self-Distillation Enables Continual Learning" (arXiv 2601.19897). The student answers a prompt x
by itself, y ~ p(. | x). The teacher is the same model, which is shown a demonstration c, the gold answer. The loss is

    mean over the tokens of y of KL(p_teacher(. | x, c, y_<i) || p_student(. | x, y_<i))

over the whole vocabulary: gold answers are not trained on. The paper writes the divergence the other way round; its
authors say that all of its results are of this one, which is the default of their code (idanshen/Self-Distillation,
issue 5). The teacher's weights are an average of the student's: T += `sdft_ema` (S - T) after each step, 0.01 as in the
authors' code; 0 = the model before the stage, 1 = the student itself. Samples are drawn at temperature 1, up to
`sdft_tokens` or the model's EOS.

**Short answers give it little to learn from.** The teacher says what comes next in the student's answer, at the
student's own tokens. Where the gold answer is one letter this is one distribution for each row and step, and a model
that does not read demonstrations teaches nothing. A base model that does not stop writes up to `sdft_tokens` for
each row in each step, which is most of the time that a stage takes. train.json has the mean length of the samples.

Why not TRL's own trainer (`trl.experimental.sdft`): its batches repeat prompts in an order of their own, its average
starts at zero, which is the base model and not the stage before, and is in no checkpoint, so that a killed stage could
not go on as it was; it would leave a second adapter. Its loss with `distillation_alpha=0` and all logits is the same as
this one, which a test compares.

Differences from the authors' code: it leaves the first three tokens of a sample out of the loss, which here are often
all; its prompt asks for a response "including the thinking process"; its samples are vLLM's, with a correction for
that. What a row draws depends on the seed, the step and the row alone: not on how a batch is divided.

Needs a copy of the trained parameters in float32, and two forward passes and the sampling in each step.

    python -m trainers.sdft --config trainers/configs/quickstart.yaml --output_dir runs/sdft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from trace_bench.engine.ends import end_ids
from trace_bench.run import Stage
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks.data.files import digest
from trace_tasks.tokens import prompt_ids, questions
from trainers.base import (
    CLConfig,
    CLTrainer,
    divergences,
    main,
    option,
    refuse_losses,
    refuse_shards,
    require_context,
    sampled,
)

TEMPLATE = """{prompt}

A response to this could be:
{answer}

Now give a response of your own:
"""
#: A column of the training set: which teacher's prompt belongs to a row.
SHOWN = "shown_row"


@dataclass
class SDFTConfig(CLConfig):
    """As CLConfig, and the teacher and the samples."""

    sdft_ema: float = option(0.01, "Share of the student in the teacher's update at each step.", least=0, most=1)
    sdft_tokens: int | None = option(None, "Most tokens of a sample; default: max_answer_length.", least=1)

    @property
    def sample_tokens(self) -> int:
        """The most tokens of a sample."""
        return self.sdft_tokens or self.max_answer_length

    @property
    def shown_tokens(self) -> int:
        """The most tokens of what the teacher is shown."""
        return self.max_prompt_length + self.max_answer_length


class SDFTTrainer(CLTrainer):
    """A stage of the student's own answers, taught by an average of itself that has seen the gold ones."""

    config: SDFTConfig
    columns = (SHOWN,)
    counters = ("samples", "sampled_tokens", "finished", "divergence")
    #: The answers that were drawn in the stage, their tokens, how many of them ended, and the sum of the divergence
    #: over the tokens; of this process.
    samples = 0
    sampled_tokens = 0
    finished = 0
    divergence = 0.0

    @classmethod
    def prepare(cls, config: SDFTConfig, model_args: Any) -> dict[str, Any]:
        """Refuses shards, other losses, and samples that do not fit into the context."""
        refuse_shards(config, "sdft needs whole weights for its teacher and its samples", "with LoRA")
        refuse_losses(config, "has no effect, since sdft has its own loss. Use ")
        what = "max_prompt_length and max_answer_length, which sdft's teacher reads, and a sample (sdft_tokens)"
        require_context(config, model_args, config.shown_tokens + config.sample_tokens, what)
        return {}

    # ---------------------------------------------------------------------------------------------------- the teacher

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The rows of the task; `shown` has what the teacher is asked, for these and for replayed rows."""
        self.shown: list[list[int]] = []
        return super().stage_dataset(stage)

    def task_dataset(self, task: str, limit: int | None = None) -> Dataset:
        """With a number for each row: of what the teacher is shown, the prompt with the gold answer."""
        c, rows = self.config, super().task_dataset(task, limit)
        asked = [TEMPLATE.format(prompt=p, answer=a) for p, a in training_rows(load_tasks([task])[task], len(rows))]
        numbers = range(len(self.shown), len(self.shown) + len(rows))
        self.shown += prompt_ids(self.tokenizer, questions(asked, self.chat), c.shown_tokens, self.chat)
        return rows.add_column(SHOWN, list(numbers))

    def begin_stage(self) -> None:
        """The teacher begins as the student does."""
        self.kept = {name: p.detach().float().clone() for name, p in self.trained().items()}
        args = self.model_args
        place = str(args.model_name_or_path), args.model_revision, self.previous.checkpoint
        self.ends = end_ids(self.tokenizer, *place)
        if self.chat is not None:
            self.ends |= self.chat.end_ids

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the teacher towards the student."""
        for name, parameter in self.trained().items():
            self.kept[name].lerp_(parameter.float(), self.config.sdft_ema)

    # ---------------------------------------------------------------------------------------------------- the student

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of an optimizer step, with the student's present answers instead of the gold ones."""
        return super().get_batch_samples(map(self.on_policy, epoch_iterator), num_batches, device)

    def on_policy(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with the student's own answers: behind the prompts, and under "taught" behind the teacher's."""
        rows = batch[SHOWN].tolist()
        starts = (batch["labels"] != -100).int().argmax(dim=1).tolist()
        prompts = [ids[:start] for ids, start in zip(batch["input_ids"].tolist(), starts, strict=True)]
        step = [self.config.seed, self.stage.index, self.state.global_step]
        seeds = [int(digest([*step, row])[:15], 16) for row in rows]
        model, most = self.accelerator.unwrap_model(self.model), self.config.sample_tokens
        answers = sampled(model, prompts, seeds, most, self.ends, self.accelerator.autocast())
        self.samples += len(answers)
        self.sampled_tokens += sum(map(len, answers))
        self.finished += sum(answer[-1] in self.ends for answer in answers)
        return {**self.behind(prompts, answers), "taught": self.behind([self.shown[row] for row in rows], answers)}

    def behind(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, torch.Tensor]:
        """A batch of prompts and answers."""
        pairs = zip(prompts, answers, strict=True)
        batch = self.data_collator([{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs])
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The divergence from the teacher, per token of the student's answers."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast(), self.model_with(self.kept) as teacher:
            taught, _ = self.answer_logits(teacher, inputs["taught"])
        inputs = {name: value for name, value in inputs.items() if name != "taught"}
        logits, _ = self.answer_logits(model, inputs)
        losses = divergences(logits, taught)
        self.divergence += float(losses.detach().sum())
        return self.whole_loss(losses, model, inputs, num_items_in_batch)

    def record(self) -> dict[str, Any]:
        """The samples of the stage: how many, their mean length and the share that ended; and the mean divergence."""
        n = max(self.samples, 1)
        mean = {"mean_tokens": self.sampled_tokens / n, "finished": self.finished / n}
        return {
            "samples": {"rows": self.samples, **mean},
            "divergence": self.divergence / max(self.sampled_tokens, 1),
        }


if __name__ == "__main__":
    main(SDFTTrainer, SDFTConfig)
