"""The stage loop, and the trainer that every method of continual learning is made of.

A method is one file with a Config and a Trainer, which override only what the method changes:

    hook                      for                                       called
    stage_dataset(stage)      what is trained on                        once, before the stage
    stage_model(stage)        which parameters are trained              once, before the stage
    begin_stage, end_stage    state carried between stages, as files    around the stage
                              in stage.method_state
    adjust_gradients(model)   the gradient, before clipping             once per optimizer step
    compute_loss              TRL's own, for losses on the outputs      once per micro-batch

Everything else is TRL's SFTTrainer. Each stage is loaded from the checkpoint of the stage before, whether or not
this process trained it, so a resumed run and an uninterrupted one are the same run.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import math
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_pt_utils import get_model_param_count
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from trace_bench import checks, ending, records
from trace_bench.engine import models
from trace_bench.evaluate import EXTRA_SETTINGS, answer_tokens
from trace_bench.keys import refuse_secrets
from trace_bench.run import Run, RunError, Stage, locked, read_json, source_commit
from trace_bench.status import duration, seconds_left
from trace_bench.tables import task_name
from trace_bench.tasks import check_stages, data_record, load_tasks, training_rows
from trace_bench.text import prepare_logging, printable
from trace_tasks import data
from trace_tasks.data.files import fingerprint, fresh_dir, remove, sync_files, write_json
from trace_tasks.errors import TraceError, brief
from trace_tasks.limits import limited
from trace_tasks.tokens import Chat, check_room, example_ids

log = logging.getLogger(__name__)

#: Settings of a stage that HF's configs do not mark as deciding the result, but do.
_DECIDING = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "max_steps",
    "optim",
    "seed",
    "bf16",
)
#: Settings that say where and how to run, not what comes out.
_INDIFFERENT = (
    "output_dir",
    "data",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_num_proc",
    "local_rank",
    "use_cpu",
    "eos_token",
    "log_level",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataset_kwargs",
    "ddp_timeout",
    "keep",
)


#: What weighs the same in a loss.
LOSS_WEIGHTS = ["rows", "tokens"]

_MEMORY = (
    "In a new run (--output_dir) give a smaller per_device_train_batch_size with as much more "
    "gradient_accumulation_steps, gradient_checkpointing: true, a shorter max_prompt_length or max_answer_length, or "
    "LoRA (use_peft: true)."
)


class ConfigError(TraceError):
    """The configuration cannot be run; the message says which value and what is allowed."""


@dataclass
class CLConfig(SFTConfig):
    """Configuration of a run: TRL's SFTConfig with the sequence of tasks and how it is measured.

    Args:
        output_dir: The run directory.
        data: Where the data is (see TRACE_DATA); None takes the variable.
        tasks: The tasks in the order of training: lm-eval names, or the paper's "order1" or "order2".
        epochs: Epochs of each task, in the order of `tasks`; None takes num_train_epochs for all.
        train_rows: The first so many training rows of each task, for trials; None = all.
        test_rows: The first so many test rows of each task, for trials; None = all.
        max_prompt_length: Tokens of a prompt, in training and in evaluation; the end is kept.
        max_answer_length: Tokens of an answer in training, EOS included.
        max_new_tokens: The most tokens generated for an answer; None leaves it to the tasks.
        chat_template: Whether prompts are put into the model's chat template, in training and in evaluation.
        chat_template_args: Variables of the chat template, such as {"enable_thinking": false}; judged answers have
            them too.
        loss_weights: What weighs the same in the loss of an optimizer step: "rows" (the mean over a row's answer
            tokens, then over the rows: what the official micro-batches of one to four rows come to) or "tokens" (the
            mean over all answer tokens, HF's own: a row weighs as much as its answer is long).
        cells: The tasks that each stage is evaluated on: "seen", "all", or "own" (that of the stage alone).
        keep: Which checkpoints stay on the disk: "all"; "last" (earlier stages cannot be evaluated later); or
            "evaluated" (each stage is evaluated right after training, then the one before is dropped).
        general: General-ability suites measured besides the matrix: names, or "general" for the paper's six.
        general_stages: The stages of `general` and `judged`: "last" (stage 0 and the last), or "all".
        general_rows: At least so many rows of each suite, for a quick look: equal parts, rounded up, of its subtasks;
            None = all.
        judged: Sets of prompts whose answers a judge is to compare: names, "instruct" or "safety".
        judged_rows: The first so many prompts of each set; None = all.
        judged_max_new_tokens: The most tokens of their answers; None = 512.
        backend: Inference for the evaluation, "vllm" or "hf".
        engine_args: Arguments of the engine, given on as they are (vLLM's LLM, or lm-eval's HFLM).
    """

    data: str | None = field(default=None, metadata={"help": "Where the data is; default: TRACE_DATA."})
    tasks: list[str] = field(
        default_factory=lambda: ["order1"],
        metadata={"help": "lm-eval task names in the order of training, or order1 or order2 of the paper."},
    )
    epochs: list[float] | None = field(
        default=None, metadata={"help": "Epochs of each task, in the order of the tasks."}
    )
    train_rows: int | None = field(default=None, metadata={"help": "First so many training rows of each task."})
    test_rows: int | None = field(default=None, metadata={"help": "First so many test rows of each task."})
    max_prompt_length: int = field(
        default=1024, metadata={"help": "Tokens of a prompt in training and evaluation, cut on the left."}
    )
    max_answer_length: int = field(default=512, metadata={"help": "Tokens of an answer in training, with EOS."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "The most tokens generated for an answer; default: each task's own."}
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Put prompts into the chat template, in training and evaluation."}
    )
    chat_template_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables of the chat template, as JSON, such as '{\"enable_thinking\": false}'."},
    )
    loss_weights: str = field(
        default="rows",
        metadata={"help": "What weighs the same in the loss: rows, or tokens as HF has it.", "choices": LOSS_WEIGHTS},
    )
    cells: str = field(
        default="seen",
        metadata={"help": "The tasks each stage is evaluated on.", "choices": ["seen", "all", "own"]},
    )
    keep: str = field(
        default="all",
        metadata={"help": "Checkpoints to keep on the disk.", "choices": ["all", "last", "evaluated"]},
    )
    general: list[str] = field(
        default_factory=list, metadata={"help": "General-ability suites besides the matrix: general, or their names."}
    )
    general_stages: str = field(
        default="last",
        metadata={"help": "Stages of general and judged: stage 0 and the last, or all.", "choices": ["last", "all"]},
    )
    general_rows: int | None = field(
        default=None, metadata={"help": "At least so many rows of each suite, of its subtasks in equal parts."}
    )
    judged: list[str] = field(
        default_factory=list, metadata={"help": "Prompts answered for the judges: instruct, safety, or their names."}
    )
    judged_rows: int | None = field(default=None, metadata={"help": "First so many prompts of each judged set."})
    judged_max_new_tokens: int | None = field(
        default=None, metadata={"help": "The most tokens of an answer to be judged; default: 512."}
    )
    backend: str = field(default="vllm", metadata={"help": "Inference for the evaluation.", "choices": ["vllm", "hf"]})
    engine_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the inference engine, as JSON, given on as they are."}
    )

    # The paper's optimisation (its section 4.2 and the official scripts) where TRL's defaults differ.
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule of each stage."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    # The loss curve of a stage is part of its record, and stages are short.
    logging_steps: float = field(default=1, metadata={"help": "Log the loss every so many steps."})
    # Examples come as token ids, cut already: TRL's own limit would cut answers.
    max_length: int | None = field(default=None, metadata={"help": "Not used: see max_prompt_length."})
    # HF's checkpoints, from which a killed stage goes on; they are gone when the stage is done.
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints within a stage, to go on from: no, steps (save_steps) or epoch."}
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints within a stage to keep."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers, such as trackio wandb tensorboard: a run of each for each stage. [none]"},
    )

    # HF reads these fields as JSON when they come from the command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "engine_args", "chat_template_args"]  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Checks the values that can be checked without data or model."""
        # HF refuses bfloat16 without an accelerator unless it is told that a CPU is meant.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        try:
            super().__post_init__()
        except (TypeError, ValueError) as e:  # HF's own checks
            raise ConfigError(str(e)) from e
        for name in ("tasks", "general", "judged"):
            value = getattr(self, name)
            names = [value] if isinstance(value, str) else value  # YAML without brackets
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise ConfigError(f"{name}={value!r} is not allowed: use a list of names.")
            setattr(self, name, names)
        if not self.tasks:
            raise ConfigError("tasks is empty: name at least one task.")
        self.tasks = [t for name in self.tasks for t in data.ORDERS.get(name, [name])]
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks={self.tasks}: every task can be one stage only.")
        if self.epochs is not None and not isinstance(self.epochs, list):
            raise ConfigError(f"epochs={self.epochs!r} is not allowed: use a list with a number for each task.")
        if self.epochs is not None and len(self.epochs) != len(self.tasks):
            raise ConfigError(
                f"epochs has {len(self.epochs)} values for {len(self.tasks)} tasks ({', '.join(self.tasks)}). "
                "Give one for each task, or leave it out and set num_train_epochs."
            )
        if self.save_strategy != "no" and self.save_only_model:
            raise ConfigError("save_only_model=true: a stage cannot go on without the optimizer's state. Leave it out.")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ConfigError(f"save_total_limit={self.save_total_limit} is not allowed: use 1 or more.")
        for name in ("eos_token", "chat_template_path"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: TRL changes the tokenizer for the training alone. Change it in "
                    "the files of the base model, from which evaluation takes it, too."
                )
        if self.max_length is not None:
            raise ConfigError(
                f"max_length={self.max_length} would cut answers off. Use max_prompt_length and max_answer_length."
            )
        for name in (
            *("train_rows", "test_rows", "max_prompt_length", "max_answer_length", "max_new_tokens"),
            *("general_rows", "judged_rows", "judged_max_new_tokens"),
            *("per_device_train_batch_size", "gradient_accumulation_steps"),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name}={value!r} is not allowed: use a whole number of at least 1.")
        for name, value in [("num_train_epochs", self.num_train_epochs), *(("epochs", e) for e in self.epochs or [])]:
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"{name}={value!r} is not allowed: use a number above 0.")
        if not (isinstance(self.learning_rate, int | float) and 0 <= self.learning_rate < math.inf):
            raise ConfigError(f"learning_rate={self.learning_rate!r} is not allowed: use a number of at least 0.")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ConfigError(f"seed={self.seed!r} is not allowed: use a number from 0 to {2**32 - 1}.")
        for name, mapping in (("engine_args", self.engine_args), ("chat_template_args", self.chat_template_args)):
            if not isinstance(mapping, dict | None):
                raise ConfigError(f"{name}={mapping!r} is not allowed: use a mapping of arguments.")
        assert not isinstance(self.engine_args, str)  # HF has read it
        if self.chat_template_args and not (self.chat_template or self.judged):
            raise ConfigError("chat_template_args has no effect without chat_template=true: set that, too.")
        for name, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
            if self.loss_weights == "rows" and getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is a loss by tokens: set loss_weights: tokens, or {name}: {plain}."
                )
        try:
            refuse_secrets(self.to_dict(), "the configuration's")
        except RunError as e:
            raise ConfigError(str(e)) from e
        try:
            self.general = data.expand(self.general, data.SUITES)
            self.judged = data.expand(self.judged, data.JUDGED)
        except data.DataError as e:
            raise ConfigError(f"general={self.general}, judged={self.judged}: {e}") from e
        for f in fields(self):
            allowed = f.metadata.get("choices")
            if allowed and f.name in self._own() and getattr(self, f.name) not in allowed:
                raise ConfigError(f"{f.name}={getattr(self, f.name)!r} is not allowed: use {' or '.join(allowed)}.")

    @property
    def stages(self) -> list[str]:
        """The stages of the run. One for each task and named after it, unless a method has others."""
        return self.tasks

    @property
    def virtual_tokens(self) -> int:
        """The most positions that a method's soft prompts take of the model's context."""
        return 0

    def _own(self) -> set[str]:
        """The names of the project's own settings and of the method's."""
        return {f.name for f in fields(self)} - {f.name for f in fields(SFTConfig)}

    def manifest(self) -> dict[str, Any]:
        """The settings that decide the result: all of the project's own and every changed one of TRL's."""
        own = self._own()
        values = self.to_dict()
        defaults = type(self)(output_dir=self.output_dir, use_cpu=self.use_cpu).to_dict()
        return {
            k: v
            for k, v in values.items()
            if k not in _INDIFFERENT
            and ((k in own and k not in EXTRA_SETTINGS) or k in _DECIDING or v != defaults.get(k))
        }


