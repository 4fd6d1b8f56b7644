"""(c) The cost of methods over sequential training, at the size of LLaMA-2-7B.

Each method trains two stages by its ordinary command. A stage is an epoch of 64 rows of real lengths, with gradient
checkpointing as in the config. The second stage is timed; its batches have the lengths of the first. One time is of its
steps, one of the whole stage with the method's work before and after them (EWC's passes are over 32 rows here instead
of 256).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from bench.gpu.shapes import comparison, train_large

TITLE = "what methods cost at 7B"
LIMIT = 105
CLASSES = {
    "sequential": ("trainers.base", "CLTrainer", "CLConfig"),
    "ewc": ("trainers.ewc", "EWCTrainer", "EWCConfig"),
    "olora": ("trainers.olora", "OLoRATrainer", "OLoRAConfig"),
    "lwf": ("trainers.lwf", "LwFTrainer", "LwFConfig"),
    "agem": ("trainers.agem", "AGEMTrainer", "MemoryConfig"),
    "replay": ("trainers.replay", "ReplayTrainer", "ReplayConfig"),
}
ITEMS = dict.fromkeys(CLASSES, ("trl", "datasets", "lm-eval"))
IMPORTS = tuple(module for module, *_ in CLASSES.values())
OPTIONS = {"ewc": ["--ewc_rows", "32"], "replay": ["--alignment_data", "none"]}


def measure(item: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Trains two stages and returns the numbers of the second."""
    from trace_bench.run import read_json

    module, trainer, config = CLASSES[item]
    loaded = importlib.import_module(module)
    options = ["--tasks", "trace_fomc", "trace_scienceqa", "--epochs", "1", "1", *OPTIONS.get(item, [])]
    run = train_large(
        getattr(loaded, trainer), getattr(loaded, config), folder / f"run-{item}", tiny, options, 2 if tiny else 8
    )
    record = read_json(run.stages[2].train_file)
    kept = run.stages[1].method_state
    return {
        "steps": record["steps"],
        "tokens": record["tokens"],
        "seconds_of_steps": round(record["seconds"] - record["seconds_around_steps"], 2),
        "seconds_of_stage": round(record["seconds"], 2),
        "peak_memory_gb": round(record["peak_memory_bytes"] / 1e9, 2),
        "kept_mb": round(sum(p.stat().st_size for p in kept.rglob("*") if p.is_file()) / 1e6, 1),
    }


def goals(done: dict[str, Any]) -> dict[str, Any]:
    """The times as multiples of those of sequential training. There is no goal."""
    plain = done.get("sequential")
    return {
        f"{name}: {what.removeprefix('seconds_of_')} over sequential": comparison(round(found[what] / plain[what], 2))
        for name, found in (done.items() if plain else ())
        for what in ("seconds_of_steps", "seconds_of_stage")
        if name != "sequential"
    }
