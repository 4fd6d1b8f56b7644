"""Whether an engine computes the model that was trained: log-likelihoods that were measured before, found again.

The trainer measures a few rows with the model in memory (`CheckpointTrainer.as_trained`): the base model before the
first stage, and each stage at its end. The engine has to give the same numbers. This covers all that an evaluation
relies on: the files of the checkpoint, how they are merged or swapped in, the engine's code for the architecture, and
the kernels of the machine. For checkpoints from elsewhere, transformers measures a few prompts (`reference`).
"""

from __future__ import annotations

import math
from typing import Any

from trace_bench.engine import EngineError
from trace_bench.evaluate import reference
from trace_bench.evaluate.plan import Plan
from trace_bench.run import AS_TRAINED, Stage, read_jsonl

#: The largest difference that rounding explains, in nats per token (docs/evaluation.md has measured ones): in general,
#: and where both sides compute in float32.
MOST, MOST_IN_FLOAT32 = 0.1, 0.01
#: What the user can do.
_CAUSES = (
    "Use the libraries of the training, or train again. The checkpoint of a method of your own may lack weights that "
    "it changed."
)


def check_engine(stage: Stage, lm: Any, plan: Plan) -> dict[str, float]:
    """Refuses an engine that gives rows other log-likelihoods than the stage's model gave them in training.

    Args:
        stage: The stage whose weights the engine holds.
        lm: The engine.
        plan: The plan of the evaluation.

    Returns:
        The entry of the cells' records: what was compared -> the difference in nats per token, a mean over the rows:
        that of the answers or of the tokens before them, whichever is larger. Empty if there is nothing to compare.

    Raises:
        EngineError: if it is larger than rounding explains.
    """
    file, most, rows = stage.path / AS_TRAINED, MOST, []
    in_training = file.is_file()
    if in_training:
        rows = read_jsonl(file)
    elif plan.backend == "vllm":
        rows = reference.read(stage, plan)
        most = MOST_IN_FLOAT32 if plan.engine_args.get("dtype") == "float32" else MOST
    parts = [(name, row["ids"][: part["stop"]], part) for row in rows for name, part in row["parts"].items()]
    parts = [(name, ids, part) for name, ids, part in parts if 0 < part["start"] < len(ids) <= lm.max_length]
    found = lm.likelihoods_of([(tuple(ids[: p["start"]]), tuple(ids[p["start"] :])) for _, ids, p in parts])
    sums: dict[str, tuple[float, int]] = {}
    for (name, ids, part), nats in zip(parts, found, strict=True):
        apart, tokens = sums.get(name, (0.0, 0))
        sums[name] = apart + abs(nats - part["nats"]), tokens + len(ids) - part["start"]
    if not sums:
        return {}
    each = [apart / tokens for apart, tokens in sums.values()]
    difference = max(each, key=lambda nats: (math.isnan(nats), nats))
    if difference <= most:
        return {"from_training" if in_training else "from_transformers": round(difference, 6)}
    rounding = f"by {difference:.2g} nats per token; rounding explains at most {most}."
    if not in_training:
        raise EngineError(
            f"{stage.name}: vLLM does not compute the model that transformers loads from the same files. The "
            f"log-likelihoods of prompts differ {rounding} Use --backend hf."
        )
    raise EngineError(
        f"{stage.name}: the engine does not compute the model that training had in memory. Its log-likelihoods of "
        f"training rows differ from those of the trainer {rounding} "
        + ("Use --backend hf." if plan.backend == "vllm" else _CAUSES)
    )
