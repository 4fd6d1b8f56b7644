"""Relearning: a few rows of each old task, trained from the last stage of a run and from the base model.

Both are ordinary runs below the run's folder, `relearn/<rows>_rows_<steps>_steps/last` and `.../base`, whose stages all
begin with the same weights. So training, evaluation and resuming are those of every run. A checkpoint is removed when
it is measured.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from trl import ModelConfig

from trace_bench import checks
from trace_bench.engine.models import adapter_config, is_adapter
from trace_bench.manifest import differences
from trace_bench.records import read_cell
from trace_bench.run import Run, RunError, Stage
from trace_bench.text import word
from trace_bench.waiting import locked
from trace_tasks.data.files import check_writable, refuse_links, remove
from trainers.base.config import CLConfig, ConfigError
from trainers.base.stages import parse, train
from trainers.base.trainer import CLTrainer
from trainers.base.writing import run_alone
from trainers.inclora import IncLoRATrainer


class RelearnTrainer(IncLoRATrainer):
    """Trains one old task from the last stage of a run or from the base model; plain fine-tuning for every method."""

    source: ClassVar[Run]
    start: ClassVar[Stage]

    @classmethod
    def prepare(cls, config: Any, model_args: ModelConfig) -> dict[str, Any]:
        """What the stages begin with, and the date that the run's chat prompts have."""
        date = cls.source.manifest.get("date")
        return {"begins_with": begins_with(cls.start)} | ({"date": date} if date else {})

    def stage_model(self, stage: Stage) -> Any:
        """The same weights for every task.

        An adapter of a larger rank than `lora_r`, such as the sum of all stages' adapters, is frozen and gets a new one
        on top. Trained as a whole it would learn faster than that of the control, and without the run's dropout.
        """
        start = self.start.checkpoint
        self.on_top = start is not None and is_adapter(start) and adapter_config(start)["r"] > self.model_args.lora_r
        return self.with_new_adapter(start) if self.on_top else self.trainable_model(start)

    def save_checkpoint(self) -> Path:
        """Saves what was trained, with the frozen adapter below it."""
        return super().save_checkpoint() if self.on_top else CLTrainer.save_checkpoint(self)


def begins_with(start: Stage) -> dict[str, str | None]:
    """The weights that a relearning begins with, for its manifest."""
    return {"stage": start.name, "checkpoint": start.fingerprint()}


def relearn(path: str | Path, rows: int = 10, steps: int = 10) -> None:
    """Trains each old task of a run again on its first rows, from the last stage and from the base, and measures it.

    Raises:
        TraceError: before anything is trained, if the run has no old tasks, is not measured, or cannot be continued.
    """
    run = Run.open(path)
    refuse_links(run.path, "relearn")
    cell = _check_run(run, rows)
    folder = run.path / "relearn" / f"{rows}_rows_{steps}_steps"
    with locked(folder, "relearn"):
        starts = {folder / "last": run.stages[-1], folder / "base": run.stages[0]}
        todo = {place: start for place, start in starts.items() if not _is_done(run, place, start, cell)}
        if todo:
            check_writable(folder)
            _check_sources(run, rows)
        for place, start in todo.items():
            print(f"{rows} rows, {steps} steps from {start.name}:", flush=True)
            _train_and_measure(run, start, place, rows, steps, cell)
    print(f"To see what came back: trace-bench report {word(path)}")


def _check_run(run: Run, rows: int) -> dict[str, Any]:
    """Refuses runs without old tasks or their scores; returns one of their cells, which says how they were made."""
    manifest, tasks = run.manifest, run.tasks[:-1]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.device_count() > 1:
        raise ConfigError(
            "relearn works in one process on one GPU. Start it without a launcher: "
            f"CUDA_VISIBLE_DEVICES=0 trace-bench relearn {word(run.path)}"
        )
    if "checkpoints" in manifest:
        raise RunError(
            f"{run.path} has checkpoints from elsewhere, so their training settings are unknown. Use another run."
        )
    if manifest.get("trains") == "prompts":
        raise RunError(f"{run.path} trains soft prompts ({manifest['method']}), which relearn cannot train further.")
    if not run.old_tasks:
        raise RunError(
            f"{run.path} has no old tasks to relearn: a sequence of at least two tasks is needed. Its method is "
            f"{manifest['method']}, and its stages are {', '.join(s.name for s in run.stages[1:]) or 'none'}."
        )
    if missing := [stage.name for stage in run.stages if not stage.is_trained]:
        raise RunError(f"{', '.join(missing)}: not trained yet. Finish the training, then run trace-bench evaluate.")
    if (most := manifest["config"].get("train_rows") or rows) < rows:
        raise RunError(f"--rows {rows}: the run was trained on the first {most} rows of each task; use at most {most}.")
    for i, task in enumerate(tasks):
        for stage in (run.stages[i + 1], run.stages[-1]):
            if not _has_score(stage, task):
                raise RunError(
                    f"{task} is not measured at {stage.name}. First run: trace-bench evaluate {word(run.path)}"
                )
    return read_cell(run.stages[-1], tasks[0])


