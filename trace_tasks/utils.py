"""Data loading, demonstrations and scoring of the TRACE tasks, in the form that lm-eval's YAMLs refer to.

Scores are fractions of 1 per test row; the score of a task is their mean. The first metric of a task is its headline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from trace_bench import data
from trace_tasks import scoring
from trace_tasks.reasoning import as_tested


def load_dataset(folder: str, variant: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Loads one folder of the data set that TRACE_DATA names, as lm-eval's `custom_dataset`.

    Args:
        folder: The folder in the official layout, for example "C-STANCE".
        variant: "reasoning" for the rows that ask for the reasoning too (see `data.find_reasoning`); None = plain.
        **_: What lm-eval passes besides (the task's metadata); unused.

    Returns:
        The splits test and, where they are there, train and eval; and `fewshot`: the training rows whose prompt is no
        test prompt.

    Raises:
        data.DataError: if there are no test rows, a file is bad, or it holds rows of the other variant.
    """
    if variant not in (None, "reasoning"):
        raise ValueError(f"variant={variant!r} is not known: leave it out or use reasoning.")
    root = data.find_data() if variant is None else data.find_reasoning()
    there = [s for s in data.SPLITS if s == "test" or (root / folder / f"{s}.json").is_file()]
    splits = {split: data.read_split(root, folder, split, variant or "plain") for split in there}
    if variant == "reasoning":
        for rows in splits.values():
            for row in rows:
                row["prompt"] = as_tested(row["prompt"])
    tested = {row["prompt"] for row in splits["test"]}
    trained = splits.get("train", [])
    splits["fewshot"] = [row for row in trained if row["prompt"] not in tested] or trained
    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


def load_prompts(kind: str, folder: str, **_: Any) -> dict[str, Dataset]:
    """Loads a set of prompts to be judged, as lm-eval's `custom_dataset`.

    Args:
        kind: "instruct" or "safety" (see `data.prompts_file`).
        folder: The folder of the set, for example "LIMA".
        **_: What lm-eval passes besides (the task's metadata); unused.

    Returns:
        The split test.
    """
    return {"test": Dataset.from_list(data.read_rows(data.prompts_file(kind, folder), answered=False))}


