"""(e) vLLM on the GPU: eight adapters as LoRA requests in one batch, and eight adapters merged one after the other.

In float32, where rounding decides nothing, both must give the same tokens as transformers. Times are for a larger model
in bf16: all adapters answer the same prompts. They include the swaps of adapters, but not the start of the engine.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.gpu.shapes import MEDIUM, SMALL, comparison, equal_share, marks, prompts, small_adapter, small_model

TITLE = "vLLM: LoRA requests and merged weights"
LIMIT = 85
ITEMS = {
    "float32, transformers": ("lm-eval", "vllm"),  # the reference for the others, so it needs their packages, too
    "float32, LoRA requests": ("lm-eval", "vllm"),
    "float32, merged": ("lm-eval", "vllm"),
    "bfloat16, LoRA requests": ("lm-eval", "vllm"),
    "bfloat16, merged": ("lm-eval", "vllm"),
}
IMPORTS = ("lm_eval.models.huggingface", "trace_bench.evaluate")
ADAPTERS = 8


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The answers of all adapters, and the seconds."""
    from trace_bench.engine import open_engine

    dtype, way = item.split(", ")
    large = dtype == "bfloat16" and not tiny
    base = small_model(folder / ("medium" if large else "small"), MEDIUM if large else SMALL)
    adapters = [small_adapter(base, folder / f"{base.name}-adapter-{n}", n) for n in range(2 if tiny else ADAPTERS)]
    args: dict[str, Any] = {"dtype": dtype}
    if way == "transformers":
        args["batch_size"] = 4
    else:
        # Compiling would take longer than it saves.
        args |= {"max_model_len": 512, "enforce_eager": True, "enable_lora": way == "LoRA requests"}
    backend = "hf" if way == "transformers" else "vllm"
    lm: Any = open_engine(backend, str(base), engine_args=args, checkpoints=adapters)
    asked, most = prompts(16 if tiny else 64), 24 if dtype == "float32" else 64
    tokens = []
    started = time.perf_counter()
    for n, adapter in enumerate(adapters):
        lm.load(adapter)
        lm.answer_together(adapters[n + 1 :])
        tokens.append(lm.first_tokens(asked, most))
    return {
        "served": str(lm.served["weights"]),
        "seconds": round(time.perf_counter() - started, 2),
        "tokens_written": sum(len(ids) for answers in tokens for ids in answers),
        "answers": [mark for answers in tokens for mark in marks(answers)] if dtype == "float32" else [],
    }


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """The share of answers with transformers' tokens, and the ratio of the times."""
    found: dict[str, Any] = {}
    hf, requests, merged = "float32, transformers", "bfloat16, LoRA requests", "bfloat16, merged"
    for way in ("float32, LoRA requests", "float32, merged"):
        if hf in done and way in done:
            same = equal_share(done[hf]["answers"], done[way]["answers"])
            found[f"{way}: share of answers as transformers gives them"] = comparison(same, 1.0, same == 1)
    if requests in done and merged in done:
        found["merging, times LoRA requests"] = comparison(
            round(done[merged]["seconds"] / done[requests]["seconds"], 2)
        )
    return found
