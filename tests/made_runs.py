"""Run directories written by hand, for the tests of what reads them: results, reports, comparisons."""

import numpy as np

from trace_bench.run import Run, write_json, write_jsonl

TASKS = ["trace_cstance", "trace_fomc", "trace_meetingbank"]
NAN = float("nan")
# The base model and three stages; scores above the diagonal are not measured. A true 0 is in it.
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
    """A run with these scores; those of `rows` (task -> metric -> shape (rows, stages)) come with samples."""
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
            write_json(
                stage.train_file,
                {
                    "checkpoint": f"weights {stage.index}",
                    "rows": 10,
                    "steps": 5,
                    "tokens": 1000,
                    "seconds": 2.0,
                    "tokens_per_second": 500.0,
                    "peak_memory_bytes": 2**30,
                    "memory_of": "process",
                },
            )
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
    """A cell with its samples: metric -> score of each row; the first metric is the headline."""
    n = len(next(iter(columns.values())))
    write_jsonl(
        stage.samples_file(task),
        (
            {
                **({"task": subtasks[i]} if subtasks else {}),
                "doc_id": i,
                "response": 'a text with "accuracy": 1.0 in it',
                **{m: float(x[i]) for m, x in columns.items()},
            }
            for i in range(n)
        ),
    )
    scores = {m: {"value": float(np.mean(x)), "stderr": None} for m, x in columns.items()}
    content = {"headline": next(iter(columns)), "metrics": scores, "n": n, **changes}
    write_json(stage.eval_file(task), cell(stage, task, 0.0) | content)


def make_bounds(make, **options):
    """A run of each method that bounds another, with options for all of them."""
    config = options.pop("config", {})
    return {
        "single": make(SINGLE, name="a-single", method="single", config=config, **options),
        "joint": make(JOINT, name="a-joint", method="joint", stages=["joint"], config=config, **options),
        "icl": make(ICL, name="an-icl", method="icl", stages=[], config={"num_fewshot": 6, **config}, **options),
    }
