"""Answers that a model of the run writes itself between two stages, with the engine of the evaluation.

The engine runs in a process of its own, which gives all of its memory back before the training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_bench import ending
from trace_bench.run import RunError, Stage, read_json
from trace_bench.tasks import load_tasks
from trace_tasks.data.files import digest, remove, write_json

#: How the variables begin by which a launcher tells its processes of each other.
LAUNCHED = (*("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"),)


def run_alone(words: list[str]) -> int:
    """Runs a Python module of ours as a program of its own, not as one of the processes that were launched together."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED)}
    return ending.run_child([sys.executable, "-m", *words], environment)


def written(
    trainer: Any, name: str, by: Stage, task: str, prompts: list[list[int]], sampling: dict[str, Any] | None
) -> list[str]:
    """See `CLTrainer.written`."""
    from accelerate import PartialState

    folder, state = trainer.stage.path / "written", PartialState()
    file = folder / f"{name}.json"
    job = _job(trainer, by, task, prompts, sampling)
    made_from = digest(job)
    if state.is_main_process and _made_from(file) != made_from:
        asked = folder / f".{name}.job.json"
        write_json(asked, job)
        remove(file)
        if run_alone(["trainers.base.writing", str(asked), str(file), made_from]):
            raise RunError(
                f"{by.name} could not answer the {len(prompts)} prompts of {task} that stage {trainer.stage.name} is "
                "trained on, see above. What is done is kept: run this again."
            )
        remove(asked)
    state.wait_for_everyone()
    return read_json(file, dict[str, Any])["answers"]


def _made_from(file: Path) -> str | None:
    try:
        return read_json(file, dict[str, Any])["made_from"] if file.exists() else None
    except (KeyError, RunError):
        return None  # damaged: it is made again


def _job(
    trainer: Any, by: Stage, task: str, prompts: list[list[int]], sampling: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that decides the answers."""
    config, model = trainer.config, trainer.model_args
    kwargs: Mapping[str, Any] = load_tasks([task])[task].config.generation_kwargs or {}
    lengths = [kwargs.get("max_gen_toks", 256), config.max_new_tokens, config.max_answer_length]
    return {
        "backend": config.backend,
        "base": model.model_name_or_path,
        "revision": model.model_revision,
        "engine_args": {
            **(config.engine_args if isinstance(config.engine_args, dict) else {}),
            **({"trust_remote_code": True} if config.trust_remote_code else {}),
        },
        "checkpoint": None if by.checkpoint is None else str(by.checkpoint),
        "fingerprint": by.fingerprint(),
        "stops": [stop for stop in kwargs.get("until") or [] if stop],
        "most": min(length for length in lengths if length is not None),
        "sampling": sampling or {},
        "seed": config.seed,
        "prompts": prompts,
    }


def answer(asked: Path, file: Path, made_from: str) -> None:
    """Answers a job, in a process of its own."""
    import torch

    from trace_bench.engine import open_engine

    job = read_json(asked, dict[str, Any])
    checkpoint = None if job["checkpoint"] is None else Path(job["checkpoint"])
    lm: Any = open_engine(
        job["backend"],
        job["base"],
        revision=job["revision"],
        engine_args=job["engine_args"],
        checkpoints=[] if checkpoint is None else [checkpoint],
    )
    torch.manual_seed(job["seed"])
    if checkpoint is not None:
        lm.load(checkpoint)
    wanted = [lm.want(ids, job["most"], job["stops"], job["sampling"]) for ids in job["prompts"]]
    write_json(file, {"made_from": made_from, "answers": lm.answers(wanted)})


if __name__ == "__main__":
    from trace_bench.text import prepare_logging

    prepare_logging()
    answer(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
