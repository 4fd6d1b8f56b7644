"""The answers in a run's page: how long they are, and those that its browser of samples shows."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from trace_bench import judgements
from trace_bench.report.results import Results
from trace_bench.report.tables import PERCENT, Block, Table, Unit, length, stage_label
from trace_bench.run import read_jsonl
from trace_tasks.data import JUDGED, SUITES, task_name

#: Size of the samples in the page. Those that changed most come first, so what is left out changed least.
SAMPLE_BYTES = 2_500_000
#: Characters that are kept of a text.
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 1200, 800
#: With more stages than these only the base model's answer, that of the own stage and the last one are in the page.
SAMPLE_STAGES = 16


class Answer(NamedTuple):
    """What a stage answered to a prompt, cut to what a page can hold."""

    text: str
    score: float | None
    verdict: str | None
    """The judges' verdict against the base model's answer: win, tie or lose."""


@dataclass
class Prompt:
    """A prompt of a task, suite or set with the answers of the stages."""

    name: str
    prompt: str
    target: str
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass
class Answers:
    """What the stages answered to the prompts of a task, suite or set."""

    name: str
    unit: Unit
    """Of its headline score."""
    own: int
    """The task's own stage; 0 if it has none."""
    prompts: dict[Any, Prompt] = field(default_factory=dict)
    lengths: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Stage -> mean characters of an answer, share of empty ones; of answers that are texts."""
    prompt_length: float | None = None
    """Mean characters of a prompt."""

    @property
    def scores(self) -> set[float]:
        """The scores of single answers."""
        return {a.score for prompt in self.prompts.values() for a in prompt.answers.values() if a.score is not None}

    @property
    def is_binary(self) -> bool:
        """Whether an answer is right or wrong, with nothing between."""
        return self.unit.is_percent and self.scores <= {0.0, 1.0}

    @cached_property
    def enough(self) -> float:
        """The largest change of a score that is none: a tenth of the scale, or where that is unknown of the scores."""
        return 0.0 if self.is_binary else 0.1 * abs(float(np.subtract(*self.unit.ends(list(self.scores)))))

    def add(self, index: int, samples: list[dict[str, Any]], metric: str | None, verdicts: dict[Any, str]) -> None:
        """Adds the samples of a stage."""
        texts = [row["response"] for row in samples if isinstance(row.get("response"), str)]
        if texts and len(texts) == len(samples):
            empty = sum(not text.strip() for text in texts)
            self.lengths[index] = sum(map(len, texts)) / len(texts), empty / len(texts)
        prompts = [len(row["prompt"]) for row in samples if isinstance(row.get("prompt"), str)]
        if prompts and self.prompt_length is None:
            self.prompt_length = sum(prompts) / len(prompts)
        for row in samples:
            subtask, doc_id = row.get("task", ""), row["doc_id"]
            text = _cut(row.get("prompt", ""), PROMPT_CHARACTERS)
            new = Prompt(f"{subtask} {doc_id}".strip(), text, _choice(row, "target"))
            prompt = self.prompts.setdefault((subtask, doc_id), new)
            if prompt.prompt == text:  # else it was made from other data: no answer to the same prompt
                score = row.get(metric) if metric else None
                number = round(float(score), 4) if isinstance(score, int | float) and math.isfinite(score) else None
                prompt.answers[index] = Answer(_choice(row, "response"), number, verdicts.get(doc_id))


def _choice(sample: dict[str, Any], key: str) -> str:
    """An answer or a target as text; of a multiple-choice question the chosen text."""
    value, choices = sample.get(key, ""), sample.get("choices")
    if isinstance(value, int) and isinstance(choices, list) and 0 <= value < len(choices):
        value = choices[value]
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return _cut(value, ANSWER_CHARACTERS)


def _cut(text: Any, most: int) -> str:
    """A text as UTF-8 can hold it, with its middle left out where it is long."""
    text = str(text).encode("utf-8", "replace").decode("utf-8")
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]} […{len(text) - head - tail} characters left out…] {text[-tail:]}"


def read_answers(results: Results) -> list[Answers]:
    """The samples of all cells."""
    run, found = results.run, []
    own = {stage.task: stage.index for stage in run.stages if stage.task}
    for name in dict.fromkeys([*run.tasks, *SUITES, *JUDGED]):
        answers = Answers(name, results.units.get(name, PERCENT), own.get(name, 0))
        metric = None if name in JUDGED else results.headlines.get(name)
        for stage in run.stages:
            file = stage.samples_file(name)
            if (stage.index, name) in results.cells and file.exists():
                left_out = run.left_out.get(name, ())
                samples = [row for row in read_jsonl(file) if row["doc_id"] not in left_out]
                current = stage.index and any((stage.index, name) in judged for judged in results.judged.values())
                answers.add(stage.index, samples, metric, judgements.verdicts(stage, name) if current else {})
        if answers.prompts:
            found.append(answers)
    return found


def lengths(results: Results, answers: Sequence[Answers]) -> list[Block]:
    """How long prompts and answers are."""
    measured = [a for a in answers if a.lengths]
    if not measured:
        return []
    stages = [s for s in results.run.stages if any(s.index in a.lengths for a in measured)]
    rows = []
    for a in measured:
        texts = (length(*a.lengths.get(s.index, (None, None))) for s in stages)
        rows.append([task_name(a.name), length(a.prompt_length, None), *texts])
    return [
        "## Lengths\n\nMean characters of prompts and of answers. In brackets: percent of empty answers, if there are "
        "any.",
        Table(["", "prompt", *(f"{s.number}<br>{stage_label(s)}" for s in stages)], rows),
    ]


# ------------------------------------------------------------------------------------------------- samples in the page


class Samples(NamedTuple):
    """The samples of the page: JSON, escaped for a script element, and what of them is there, in words."""

    json: Markup
    notes: str


def embed(results: Results, answers: Sequence[Answers]) -> Samples | None:
    """As many samples as the page may hold, those that changed most first; None if there are none."""
    stages = results.run.stages
    few = len(stages) > SAMPLE_STAGES
    queue: list[tuple[int, int, int, str]] = []
    for number, a in enumerate(answers):
        ranks: Counter[int] = Counter()
        for prompt in a.prompts.values():
            kept = {0, a.own, max(prompt.answers)} if few else prompt.answers.keys()
            shown = {i: answer for i, answer in prompt.answers.items() if i in kept}
            rank = _rank(shown, a.own, a.unit.sign, a.enough)
            ranks[rank] += 1
            texts = list(dict.fromkeys(answer.text for answer in shown.values()))
            of_stages = [[i, texts.index(a.text), a.score, a.verdict] for i, a in shown.items()]
            packed = _escaped_json([number, prompt.name, prompt.prompt, prompt.target, texts, of_stages])
            queue.append((rank, ranks[rank], number, packed))
    queue.sort(key=lambda item: item[:3])  # of the same rank a sample of each task in turn
    sizes = np.cumsum([len(text.encode("utf-8")) for *_, text in queue])
    rows = [text for (*_, text), size in zip(queue, sizes, strict=True) if size <= SAMPLE_BYTES]
    head = {
        "tasks": [task_name(a.name) for a in answers],
        "binary": [a.is_binary and bool(a.scores) for a in answers],
        # By which a score is multiplied to be shown, the sign of a gain, and the unit of a gain.
        "names": [a.name for a in answers],
        # The largest fall of a score that loses no row: see `transitions.GRADED`.
        "enough": [a.enough for a in answers],
        "units": [[a.unit.factor, a.unit.sign, a.unit.of_changes] for a in answers],
        "own": [a.own if results.is_sequential else 0 for a in answers],
        "stages": [f"{s.number} {stage_label(s)}" for s in stages],
    }
    joined = _escaped_json(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}"
    notes = f"{len(rows):,} of {len(queue):,} prompts are in this page."
    if len(rows) < len(queue):
        notes += " They are those whose answers changed most; all are in the run's folder."
    if few:
        notes += " Each prompt has the answers of the base model, of the task's own stage and of the last stage."
    notes += f" Prompts are cut to {PROMPT_CHARACTERS} characters and answers to {ANSWER_CHARACTERS}, their middle"
    return Samples(Markup(joined), f"{notes} left out.") if queue else None


def _rank(found: dict[int, Answer], own: int, sign: int, enough: float) -> int:
    """0 = got worse since the base model or the own stage, 1 = better, 2 = another answer, 3 = the same."""
    last = max(found)
    answer = found[last]
    earlier = [found[i] for i in (0, own) if i in found and i != last]
    gains = [sign * (answer.score - a.score) for a in earlier if answer.score is not None and a.score is not None]
    if answer.verdict == "lose" or any(gain < -enough for gain in gains):
        return 0
    if answer.verdict == "win" or any(gain > enough for gain in gains):
        return 1
    return 2 if any(a.text != answer.text for a in earlier) else 3


def _escaped_json(value: Any) -> str:
    """JSON within a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", text)
