"""(a) A small model trains and answers on the GPU as on the CPU.

The same few steps give the same losses up to rounding, and the same adapter gives the same tokens in float32.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.gpu.shapes import comparison, device, equal_share, marks, prompts, small_adapter, small_model

TITLE = "a small model, as on the CPU"
LIMIT = 70
_PACKAGES = ("trl", "datasets", "lm-eval")
ITEMS = dict.fromkeys(("float32 CPU", "float32 GPU", "bfloat16 CPU", "bfloat16 GPU"), _PACKAGES)
IMPORTS = ("trainers.base", "trace_bench.evaluate", "lm_eval.models.huggingface")
#: The largest relative difference of a step's loss from the loss on the CPU. A float32 has 24 bits, a bfloat16 has 8.
#: AdamW turns a rounding error of a gradient into a step of full size, so differences grow from step to step.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
STEPS, TOKENS, PROMPTS = 8, 24, 16


def options(folder: Path, dtype: str, **further: Any) -> tuple[Any, Any]:
    """A run on the small model: two tasks, a few steps each."""
    from trl import ModelConfig

    from trainers.base import CLConfig

    config = CLConfig(
        output_dir=str(folder),
        data="demo",
        tasks=["trace_fomc", "trace_numglue_ds"],
        train_rows=64,
        test_rows=8,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_prompt_length=96,
        max_new_tokens=8,
        gradient_checkpointing=False,
        bf16=dtype == "bfloat16",
        backend="hf",
        disable_tqdm=True,
        **further,
    )
    base = small_model(folder.parent / "small")
    return config, ModelConfig(model_name_or_path=str(base), dtype=dtype, use_peft=True, lora_r=8, lora_dropout=0.0)


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Trains, evaluates the run, and answers with an adapter that both devices share."""
    import torch

    from trace_bench.engine import open_engine
    from trace_bench.evaluate import evaluate
    from trace_bench.run import read_json
    from trainers.base import CLTrainer, train

    dtype = item.split()[0]
    path = folder / f"run-{item.replace(' ', '-')}"
    shutil.rmtree(path, ignore_errors=True)
    run = train(CLTrainer, *options(path, dtype))
    records = [read_json(stage.train_file) for stage in run.stages[1:]]
    cells = evaluate(run)
    base = folder / "small"
    lm: Any = open_engine("hf", str(base), engine_args={"dtype": dtype, "batch_size": 4})
    lm.load(small_adapter(base, folder / "adapter-0", 1))
    return {
        "device": device(),
        "gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6),  # shows that the GPU was used
        "losses": [entry["loss"] for record in records for entry in record["losses"]],
        "mean_loss": round(sum(r["mean_loss"] for r in records) / len(records), 4),
        "cells": cells,
        "answers": marks(lm.first_tokens(prompts(PROMPTS), TOKENS)),
    }


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """The differences between the devices, for the precisions that both have measured."""
    found = {}
    for dtype, most in TOLERANCE.items():
        if f"{dtype} CPU" in done and f"{dtype} GPU" in done:
            cpu, gpu = done[f"{dtype} CPU"], done[f"{dtype} GPU"]
            off = largest_difference(cpu["losses"], gpu["losses"])
            found[f"{dtype}: largest difference of a step's loss, as a share"] = comparison(off, most, off <= most)
            same = equal_share(cpu["answers"], gpu["answers"])
            exact = dtype == "float32"  # in bf16 the share has no goal
            goal = (1.0, same == 1) if exact else ()
            found[f"{dtype}: share of equal answers"] = comparison(same, *goal)
    return found


def largest_difference(losses: list[float], others: list[float]) -> float:
    """The largest relative difference between two losses of a step."""
    return max(abs(a - b) / a for a, b in zip(losses, others, strict=True))
