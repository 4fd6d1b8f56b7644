r"""LFPT5: one soft prompt learns task after task, and rows of the earlier tasks that the model has written itself.

Qin and Joty 2022 (arXiv 2110.07298). The model is frozen. Its soft prompt, that of the stage before, learns to solve
the task and to write rows of it, x -> y and "__task__" -> "x__ans__y". Before stage t the model writes pseudo rows of
each earlier task behind that task's marker, and they are trained as the task's own. On them the answers are also held
to what the prompt of the stage before says:

    L = L_task + \lambda_lm L_lm + \lambda_kl KL(p_old || p),    the last of pseudo rows, at their answer tokens

\lambda_lm = 0.1 is the authors' for named entities and summaries (0.25 for classes). Their \lambda_kl of 0.01 to 0.04
weighs a sum over the tokens of two rows, ours a mean over a row's tokens; 0.1 is our choice. The prompt has 300 tokens,
as the authors' has for T5; `prompt_tokens` 20 is that of `pp`. `replay_ratio` 0.1 says how many pseudo rows are asked
for, as a share of a task's rows. Temperature 0.7, top_k 50 and top_p 0.95, and the form of the rows, are those of a
first state of the official TRACE code; the authors have temperature 1 and top_k 64. Both penalise repetitions, of which
an answer that stands in its prompt is one: ours do not.

A pseudo row is kept if it has one "__ans__" between a prompt and an answer, has ended, and is not there yet. The
authors also ask for one of the known labels, which most tasks of TRACE do not have. **A model that does not write such
rows replays nothing**: the prompt then only goes on from task to task. train.json says how many were asked for and
kept. The paper has T5 and short rows; long ones are harder to write.

Differences: the markers are text of existing tokens, where the authors add tokens of random embeddings to the
vocabulary. (1 - \lambda_kl) does not weigh the other losses. The paper adds prompt tokens for a new type of task; here,
as in the official TRACE code, all tasks share one prompt. That code, as it is now, has neither markers nor L_lm nor the
divergence: the model answers the test prompts of all earlier tasks, and is trained on these rows.

It needs what `pp` needs, and two forward passes in each step, three with pseudo rows.

    python -m trainers.lfpt5 --config trainers/configs/quickstart.yaml --output_dir runs/lfpt5
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import cross_entropy

from trace_bench.engine import models
from trace_bench.engine.swap import Answer
from trace_bench.run import Stage
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks.tokens import example_ids, prompt_ids, questions, text_of
from trainers.base import ConfigError, divergences, main, option, require_context
from trainers.pp import PPConfig, PPTrainer

log = logging.getLogger(__name__)

#: What a pseudo row begins with, and what stands between its prompt and its answer.
MARKER, ANSWER = "__{task}__", "__ans__"
#: More than a marker has.
MARKER_TOKENS = 32
#: Columns of the training set: which text the model learns to write for a row, and whether a row is a pseudo row.
WRITTEN, PSEUDO = "written_row", "pseudo_row"


@dataclass
class LFPT5Config(PPConfig):
    """As PPConfig, and the pseudo rows."""

    replay_ratio: float = option(
        0.1, "Number of pseudo rows of each earlier task, as a share of its rows.", least=0, most=1
    )
    lfpt5_lm: float = option(0.1, "Weight of the loss of writing rows.", least=0)
    lfpt5_kl: float = option(0.1, "Weight of the divergence from the old prompt on pseudo rows.", least=0)
    lfpt5_temperature: float = option(0.7, "Temperature of the pseudo rows.", above=0)

    def __post_init__(self) -> None:
        """Refuses what would change the prompt of the stage before, and other losses."""
        super().__post_init__()
        if self.prompt_mlp:
            raise ConfigError(f"prompt_mlp={self.prompt_mlp}: lfpt5 trains the prompt directly. Use prompt_mlp: 0.")
        if self.loss_weights != "rows":
            raise ConfigError(
                f"loss_weights={self.loss_weights}: lfpt5 adds two losses of rows. Use loss_weights: rows."
            )

    @property
    def virtual_tokens(self) -> int:
        """One prompt for all stages."""
        return self.prompt_tokens

    @property
    def written_tokens(self) -> int:
        """The most tokens of a pseudo row."""
        return self.max_prompt_length + self.max_answer_length


class LFPT5Trainer(PPTrainer):
    """A stage that trains the prompt of the stage before, with pseudo rows."""

    config: LFPT5Config
    own_memory = True
    columns = (WRITTEN, PSEUDO)

    @classmethod
    def prepare(cls, config: Any, model_args: Any) -> dict[str, Any]:
        """As `pp`; and refuses a context that is too small for pseudo rows."""
        room = config.prompt_tokens + MARKER_TOKENS + config.written_tokens
        what = (
            f"prompt_tokens, {MARKER_TOKENS} for a marker, and max_prompt_length and max_answer_length for a pseudo row"
        )
        require_context(config, model_args, room, what, engine=True)
        return super().prepare(config, model_args)

    def stage_model(self, stage: Stage) -> Any:
        """The base model with the prompt of the stage before, or one of random tokens' embeddings."""
        model = self.with_prompt(self.config.prompt_tokens)
        before = models.soft_prompt(self.previous.checkpoint)  # PEFT loads prompts only to use them
        if before is not None:
            encoders: Any = model.prompt_encoder
            encoders["default"].embedding.weight.data.copy_(before)
        return model

    # ------------------------------------------------------------------------------------------------------- the rows

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The task's own rows, then the pseudo rows of each earlier task."""
        assert stage.task is not None
        self.written_rows: list[dict[str, list[int]]] = []
        self.pseudo: dict[str, dict[str, int]] = {}
        # The texts without a chat template.
        own = training_rows(load_tasks([stage.task])[stage.task], len(self.task_texts(stage.task)))
        parts = [self.rows_of(stage.task, own, pseudo=False)]
        for task, texts in (self.pseudo_texts(stage) if self.config.replay_ratio and stage.index > 1 else {}).items():
            if texts:
                parts.append(self.rows_of(task, texts, pseudo=True))
            else:
                log.warning("%s wrote no usable row of %s, so this task is not replayed.", self.previous.name, task)
        return concatenate_datasets(parts)

    def pseudo_texts(self, stage: Stage) -> dict[str, list[tuple[str, str]]]:
        """The usable pseudo rows that the model of the stage before writes, by earlier task."""
        c, earlier = self.config, self.run.tasks[: stage.index - 1]
        asked = {task: max(1, round(c.replay_ratio * len(self.task_texts(task)))) for task in earlier}
        written = self.answers(
            "pseudo",
            self.previous,
            {task: [MARKER.format(task=task)] for task in earlier},
            samples=asked,
            sampling={"temperature": c.lfpt5_temperature, "top_k": 50, "top_p": 0.95},
            most=c.written_tokens,
        )
        found = {task: list(dict.fromkeys(filter(None, map(as_row, answers)))) for task, [answers] in written.items()}
        self.pseudo = {task: {"asked": asked[task], "kept": len(found[task])} for task in earlier}
        return found

    def rows_of(self, task: str, texts: list[tuple[str, str]], pseudo: bool) -> Dataset:
        """Token ids of rows of a task, with the columns; and of what the model learns to write for each of them."""
        c, tokenizer = self.config, self.tokenizer
        prompts, answers = zip(*texts, strict=True)
        rows = self.text_dataset(list(zip(questions(prompts, self.chat), answers, strict=True)))
        # Prompts are cut as in training, or a text would end before its answer.
        ends = [
            p if len(ids) <= c.max_prompt_length else text_of(tokenizer, ids[-c.max_prompt_length :])
            for p, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True)
        ]
        wholes = [end + ANSWER + answer for end, answer in zip(ends, answers, strict=True)]
        start = len(self.written_rows)
        self.written_rows += example_ids(
            tokenizer, [MARKER.format(task=task)] * len(texts), wholes, None, c.written_tokens
        )
        rows = rows.add_column(WRITTEN, list(range(start, len(self.written_rows))))
        return rows.add_column(PSEUDO, [int(pseudo)] * len(texts))

    # ------------------------------------------------------------------------------------------------------- the loss

    def begin_stage(self) -> None:
        """Keeps the prompt of the stage before."""
        self.old = {name: p.detach().clone() for name, p in self.trained().items()}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the answers, that of writing the rows, and the divergence from the old prompt on pseudo rows."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        c, told = self.config, None
        pseudo = (inputs[PSEUDO] > 0).repeat_interleave((inputs["labels"][:, 1:] != -100).sum(dim=1))
        if c.lfpt5_kl and pseudo.any():
            with torch.no_grad(), self.accelerator.autocast(), self.model_with(self.old) as before:
                told = self.answer_logits(before, inputs)[0][pseudo]
        loss = torch.zeros((), device=pseudo.device)
        if c.lfpt5_lm:
            batch = self.data_collator([self.written_rows[row] for row in inputs[WRITTEN].tolist()])
            batch = {name: tensor.to(pseudo.device) for name, tensor in batch.items()}
            writes = cross_entropy(*self.answer_logits(model, batch), reduction="none")
            loss = c.lfpt5_lm * self.step_loss(writes, batch, num_items_in_batch)
        logits, target = self.answer_logits(model, inputs)
        losses = cross_entropy(logits, target, reduction="none")
        if told is not None:
            losses = losses.masked_scatter(pseudo, losses[pseudo] + c.lfpt5_kl * divergences(logits[pseudo], told))
        return loss + self.whole_loss(losses, model, inputs, num_items_in_batch)

    def record(self) -> dict[str, Any]:
        """How many pseudo rows of each earlier task were asked for and kept."""
        return {"replayed": {task: made["kept"] for task, made in self.pseudo.items()}, "pseudo": self.pseudo}


def as_row(answer: Answer) -> tuple[str, str] | None:
    """The prompt and the answer in a text that a model has written; None if it is not a row."""
    parts = answer.text.split(ANSWER)
    return (parts[0], parts[1]) if answer.finished and len(parts) == 2 and all(p.strip() for p in parts) else None


if __name__ == "__main__":
    main(LFPT5Trainer, LFPT5Config)
