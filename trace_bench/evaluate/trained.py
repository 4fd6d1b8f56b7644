"""Whether an engine computes the model that was trained: the log-likelihoods that training measured, found again.

The trainer measures a few rows with the model in memory (`CheckpointTrainer.as_trained`): the base model before the
first stage, and each stage at its end. The engine has to give the same numbers. This covers all that an evaluation
relies on: the files of the checkpoint, how they are merged or swapped in, the engine's code for the architecture, and
the kernels of the machine.
"""

from __future__ import annotations

from typing import Any

from trace_bench.engine import EngineError
from trace_bench.run import AS_TRAINED, Stage, read_jsonl

#: The largest difference that rounding explains, in nats per token (docs/evaluation.md has measured ones).
MOST = 0.1


def check_as_trained(stage: Stage, lm: Any, backend: str) -> float | None:
    """Refuses an engine that gives rows other log-likelihoods than the stage's model gave them in training.

    Args:
        stage: The stage whose weights the engine holds.
        lm: The engine.
        backend: Its name.

    Returns:
        The difference in nats per token, a mean over the rows: that of the answers or of the tokens before them,
        whichever is larger. None if there is nothing to compare.

    Raises:
        EngineError: if it is larger than rounding explains.
    """
    file = stage.path / AS_TRAINED
    rows = read_jsonl(file) if file.is_file() else []
    parts = [(name, row["ids"][: part["stop"]], part) for row in rows for name, part in row["parts"].items()]
    parts = [(name, ids, part) for name, ids, part in parts if 0 < part["start"] < len(ids) <= lm.max_length]
    found = lm.likelihoods_of([(tuple(ids[: p["start"]]), tuple(ids[p["start"] :])) for _, ids, p in parts])
    sums: dict[str, tuple[float, int]] = {}
    for (name, ids, part), nats in zip(parts, found, strict=True):
        apart, tokens = sums.get(name, (0.0, 0))
        sums[name] = apart + abs(nats - part["nats"]), tokens + len(ids) - part["start"]
    if not sums:
        return None
    difference = max(apart / tokens for apart, tokens in sums.values())
    if not difference <= MOST:
        raise EngineError(
            f"{stage.name}: the engine does not compute the model that training had in memory. Its log-likelihoods of "
            f"training rows differ by {difference:.2f} nats per token from those of the trainer; rounding explains at "
            f"most {MOST}. "
            + ("Use --backend hf." if backend == "vllm" else "Use the libraries of the training, or train again.")
        )
    return difference
