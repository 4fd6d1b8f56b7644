"""The log-likelihood of the reference answers: a further metric of the matrix, for which nothing is generated.

It is the mean over the rows of nats per token. The tokens are those of training, including EOS, so it is minus the
training loss on the test rows.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from trace_bench.evaluate.plan import Plan
from trace_bench.measures.likelihood import LIKELIHOOD
from trace_bench.metrics import standard_error
from trace_bench.records import check_samples
from trace_bench.run import RunError, Stage, read_jsonl
from trace_bench.tasks import target_text
from trace_tasks.data.files import fingerprint, write_json, write_jsonl

log = logging.getLogger(__name__)


def with_likelihood(
    lm: Any, task: Any, max_answer: int | None, cell: dict[str, Any], samples: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Adds likelihoods to a cell and its samples. The engine holds the weights, and the task's prompts are built.

    Each row gets its nats per token and the number of tokens; the cell gets their mean and the seconds. A row whose
    reference is no text, or does not fit into the context, has no likelihood, and then the cell has none either.
    """
    began = time.perf_counter()
    asked = {instance.doc_id: (instance.args[0], _answer(task, instance.doc)) for instance in task.instances}
    known = [(i, *asked[row["doc_id"]]) for i, row in enumerate(samples)]
    known = [(i, prompt, answer) for i, prompt, answer in known if answer is not None]
    found = lm.log_likelihoods([p for _, p, _ in known], [a for *_, a in known], max_answer)
    read = {i: (nats / n, n) for (i, *_), (nats, n) in zip(known, found, strict=True) if not math.isnan(nats)}
    rows = []
    for i, row in enumerate(samples):
        value, tokens = read.get(i, (None, None))
        rows.append({**row, LIKELIHOOD: value, "target_tokens": tokens})
    values = [value for value, _ in read.values()]
    if lacking := len(rows) - len(values):
        log.warning(
            "%s has no likelihood: %d of %d reference answers are not text, or do not fit into the engine's context of "
            "%d tokens after their prompts. In --engine-args, raise max_model_len (vllm) or max_length (hf), and add "
            "--likelihood.",
            *(task.task_name, lacking, len(rows), lm.max_length),
        )
    mean = None if lacking else sum(values) / len(values)
    score = {"value": mean, "stderr": None if lacking else standard_error(values)}
    taken = {"seconds": round(time.perf_counter() - began, 3), "max_answer_length": max_answer}
    further = {"metrics": score, "higher_is_better": True, "scale": None}
    return {
        **cell,
        **{key: {**cell.get(key, {}), LIKELIHOOD: value} for key, value in further.items()},
        "likelihood": taken,
    }, rows


def reference_of(lm: Any, tasks: dict[str, Any], max_answer: int | None, request: Any) -> tuple[int, ...]:
    """The token ids of the reference answer to a request (`SwapLM.reference`), cut to `max_answer` tokens.

    Empty if its task is not among `tasks`, or its reference is no text.
    """
    task = tasks.get(request.task_name)
    answer = None if task is None else _answer(task, request.doc)
    return () if answer is None else lm.reference_ids(request.args[0], answer, max_answer)


def _answer(task: Any, doc: dict[str, Any]) -> str | None:
    """The reference answer as it would be trained; None where there is no text."""
    try:
        return target_text(task, doc)
    except ValueError:
        return None


def add_likelihood(plan: Plan, task: Any, lm: Any, stage: Stage, name: str, made: dict[str, Any]) -> None:
    """Adds the likelihoods to a cell that was made without them; nothing is generated again.

    The cell is first written without the fingerprint of its samples, then the samples, then the cell again. A program
    that is killed in between leaves the old scores, which fit both versions of the samples.
    """
    settings, samples = plan.settings[name], read_jsonl(stage.samples_file(name))
    check_samples(stage, name, [row["doc_id"] for row in samples])
    lm.max_prompt_length = settings["max_prompt_length"]
    task.build_all_requests(
        limit=settings["test_rows"],
        rank=0,
        world_size=1,
        apply_chat_template=settings["chat_template"],
        chat_template=lm.apply_chat_template if settings["chat_template"] else None,
    )
    prompts = {instance.doc_id: instance.args[0] for instance in task.instances}
    for row in samples:
        if prompts.get(row["doc_id"]) != row["prompt"]:
            raise RunError(
                f"{stage.samples_file(name)}: row {row['doc_id']} has a different prompt than the task makes now, so "
                "its likelihood would be wrong. Delete both files of the cell and evaluate again."
            )
    cell, rows = with_likelihood(lm, task, plan.max_answer, dict(plan.existing[stage, name]), samples)
    cell["likelihood"] |= {"served": lm.served, **{k: made[k] for k in ("engine_args", "made_with", "commit")}}
    cell["seconds"] = round(cell["seconds"] + cell["likelihood"]["seconds"], 3)
    write_json(stage.eval_file(name), {**plan.existing[stage, name], "samples": None})
    write_jsonl(stage.samples_file(name), rows)
    write_json(stage.eval_file(name), cell | {"samples": fingerprint(stage.samples_file(name))})
