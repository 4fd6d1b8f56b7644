"""What is shown and logged while a stage is trained."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from trace_bench.run import read_json
from trace_bench.status import duration, seconds_left
from trace_bench.text import printable
from trace_tasks.data import task_name
from trace_tasks.data.files import write_json
from trainers.base.checkpoints import CheckpointTrainer


def follow(trainer: CheckpointTrainer) -> None:
    """Replaces HF's progress bar by our callbacks."""
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(_ProgressFile(trainer))
    trainer.add_callback(_LossesGoOn(trainer))
    trainer.add_callback(_WandbEnd())
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # HF's default folder is removed when the stage is done
            folder = callback.logging_dir or trainer.run.path / "tensorboard"
            callback.logging_dir = f"{folder}/{trainer.stage.name}"
    if not trainer.args.disable_tqdm:
        trainer.add_callback(_ProgressBar(trainer))


class _ProgressFile(TrainerCallback):
    """Writes how far the training is, for `trace-bench status`, and tells the sampler which epoch begins."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self.trainer = trainer
        self.written = -1.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # With several processes, accelerate does not pass the epoch on to the sampler of a resumed stage.
        if self.trainer.grouped is not None:
            self.trainer.grouped.set_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.is_world_process_zero and logs and "loss" in logs and now - self.written > 1:
            self.written = now
            progress = {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": float(logs["loss"]),
                "tokens": int(self.trainer._total_train_tokens),
                "seconds": now - self.trainer._started,
                "time": time.time(),
            }
            write_json(self.trainer.stage.progress_file, progress)


class _LossesGoOn(TrainerCallback):
    """Makes a resumed stage log the same losses as an uninterrupted one: HF loses those that are not logged yet."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._tr_loss += self.trainer._resumed_from["unlogged"]
        self.trainer._globalstep_last_logged -= int(self.trainer._resumed_from["unlogged_steps"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # HF logs an epoch after the checkpoint of its last step: a stage resumed from there would miss it.
        if args.logging_strategy == "epoch" and state.epoch % 1 == 0:
            control.should_log = True


class _WandbEnd(TrainerCallback):
    """Ends the stage's wandb run, which HF leaves open: the next stage would be logged into it."""

    def __init__(self) -> None:
        self.is_callers = self._is_open()

    @staticmethod
    def _is_open() -> bool:
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_open() and not self.is_callers:  # a run that was open before belongs to the caller
            sys.modules["wandb"].finish()


class _ProgressBar(ProgressCallback):
    """HF's progress bar with the stage, the loss and the time left, instead of a line of numbers every few steps."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        stages = trainer.run.stages[1:]
        name = printable(task_name(trainer.stage.task or trainer.stage.name))
        self.title = f"stage {trainer.stage.index}/{len(stages)} {name}"
        self.trained = [read_json(s.train_file)["seconds"] for s in stages if s.train_file.exists()]
        self.stages = len(stages)
        self.watched = sys.stderr.isatty()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step  # not 0 in a resumed stage
        if state.is_world_process_zero:
            self.training_bar: Any = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                dynamic_ncols=True,
                bar_format="{desc} {bar} step {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}",
                mininterval=0.1 if self.watched else 30,  # in a log file every update is a line
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.trainer._started
        text = f"loss {float(logs['loss']):.3f}, {self.trainer._total_train_tokens / seconds:.0f} tokens/s"
        if len(self.trained) + 1 < self.stages:
            left = seconds_left(self.trained, self.stages, seconds, state.global_step / state.max_steps)
            text += f", whole run {duration(left)} left"
        self.training_bar.set_postfix_str(text, refresh=self.watched)
