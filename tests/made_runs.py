"""Writes run directories by hand, for the tests of results, reports and comparisons."""

import numpy as np

from trace_bench.judgements import KINDS, direct_rate, judge_file, rates, sample_fingerprints, tally
from trace_bench.run import Run
from trace_tasks.data import GROUPS, ORDERS
from trace_tasks.data.files import write_json, write_jsonl

TASKS = ["trace_cstance", "trace_fomc", "trace_meetingbank"]
NAN = float("nan")
# The base model and three stages. Scores above the diagonal are not measured. One score is a true 0.
R = np.array([[0.1, 0.2, 0.3], [0.8, NAN, NAN], [0.6, 0.9, NAN], [0.7, 0.0, 0.5]])
SINGLE = np.array([[0.1, 0.2, 0.3], [0.9, NAN, NAN], [NAN, 0.8, NAN], [NAN, NAN, 0.7]])
JOINT = np.array([[0.1, 0.2, 0.3], [0.6, 0.6, 0.9]])
ICL = np.array([[0.3, 0.4, 0.5]])
SETTINGS = {"backend": "hf"}


def without(*cells):
    matrix = R.copy()
    for cell in cells:
        matrix[cell] = NAN
    return matrix


def make_run(
    folder, matrix=R, demo=False, config=None, checkpoints=None, name="mine", metric=None, rows=None, **manifest
):
    """Writes a run with the scores of `matrix`, or of `rows` with samples: task -> metric -> shape (rows, stages)."""
    run = Run.create(
        folder / name,
        {
            "method": "external" if checkpoints else "sequential",
            **({"checkpoints": checkpoints} if checkpoints else {"trains": "lora"}),
            "model": {"name": "a/model", "revision": "main"},
            "tasks": TASKS,
            "task_versions": dict.fromkeys(TASKS, 1),
            "data": {"path": "somewhere", "demo": demo, "fingerprint": dict.fromkeys(TASKS, "f00")},
            "config": config or {},
            "seed": 1,
            **manifest,
        },
    )
    for stage in run.stages:
        if stage.index and not checkpoints:
            write_json(stage.train_file, _trained(stage))
        for i, task in enumerate(run.tasks):
            if rows is None and not np.isnan(matrix[stage.index, i]):
                content = cell(stage, task, float(matrix[stage.index, i]))
                content["metrics"] |= metric or {}
                write_json(stage.eval_file(task), content)
    for task, scores in (rows or {}).items():
        for stage in run.stages:
            columns = {m: x[:, stage.index] for m, x in scores.items()}
            if not any(np.isnan(x).any() for x in columns.values()):
                write_cell(stage, task, columns)
    return run


def cell(stage, task, value, checkpoint=None, **changes):
    headline = "rouge_l" if task == "trace_meetingbank" else "accuracy"
    scores = {headline: {"value": value, "stderr": 0.01}}
    if headline == "accuracy":
        scores["accuracy_tolerant"] = {"value": (1 + value) / 2, "stderr": None}
    return {
        "stage": stage.name,
        "task": task,
        "n": 100,
        "headline": headline,
        "metrics": scores,
        "checkpoint": checkpoint or (f"weights {stage.index}" if stage.index else None),
        "settings": SETTINGS,
        "seconds": 1.5,
        **changes,
    }


def write_cell(stage, task, columns, subtasks=None, **changes):
    """Writes a cell with its samples. `columns` is metric -> score of each row; the first metric is the headline."""
    headline, n = next(iter(columns)), len(next(iter(columns.values())))
    rows = [{"doc_id": i, "response": 'a text with "accuracy": 1.0 in it'} for i in range(n)]
    for i, row in enumerate(rows):
        row |= {"task": subtasks[i]} if subtasks else {}
        row |= {m: float(x[i]) for m, x in columns.items()}
    write_jsonl(stage.samples_file(task), rows)
    scores = {m: {"value": float(np.mean(x)), "stderr": None} for m, x in columns.items()}
    write_json(stage.eval_file(task), cell(stage, task, 0.0, headline=headline, metrics=scores, n=n) | changes)


def make_bounds(make, **options):
    """Writes one run of each method that serves as a bound, with the same options for all."""
    config = options.pop("config", {})
    return {
        "single": make(SINGLE, name="a-single", method="single", config=config, **options),
        "joint": make(JOINT, name="a-joint", method="joint", stages=["joint"], config=config, **options),
        "icl": make(ICL, name="an-icl", method="icl", stages=[], config={"num_fewshot": 6, **config}, **options),
    }


# ----------------------------------------------------------------------------------------- a run that has everything

EIGHT = ORDERS["order1"]
#: Task with a graded score -> its headline.
_GRADED = {"trace_meetingbank": "rouge_l", "trace_py150": "similarity", "trace_20minuten": "sari"}


