"""What transformers computes for a few prompts, with models that no training of ours has measured.

vLLM has its own code for each architecture, and obeys or ignores entries of a config.json as transformers does not. So
before it starts, transformers reads some prompts in a process of its own, whose memory is free again when vLLM starts.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from trace_bench.ending import run_child
from trace_bench.engine import models
from trace_bench.evaluate.distance import QUESTIONS
from trace_bench.evaluate.plan import Plan, base_of
from trace_bench.evaluate.tasks import contexts_of, shortest
from trace_bench.run import AS_TRAINED, Stage, read_json, read_jsonl
from trace_bench.text import printable
from trace_bench.waiting import locked
from trace_tasks.data.files import write_json, write_jsonl
from trace_tasks.tokens import prompt_ids

log = logging.getLogger(__name__)

#: The file of a stage that has the result.
BY_TRANSFORMERS = "by_transformers.jsonl"
#: How many prompts are read, the most tokens of each, and how many of its last tokens are compared.
_PROMPTS, _LENGTH, _TOKENS = 8, 1024, 32


def read(stage: Stage, plan: Plan) -> list[dict[str, Any]]:
    """The lines about the weights that a stage has now, in the form of `CheckpointTrainer.as_trained`; may be none."""
    file, made = stage.path / BY_TRANSFORMERS, _made(stage, plan)
    return [row for row in (read_jsonl(file) if file.is_file() else []) if made.items() <= row.items()]


def measure(plan: Plan, single: dict[str, Any], context: int | None = None) -> None:
    """Has transformers measure the base model and the first stage of each configuration, unless training has done it.

    What vLLM computes differently, it computes so for all checkpoints with the same configuration. If transformers
    cannot load a model here, a warning says that it was not compared, and the evaluation goes on.

    Args:
        plan: The plan of an evaluation by vLLM.
        single: The tasks of the plan, by name; their first prompts are read, or neutral questions if there are none.
        context: The engine's context, if one was asked for.
    """
    with locked(plan.run.path, "reference", wait=True):  # other processes of --share need the same
        kinds: dict[Any, Stage] = {}
        for stage in plan.stages:
            if not (stage.path / AS_TRAINED).is_file():
                kinds.setdefault(_kind(stage), stage)
        stages = [stage for stage in kinds.values() if not read(stage, plan)]
        if not stages:
            return
        rows = _prompts(plan, single, context)
        names = ", ".join(stage.name for stage in stages)
        print(printable(f"transformers reads {len(rows)} prompts with {names}, to compare vLLM with it"), flush=True)
        found, error = _read_by_transformers(plan, stages, rows)
        for stage, nats in zip(stages, found, strict=False):
            made = _made(stage, plan)
            lines = [
                {"ids": ids, "parts": {"before": {"start": start, "stop": len(ids), "nats": sum_}}, **made}
                for (ids, start), sum_ in zip(rows, nats, strict=True)
            ]
            write_jsonl(stage.path / BY_TRANSFORMERS, lines)
        if left := [stage.name for stage in stages[len(found) :]]:
            said = "It is not known whether vLLM computes the same as transformers for %s, which failed: %s"
            log.warning(said, ", ".join(left), error)


def _read_by_transformers(plan: Plan, stages: list[Stage], rows: list[Any]) -> tuple[list[list[float]], str]:
    """The nats of each row for each stage, in a process of its own; if it fails, those until then, and why."""
    known = {name: plan.engine_args[name] for name in ("dtype", "trust_remote_code") if name in plan.engine_args}
    weights = [[stage.checkpoint and str(stage.checkpoint), [*map(str, stage.below)]] for stage in stages]
    request = {"base": base_of(plan.run), "engine_args": known, "rows": rows, "weights": weights}
    with tempfile.TemporaryDirectory(prefix="trace-reference-") as folder:
        write_json(Path(folder) / "request.json", request)
        words = [sys.executable, "-m", "trace_bench.evaluate.reading", folder]
        code = run_child(words)
        answer = Path(folder) / "found.json"
        found = read_json(answer) if answer.is_file() else {}
    return found.get("nats", []), found.get("error", f"its process ended with exit code {code}")


def _made(stage: Stage, plan: Plan) -> dict[str, Any]:
    """What decides the numbers: in bfloat16, by an older transformers, or on another base they are other ones."""
    weights = {"base": base_of(plan.run)["revision"], "checkpoint": stage.fingerprint()}
    return {**weights, "dtype": plan.engine_args.get("dtype", "auto"), "transformers": version("transformers")}


def _kind(stage: Stage) -> tuple[str, bool] | None:
    """What decides how an engine computes a stage's weights: its configuration, and whether it is stacked on others."""
    if stage.checkpoint is None:
        return None
    name = "adapter_config.json" if models.is_adapter(stage.checkpoint) else "config.json"
    return (stage.checkpoint / name).read_text(encoding="utf-8"), bool(stage.below)


def _prompts(plan: Plan, single: dict[str, Any], context: int | None) -> list[tuple[list[int], int]]:
    """The token ids of each prompt, and where the tokens to compare begin."""
    each = -(-_PROMPTS // max(len(single), 1))
    texts = [task.doc_to_text(doc) for task in single.values() for doc in islice(task.eval_docs, each)]
    questions = QUESTIONS.read_text(encoding="utf-8")
    texts = [text for text in texts if isinstance(text, str)][:_PROMPTS] or [*questions.splitlines(), questions]
    base, trusted = base_of(plan.run), plan.engine_args.get("trust_remote_code", False)
    tokenizer = models.load_tokenizer(**base, trust_remote_code=trusted)
    of_base = contexts_of(base["model"], base["revision"], trusted, vllm=True)
    ids = prompt_ids(tokenizer, texts, shortest([_LENGTH, plan.matrix["max_prompt_length"], context, *of_base]))
    return [(one, max(len(one) - _TOKENS, 1)) for one in ids if len(one) > 1]