class Demonstrations(ContextSampler):
    """Demonstrations for in-context learning by the paper's rules (section 4.1 and the official ICL code).

    One draw per task serves all test rows. Where answers repeat (classification) the draw is balanced over them;
    elsewhere no answer is taken twice. All of them together take half of the length budget, so each is at most
    1/(2n) of it; where too few rows are that short, the shortest ones are taken.

    A sampler knows no tokenizer: with plain lm-eval the budget is counted in UTF-8 bytes, at four a token of the
    official prompt limit of 1024 tokens. `trace-bench evaluate` counts tokens and the run's own limit (`count_in`).
    """

    budget = 4 * 1024
    _size: Callable[[str], int] = staticmethod(lambda text: len(text.encode()))
    _drawn: list[dict[str, Any]] | None = None

    def sample(
        self, n: int, eval_doc: dict[str, Any] | None = None, df: Any = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Returns the n demonstrations of the task, the same ones until the seed is set anew."""
        if self._drawn is None or len(self._drawn) != n:
            self._drawn = self._draw(n)
        return self._drawn

    def set_rnd(self, rnd: int | None) -> Demonstrations:
        """Sets the seed of the draw."""
        self._drawn = None
        super().set_rnd(rnd)
        return self

    def count_in(self, size: Callable[[str], int], budget: int) -> None:
        """Counts the length of a demonstration by `size`, and half of `budget` is for all of them."""
        self._size, self.budget, self._drawn = size, budget, None

    def _draw(self, n: int) -> list[dict[str, Any]]:
        rows = list(self.df)
        self.rnd.shuffle(rows)
        limit = self.budget / (2 * n)

        def size(row: dict[str, Any]) -> int:
            return self._size(row["prompt"] + row["answer"])

        # A stable sort keeps the shuffled order among the rows within the limit.
        rows.sort(key=lambda row: max(size(row), limit))
        by_answer: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_answer[row["answer"]].append(row)
        if len(by_answer) < n:
            drawn = [rank[answer] for rank in zip_ranks(by_answer) for answer in sorted(rank)][:n]
        else:
            drawn = [same[0] for same in by_answer.values()][:n]
        self.rnd.shuffle(drawn)
        return drawn


def zip_ranks(groups: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The first member of every group, then the second of every group that has one, and so on."""
    longest = max(len(g) for g in groups.values())
    return [{k: g[i] for k, g in groups.items() if i < len(g)} for i in range(longest)]


def score_choice(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """C-STANCE, FOMC: the official strict accuracy, and one that tolerates another form of the answer."""
    return {
        "accuracy": scoring.accuracy(results[0], doc["answer"]),
        "accuracy_tolerant": scoring.choice_tolerant(results[0], doc["answer"]),
    }


def score_number(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """NumGLUE: the official strict accuracy, and one that compares numbers as numbers."""
    return {
        "accuracy": scoring.accuracy(results[0], doc["answer"]),
        "accuracy_tolerant": scoring.number_tolerant(results[0], doc["answer"]),
    }


def score_summary(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """MeetingBank: ROUGE-L; BLEU-1 and BLEU-4 beside it."""
    return _overlap(results[0], doc["answer"])


def score_code(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Py150: edit similarity."""
    return {"similarity": scoring.similarity(results[0], doc["answer"])}


def score_scienceqa(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """ScienceQA: accuracy of the letter; ROUGE-L and BLEU of the explanation beside it."""
    letter, reasons = scoring.scienceqa_parts(results[0])
    gold_letter, gold_reasons = scoring.scienceqa_parts(doc["answer"])
    return {
        "accuracy": scoring.accuracy(letter, gold_letter),
        "accuracy_tolerant": scoring.choice_tolerant(results[0], gold_letter),
        **_overlap(reasons, gold_reasons),
    }


def score_simplification(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """20Minuten: SARI against the whole prompt, as the official code has it; ROUGE-L and BLEU beside it."""
    return {
        "sari": scoring.sari(doc["prompt"], results[0], doc["answer"]),
        **_overlap(results[0], doc["answer"]),
    }


def describe_answer(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Prompts to be judged: the length of the answer, and whether it is empty."""
    return {"characters": float(len(results[0])), "empty": float(not results[0].strip())}


def _overlap(prediction: str, reference: str) -> dict[str, float]:
    return {
        "rouge_l": scoring.rouge_l(prediction, reference),
        "bleu_1": scoring.bleu(prediction, reference, 1),
        "bleu_4": scoring.bleu(prediction, reference, 4),
    }


def score_reasoned_choice(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """C-STANCE, FOMC and ScienceQA with reasoning: `score_choice` of the extracted answer, a bare letter."""
    return _score_extracted("line", score_choice, doc, results[0])


def score_reasoned_number(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """NumGLUE with reasoning: `score_number` of the extracted answer."""
    return _score_extracted("line", score_number, doc, results[0])


def score_reasoned_summary(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """MeetingBank with reasoning: `score_summary` of the extracted answer."""
    return _score_extracted("summary", score_summary, doc, results[0])


def score_reasoned_code(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Py150 with reasoning: `score_code` of the extracted answer, which comes first here."""
    return _score_extracted("code", score_code, doc, results[0])


def score_reasoned_simplification(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """20Minuten with reasoning: `score_simplification` of the extracted answer, SARI against the row's own prompt."""
    return _score_extracted("text", score_simplification, doc, results[0])


def _score_extracted(
    form: str,
    score: Callable[[dict[str, str], list[str]], dict[str, float]],
    doc: dict[str, str],
    text: str,
) -> dict[str, float]:
    answer = scoring.extract_answer(form, text)
    scores = score(doc, [answer or ""])
    if answer is None:  # 0 throughout: SARI gives an empty text about a half
        scores = dict.fromkeys(scores, 0.0)
    return {**scores, "extracted": float(answer is not None)}
