"""Data loading, demonstrations and scoring of the TRACE tasks: the functions that the YAMLs name.

Each test row gets scores between 0 and 1; the score of a task is their mean. The first metric of a task is its
headline.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache, cached_property
from itertools import islice, zip_longest
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from trace_tasks import data, scoring
from trace_tasks.answers import choice_tolerant, extract_answer
from trace_tasks.own_rows import OwnRows
from trace_tasks.reasoning import as_tested
from trace_tasks.tokens import drops_first_space
from trace_tasks.written_numbers import number_tolerant

log = logging.getLogger(__name__)

#: The text of the official ICL code between the instruction and the demonstrations.
SENTENCE = "We will give you several examples and you should follow them to accomplish the task.\n Examples:\n"
#: Raise it with every change of prompts, draws or answers with demonstrations. Cells of two versions are never mixed.
ICL_VERSION = 2


def load_dataset(folder: str, trace_variant: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Loads one folder of the data set that TRACE_DATA names, as lm-eval's `custom_dataset`.

    The rows of the variant "reasoning" also ask for the reasoning. lm-eval also passes the metadata of the task and the
    arguments of the model, such as transformers' `variant`; they are not used.

    Returns:
        The splits test and, if they exist, train and eval; and `fewshot`: the training rows whose prompt is no test
        prompt.

    Raises:
        data.DataError: if there are no test rows, a file is bad, or it contains rows of the other variant.
    """
    if trace_variant not in (None, "reasoning"):
        raise ValueError(f"trace_variant={trace_variant!r} is not known: use reasoning, or leave it out.")
    root = data.find_data() if trace_variant is None else data.find_reasoning()
    there = [s for s in data.SPLITS if s == "test" or (root / folder / f"{s}.json").is_file()]
    splits = {split: data.read_split(root, folder, split, trace_variant or "plain") for split in there}
    if trace_variant:
        splits = {k: [{**row, "prompt": as_tested(row["prompt"])} for row in rows] for k, rows in splits.items()}
    return _with_fewshot(splits)


def _with_fewshot(splits: dict[str, list[dict[str, str]]]) -> dict[str, Dataset]:
    tested = {row["prompt"] for row in splits["test"]}
    trained = splits.get("train", [])
    splits = {**splits, "fewshot": [row for row in trained if row["prompt"] not in tested] or trained}
    return {name: Dataset.from_list(rows) for name, rows in splits.items()}


def load_cl_benchmark(folder: str, **_: Any) -> dict[str, Dataset]:
    """Loads a set of CL_Benchmark, as lm-eval's `custom_dataset`; returns the splits of `load_dataset`.

    Raises:
        data.DataError: if there are no test rows or options, or a file is bad.
    """
    return _with_fewshot(data.read_set(folder))


def load_prompts(kind: str, folder: str, **_: Any) -> dict[str, Dataset]:
    """Loads a set of prompts to be judged, as lm-eval's `custom_dataset`. Arguments as for `data.prompts_file`."""
    return {"test": Dataset.from_list(data.read_rows(data.prompts_file(kind, folder), answered=False))}


