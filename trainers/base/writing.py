"""Lets a model of the run write answers between two stages, with the engine of the evaluation.

The engine runs in a separate process, so all of its memory is free again before the training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from trace_bench import ending
from trace_bench.engine.swap import Answer
from trace_bench.run import RunError, Stage, read_json
from trace_bench.tasks import answer_scores, load_tasks, training_rows
from trace_bench.waiting import others_wait
from trace_tasks.data import DataError
from trace_tasks.data.files import digest, remove, write_json
from trace_tasks.tokens import prompt_ids
from trainers.base.config import ENGINE_CONTEXT, ConfigError

#: The prefixes of environment variables with which a launcher connects its processes.
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_"),
)


def run_alone(words: list[str]) -> int:
    """Runs a Python module of ours as a separate program, outside the launch of several processes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    return ending.run_child([sys.executable, "-m", *words], environment)


def answers(
    trainer: Any,
    name: str,
    by: Stage,
    prompts: Mapping[str, Sequence[str]],
    *,
    samples: int | Mapping[str, int] = 1,
    sampling: dict[str, Any] | None = None,
    rated: bool = False,
    cut: bool = True,
    most: int | None = None,
    at: Stage | None = None,
) -> dict[str, list[list[Answer]]]:
    """The answers of a stage's model to prompts, generated as in the evaluation of their tasks.

    This is `CLTrainer.answers`. Call it in `stage_dataset`, while no model is on the GPU yet. The answers are kept in
    the stage's folder, and generated again only if the model, the prompts or the settings change.

    Args:
        trainer: The trainer of the stage.
        name: A name for the files, different for each call within a stage.
        by: The stage whose checkpoint answers; stage 0 is the base model.
        prompts: Task -> texts as in `task_texts`. The task's stops and length limits apply.
        samples: The number of answers to each prompt; or task -> this number.
        sampling: Sampling arguments, such as {"temperature": 1.0}; None or a temperature of 0 = greedy.
        rated: Whether the answers get their mean log-probability.
        cut: Whether prompts are cut to `max_prompt_length`. If not, a prompt that does not fit gets an empty,
            unfinished answer.
        most: The most tokens of an answer, which then only EOS ends; None = as in the evaluation.
        at: The stage in whose folder the answers are kept; None = the stage in training.

    Returns:
        Task -> for each prompt its answers, without the stop that ended them.
    """
    how: dict[str, Any] = {"sampling": sampling, "rated": rated}
    how |= {} if most is None else {"most": most, "stops": []}
    engine, folder, jobs = _engine(trainer, by), (at or trainer.stage).path / "written", {}
    for task, texts in prompts.items():
        many = samples if isinstance(samples, int) else samples[task]
        job = _job(trainer, task, texts, {"samples": many, **how}, trainer.config.max_prompt_length if cut else None)
        file = folder / f"{name}_{task}.json"
        jobs[file] = {**job, "file": str(file), "made_from": digest({**engine, **job})}
    with others_wait():
        if PartialState().is_main_process:
            missing = [job for file, job in jobs.items() if _made_from(file) != job["made_from"]]
            order = folder / f".{name}.job.json"
            if missing:
                write_json(order, {**engine, "jobs": missing})
                if run_alone(["trainers.base.answering", str(order)]):
                    raise RunError(
                        f"{by.name} could not answer the {sum(len(job['prompts']) for job in missing)} prompts of "
                        f"{', '.join(prompts)} that stage {trainer.stage.name} needs: see the error above. Finished "
                        "work is kept; run this again."
                    )
            remove(order)
    read = [read_json(file, dict[str, Any])["answers"] for file in jobs]
    return {task: [[Answer(*a) for a in row] for row in rows] for task, rows in zip(prompts, read, strict=True)}


def _made_from(file: Path) -> str | None:
    try:
        return read_json(file, dict[str, Any])["made_from"] if file.exists() else None
    except (KeyError, RunError):
        return None  # damaged: it is made again


def _engine(trainer: Any, by: Stage) -> dict[str, Any]:
    """The engine and the weights that answer."""
    config, model = trainer.config, trainer.model_args
    return {
        "backend": config.backend,
        "base": model.model_name_or_path,
        "revision": model.model_revision,
        "engine_args": {
            **(config.engine_args or {}),
            **({"trust_remote_code": True} if config.trust_remote_code else {}),
        },
        "checkpoint": None if by.checkpoint is None else str(by.checkpoint),
        "fingerprint": by.fingerprint(),
    }


def _job(trainer: Any, task: str, texts: Sequence[str], how: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The requests for a task. Together with `_engine` they decide its answers."""
    config = trainer.config
    kwargs: Mapping[str, Any] = load_tasks([task])[task].config.generation_kwargs or {}
    lengths = [kwargs.get("max_gen_toks", 256), config.max_new_tokens, config.max_answer_length]
    most = how.get("most") or min(length for length in lengths if length is not None)
    engine = config.engine_args or {}
    context = next((engine[name] for name in ENGINE_CONTEXT if engine.get(name)), None)
    if limit is not None and context:  # as the evaluation cuts prompts
        limit = min(limit, max(context - most, 1))
    chat = trainer.chat
    end = [chat.end] if chat is not None and chat.end and any(text in chat for text in texts) else []
    return {
        "most": most,
        "seed": config.seed,
        "prompts": prompt_ids(trainer.tokenizer, texts, limit, chat),
        **how,
        "stops": [*how.get("stops", [stop for stop in kwargs.get("until") or [] if stop]), *end],
    }


def check_scores(names: Sequence[str], option: str, instead: str) -> None:
    """Refuses tasks whose metric has no score for an individual answer; for `prepare`.

    Args:
        names: The tasks.
        option: What needs the scores, for the error.
        instead: What to do, for the error.
    """
    for task in load_tasks(names).values():
        try:
            answer_scores(task, [(0, training_rows(task, 1)[0][1])])
        except DataError as e:
            raise ConfigError(f"{option}: {e} {instead}") from e
