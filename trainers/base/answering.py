"""The process that answers for `trainers.base.writing`: an engine, the weights of one stage, and the prompts of tasks.

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


def drawn(sampling: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """The arguments of a drawn answer, the same on both backends; none where it is greedy.

    Of themselves transformers draws from the 50 likeliest tokens and vLLM from all.
    """
    return {"top_k": 0, **sampling, "seed": seed} if sampling and sampling.get("temperature") else {}


def answer(order_file: Path) -> None:
    """Answers jobs, in a process of its own. A task is done when its file exists."""
    from trace_bench.engine import open_engine
    from trace_bench.engine.gpu import has_gpu

    order = read_json(order_file, dict[str, Any])
    if not has_gpu() and any(drawn(job["sampling"], job["seed"]) for job in order["jobs"]):
        # vLLM takes back the random numbers of a prompt that it has read in part, which a CPU's generator cannot.
        order["engine_args"]["enable_chunked_prefill"] = False
        order["engine_args"].pop("max_num_batched_tokens", None)  # it may be less than a prompt has
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
            (i, n): lm.want(ids, job["most"], job["stops"], drawn(job["sampling"], job["seed"] + n), job["rated"])
            for i, ids in enumerate(job["prompts"])
            for n in range(job["samples"])
            if len(ids) <= room
        }
        asked = list(dict.fromkeys(wanted.values()))  # rows with the same prompt have the same answers
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
