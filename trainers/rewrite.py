r"""Self-distillation fine-tuning: the base model says each gold answer in its own words, and that is trained on.

Yang et al. 2024 (arXiv 2402.13669): the seed model f is shown a prompt x with its gold answer y and writes an answer
of its own, y~ ~ f(. | x, y), so that what is trained is likely under the model already. y~ takes the place of y if
Extract(y~) = y, that is if it gives the same final answer; otherwise y stays. The loss is the usual one.

The base model (stage 0) writes once for each task. "The same final answer" is here the task's own metric: a rewrite is
kept if it has at least `rewrite_accept` of the score that the gold answer has. With a metric of right and wrong any
value above 0 is the paper's rule. With overlaps (ROUGE-L, SARI) there is no final answer; the paper's open data sets
then keep all (`rewrite_accept: 0`), and 0.5, the default, is our choice. As in the official code (sail-sg/sdft)
rewrites that speak of the reference answer are dropped; so are empty ones and, unlike there, those that the limit of
their length cut. Decoding is the official one, the defaults of LLaMA-Factory: temperature 0.95, top_p 0.7 (its top_k of
50 is left out). The prompt says in our words what the official one does, which has a variant for each data set.

Strict metrics keep little: where the gold answer is a letter, a sentence around it is wrong. `train.json` has the share
that was kept. A base model that does not follow instructions rewrites nothing usable, and this is then plain training.

    python -m trainers.rewrite --config trainers/configs/quickstart.yaml --output_dir runs/rewrite
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trace_bench.engine.swap import Answer
from trace_bench.run import Stage
from trace_bench.tasks import answer_scores, load_tasks, training_rows
from trace_tasks.tokens import questions
from trainers.base import CLConfig, CLTrainer, check_scores, main, option

TEMPLATE = """Below are a task and a reference answer to it. Answer the task yourself, in your own words. \
What you say has to agree with the reference answer. Give the answer only.

Task:
{prompt}

Reference answer:
{answer}

Your answer:
"""
#: What an answer does not say, unless it talks about the template.
TALK = ("reference answer", "own words", "your answer", "my answer")


@dataclass
class RewriteConfig(CLConfig):
    """As CLConfig, and how answers are rewritten."""

    rewrite_accept: float = option(
        0.5, "Keep a rewrite if its score is at least this share of the gold answer's; 0 = keep all.", least=0, most=1
    )
    rewrite_temperature: float = option(0.95, "Temperature of the rewrites; 0 = greedy.", least=0)
    rewrite_top_p: float = option(
        0.7, "Nucleus sampling of the rewrites: total probability of the tokens.", above=0, most=1
    )


class RewriteTrainer(CLTrainer):
    """A stage that trains rewritten answers."""

    config: RewriteConfig

    @classmethod
    def prepare(cls, config: RewriteConfig, model_args: Any) -> dict[str, Any]:
        """Refuses tasks whose metric has no score for a single answer, before anything is trained."""
        if config.rewrite_accept:
            check_scores(config.tasks, f"rewrite_accept={config.rewrite_accept}", "Use rewrite_accept: 0.")
        return {}

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The rows of the task, rewritten where that was possible."""
        self.rewritten: dict[str, dict[str, Any]] = {}
        return super().stage_dataset(stage)

    def task_texts(self, task: str, limit: int | None = None) -> list[tuple[str, str]]:
        """Prompts and rewritten answers; those of earlier tasks, for replay, are found with their own stages."""
        rows = super().task_texts(task, limit)
        loaded = load_tasks([task])[task]
        asked = [TEMPLATE.format(prompt=p, answer=a) for p, a in training_rows(loaded, len(rows))]
        c = self.config
        answers = self.answers(
            "rewritten",
            self.run.stages[0],
            {task: questions(asked, self.chat)},
            sampling={"temperature": c.rewrite_temperature, "top_p": c.rewrite_top_p},
            cut=False,
            at=next(stage for stage in self.run.stages if stage.task == task),
        )[task]
        texts = [as_gold(answer, gold) for (answer,), (_, gold) in zip(answers, rows, strict=True)]
        if c.rewrite_accept:
            scores = answer_scores(loaded, [(i, text or "") for i, text in enumerate(texts)])
            best = answer_scores(loaded, [(i, gold) for i, (_, gold) in enumerate(rows)])
            # Of scores below zero (less of the metric is better) the share is counted from the gold answer's, too.
            least = [score - (1 - c.rewrite_accept) * abs(score) for score in best]
            texts = [t if score >= s else None for t, score, s in zip(texts, scores, least, strict=True)]
        self.rewritten[task] = {
            "rows": len(rows),
            "kept": sum(text is not None for text in texts) / len(rows),
            "changed": sum(text not in (None, gold) for text, (_, gold) in zip(texts, rows, strict=True)) / len(rows),
        }
        return [(prompt, gold if text is None else text) for text, (prompt, gold) in zip(texts, rows, strict=True)]

    def record(self) -> dict[str, Any]:
        """The share of each task's rewrites that was kept, and that differs from the gold answers."""
        return {"rewritten": self.rewritten}


def as_gold(answer: Answer, gold: str) -> str | None:
    """A rewrite as it is trained: between the spaces of the gold answer; None if it is none."""
    text = answer.text.strip()
    if not answer.finished or not text or any(words in text.lower() for words in TALK):
        return None
    return gold[: len(gold) - len(gold.lstrip())] + text + gold[len(gold.rstrip()) :]


if __name__ == "__main__":
    main(RewriteTrainer, RewriteConfig)