class TraceTask(OwnRows):
    """A task of lm-eval that follows the official ICL code in prompts, answers and scores if it has demonstrations.

    Without demonstrations it is lm-eval's own ConfigurableTask. With them, `metadata.icl` of the YAML has these keys:

    - instruction: The text with which every prompt begins. It is put in front once; demonstrations and question follow
      without it.
    - cue: A text before each demonstration and before the question (for Py150, whose prompts have no instruction).
    - demonstrations: false = none at all (MeetingBank).
    - until: Texts that end an answer, in addition to those of `generation_kwargs`. The answer is cut before them.
    - max_gen_toks: 1 = the answer is the first generated token.

    The whole prompt is one text, and one turn of the user in a chat template. A YAML without `metadata.icl` gets
    lm-eval's own prompts with whole rows as demonstrations.

    Source: inference/ICL.py and utils/data/data_collator.py of https://github.com/BeyonderXX/TRACE.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Like ConfigurableTask."""
        self.icl: dict[str, Any] = (config.get("metadata") or {}).get("icl", {})
        super().__init__(config)
        if isinstance(self.sampler, Demonstrations):
            self.sampler.task = self.task_name
            self.sampler.opening = self.icl["instruction"] + SENTENCE if "instruction" in self.icl else ""

    def fewshot_docs(self) -> Any:
        """The rows that demonstrations are drawn from, without the instruction."""
        rows = super().fewshot_docs()
        return [{**row, "prompt": self._bare(row["prompt"])} for row in rows] if self.icl else rows

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """The prompt of a row. See `ConfigurableTask.fewshot_context`."""
        if num_fewshot and self.icl:
            doc, num_fewshot = {**doc, "prompt": self._demonstrated(doc["prompt"], num_fewshot)}, 0
        return super().fewshot_context(doc, num_fewshot, *args, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Any:
        """The request of a row, with the texts that end its answer. See `ConfigurableTask.construct_requests`."""
        request = super().construct_requests(doc, ctx, **kwargs)
        if self.config.num_fewshot and self.icl:
            settings = request.args[1]  # a dictionary of this request alone
            given = settings.get("until") or []  # a single text, if it is from --gen_kwargs
            settings["until"] = [*([given] if isinstance(given, str) else given), *self.icl.get("until", [])]
            if "max_gen_toks" in self.icl:
                settings["max_gen_toks"] = self.icl["max_gen_toks"]
        return request

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in `OwnRows`. A tokenizer that cannot be loaded is an error now, not when all answers are there."""
        if self._spaced:
            log.info("%s: the space that vLLM puts in front of answers is not scored.", self.task_name)
        super().build_all_requests(**kwargs)

    def apply_filters(self) -> Any:
        """Takes the space away that vLLM puts in front of answers, so that logs do not have it either."""
        for request in self.instances if self._spaced else ():
            request.resps = [answer.removeprefix(" ") for answer in request.resps]
        return super().apply_filters()

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> Any:
        """The scores of a row. As in the official code, SARI's source is the whole prompt with its demonstrations."""
        if self.config.num_fewshot and self.icl:
            doc = {**doc, "prompt": self._demonstrated(doc["prompt"], self.config.num_fewshot)}
        return super().process_results(doc, results)

    @cached_property
    def _spaced(self) -> bool:
        """Whether answers have a space in front that the official code, which decodes them alone, does not see.

        That is so with `lm_eval --model vllm` and a SentencePiece tokenizer: vLLM decodes an answer with its prompt.
        """
        given = self.config.metadata or {}  # lm-eval adds the arguments of the model
        by_vllm = "lm_eval.models.vllm_causallms" in sys.modules and "pretrained" in given
        if not by_vllm or self.OUTPUT_TYPE != "generate_until":
            return False
        name, its = ("tokenizer", "tokenizer_revision") if given.get("tokenizer") else ("pretrained", "revision")
        return _drops_first_space(given[name], given.get(its) or "main", given.get("trust_remote_code", False))

    def _bare(self, prompt: str) -> str:
        return prompt.removeprefix(self.icl.get("instruction", ""))

    def _demonstrated(self, prompt: str, n: int) -> str:
        if not self.icl.get("demonstrations", True):
            return prompt
        cue = self.icl.get("cue", "")
        shots = [cue + d["prompt"] + d["answer"] + self.config.fewshot_delimiter for d in self.sampler.sample(n)]
        return "".join([self.sampler.opening, *shots, cue, self._bare(prompt)])


@cache
def _drops_first_space(name: str, revision: str, trust_remote_code: bool) -> bool:
    """`drops_first_space` of a tokenizer, which is loaded once for all tasks."""
    from transformers import AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return drops_first_space(AutoTokenizer.from_pretrained(name, **options))


class Demonstrations(ContextSampler):
    """Demonstrations for in-context learning by the paper's rules (section 4.1 and the official ICL code).

    All test rows of a task get the same demonstrations. If there are fewer different answers than demonstrations
    (classification), the draw is balanced over the answers; otherwise no answer is drawn twice. Subtract the
    instruction from the length budget: each of n demonstrations may take 1/(2n) of the rest. If too few rows are that
    short, there are fewer than n.

    A sampler knows no tokenizer. With plain lm-eval the budget is therefore in UTF-8 bytes: four for each of the 3584
    tokens of the official prompt limit. `trace-bench evaluate` counts tokens and takes the run's limit (`count_in`).
    """

    budget = 4 * 3584
    #: The name of the task, and the text before the demonstrations in its prompts. `TraceTask` sets both.
    task = opening = ""
    _size: Callable[[str], int] = staticmethod(lambda text: len(text.encode()))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Like lm-eval's ContextSampler."""
        super().__init__(*args, **kwargs)
        self._drawn: dict[int, list[dict[str, Any]]] = {}

    def sample(
        self, n: int, eval_doc: dict[str, Any] | None = None, df: Any = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Returns the n demonstrations of the task: the same ones until the seed is set again."""
        if n not in self._drawn:
            self._drawn[n] = self._draw(n)
        return self._drawn[n]

    def set_rnd(self, rnd: int | None) -> Demonstrations:
        """Sets the seed of the draw."""
        self._drawn = {}
        super().set_rnd(rnd)
        return self

    def count_in(self, size: Callable[[str], int], budget: int) -> None:
        """Sets the function that measures a demonstration, and the budget in its unit."""
        self._size, self.budget, self._drawn = size, budget, {}

    def _draw(self, n: int) -> list[dict[str, Any]]:
        rows = list(self.df)
        if not rows:
            raise data.DataError(f"{self.task}: demonstrations need training rows, and there are none. Add train.json.")
        self.rnd.shuffle(rows)
        limit = (self.budget - self._size(self.opening)) / (2 * n)
        by_answer: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if self._size(row["prompt"]) + self._size(row["answer"]) <= limit:
                by_answer[row["answer"]].append(row)
        answers = len({row["answer"] for row in rows})
        if answers < n:
            # First one row of every answer, then a second row of every answer that has one, and so on.
            ranks = zip_longest(*(by_answer[answer] for answer in sorted(by_answer)))
            drawn = [row for rank in islice(ranks, math.ceil(n / answers)) for row in rank if row is not None][:n]
        else:
            drawn = [same[0] for same in by_answer.values()][:n]
        if len(drawn) < n:
            log.warning(
                "%s has only %d of %d demonstrations: with its answer, no other training row is at most %.0f long. "
                "Raise the limit of a prompt, or ask for fewer demonstrations.",
                self.task,
                len(drawn),
                n,
                limit,
            )
        self.rnd.shuffle(drawn)
        return drawn


def score_choice(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """C-STANCE, FOMC: the official strict accuracy, and one that accepts other forms of the answer."""
    return {
        "accuracy": scoring.accuracy(results[0], doc["answer"]),
        "accuracy_tolerant": choice_tolerant(results[0], doc["answer"], doc["prompt"]),
    }


def score_number(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """NumGLUE: the official strict accuracy, and one that compares numbers as numbers."""
    return {
        "accuracy": scoring.accuracy(results[0], doc["answer"]),
        "accuracy_tolerant": number_tolerant(results[0], doc["answer"]),
    }


def score_label(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """CL_Benchmark: O-LoRA's exact match, and one that accepts other forms of the answer."""
    strict = scoring.label_accuracy(results[0], doc["answer"])
    tolerant = choice_tolerant(results[0], doc["answer"], doc["prompt"])
    return {"accuracy": strict, "accuracy_tolerant": max(strict, tolerant)}


def score_summary(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """MeetingBank: ROUGE-L; in addition BLEU-1 and BLEU-4."""
    return _overlap(results[0], doc["answer"])


def score_code(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Py150: edit similarity."""
    return {"similarity": scoring.similarity(results[0], doc["answer"])}


def score_scienceqa(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """ScienceQA: accuracy of the letter; in addition ROUGE-L and BLEU of the explanation."""
    letter, reasons = scoring.scienceqa_parts(results[0])
    gold_letter, gold_reasons = scoring.scienceqa_parts(doc["answer"])
    return {
        "accuracy": scoring.accuracy(letter, gold_letter),
        "accuracy_tolerant": choice_tolerant(results[0], gold_letter, doc["prompt"]),
        **_overlap(reasons, gold_reasons),
    }


def score_simplification(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """20Minuten: SARI with the whole prompt as the source, as in the official code; in addition ROUGE-L and BLEU."""
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
    """C-STANCE, FOMC and ScienceQA with reasoning: `score_choice` of the extracted answer, a letter alone."""
    return _score_extracted("line", score_choice, doc, results[0])


def score_reasoned_number(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """NumGLUE with reasoning: `score_number` of the extracted answer."""
    return _score_extracted("line", score_number, doc, results[0])


def score_reasoned_summary(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """MeetingBank with reasoning: `score_summary` of the extracted answer."""
    return _score_extracted("summary", score_summary, doc, results[0])


def score_reasoned_code(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Py150 with reasoning: `score_code` of the extracted answer, which comes before the reasoning."""
    return _score_extracted("code", score_code, doc, results[0])


def score_reasoned_simplification(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """20Minuten with reasoning: `score_simplification` of the extracted answer; SARI's source is the row's prompt."""
    return _score_extracted("text", score_simplification, doc, results[0])


def _score_extracted(
    form: str,
    score: Callable[[dict[str, str], list[str]], dict[str, float]],
    doc: dict[str, str],
    text: str,
) -> dict[str, float]:
    answer = extract_answer(form, text)
    scores = score(doc, [answer or ""])
    if answer is None:  # all scores are 0, even SARI, which is about a half for an empty text
        scores = dict.fromkeys(scores, 0.0)
    return {**scores, "extracted": float(answer is not None)}
