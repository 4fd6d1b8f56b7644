"""The process that `trainers.base.writing` starts: loads one stage into an engine and answers the prompts of tasks.

python -m trainers.base.answering ORDER.json
"""

from __future__ import annotations

import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from trace_bench.engine.swap import Answer
from trace_bench.run import read_json
from trace_tasks.data.files import write_json


def sampling_args(sampling: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """The sampling arguments for both backends; empty for greedy decoding.

    By default transformers samples from the 50 likeliest tokens, and vLLM from all of them: top_k = 0 is all.
    """
    return {"top_k": 0, **sampling, "seed": seed} if sampling and sampling.get("temperature") else {}


def answer(order_file: Path) -> None:
    """Answers the jobs of an order file. A job is done when its file exists."""
    from trace_bench.engine import open_engine
    from trace_bench.engine.gpu import has_gpu

    order = read_json(order_file, dict[str, Any])
    if not has_gpu() and any(sampling_args(job["sampling"], job["seed"]) for job in order["jobs"]):
        # After a part of a prompt vLLM rewinds the random generator, which is not possible on a CPU.
        order["engine_args"]["enable_chunked_prefill"] = False
        order["engine_args"].pop("max_num_batched_tokens", None)  # a whole prompt has to fit
    checkpoint = None if order["checkpoint"] is None else Path(order["checkpoint"])
    lm: Any = open_engine(
        order["backend"],
        order["base"],
        revision=order["revision"],
        engine_args=order["engine_args"],
        checkpoints=[] if checkpoint is None else [checkpoint],
    )
    if checkpoint is not None:
        lm.load(checkpoint)
    for job in order["jobs"]:
        room = lm.max_length - job["most"]
        wanted = {
            (i, n): lm.want(
                ids, job["most"], job["stops"], sampling_args(job["sampling"], job["seed"] + n), job["rated"]
            )
            for i, ids in enumerate(job["prompts"])
            for n in range(job["samples"])
            if len(ids) <= room
        }
        asked = list(dict.fromkeys(wanted.values()))  # equal requests are answered once
        found = dict(zip(asked, lm.full_answers(asked), strict=True))
        none = Answer("", finished=False)  # the prompt does not fit
        rows = [
            [astuple(found[wanted[i, n]] if (i, n) in wanted else none) for n in range(job["samples"])]
            for i in range(len(job["prompts"]))
        ]
        write_json(Path(job["file"]), {"made_from": job["made_from"], "answers": rows})


if __name__ == "__main__":
    from trace_bench.text import prepare_logging

    prepare_logging()
    answer(Path(sys.argv[1]))
