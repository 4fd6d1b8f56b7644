"""Forgetting within anyone's training: a callback for TRL's trainers and transformers' own.

    trainer.add_callback(ForgettingCallback(trainer, tasks=["trace_fomc"], suites=["boolq"], every=100))

It measures tasks and suites at the start, every so often and at the end, with the model in memory, logs what changed to
the trainer's trackers, and writes a run that `trace-bench report` reads. The training goes on as if it had not been
there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from trace_bench.engine.live import LiveHF, quiet, same_numbers
from trace_bench.engine.models import PROMPT
from trace_bench.evaluate.cells import batches, circumstances, evaluate_batch
from trace_bench.evaluate.external import drop, tasks_record, with_checkpoints
from trace_bench.evaluate.plan import Plan, matrix_settings, suite_settings
from trace_bench.evaluate.tasks import check_context, prepare
from trace_bench.measures.likelihood import LIKELIHOOD
from trace_bench.records import read_cell
from trace_bench.report.results import unit_of
from trace_bench.run import Run, Stage
from trace_bench.tasks import kept_variable, load_tasks
from trace_bench.waiting import locked, others_wait
from trace_tasks import data
from trace_tasks.errors import TraceError
from trace_tasks.tokens import check_room

log = logging.getLogger(__name__)

#: The values of `every` that are not numbers of steps, named as in transformers.
EVERY = ("epoch", "save", "no")
#: Logged beside the headline: a model that was never trained on a task has the knowledge, but not the form.
_TOLERANT = "accuracy_tolerant"
#: The locks of the runs that this process writes. A training that ended with an error leaves its own to the next one.
_LOCKS: dict[Path, ExitStack] = {}


class CallbackError(TraceError):
    """The callback cannot measure this training; the message says why and what to do."""


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Leaves the random numbers, and what TRACE_DATA names, to the program whose training it is."""
    with kept_variable("TRACE_DATA"), same_numbers(torch.device("cpu")):
        yield


