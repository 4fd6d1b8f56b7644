r"""On-policy replay: earlier tasks are replayed with answers that the model has just written itself.

Chen et al. 2026 (arXiv 2605.29495). Before stage t the model of stage t - 1 answers training prompts of each earlier
task. The best answers are mixed into the new task's rows and trained on as any others: no second model, no further
loss. What "best" means is `opr_score`:

- metric (the paper's OPR-RU): the task's own metric against the gold answer, as the evaluation computes it;
- confidence (OPR-SC): the mean log-probability of the answer's tokens, which needs no gold answer.

The paper's budgets are 0.01 (the default) and 0.1. From the official code (Yancey2024/OnPolicyReplay): all training
prompts are answered (`opr_prompts` takes fewer), once each, at temperature 0.1; answers are sorted and the first ones
kept, without a threshold. A metric of right and wrong leaves ties: `replay_choice` says which rows go first, as in
`replay` (officially "first"). So a model that answers all prompts as the gold answers do is trained on exactly the
rows of `replay: mixed`.

Differences. The official budget is shared: after t tasks each has ratio / t of a task's rows (`opr_budget: shared`);
ours is each earlier task's, as in `replay`. The official code leaves out rows of more than 2048 tokens and lets answers
have one token up to the third stage, where they are letters, and 512 after it; here prompts are cut and answers limited
as the evaluation of their task does. An answer that its limit cuts is trained without the end that the model did not
write. The official score of confidence also counts the likeliest token wherever another was drawn; ours has the drawn
ones alone.

It works with any model. `train.json` has for each earlier task the number of answers and of kept rows, the mean score
of both, and the share of kept answers that equal the gold answer.

    python -m trainers.opr --config trainers/configs/quickstart.yaml --replay_ratio 0.1 --output_dir runs/opr
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets

from trace_bench.engine.swap import Answer
from trace_bench.run import Stage
from trace_bench.tasks import answer_scores, load_tasks
from trainers.base import CHOICES, CLConfig, CLTrainer, ConfigError, check_scores, main, option, ranked_rows


@dataclass
class OPRConfig(CLConfig):
    """As CLConfig, and what is answered and kept."""

    replay_ratio: float = option(0.01, "Share of each earlier task's rows to keep.", above=0, most=1)
    replay_choice: str = option(
        "random", "Which of equally good rows to keep: first (official code), random or balanced.", choices=CHOICES
    )
    opr_budget: str = option(
        "task", "The ratio is for each earlier task, or shared by all (official code).", choices=["task", "shared"]
    )
    opr_score: str = option(
        "metric",
        "How answers are chosen: by the task's metric, or by their probability.",
        choices=["metric", "confidence"],
    )
    opr_prompts: int | None = option(None, "Number of prompts of each earlier task to answer; default: all.", least=1)
    opr_samples: int = option(1, "Number of answers to each prompt; the best one may be kept.", least=1)
    opr_temperature: float = option(0.1, "Temperature of the answers; 0 = greedy.", least=0)

    def __post_init__(self) -> None:
        """Refuses several answers that would all be the same."""
        super().__post_init__()
        if self.opr_samples > 1 and not self.opr_temperature:
            raise ConfigError(
                f"opr_samples={self.opr_samples}: at opr_temperature=0 all answers to a prompt are the same. Use a "
                "temperature above 0, or opr_samples=1."
            )


class OPRTrainer(CLTrainer):
    """A stage that trains the model's own answers to earlier tasks as well."""

    config: OPRConfig
    own_memory = True

    @classmethod
    def prepare(cls, config: OPRConfig, model_args: Any) -> dict[str, Any]:
        """Refuses tasks whose metric has no score for a single answer, before anything is trained."""
        if config.opr_score == "metric":
            check_scores(config.tasks, "opr_score=metric", "Use opr_score: confidence.")
        return {}

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The task's own rows first, then those that the model of the stage before has answered."""
        own = super().stage_dataset(stage)
        self.own_rows = len(own)
        self.replayed: dict[str, dict[str, Any]] = {}
        return concatenate_datasets([own, *self._replayed(stage)]) if stage.index > 1 else own

    def _replayed(self, stage: Stage) -> list[Dataset]:
        c = self.config
        texts = {task: self.task_texts(task) for task in self.run.tasks[: stage.index - 1]}
        ranked = {task: ranked_rows(self.task_dataset(task), c.replay_choice, c.seed) for task in texts}
        asked = {task: order[: c.opr_prompts] for task, order in ranked.items()}
        answers = self.answers(
            "replay",
            self.previous,
            {task: [texts[task][i][0] for i in order] for task, order in asked.items()},
            samples=c.opr_samples,
            sampling={"temperature": c.opr_temperature},
            rated=c.opr_score == "confidence",
        )
        return [
            self._kept(task, texts[task], dict(zip(asked[task], answers[task], strict=True)), len(texts))
            for task in texts
        ]

    def _kept(self, task: str, texts: list[tuple[str, str]], answers: dict[int, list[Answer]], earlier: int) -> Dataset:
        """The best answers to the rows of a task, which are given in the order of preference among equals."""
        c = self.config
        shared = c.opr_budget == "shared"
        count = max(1, int(c.replay_ratio * self.own_rows / earlier) if shared else round(c.replay_ratio * len(texts)))
        each = [(i, answer) for i, row in answers.items() for answer in row]
        if c.opr_score == "metric":
            scores = answer_scores(load_tasks([task])[task], [(i, answer.text) for i, answer in each])
        else:
            scores = [answer.logprob for _, answer in each if answer.logprob is not None]
        best: dict[int, tuple[float, Answer]] = {}
        for (i, answer), score in zip(each, scores, strict=True):
            if i not in best or score > best[i][0]:
                best[i] = score, answer
        rows = sorted(sorted(best, key=lambda i: -best[i][0])[:count])
        kept = [best[i] for i in rows]
        self.replayed[task] = {
            "rows": len(kept),
            "answers": len(each),
            "score": sum(score for score, _ in kept) / len(kept),
            "score_of_all": sum(scores) / len(scores),
            "gold": sum(texts[i][1] == best[i][1].text for i in rows) / len(rows),
            "unfinished": sum(not answer.finished for _, answer in kept) / len(kept),
        }
        data = self.text_dataset([(texts[i][0], best[i][1].text) for i in rows])
        return Dataset.from_list(
            [self._as_written(row, answer) for row, (_, answer) in zip(data.to_list(), kept, strict=True)]
        )

    def _as_written(self, row: dict[str, list[int]], answer: Answer) -> dict[str, list[int]]:
        """A row without the end that its answer did not reach."""
        ended = row["labels"][-1] == self.tokenizer.eos_token_id
        return row if answer.finished or not answer.text or not ended else {k: ids[:-1] for k, ids in row.items()}

    def record(self) -> dict[str, Any]:
        """What was kept of each earlier task."""
        rows = {task: kept["rows"] for task, kept in self.replayed.items()}
        return {"own_rows": self.own_rows, "replayed": rows, "answered": self.replayed}


if __name__ == "__main__":
    main(OPRTrainer, OPRConfig)
