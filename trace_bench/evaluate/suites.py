"""General-ability suites: one cell for a group of lm-eval tasks, its value being lm-eval's own aggregate."""

from __future__ import annotations

import logging
import math
from typing import Any

from trace_bench.evaluate.tasks import answer_tokens, run_tasks, scale_of
from trace_bench.metrics import standard_error

log = logging.getLogger(__name__)


def run_suite(lm: Any, group: Any, rows: int | None) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """The scores, samples and seconds of a suite, lm-eval's `group` of tasks, on at least so many of its rows."""
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    limit = None if rows is None else math.ceil(rows / len(tasks))  # lm-eval's is that of each subtask
    results, seconds = run_tasks(lm, [group], max_prompt_length=None, limit=limit)
    subtasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for name, task in tasks.items():
        docs: dict[int, list[dict[str, Any]]] = {}  # lm-eval has a row for each document and filter
        for row in results["samples"][name]:
            docs.setdefault(row["doc_id"], []).append(row)
        own = [_sample(name, task, docs[i]) for i in sorted(docs)]
        samples += own
        subtasks[name] = {
            "version": task.VERSION,
            "n": len(own),
            "n_cut": _cut_prompts(lm, task),
            "metrics": {
                _metric_name(key): {"value": value, "stderr": standard_error([r[_metric_name(key)] for r in own])}
                for key, value in results["results"][name].items()
                if "," in key and "_stderr" not in key
            },
        }
    metrics = _aggregates(group, results["results"][group.name], subtasks)
    higher = next(iter(tasks.values())).higher_is_better()
    scores = {
        "version": group.version,
        "n": len(samples),
        "n_cut": sum(s["n_cut"] for s in subtasks.values()),
        "headline": next(iter(metrics)),
        "metrics": metrics,
        "higher_is_better": {name: higher.get(name.partition(",")[0]) for name in metrics},
        "scale": {name: scale_of(None, [row.get(name) for row in samples]) for name in metrics},
        "subtasks": subtasks,
    }
    return scores, samples, seconds


def _aggregates(group: Any, values: dict[str, Any], subtasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of a suite: lm-eval's weighted means, with the standard errors of means of independent means."""
    metrics: dict[str, dict[str, Any]] = {}
    for aggregate in group.aggregate_metric_list:
        weights = [s["n"] if aggregate.weight_by_size else 1 for s in subtasks.values()]
        for kind in aggregate.filter_list:
            name = _metric_name(key := f"{aggregate.metric},{kind}")
            errors = [s["metrics"][name]["stderr"] for s in subtasks.values()]
            stderr = None
            if None not in errors:
                stderr = sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True)) ** 0.5 / sum(weights)
            metrics[name] = {"value": values[key], "stderr": stderr}
    return metrics


def _metric_name(key: str) -> str:
    """lm-eval's "metric,filter"; without the filter if it is the only one, which is called none."""
    return key.removesuffix(",none")


def _sample(name: str, task: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of a suite's samples from the rows of a document."""
    row = rows[0]
    sample = {"task": name, "doc_id": row["doc_id"], "prompt": row["arguments"][0][0]}
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [response[0] for response in row["filtered_resps"]]
        sample |= {
            "choices": [arguments[1] for arguments in row["arguments"]],
            "loglikelihoods": likelihoods,
            "target": int(row["target"]),
            "response": likelihoods.index(max(likelihoods)),
        }
    else:
        sample |= {"target": row["target"], "response": row["resps"][0][0]}  # as generated: filters see parts of it
    return sample | {_metric_name(f"{m},{row['filter']}"): row[m] for row in rows for m in row["metrics"]}


def _cut_prompts(lm: Any, task: Any) -> int:
    """How many documents of a task had a prompt longer than the engine's context, so that lm-eval cut its beginning."""
    room = lm.max_length - answer_tokens(task)
    cut = set()
    for instance in task.instances:
        text = "".join(a for a in instance.args if isinstance(a, str))
        # A token is at least a byte, so most texts need not be tokenized.
        if len(text.encode()) > room and len(lm.tok_encode(text)) > room:
            cut.add(instance.doc_id)
    if cut:
        log.warning(
            "%s: %d prompts are longer than the engine's context (%d tokens with the answer). Examples were removed "
            "first, then text on the left. For more room: --engine-args '{\"max_model_len\": N}'.",
            task.task_name,
            len(cut),
            lm.max_length,
        )
    return len(cut)