class ForgettingCallback(TrainerCallback):
    """Measures what a model forgets while it is trained.

    The model answers greedily, as in `trace-bench evaluate --backend hf`. Its state, its settings and all random
    numbers are afterwards what they were. Of several processes (DDP, ZeRO-1 and 2) the first one measures, and the
    others wait.

    Logged are `score/TASK` and, in points since the start, `change/TASK` (negative = forgotten). Of tasks that have a
    form-tolerant accuracy that one is logged, too, as `TASK_tolerant`, and of all tasks the log-likelihood of the
    reference answers (nats per token) as `TASK_log_likelihood`: it moves before an answer changes.

    Args:
        trainer: The trainer that it will be added to.
        tasks: Names of TRACE's tasks, of your own (TRACE_TASKS), or an order.
        suites: Suites of general ability, such as boolq, mmlu or general.
        every: Steps between two measurements, or "epoch", "save", or "no" (at the start and the end alone).
        rows: The first so many test rows of each task, and at least so many of each suite; None = all.
        output_dir: The run that is written (default: forgetting, in the trainer's output_dir).
        data_path: The rows of TRACE's tasks (default: TRACE_DATA).
        max_prompt_length: Tokens of a prompt, cut on the left.
        max_new_tokens: The most tokens of an answer; None = as each task has it.
        chat_template: Whether prompts are put into the model's chat template.
        chat_template_args: Its variables.
        batch_size: Prompts at once (default: per_device_eval_batch_size).

    Raises:
        CallbackError: if the trainer's model is sharded, or there is nothing to measure.
        DataError: for a task or suite that is not known, or without its data.
    """

    @_unnoticed()
    def __init__(
        self,
        trainer: Trainer,
        tasks: str | Iterable[str] = (),
        suites: str | Iterable[str] = (),
        *,
        every: int | str = "epoch",
        rows: int | None = 100,
        output_dir: str | Path | None = None,
        data_path: str | None = None,
        max_prompt_length: int = 1024,
        max_new_tokens: int | None = None,
        chat_template: bool = False,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | None = None,
    ) -> None:
        _check(trainer, every, rows)
        self.trainer, self.every = trainer, every
        self.place = Path(trainer.args.output_dir or ".").absolute()
        self.path = Path(output_dir or self.place / "forgetting").absolute()
        self.measured: int | None = None
        names, suites = data.expand_orders(data.split_names(tasks)), data.split_names(suites)
        known = data.expand([s if s in {*data.SUITES, *data.GROUPS} else f"general_{s}" for s in suites], data.SUITES)
        if not [*names, *known]:
            raise CallbackError(
                "There is nothing to measure: name tasks, such as trace_fomc, or suites, such as boolq."
            )
        if chat_template_args and not chat_template:
            raise CallbackError("chat_template_args has no effect without chat_template=True. Set both, or neither.")
        source = data.open_data(names, data_path)
        source.use()
        source.check(["test"])
        with quiet():
            loaded = load_tasks(names)
        self.config: dict[str, Any] = {
            "backend": "hf",
            "test_rows": rows,
            "max_prompt_length": max_prompt_length,
            "max_new_tokens": max_new_tokens,
            "chat_template": chat_template,
            **({"chat_template_args": chat_template_args} if chat_template_args else {}),
            "general": known,
            "general_rows": rows,
        }
        precision = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        size = batch_size or trainer.args.per_device_eval_batch_size
        self.lm = LiveHF(model, trainer.processing_class, size, precision)
        manifest = self._manifest(tasks_record(self.path, loaded, source), model)
        self.plan = self._plan(Run(self.path, manifest), known)
        if chat_template:
            self.lm.chat = self.plan.chat(self.lm.tokenizer)
            check_room(self.lm.chat, max_prompt_length)
        self.tasks = prepare(self.plan, loaded, manifest["task_definitions"])
        check_context(self.plan, self.tasks, self.lm.max_length, "This is the model's limit:")

    def _manifest(self, record: dict[str, Any], model: Any) -> dict[str, Any]:
        return {
            "method": "callback",
            "answers_only": "measured by ForgettingCallback while the model was trained",
            "model": {
                "name": model.config._name_or_path or "unknown",
                "revision": getattr(model.config, "_commit_hash", None),
            },
            **record,
            "config": self.config,
            "seed": self.trainer.args.seed,
            "checkpoints": {},
        }

    def _plan(self, run: Run, suites: Iterable[str]) -> Plan:
        # As --engine-args of `trace-bench evaluate` would say it: other roundings are another setting.
        precision = self.lm.mixed_precision_dtype
        engine = {"mixed_precision_dtype": str(precision).removeprefix("torch.")} if precision else {}
        matrix = matrix_settings(self.config, engine)
        settings = dict.fromkeys(run.tasks, matrix) | suite_settings(suites, self.config, matrix)
        missing = {run.stages[0]: list(settings)}
        return Plan(run, self.config, engine, matrix, settings, {}, missing, likelihood=True)

    # ---------------------------------------------------------------------------------------------- transformers' hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures the model before the first step; a resumed training keeps its former measurements."""
        if self.trainer.is_world_process_zero():
            self._lock()
            self._begin(state.global_step)
        self.measured = None
        if state.global_step == 0:
            self._measure(model, control, "0_base")
        elif self.every == "save":  # the program may have ended between saving this step and measuring it
            self._measure_step(model, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures after every `every` steps, and after the last step."""
        due = isinstance(self.every, int) and state.global_step % self.every == 0
        if due or state.global_step >= state.max_steps:
            self._measure_step(model, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures after an epoch."""
        if self.every == "epoch":
            self._measure_step(model, state, control)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures what was saved."""
        if self.every == "save":
            self._measure_step(model, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures the final model, if it is not that of the last step."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._measure(model, control, "best")
        else:
            self._measure_step(model, state, control)
        if self.trainer.is_world_process_zero():
            _LOCKS.pop(self.path).close()
            log.info("To see what was forgotten: trace-bench report %s", self.path)

    # ---------------------------------------------------------------------------------------------------------- the run

    def _lock(self) -> None:
        """Locks the run until the training ends: a second training at the same time would mix its numbers in."""
        if self.path in _LOCKS:
            _LOCKS.pop(self.path).close()
        lock = ExitStack()
        lock.enter_context(locked(self.path.parent, self.path.name))  # beside the folder, which may be moved aside
        _LOCKS[self.path] = lock

    def _begin(self, step: int) -> None:
        """Begins the run, or continues it at the step where the training resumes.

        Raises:
            RunError: if the folder holds another run, or measured something else.
        """
        manifest, later = dict(self.plan.run.manifest), []
        if step == 0:
            self._move_aside()
        if (self.path / "manifest.json").exists():
            there = Run.open(self.path).manifest
            later = [name for name in there.get("checkpoints", {}) if _step_of(name) > step]
            manifest |= {key: there[key] for key in ("checkpoints", "folders") if key in there}
        elif step:
            log.warning(
                "The training continues at step %d, but %s has no measurement of its start: changes since then are "
                "unknown.",
                *(step, self.path),
            )
        self.run = Run.create(self.path, manifest)  # before anything is removed: refuses a different run
        if later:  # measurements of steps that are trained again
            self.run = drop(self.path, later)
        self.plan = replace(self.plan, run=self.run)
        if self.config["chat_template"]:  # with the date on which the run began
            self.lm.chat = self.plan.chat(self.lm.tokenizer)

    def _move_aside(self) -> None:
        """Gives another name to the run of a training that ended, or was killed before its first checkpoint."""
        if not (self.path / "manifest.json").exists():
            return
        there = Run.open(self.path).manifest
        if there["method"] == "callback" and there["checkpoints"]:
            free = (self.path.with_name(f"{self.path.name}-{n}") for n in count(1))
            aside = next(place for place in free if not os.path.lexists(place))
            self.path.rename(aside)
            log.warning("%s holds measurements of an earlier training: it is %s now.", self.path, aside)

    def _measure_step(self, model: Any, state: Any, control: Any) -> None:
        """Measures a step, unless it is measured already."""
        if self.measured != state.global_step:
            self.measured = state.global_step
            self._measure(model, control, f"step_{state.global_step}")

    def _measure(self, model: Any, control: Any, name: str) -> None:
        """Makes the cells of a stage and logs them, in the first process."""
        with others_wait():
            if not self.trainer.is_world_process_zero():
                return
            stage = self._stage(name)
            if stage.index and all(stage.eval_file(task).exists() for task in self.plan.settings):
                return  # before the training was interrupted
            self.lm.take(self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False))
            made = {"checkpoint": name if stage.index else None, **circumstances(self.plan, self.lm.device.type)}
            with ExitStack() as stack:
                stack.enter_context(locked(stage.path, "evaluate"))
                stack.enter_context(self.lm.left_as_it_was())
                for batch in batches(self.plan, self.tasks, list(self.plan.settings)):
                    evaluate_batch(self.plan, self.tasks, self.lm, stage, batch, made)
            self._log(stage, control)

    def _stage(self, name: str) -> Stage:
        """The stage of that name; a new one is added to the manifest."""
        there = self.run.manifest["checkpoints"]
        if name != "0_base" and name not in there:
            place = str(self.place / name.replace("step_", "checkpoint-"))  # where transformers may have saved it
            self.run = with_checkpoints(self.run, {**there, name: place})
        return self.run.stages[["0_base", *self.run.manifest["checkpoints"]].index(name)]

    def _log(self, stage: Stage, control: Any) -> None:
        """Logs the scores and their changes since the start, in the units of the report."""
        values: dict[str, float] = {}
        start = self.run.stages[0]
        for name in self.plan.settings:
            cell = read_cell(stage, name)
            before = read_cell(start, name) if stage.index and start.eval_file(name).exists() else None
            further = {_TOLERANT: f"{name}_tolerant", LIKELIHOOD: f"{name}_{LIKELIHOOD}"}
            for metric, label in {cell["headline"]: name, **further}.items():
                if (score := cell["metrics"].get(metric, {}).get("value")) is None:
                    continue
                unit = unit_of(metric, [cell])
                values[f"score/{label}"] = unit.factor * score
                if before is not None and (then := before["metrics"][metric]["value"]) is not None:
                    values[f"change/{label}"] = unit.factor * unit.sign * (score - then)
        due = control.should_log
        # Not TRL's `log`, which would reset its means. Logging here must not count as having logged the step's loss.
        Trainer.log(self.trainer, values)
        control.should_log = due


def _step_of(name: str) -> float:
    """The step of a stage, for sorting; the best model comes after all steps."""
    return int(name.removeprefix("step_")) if name.startswith("step_") else math.inf


def _check(trainer: Trainer, every: int | str, rows: int | None) -> None:
    """Refuses what cannot be measured, before anything is loaded."""
    if not ((isinstance(every, int) and every > 0) or every in EVERY) or isinstance(every, bool):
        raise CallbackError(
            f"every={every!r} is not allowed: use a number of steps (at least 1), or {' or '.join(EVERY)}."
        )
    if rows is not None and rows < 1:
        raise CallbackError(f"rows={rows!r} is not allowed: use a number of at least 1, or None for all rows.")
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    sizes = trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()
    spread = {
        "FSDP": trainer.is_fsdp_enabled,
        "ZeRO-3": plugin is not None and plugin.zero_stage == 3,
        "Tensor, context or sequence parallelism": max(sizes) > 1,
    }
    if kinds := [kind for kind, used in spread.items() if used]:
        raise CallbackError(
            f"{kinds[0]} gives each process only a part of the weights or of a text, but one process has to measure "
            "alone. Train with DDP or ZeRO-2; or save checkpoints and measure them: trace-bench evaluate RUN --model "
            "BASE --checkpoint NAME=PATH."
        )
    _check_model(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        raise CallbackError(
            f"The trainer's processing_class is {type(trainer.processing_class).__name__}, which is not a tokenizer. "
            "Give the model's tokenizer to the trainer."
        )


def _check_model(model: Any) -> None:
    """Refuses a model that gives no answers, or an adapter whose answers would depend on the batch."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate() or inner.config.is_encoder_decoder:
        raise CallbackError(
            f"The trainer's model is {type(inner).__name__}. ForgettingCallback measures a causal language model of "
            "transformers, or a PEFT model around one."
        )
    adapter = model.active_peft_config if isinstance(model, PeftModel) else None
    if adapter is not None and adapter.is_prompt_learning and adapter.peft_type != PROMPT:
        raise CallbackError(
            f"The trainer's adapter is of the kind {adapter.peft_type.value}. Among adapters that add tokens to the "
            f"input, only {PROMPT} can be measured, here and with trace-bench evaluate."
        )