def _has_score(stage: Stage, task: str) -> bool:
    """Whether a task is measured with the weights that a stage has now."""
    return stage.eval_file(task).exists() and read_cell(stage, task)["checkpoint"] == stage.fingerprint()


def _is_done(run: Run, folder: Path, start: Stage, cell: dict[str, Any]) -> bool:
    """Whether a relearning is there and measured.

    Raises:
        RunError: if it began with other weights than the run has now, or was measured in another way than `cell`.
    """
    if not (folder / "manifest.json").exists():
        return False
    there = Run.open(folder)
    if there.manifest.get("begins_with") != begins_with(start):
        raise RunError(f"{folder} began with different weights than {start.name} has now. Remove it to relearn.")
    for stage in there.stages[1:]:
        if stage.is_trained and _has_score(stage, str(stage.task)):
            settings = read_cell(stage, str(stage.task))["settings"]
            if lines := differences(settings, cell["settings"]):
                raise RunError(
                    f"{folder} was measured with different settings (in the folder -> in the run):\n"
                    + "\n".join(lines)
                    + "\nRemove it to relearn with those of the run."
                )
    return _is_measured(there) and there.tasks == run.tasks[:-1]


def _is_measured(relearned: Run) -> bool:
    """Whether all stages are measured. The checkpoints of those that are go.

    A stage whose checkpoint went before it was measured, or whose score was deleted, is trained again.
    """
    done = True
    for stage in relearned.stages[1:]:
        if not stage.is_trained:
            done = False
        elif _has_score(stage, str(stage.task)):
            for checkpoint in stage.saved:
                remove(checkpoint)
        else:
            done = False
            if not stage.saved:
                remove(stage.train_file)
    return done


def _check_sources(run: Run, rows: int) -> None:
    """Makes sure that checkpoint, base model and data are those of the run, with as many rows as are asked for."""
    loaded, _ = checks.verify(run, [run.stages[-1]], tasks=run.tasks[:-1])
    for name, task in loaded.items():
        if (there := len(list(islice(task.training_docs(), rows)))) < rows:
            raise RunError(f"--rows {rows}: {name} has {there} training rows; use at most {there}.")


def _train_and_measure(run: Run, start: Stage, folder: Path, rows: int, steps: int, cell: dict[str, Any]) -> None:
    config, model_args = parse(CLConfig, ["--like", str(run.path), "--output_dir", str(folder)], "relearn")
    config.tasks, config.epochs, config.cells, config.general, config.judged = run.tasks[:-1], None, "own", [], []
    config.train_rows, config.max_steps = rows, steps
    config.gradient_accumulation_steps *= run.manifest.get("processes", 1)
    # So few steps are all taken at the run's learning rate.
    config.lr_scheduler_type, config.warmup_steps = "constant", 0
    # With the settings of the run's cells, which may differ from its configuration.
    config.backend, config.engine_args = cell["settings"]["backend"], cell.get("engine_args") or None
    kind = type("RelearnTrainer", (RelearnTrainer,), {"source": run, "start": start, "__module__": __name__})
    relearned = train(kind, config, model_args)
    stages = [str(stage.index) for stage in relearned.stages[1:]]
    if run_alone(["trace_bench", "evaluate", str(folder), "--stages", *stages]):
        raise RunError(
            f"The evaluation of {folder} failed: see the error above. Finished work is kept; run this again."
        )
    _is_measured(relearned)