class CLTrainer(SFTTrainer):
    """One stage of continual learning. Subclasses override hooks; this class is sequential fine-tuning.

    Args:
        config: The run's configuration.
        model_args: TRL's ModelConfig: the base model, its dtype, LoRA.
        run: The run; a method may read its earlier stages.
        stage: The stage to train.
        tokenizer: The base model's tokenizer.
    """

    #: What is counted during a stage and so has to be kept in its checkpoints, besides what HF keeps.
    counters: ClassVar[tuple[str, ...]] = ("_total_train_tokens",)

    def __init__(self, config: CLConfig, model_args: ModelConfig, run: Run, stage: Stage, tokenizer: Any) -> None:
        self.run, self.stage, self.model_args, self.config = run, stage, model_args, config
        self.tokenizer = tokenizer
        #: Renders chat prompts as the evaluation does; None without a chat template.
        arguments: Any = config.chat_template_args
        self.chat = Chat(tokenizer, arguments, run.manifest.get("date")) if config.chat_template else None
        self.grouped: LengthGrouped | None = None
        args = self.stage_args(stage)
        args.output_dir = str(stage.attempt)
        # A stage begins at step 0: in one run of a tracker the stages would lie on each other.
        args.run_name = f"{args.run_name or run.path.name} {stage.name}"
        args.save_total_limit = None  # HF drops the oldest by the times of files; `_save_checkpoint` by their steps
        #: Before the checkpoint that the stage goes on from: seconds, and the sum of the losses of its steps.
        self.before: dict[str, float] = {"seconds": 0.0, "losses": 0.0, "step": 0}
        self.started = time.perf_counter()
        set_seed(args.seed)  # an adapter's first weights are random
        super().__init__(
            model=self.stage_model(stage),
            args=args,
            train_dataset=self.stage_dataset(stage),
            processing_class=tokenizer,
        )
        # Neither TRL's losses nor ours need the model for their division by the whole step: whatever its forward takes.
        self.model_accepts_loss_kwargs = True
        for noisy in (ProgressCallback, PrinterCallback):
            self.remove_callback(noisy)
        self.add_callback(_Live(self))
        self.add_callback(_EndOfWandb())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # HF's own place is gone when the stage is done
                callback.logging_dir = str(Path(callback.logging_dir or run.path / "tensorboard") / stage.name)
        if not args.disable_tqdm:
            self.add_callback(_Progress(self))

    # ------------------------------------------------------------------------------------------------------- hooks

    @classmethod
    def prepare(cls, config: Any, model_args: ModelConfig) -> dict[str, Any]:
        """Checks what the method needs, before anything expensive starts. It may change the configuration.

        Returns:
            What the method adds to the manifest, and so may not change when the run is resumed.

        Raises:
            ConfigError, data.DataError: if it cannot be run.
        """
        return {}

    def stage_dataset(self, stage: Stage) -> Dataset:
        """The training set of a stage: columns input_ids and labels."""
        assert stage.task is not None
        return self.task_dataset(stage.task)

    def stage_args(self, stage: Stage) -> CLConfig:
        """The settings of a stage: those of the run, with the epochs of its task."""
        args = copy.copy(self.config)
        if self.config.epochs is not None:
            args.num_train_epochs = self.config.epochs[stage.index - 1]
        return args

    def stage_model(self, stage: Stage) -> Any:
        """The model to train: the one of the stage before, its adapter or all of its parameters trainable."""
        return self.trainable_model(self.run.stages[stage.index - 1].checkpoint)

    def begin_stage(self) -> None:
        """Called before the training of the stage: load what the method needs of earlier stages."""

    def end_stage(self) -> None:
        """Called after the training, before the checkpoint is saved: write the method's state."""

    def adjust_gradients(self, model: Any) -> None:
        """Called once per optimizer step with the accumulated gradient, before clipping.

        A penalty belongs here, as a gradient: one added to the loss would be scaled by how the batch is divided
        into micro-batches and processes.
        """

    def record(self) -> dict[str, Any]:
        """What the method adds to the stage's train.json."""
        return {}

    # --------------------------------------------------------------------------------------------------- for methods

    def task_dataset(self, task: str, limit: int | None = None) -> Dataset:
        """Token ids of a task's training rows, as `stage_dataset` returns them.

        Args:
            task: An lm-eval task with a training split.
            limit: The first so many rows; None = the run's `train_rows`.
        """
        if limit is None and task in self.run.rows:
            return self.text_dataset(self.run.rows[task])
        tasks = load_tasks([task])
        checks.check_tasks(self.run, tasks)
        return self.text_dataset(training_rows(tasks[task], limit or self.config.train_rows, self.chat))

    def text_dataset(self, rows: list[tuple[str, str]]) -> Dataset:
        """Token ids of prompts and answers, as `stage_dataset` returns them."""
        prompts, answers = zip(*rows, strict=True)
        examples = example_ids(
            self.tokenizer, prompts, answers, self.config.max_prompt_length, self.config.max_answer_length, self.chat
        )
        return Dataset.from_list(examples)

    def trainable_model(self, checkpoint: Path | None) -> Any:
        """A model to train on from a checkpoint (None = the base model): its adapter, or all of its parameters."""
        if not self.model_args.use_peft:
            return self.load_model(checkpoint)
        from peft import PeftModel, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        base = self.load_model(None)
        model: Any
        if checkpoint is not None:
            models.refuse_pickle(checkpoint)
            model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
        else:
            peft_config = get_peft_config(self.model_args)
            assert peft_config is not None
            # As TRL does for ZeRO-3, which wants parameters of one type.
            plugin = self.config.deepspeed_plugin
            one_type = plugin is not None and plugin.zero_stage == 3
            model = get_peft_model(base, peft_config, autocast_adapter_dtype=not one_type)
        if self.config.bf16:
            # PEFT brings each layer's input to the adapter's float32, and autocast brings it back to bf16 in the next
            # operation: two copies of every activation that change no bit.
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = False  # type: ignore[attr-defined]
            frozen_in_bf16(model)
        return model

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        assert self.model is not None
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def answer_logits(self, model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that predict answer tokens, and these tokens.

        The LM head is computed at answer positions only: over a vocabulary of 50,000 words it would take most of the
        time of a step when answers are short.

        Args:
            model: The model, wrapped or not.
            inputs: A batch of the collator, with labels.

        Returns:
            float32 logits of shape (answer tokens of the batch, vocabulary), and their targets.
        """
        target = inputs["labels"][:, 1:]
        answer = target != -100

        def at_answers(head: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            # The state before a token predicts it. A soft prompt has states of its own in front.
            return (args[0][:, -answer.shape[1] - 1 : -1][answer],)

        # Rows are padded on the right, where a causal model never looks: without a mask the attention kernels leave
        # the future out instead of computing and masking it.
        kept = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask")}
        if self.aux_loss_enabled:  # which needs the mask to leave padding out
            kept |= {"attention_mask": inputs["attention_mask"], "output_router_logits": True}
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(at_answers)
        try:
            output = model(**kept, use_cache=False)
        finally:
            hook.remove()
        #: What a mixture of experts adds to the loss of a batch, as TRL takes it.
        self.router_loss = self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else 0.0
        return output.logits.float(), target[answer]

    def weighted(self, losses: torch.Tensor, inputs: Any, weights: str | None = None) -> tuple[torch.Tensor, int]:
        """The weighted sum of a batch's losses, and by how many items of the whole a sum over batches is divided.

        Args:
            losses: Of each answer token, in the order of `answer_logits`.
            inputs: The batch, with labels.
            weights: "rows" or "tokens"; None = the run's.

        Returns:
            With "rows" the sum of the rows' means, and the rows; with "tokens" the sum of all, and the tokens.
        """
        lengths = (inputs["labels"][:, 1:] != -100).sum(dim=1)
        if (weights or self.config.loss_weights) == "tokens":
            return losses.sum(), len(losses)
        return (losses / lengths.repeat_interleave(lengths)).sum(), int((lengths > 0).sum())

    def step_loss(self, losses: torch.Tensor, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """Losses of answer tokens as HF's trainer wants the loss of a micro-batch.

        What is divided by are the items (rows or tokens) of the whole optimizer step, over its micro-batches and
        processes: the gradient of the step does not depend on how its rows are split.
        """
        total, items = self.weighted(losses, inputs)
        loss = total / (items if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes what was divided by all
        return loss

    def batches(self, rows: Dataset, size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Rows as batches on the device, in order."""
        size = size or self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            yield {k: v.to(self.accelerator.device) for k, v in batch.items()}

    def own_share(self, rows: Dataset) -> Dataset:
        """The rows that this process works on when all processes share a computation."""
        return rows.select(range(self.accelerator.process_index, len(rows), self.accelerator.num_processes))

    def loss_gradient(self, rows: Dataset, weights: str | None = None) -> dict[str, torch.Tensor]:
        """The gradient of the task loss on `rows`, beside the one being accumulated.

        Each process computes its share of the rows, and all get the sum: it is faster, and the processes cannot drift
        apart by the rounding of kernels that sum in another order each time.

        Args:
            rows: The same ones in every process.
            weights: What weighs the same in the mean, "rows" or "tokens"; None = as in the loss of the run.
        """
        parameters = self.trained()
        lengths = [sum(label != -100 for label in labels) for labels in rows["labels"]]
        items = sum(lengths) if (weights or self.config.loss_weights) == "tokens" else len(rows)
        gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in self.batches(self.own_share(rows)):
            with self.compute_loss_context_manager():
                logits, target = self.answer_logits(self.model, batch)
                loss = self.weighted(cross_entropy(logits, target, reduction="none"), batch, weights)[0] / items
            parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, part in zip(parameters, parts, strict=True):
                if part is not None:
                    gradient[name] += part
        # A reduction copies the gradient, even of a single process.
        return self.accelerator.reduce(gradient, "sum") if self.accelerator.num_processes > 1 else gradient

    def row_gradients(
        self, rows: Dataset, value: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The gradient of each row's own sum over its answer tokens, beside the one being accumulated.

        Where linear layers alone are trained, such as LoRA's, one pass for the rows of a batch is enough: a row's
        gradient of a layer's weight is the product of the layer's inputs and of the gradients of its outputs, both of
        the row's positions only. Otherwise each row takes a pass.

        Args:
            rows: What this process works on; nothing is exchanged.
            value: Makes of logits (tokens, vocabulary), their targets (tokens), and how many tokens the answer has that
                each is of (tokens), what is summed (tokens).

        Yields:
            The name of a parameter and its gradients for some rows, shape (rows, *parameter), float32. All parameters
            of a batch of rows follow each other; rows are ordered by length.
        """
        parameters = self.trained()
        layers = [
            (f"{name}.weight", module)
            for name, module in self.model.named_modules()  # type: ignore[union-attr]
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" in parameters
        ]
        # A head sees answer positions alone, MoE layers call no module of the adapter. Gradient checkpointing is off
        # here, as in all evaluation, so that there may be no room for more than a row.
        unusual = self.model_args.lora_modules_to_save or self.model_args.lora_target_parameters
        together = len(layers) == len(parameters) and not unusual and not self.args.gradient_checkpointing
        lengths = [len(ids) for ids in rows["input_ids"]]
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
        for batch in self.batches(rows, None if together else 1):
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

            def see(layer: Any, args: Any, output: torch.Tensor, *, name: str, seen: Any = seen) -> None:
                seen[name] = args[0], output

            hooks = [
                layer.register_forward_hook(partial(see, name=name)) for name, layer in (layers if together else ())
            ]
            with self.compute_loss_context_manager():
                logits, target = self.answer_logits(self.model, batch)
            for hook in hooks:
                hook.remove()
            answers = (batch["labels"][:, 1:] != -100).sum(dim=1)
            total = value(logits, target, answers.repeat_interleave(answers)).sum()
            if together:
                gradients = torch.autograd.grad(total, [output for _, output in seen.values()])
                for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
                    yield name, gradient.float().transpose(1, 2) @ inputs.detach().float()
            else:
                parts = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
                yield from zip(parameters, (part.float()[None] for part in parts), strict=True)

    def save_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Writes what the next stage needs to stage.method_state; for `end_stage`."""
        if self.is_world_process_zero():
            with fresh_dir(self.stage.method_state) as folder:
                save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "state.safetensors")

    def load_state(self) -> dict[str, torch.Tensor]:
        """What `save_state` wrote at the stage before, on the device; empty at the first stage.

        Raises:
            RunError: if it is gone.
        """
        if self.stage.index == 1:
            return {}
        file = self.run.stages[self.stage.index - 1].method_state / "state.safetensors"
        if not file.is_file():
            raise RunError(
                f"{file} is gone: stage {self.stage.name} cannot be trained without it. Train the stage before anew "
                f"(delete its train.json), or restore the file."
            )
        return {name: tensor.to(self.accelerator.device) for name, tensor in load_file(file).items()}

    def load_model(self, checkpoint: Path | None) -> Any:
        """Loads a full model: `checkpoint`, or the base model."""
        args = self.model_args
        kwargs: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": self.config.trust_remote_code}
        kwargs["use_safetensors"] = True  # other formats can hold code
        if args.attn_implementation is not None:
            kwargs["attn_implementation"] = args.attn_implementation
        if checkpoint is None:
            kwargs["revision"] = args.model_revision
        return AutoModelForCausalLM.from_pretrained(str(checkpoint or args.model_name_or_path), **kwargs)

    # ------------------------------------------------------------------------------------------------------ machinery

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """HF's sampler, but for `train_sampling_strategy: group_by_length`."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        # Processes work on batches that follow each other: they wait for the longest of them.
        self.grouped = LengthGrouped(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)
        return self.grouped

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """TRL's step, then `adjust_gradients` when the gradient of the optimizer step is complete."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            # HF would log 0 and go on, and every later stage would begin with these weights.
            raise RunError(
                f"The loss of stage {self.stage.name} is {loss.item()} at step {self.state.global_step + 1}: training "
                "has diverged. Begin a new run with a lower learning_rate or max_grad_norm."
            )
        if self.accelerator.sync_gradients:
            self.adjust_gradients(model)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, its rows or tokens weighing the same; TRL's own by tokens on a GPU.

        Ours computes the LM head at answer positions only. So does TRL's fused head on GPUs, but not on CPUs, where the
        head over the whole vocabulary would take most of the time of a step when answers are short.
        """
        rows = self.config.loss_weights == "rows"
        plain = self.config.loss_type == "nll" and not (self.label_smoother or self.aux_loss_enabled)
        if return_outputs or not (rows or (self.args.use_cpu and plain)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, target = self.answer_logits(model, inputs)
        loss = self.step_loss(cross_entropy(logits, target, reduction="none"), inputs, num_items_in_batch)
        self.count_tokens(model, inputs)
        return loss + self.router_loss / self.current_gradient_accumulation_steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """HF's batches of an optimizer step, and what its loss is divided by: the answer tokens, or the rows."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.config.loss_weights == "rows" and samples:
            items = sum((batch["labels"][:, 1:] != -100).any(dim=1).sum() for batch in samples).to(device)  # type: ignore[union-attr]
            if self.args.average_tokens_across_devices:
                items = self.accelerator.gather(items).sum()
        return samples, items

    def count_tokens(self, model: Any, inputs: Any) -> None:
        """Adds a batch to the tokens that were trained, as TRL's own `compute_loss` does."""
        if model.training:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """HF's; but in a checkpoint within the stage the trained parameters, as the method has them in memory.

        What is saved for others may be another thing: merged, or several adapters made one.
        """
        if not _internal_call or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(str(output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in self.trained().items()}, folder / _TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The counterpart of `save_model`; called by HF's trainer."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / _TRAINED)
        for name, parameter in self.trained().items():
            parameter.data.copy_(saved[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """HF's checkpoint, and last of all the file that says that it is whole; then older ones go.

        Besides the weights HF writes pickles (optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin). It reads
        them with weights_only, which runs no code, and never reads the last. They are files of this program's own
        attempt, below the run directory, for nobody else, and gone when the stage is trained.
        """
        if self.state.global_step >= self.state.max_steps and self.state.epoch and self.state.epoch % 1:
            return  # HF, going on within an epoch, looks at the number of steps only after one more of them
        folder = self.stage.attempt / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            remove(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        sync_files(folder)
        write_json(
            folder / _WHOLE,
            {
                "of": self._attempt(),
                "step": self.state.global_step,
                "seconds": time.perf_counter() - self.started,
                "losses": self.before["losses"] + self._total_loss_scalar + float(self._tr_loss),
                "counters": {name: getattr(self, name) for name in self.counters},
                "files": {p.name: p.stat().st_size for p in folder.iterdir() if p.name != _WHOLE},
            },
        )
        kept = {path for path, _ in list(self._checkpoints())[: self.config.save_total_limit]}
        for old in self.stage.attempt.glob("checkpoint-*"):
            if old not in kept:
                remove(old)

    def _attempt(self) -> dict[str, Any]:
        """What a checkpoint within the stage has to share with an attempt that goes on from it."""
        before = self.run.stages[self.stage.index - 1].train_file
        return {
            "run": fingerprint(self.run.path / "manifest.json"),
            "stage before": fingerprint(before) if before.exists() else None,
            "processes": self.args.world_size,
        }

    def _checkpoints(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The whole checkpoints of this very stage with what their last file says, newest first."""
        mine = self._attempt()
        folders = {p: p.name.rpartition("-")[2] for p in self.stage.attempt.glob("checkpoint-*")}
        for folder in sorted((p for p, n in folders.items() if n.isdigit()), key=lambda p: -int(folders[p])):
            try:
                whole = read_json(folder / _WHOLE)
                sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != _WHOLE}
            except (OSError, RunError):
                continue  # it was being written when the program was killed
            if whole["of"] == mine and whole["files"] == sizes:
                yield folder, whole

    def resume(self) -> str | None:
        """The checkpoint that the stage goes on from, its counts taken over; None = from the beginning."""
        newest = next(self._checkpoints(), None)
        if newest is None:
            return None
        folder, whole = newest
        for name, value in whole["counters"].items():
            setattr(self, name, value)
        self.before = {name: whole[name] for name in self.before}
        self.started -= whole["seconds"]
        return str(folder)

    def save_checkpoint(self) -> Path:
        """Saves the stage's adapter or model, whole or not at all, and returns its folder."""
        target = self.stage.path / ("adapter" if self.model_args.use_peft else "model")
        # All processes take part in gathering the weights; the first one writes, and says where.
        with fresh_dir(target) if self.is_world_process_zero() else nullcontext(target) as folder:
            (place,) = broadcast_object_list([str(folder)])
            self.save_model(place)
            if self.is_world_process_zero():
                if not list(folder.glob("*.safetensors")):
                    raise RunError(
                        f"{target} would hold no weights: DeepSpeed or FSDP saved shards. Launch with a file of "
                        "trainers/configs/accelerate, which have them put together."
                    )
                # A pickle of the arguments: nobody reads it, and only safetensors are kept.
                (folder / "training_args.bin").unlink(missing_ok=True)
                if self.model_args.use_peft:
                    sort_names(folder, self.accelerator.unwrap_model(self.model).peft_config["default"])
        return target


def sort_names(folder: Path, config: Any) -> None:
    """Sorts the names in an adapter_config.json that PEFT keeps in sets: their order is another in each process.

    Args:
        folder: A saved adapter.
        config: PEFT's configuration of it.
    """
    file = folder / "adapter_config.json"
    names = {key: sorted(value) for key, value in vars(config).items() if isinstance(value, set)}
    file.write_text(json.dumps({**read_json(file), **names}, indent=2, sort_keys=True), encoding="utf-8")


def frozen_in_bf16(model: Any) -> None:
    """Keeps frozen weights of linear layers in bf16, to which autocast would bring them anew in every step.

    The embeddings stay what they are, since the states begin with them; they may be tied to the head.
    """
    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
            for parameter in module.parameters():
                if not parameter.requires_grad and parameter.numel():  # ZeRO-3 leaves empty ones
                    parameter.data = parameter.data.to(torch.bfloat16)


#: Files of a checkpoint within a stage: the trained parameters, and what is written last.
_TRAINED, _WHOLE = "trained.safetensors", "whole.json"


class LengthGrouped(Sampler[int]):
    """Batches of rows of similar length, in random order, others in each epoch.

    HF's own sampler sorts a quarter of the rows at most at a time, so that a stage of few rows is hardly grouped, and
    every window begins with its longest batch.

    Args:
        lengths: The length of each row.
        size: Rows of a batch.
        seed: Decides the order, with the number of the epoch.
        window: So many batches are drawn at random and grouped among themselves.
    """

    def __init__(self, lengths: list[int], size: int, seed: int, window: int = 50) -> None:
        self.lengths, self.size, self.seed, self.window = lengths, size, seed, window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader: an epoch that is resumed has the order that it had."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        whole = len(order) // self.size * self.size
        batches = []
        for start in range(0, whole, self.size * self.window):
            rows = sorted(order[start : min(start + self.size * self.window, whole)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.size] for i in range(0, len(rows), self.size)]
        for i in torch.randperm(len(batches), generator=random).tolist():
            yield from batches[i]
        yield from order[whole:]  # an incomplete batch can only be the last one


class _Live(TrainerCallback):
    """Says in a file how far the training is, for `trace-bench status`, and to the sampler which epoch begins."""

    def __init__(self, trainer: CLTrainer) -> None:
        self.trainer = trainer
        self.written = -1.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where several processes share the batches, a stage that goes on within an epoch does not reach the sampler.
        if self.trainer.grouped is not None:
            self.trainer.grouped.set_epoch(int(state.epoch or 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.is_world_process_zero and logs and "loss" in logs and now - self.written > 1:
            self.written = now
            write_json(
                self.trainer.stage.progress_file,
                {
                    "step": state.global_step,
                    "steps": state.max_steps,
                    "loss": float(logs["loss"]),
                    "tokens": int(self.trainer._total_train_tokens),
                    "seconds": now - self.trainer.started,
                    "time": time.time(),
                },
            )


class _EndOfWandb(TrainerCallback):
    """Ends the stage's run of wandb, which HF leaves open: the next stage would be logged into it."""

    def __init__(self) -> None:
        self.others = self._open()

    @staticmethod
    def _open() -> bool:
        return getattr(sys.modules.get("wandb"), "run", None) is not None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._open() and not self.others:  # one that was open before is the caller's
            sys.modules["wandb"].finish()


class _Progress(ProgressCallback):
    """HF's progress bar with the stage, the loss and the time left, instead of a line of numbers every few steps."""

    def __init__(self, trainer: CLTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        stages = trainer.run.stages[1:]
        name = printable(task_name(trainer.stage.task or trainer.stage.name))
        self.title = f"stage {trainer.stage.index}/{len(stages)} {name}"
        self.trained = [read_json(s.train_file)["seconds"] for s in stages if s.train_file.exists()]
        self.stages = len(stages)
        self.watched = sys.stderr.isatty()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step  # a stage that goes on
        if state.is_world_process_zero:
            self.training_bar: Any = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                dynamic_ncols=True,
                bar_format="{desc} {bar} step {n_fmt}/{total_fmt}, {elapsed}<{remaining}{postfix}",
                mininterval=0.1 if self.watched else 30,  # in a file every state would be a line
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.trainer.started
        text = f"loss {float(logs['loss']):.3f}, {self.trainer._total_train_tokens / seconds:.0f} tokens/s"
        if len(self.trained) + 1 < self.stages:
            left = seconds_left(self.trained, self.stages, seconds, state.global_step / state.max_steps)
            text += f", run {duration(left)} left"
        self.training_bar.set_postfix_str(text, refresh=self.watched)


# ----------------------------------------------------------------------------------------------------- the stage loop


def main(trainer: type[CLTrainer], config: type[CLConfig], argv: list[str] | None = None) -> None:
    """Parses `--config FILE.yaml` and command-line options (which win) and trains every stage of the run."""
    given = None if argv is None else f"python -m trainers.{_method(trainer)} {shlex.join(argv)}"
    with ending.command("train", given, _MEMORY):
        prepare_logging()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if "--help_all" in (sys.argv if argv is None else argv):
            argv = ["--help"]
        try:
            args, model_args = TrlParser((config, ModelConfig)).parse_args_and_config(argv)  # type: ignore[arg-type]
        except (OSError, TypeError, ValueError, yaml.YAMLError) as e:  # no file, no YAML, an unknown key
            raise ConfigError(f"the configuration cannot be read: {e}") from e
        train(trainer, args, model_args)


def train(trainer: type[CLTrainer], config: CLConfig, model_args: ModelConfig) -> Run:
    """Trains every stage of a run that is not trained yet.

    Args:
        trainer: The method.
        config: Its configuration; `output_dir` is the run directory.
        model_args: The base model and LoRA.

    Returns:
        The run, all of its stages trained.

    Raises:
        ConfigError, RunError, data.DataError, models.ModelError: before anything expensive starts.
    """
    state = PartialState()
    if not model_args.model_name_or_path:
        raise ConfigError("model_name_or_path is not set: name a hub id, a local folder, or " + models.QUICKSTART)
    if not config.output_dir:
        raise ConfigError("output_dir is not set: it names the run directory, for example runs/sequential.")
    gpus = 0 if config.use_cpu else torch.cuda.device_count()
    if gpus > 1 and state.num_processes == 1 and config.stages:
        raise ConfigError(
            f"{gpus} GPUs are visible to one process. Take one of them (CUDA_VISIBLE_DEVICES=0), or all: accelerate "
            f"launch --num_processes {gpus} -m trainers.{_method(trainer)} ..., with gradient_accumulation_steps "
            f"divided by {gpus} for the same batch."
        )
    with state.main_process_first():
        trace_data = data.open_data(config.tasks, config.data)
        base = models.resolve_model(model_args.model_name_or_path)
    if config.data and os.environ.get("TRACE_DATA", config.data) not in (config.data, str(trace_data.root)):
        log.warning("TRACE_DATA is not used: the configuration says data=%s.", config.data)
    trace_data.use()
    trace_data.check()
    for name in (*config.general, *config.judged):
        data.source_fingerprint(name)  # its data is needed after hours of training: is it there?
    tasks = load_tasks(config.tasks)
    check_stages(tasks)
    _check_gradients(trainer, config)
    _check_trackers(config)
    added = trainer.prepare(config, model_args)

    manifest = {
        "method": _method(trainer),
        "trains": "lora" if model_args.use_peft else "full",
        "model": {
            "name": model_args.model_name_or_path,
            "path": base,
            "revision": models.pinned_revision(base, model_args.model_revision),
        },
        "tasks": config.tasks,
        **({"stages": config.stages} if config.stages != config.tasks else {}),
        # Another number of processes is another batch.
        **({"processes": state.num_processes} if state.num_processes > 1 else {}),
        "task_versions": {name: task.VERSION for name, task in tasks.items()},
        "task_definitions": checks.definitions(tasks),
        "data": data_record(trace_data, tasks),
        "seed": config.seed,
        # What a chat template that asks for the date is told, whenever a stage is trained or evaluated.
        "date": time.strftime("%Y-%m-%d"),
        "config": {
            **config.manifest(),
            **{
                k: v
                for k, v in asdict(model_args).items()
                if v != getattr(ModelConfig(), k) or k in ("dtype", "use_peft", "lora_r", "lora_alpha", "lora_dropout")
            },
        },
        **added,
    }
    refuse_secrets(manifest, "the manifest's")
    _check_shards()
    model_args = copy.copy(model_args)
    model_args.model_name_or_path = base
    if isinstance(model_args.lora_target_modules, str) and re.fullmatch(r"\w+", model_args.lora_target_modules):
        # TRL makes a text of a list of one, which PEFT reads as a pattern for the whole path of a module.
        model_args.lora_target_modules = [model_args.lora_target_modules]
    if not Path(base).is_dir():
        model_args.model_revision = manifest["model"]["revision"]  # the same at all stages, if the hub's changes
    tokenizer = models.load_tokenizer(base, model_args.model_revision, config.trust_remote_code)
    if tokenizer.eos_token is None:
        raise ConfigError(f"The tokenizer of {base} has no EOS token, so no answer could ever end.")
    _check_model(config, model_args, tokenizer, tasks, lora=manifest["trains"] == "lora")
    chat = None
    if config.chat_template:
        assert not isinstance(config.chat_template_args, str)
        chat = Chat(tokenizer, config.chat_template_args)
        check_room(chat, config.max_prompt_length)
    # Rows are made of all tasks before the first one is trained: a bad one of the last task would cost days.
    rows = {name: training_rows(task, config.train_rows, chat) for name, task in tasks.items() if config.stages}
    if chat is not None:
        rows.clear()  # a stage makes them with the date of the run, which may be an older one
    # Of all processes of a launch the first one has the lock.
    with locked(Path(config.output_dir), "train") if state.is_main_process else nullcontext():
        with state.main_process_first():
            run = replace(Run.create(config.output_dir, manifest, restart=True), rows=rows)
        _train_stages(trainer, config, model_args, run, trace_data.root, tokenizer, state)
    return run


#: What a model's configuration calls the most tokens that it reads; sliding windows are no limit.
_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"),
    "max_seq_length",
)


def context_length(model: dict[str, Any]) -> int | None:
    """The most tokens that a model of this configuration reads; None where it has no limit."""
    return min((model[name] for name in _CONTEXT if isinstance(model.get(name), int)), default=None)


def _check_model(
    config: CLConfig, model_args: ModelConfig, tokenizer: Any, tasks: dict[str, Any], *, lora: bool
) -> None:
    """Refuses what would fail, or mean something else, in the training or when its checkpoints are evaluated."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ConfigError(
            "load_in_4bit and load_in_8bit are not supported: evaluation merges adapters into the weights as they are, "
            "which are others than those that were trained with. Use dtype=bfloat16 and LoRA."
        )
    if not model_args.use_peft and model_args.dtype in ("bfloat16", "float16"):
        log.warning(
            "All parameters are trained in %s: a step of AdamW is often smaller than its rounding, which looks like "
            "little forgetting. Use dtype=float32 with bf16=true (autocast).",
            model_args.dtype,
        )
    base = str(model_args.model_name_or_path)
    model = _causal_config(base, model_args, config.trust_remote_code)
    method = (model.to_dict().get("quantization_config") or {}).get("quant_method")
    if model_args.use_peft and method in ("gptq", "awq", "aqlm", "eetq"):
        raise ConfigError(
            f"{base} is quantised with {method}, into which PEFT cannot merge an adapter, as evaluation does. Take the "
            "model in bf16."
        )
    context = context_length(model.get_text_config(decoder=True).to_dict())
    for name, task in tasks.items():
        answer = min(answer_tokens(task), config.max_new_tokens or 10**9) + config.virtual_tokens
        if context and config.max_prompt_length + answer > context:
            raise ConfigError(
                f"max_prompt_length={config.max_prompt_length} and {answer} tokens of an answer of {name} are more "
                f"than the model's context of {context}: use a max_prompt_length of at most {context - answer}, or "
                "lower max_new_tokens."
            )
    if config.deepspeed_plugin is None:  # which makes shards of a model wherever it is made
        _check_empty(model, model_args, tokenizer, config.trust_remote_code, lora)


def _causal_config(base: str, model_args: ModelConfig, trust_remote_code: bool) -> Any:
    """The configuration of a base model that writes text from left to right."""
    try:
        with models.reading(base):
            model = AutoConfig.from_pretrained(
                base, revision=model_args.model_revision, trust_remote_code=trust_remote_code
            )
        model.get_text_config(decoder=True).to_dict()
    except Exception as e:  # a type that transformers does not know, code of its own, values that a class does not take
        raise ConfigError(f"transformers cannot make the model {base}: {models.why_not(e)}") from e
    kind, listed = model.model_type, model.to_dict()
    if listed.get("is_encoder_decoder") or type(model) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder"
    elif type(model) in MODEL_FOR_MASKED_LM_MAPPING and not listed.get("is_decoder"):
        what = "an encoder"
    elif type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (
        listed.get("auto_map") or {}
    ):
        what = "of another kind"
    elif heads := [a for a in model.architectures or () if _OTHER_HEAD.search(a)]:
        what = f"a {heads[0]} without a head for the next token"
    else:
        return model
    raise ConfigError(f"{base} ({kind}) is not a causal model but {what}. Take a model such as Llama, Qwen or GPT-2.")


_OTHER_HEAD = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)$")


def _check_empty(model: Any, model_args: ModelConfig, tokenizer: Any, trust_remote_code: bool, lora: bool) -> None:
    """Makes the base model without weights, in a second, and the run's adapter on it, as each stage will."""
    base = model_args.model_name_or_path

    def made() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(model),
                trust_remote_code=trust_remote_code,
                **({"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}),
            )

    try:
        with limited(*models.READING):
            empty = made()
    except Exception as e:  # whatever the model's code says of its configuration: loading it would say the same
        raise ConfigError(f"transformers cannot make the model {base}: {brief(e)}") from e
    size = empty.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    never_seen = tokenizer.get_added_vocab().keys() - {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    if beyond.keys() - never_seen:
        raise ConfigError(
            f"The tokenizer of {base} has {len(beyond)} tokens without a row in the model's {size} embeddings, such as "
            f"{min(beyond, key=beyond.__getitem__)!r}. Take the tokenizer that the model came with, or resize the "
            "model's embeddings and save it."
        )
    if beyond:
        log.warning("The model has no embeddings of %s: a row with such a text would stop it.", ", ".join(beyond))
    if lora:
        problem = _lora_problem(empty, model_args)
        if problem is not None:
            raise ConfigError(
                f"LoRA does not fit {base} ({model.model_type}): {problem} {_lora_remedy(made, model_args)}"
            )


def _lora_problem(empty: Any, model_args: ModelConfig) -> str | None:
    """What keeps the run's LoRA from a model; None if it fits."""
    from peft import get_peft_model

    peft_config = get_peft_config(model_args)
    assert peft_config is not None
    names = {name for name, _ in empty.named_modules()}
    adapted: Any
    try:
        adapted = get_peft_model(empty, peft_config, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        return f"{brief(e).rstrip('.')}."
    # PEFT is content when one name of a list fits.
    wanted = {
        "lora_target_modules": (model_args.lora_target_modules, adapted.base_model.targeted_module_names),
        "lora_target_parameters": (model_args.lora_target_parameters, adapted.base_model.targeted_parameter_names),
        "lora_modules_to_save": (model_args.lora_modules_to_save, names),
    }
    for option, (given, there) in wanted.items():
        for name in given if isinstance(given, list) else ():
            if not any(f".{full}".endswith(f".{name}") for full in there):
                return f"{option} names {name!r}, which the model does not have."
    return None


def _lora_remedy(made: Callable[[], Any], model_args: ModelConfig) -> str:
    """The options under which LoRA fits, found by trying."""
    linear = {n.rpartition(".")[2] for n, m in made().named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    # What PEFT refuses in state-space models, whose kernels take these weights without calling the layer.
    listed = sorted(linear - {"lm_head", "out_proj"})
    choices: list[tuple[Any, float | None]] = [(None, 0.0), ("all-linear", None), ("all-linear", 0.0), (listed, None)]
    for targets, dropout in choices:
        tried = copy.copy(model_args)
        words = []
        if targets is not None:
            tried.lora_target_modules = targets
            words.append(f"--lora_target_modules {targets if isinstance(targets, str) else ' '.join(targets)}")
        if dropout is not None:
            tried.lora_dropout = dropout
            words.append("--lora_dropout 0")
        if tried != model_args and _lora_problem(made(), tried) is None:
            return f"Use {' '.join(words)}."
    return f"Its linear layers are {', '.join(sorted(linear))}."


def _train_stages(
    trainer: type[CLTrainer],
    config: CLConfig,
    model_args: ModelConfig,
    run: Run,
    root: Path | None,
    tokenizer: Any,
    state: PartialState,
) -> None:
    if config.keep == "evaluated":
        _evaluate(run, run.stages[0], state)
    for stage in run.stages[1:]:
        if stage.is_trained:
            records.check_stages(run, [stage])
            _say(state, f"stage {stage.index}/{len(config.stages)} {stage.name}: trained already")
            if state.is_main_process:
                remove(stage.attempt)  # killed just after train.json was written
        else:
            if state.is_main_process:
                _check_sources(run, stage, root, trainer)
            _train_stage(trainer, config, model_args, run, stage, tokenizer, state)
        if config.keep == "evaluated":
            _evaluate(run, stage, state)
        if config.keep != "all" and stage.index > 1 and state.is_main_process:
            for kind in ("adapter", "model", "method_state"):
                remove(run.stages[stage.index - 1].path / kind)


def _method_source(trainer: type[CLTrainer]) -> str | None:
    """The fingerprint of a method's file; None where there is no file, as in a notebook."""
    try:
        return fingerprint(Path(inspect.getfile(trainer)))
    except (OSError, TypeError):
        return None


def _check_sources(run: Run, stage: Stage, root: Path | None, trainer: type[CLTrainer]) -> None:
    """Refuses to train on what is no longer what the run began with: files may change between stages."""
    before = run.stages[stage.index - 1]
    there = any((before.path / kind).is_dir() for kind in ("adapter", "model"))
    checks.verify(run, [before] if there else [], root)
    last = read_json(before.train_file) if before.train_file.exists() else {}
    if last.get("method_source") not in (None, _method_source(trainer)):
        log.warning(
            "The file of the method %s has changed since stage %s was trained: this run would mix two methods. For a "
            "clean one begin again in another folder.",
            _method(trainer),
            before.name,
        )
    recorded = last.get("method_state")
    if recorded and before.method_state.is_dir() and fingerprint(before.method_state) != recorded:
        raise RunError(
            f"{before.method_state} is not what the training of the stage wrote: it was changed or damaged. "
            f"Restore it, or delete {before.train_file} to train the stage anew."
        )


def refuse_shards(config: CLConfig, why: str, instead: str) -> None:
    """Refuses DeepSpeed and FSDP, however they were asked for.

    Raises:
        ConfigError: with `why` a method cannot work with them.
    """
    sharded = {
        "DeepSpeed": config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
        "FSDP": config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
    }
    for name, used in sharded.items():
        if used:
            raise ConfigError(
                f"{why}, and {name} gives each process a part of them. "
                f"Launch it without, on one process or several (DDP), {instead}."
            )


def _check_shards() -> None:
    """Refuses launches of accelerate that save shards or nothing instead of a whole checkpoint."""
    launched = {k: v.lower() for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    kind = launched.get("FSDP_STATE_DICT_TYPE", "not set")
    if launched.get("ACCELERATE_USE_FSDP") == "true" and kind != "full_state_dict":
        raise ConfigError(
            f"fsdp_state_dict_type is {kind.upper()}, which saves no checkpoint that a stage could start from: set "
            "FULL_STATE_DICT, as trainers/configs/accelerate/fsdp.yaml does."
        )
    whole = launched.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "not set")
    if (
        launched.get("ACCELERATE_USE_DEEPSPEED") == "true"
        and launched.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
        and whole != "true"
    ):
        raise ConfigError(
            f"zero3_save_16bit_model is {whole}, which saves no checkpoint that a stage could start from: set true, as "
            "trainers/configs/accelerate/zero3.yaml does."
        )


def _check_trackers(config: CLConfig) -> None:
    """Refuses trackers that there are not, which HF notices when the model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as e:
        raise ConfigError(f"report_to={config.report_to}: {e}") from e


def _check_gradients(trainer: type[CLTrainer], config: CLConfig) -> None:
    """Refuses settings under which a method would not see rows or gradients as they are."""
    joined = [name for name in ("packing", "padding_free") if getattr(config, name)]
    hooks = ("adjust_gradients", "compute_loss")
    if joined and (config.use_cpu or any(getattr(trainer, h) is not getattr(CLTrainer, h) for h in hooks)):
        raise ConfigError(
            f"{joined[0]}=true joins rows, which needs flash attention on a GPU and a method without gradients or "
            "losses of its own (sequential, single, joint, replay, rcl). Leave it out."
        )
    if joined and config.loss_weights == "rows":
        raise ConfigError(f"{joined[0]}=true joins rows, which then cannot weigh the same: set loss_weights: tokens.")
    if trainer.adjust_gradients is CLTrainer.adjust_gradients:
        return
    refuse_shards(config, f"{_method(trainer)} needs whole gradients", "with LoRA if memory is short")
    if config.fp16:
        raise ConfigError(f"{_method(trainer)} needs true gradients, and fp16=true scales them: use bf16 or float32.")


def _method(trainer: type[CLTrainer]) -> str:
    """The name of a method is the name of its file."""
    if trainer.__module__ == __name__:
        return "sequential"
    if trainer.__module__ == "__main__":
        return Path(sys.argv[0]).stem
    return trainer.__module__.rpartition(".")[2]


def _train_stage(
    trainer_class: type[CLTrainer],
    config: CLConfig,
    model_args: ModelConfig,
    run: Run,
    stage: Stage,
    tokenizer: Any,
    state: PartialState,
) -> None:
    if state.is_main_process:
        # What a killed attempt left.
        for leftover in ("adapter", "model", "method_state"):
            remove(stage.path / leftover)
    state.wait_for_everyone()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if config.deepspeed_plugin is not None:
        # accelerate takes its plugin once, and HF's loader looks at the one that was made last, for a manifest.
        AcceleratorState._reset_state()
        config.deepspeed_plugin.set_deepspeed_weakref()
    trainer = trainer_class(config, model_args, run, stage, tokenizer)
    trainer.started = time.perf_counter()
    trainer.begin_stage()
    around = time.perf_counter() - trainer.started
    checkpoint = trainer.resume()
    if checkpoint is not None:
        _say(state, f"stage {stage.index}/{len(run.stages) - 1} {stage.name}: goes on at step {trainer.before['step']}")
    elif state.is_main_process:  # what TensorBoard was told of an attempt that was lost
        remove(run.path / "tensorboard" / stage.name)
    trainer.train(resume_from_checkpoint=checkpoint)
    ending = time.perf_counter()
    trainer.end_stage()
    seconds = time.perf_counter() - trainer.started
    around += time.perf_counter() - ending
    saved = trainer.save_checkpoint()
    state.wait_for_everyone()
    if state.is_main_process:
        summary = _summary(trainer, seconds)
        # Of `seconds` those that begin_stage and end_stage took: what a method costs whatever the number of steps.
        summary["seconds_around_steps"] = round(around, 3)
        summary |= {"commit": source_commit(), "method_source": _method_source(trainer_class)}
        summary |= records.origin(run, stage)
        summary["checkpoint"] = fingerprint(saved)
        if stage.method_state.is_dir():
            summary["method_state"] = fingerprint(stage.method_state)
        write_json(stage.train_file, summary)
        remove(stage.attempt)
        _say(
            state,
            f"stage {stage.index}/{len(run.stages) - 1} {stage.task or stage.name}: "
            f"{summary['rows']} rows, {summary['steps']} steps, loss {_loss_line(summary)}, "
            f"{summary['tokens_per_second']:.0f} tokens/s, {seconds:.0f} s",
        )
    state.wait_for_everyone()
    # The next stage loads its model from the disk: let go of this one first.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loss_line(summary: dict[str, Any]) -> str:
    losses = [entry["loss"] for entry in summary["losses"]]
    return f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else f"{summary['mean_loss']:.3f}"


def _summary(trainer: CLTrainer, seconds: float) -> dict[str, Any]:
    assert trainer.model is not None and isinstance(trainer.train_dataset, Dataset)
    cuda = torch.cuda.is_available()
    tokens = int(trainer._total_train_tokens)
    return {
        "stage": trainer.stage.index,
        "task": trainer.stage.task,
        "rows": len(trainer.train_dataset),
        "epochs": trainer.args.num_train_epochs,
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory_of": "cuda" if cuda else "process",
        "processes": trainer.accelerator.num_processes,
        # Of the whole model, also where this process has a part of it.
        "parameters": get_model_param_count(trainer.model),
        "trainable_parameters": get_model_param_count(trainer.model, trainable_only=True),
        # HF's own "train_loss" is the mean since the checkpoint that the stage went on from.
        "mean_loss": (trainer.before["losses"] + trainer._total_loss_scalar) / max(trainer.state.global_step, 1),
        "losses": [
            {"step": e["step"], "loss": e["loss"], "learning_rate": e["learning_rate"]}
            for e in trainer.state.log_history
            if "loss" in e
        ],
        **trainer.record(),
    }


def _evaluate(run: Run, stage: Stage, state: PartialState) -> None:
    """Evaluates one stage in a process of its own, which gives all memory back when it ends."""
    if state.is_main_process:
        command = [
            sys.executable,
            "-m",
            "trace_bench.cli",
            "evaluate",
            str(run.path),
            "--stages",
            str(stage.index),
        ]
        # It is a program of its own, not one of the processes that were launched together.
        launched = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_",
            "GROUP_",
            "ROLE_",
            "MASTER_",
            "TORCHELASTIC_",
            "ACCELERATE_",
            "FSDP_",
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith(launched)}
        if ending.run_child(command, environment):
            raise RunError(f"The evaluation of {stage.name} failed, see above. What is done is kept: run this again.")
    state.wait_for_everyone()


def _say(state: PartialState, line: str) -> None:
    if state.is_main_process:
        print(printable(line), flush=True)