def make_rich_run(make, tasks=tuple(EIGHT), n=40, seed=0, **manifest):
    """Writes a run with samples of all cells, general suites, judged sets and losses, from seeded random numbers.

    Each task is learned in its own stage and forgotten a little more in each later stage. For tasks with an accuracy,
    half of the loss is only form: the right letter in a sentence.
    """
    rng, tasks = np.random.default_rng(seed), list(tasks)
    run = make(np.full((len(tasks) + 1, len(tasks)), NAN), tasks=tasks, **manifest)
    for stage in run.stages:
        if stage.index:
            steps = 20 + 2 * stage.index
            losses = [{"step": k, "loss": 3.2 * 0.88**k + 0.3 + 0.1 * rng.random()} for k in range(1, steps + 1)]
            numbers = {"steps": steps, "tokens": 1500 * steps, "seconds": 2.5 * steps, "losses": losses}
            write_json(stage.train_file, {**_trained(stage), "rows": 8 * steps, **numbers})
        for i, task in enumerate(tasks):
            own = i + 1
            if stage.index in range(1, own):
                continue
            chance = 0.1 if stage.index == 0 else max(0.15, 0.92 - (0.25 + 0.2 * (i % 3)) * (stage.index - own) ** 0.7)
            _write_answers(rng, stage, task, chance, n)
        for number, suite in enumerate(GROUPS["general"]):
            if stage.index in (0, len(tasks) // 2, len(tasks)):
                scores = (rng.random(60) < 0.66 - 0.08 * number - 0.015 * stage.index).astype(float)
                changes = {"n_cut": 3 if number == 1 else 0, "version": 1}
                settings = {"general_rows": 60, "data": "hub"}
                write_cell(stage, suite, {"acc": scores}, **changes, settings=settings)
    for kind, suite in zip(KINDS, ("instruct_lima", "safety_cona"), strict=True):
        for stage in run.stages:
            _write_answers(rng, stage, suite, 1 - 0.07 * stage.index, 20)
            results = rng.choice(["win", "tie", "lose"], size=20, p=_won(stage.index))
            rows = [verdict_row(k, str(result), kind.words[k % 2]) for k, result in enumerate(results)]
            write_jsonl(judge_file(stage, suite).with_suffix(".jsonl"), rows)
            numbers = {
                "suite": suite,
                "settings": {"judge": "a/judge", "revision": None, "sampling": {"temperature": 0}, "prompts": 1},
                "samples": sample_fingerprints(run.stages[0], stage, suite),
                "direct": direct_rate(kind, (row["direct"] for row in rows)),
                "limit": None,
                **{"failed": 0, "forced": 0, "unpaired": 0},
                **{"requests": 60, "prompt_tokens": 9000, "completion_tokens": 60},
            }
            pairs = {"pairs": {**tally(rows), **rates(tally(rows))}} if stage.index else {}
            write_json(judge_file(stage, suite), numbers | pairs)
    return run


def verdict_row(doc_id, result, word):
    """A line of a judge's verdicts: for a pair in both orders, and for the answer alone."""
    verdicts = {"win": ["A", "B"], "tie": ["C", "C"], "lose": ["B", "A"]}[result]
    same = {"disagree": False, "identical": False}
    return {"doc_id": doc_id, "direct": word, "combined": result, "verdicts": verdicts, **same}


def _won(index):
    lose = min(0.75, 0.15 + 0.08 * index)
    return [0.2 - 0.02 * index, 0.8 + 0.02 * index - lose, lose]


def _write_answers(rng, stage, task, chance, n):
    """Writes the samples and the score of a cell: graded answers, letters, or answers for a judge."""
    judged = task.startswith(("instruct_", "safety_"))
    rows = []
    for k in range(n):
        right = rng.random() < chance
        target = "ABC"[k % 3] if task not in _GRADED else f"The council approved item {k} and closed the meeting."
        prompt = f"{task}, question {k}: which of the three statements fits the text below?\nText {k}: " + "word " * 30
        row = {"doc_id": k, "prompt": prompt, "target": target}
        if judged:
            response = f"Answer {k} at stage {stage.index}. " + "It goes on. " * int(30 * chance) if right else ""
            scores = {"characters": float(len(response)), "empty": float(not response)}
        elif task in _GRADED:
            response = target if right else f"Council {k}, " + "and so on " * int(rng.integers(1, 6))
            scores = {_GRADED[task]: 1.0 if right else float(0.1 + 0.3 * rng.random())}
        else:
            known = right or rng.random() < 0.5
            letter = target if known else "ABC"["ABC".index(target) - 1]
            response = letter if right else f"The answer is {letter}, because of the text."
            scores = {"accuracy": float(right), "accuracy_tolerant": float(known)}
        rows.append({**row, "response": response, **scores})
    write_jsonl(stage.samples_file(task), rows)
    metrics = {m: {"value": float(np.mean([r[m] for r in rows])), "stderr": None} for m in scores}
    settings = {"test_rows": None} if judged else SETTINGS
    content = {"headline": next(iter(scores)), "metrics": metrics, "n": n, "settings": settings, "version": 1}
    write_json(stage.eval_file(task), cell(stage, task, 0.0) | content)


def _trained(stage):
    numbers = {"rows": 10, "steps": 5, "tokens": 1000, "seconds": 2.0, "tokens_per_second": 500.0}
    return {"checkpoint": f"weights {stage.index}", **numbers, "peak_memory_bytes": 2**30, "memory_of": "process"}
