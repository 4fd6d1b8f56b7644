"""The trainer of one stage: TRL's SFTTrainer with the hooks of a method (docs/methods.md has them in a table)."""

from __future__ import annotations

import copy
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, set_seed
from trl import ModelConfig, get_peft_config

from trace_bench import checks
from trace_bench.engine import models
from trace_bench.run import AS_TRAINED, Run, RunError, Stage
from trace_bench.tasks import load_tasks, training_rows
from trace_tasks.data.files import write_jsonl
from trace_tasks.tokens import Chat, example_ids
from trainers.base import writing
from trainers.base.checkpoints import CheckpointTrainer
from trainers.base.config import CLConfig
from trainers.base.gradients import with_columns
from trainers.base.progress import follow
from trainers.base.rows import choose_rows
from trainers.base.sampler import LengthGrouped

log = logging.getLogger(__name__)


class CLTrainer(CheckpointTrainer):
    """One stage of continual learning. Subclasses override hooks; this class is sequential fine-tuning."""

    def __init__(self, config: CLConfig, model_args: ModelConfig, run: Run, stage: Stage, tokenizer: Any) -> None:
        # Copies: what a method sets in them lasts for one stage, as after a kill.
        self.run, self.stage, self.model_args, self.config = run, stage, copy.deepcopy(model_args), copy.copy(config)
        self.tokenizer = tokenizer
        #: Renders chat prompts as the evaluation does; None without a chat template.
        arguments: Any = config.chat_template_args
        self.chat = Chat(tokenizer, arguments, run.manifest.get("date")) if config.chat_template else None
        args = self.stage_args(stage)
        args.output_dir = str(stage.attempt)
        # Every stage begins at step 0, so in a single tracker run their curves would overlap.
        args.run_name = f"{args.run_name or run.path.name} {stage.name}"
        args.save_total_limit = None  # `_save_checkpoint` removes older checkpoints once the new one is complete
        self._resumed_from = {"seconds": 0.0, "losses": 0.0, "step": 0, "unlogged": 0.0, "unlogged_steps": 0}
        self._started = time.perf_counter()
        self.kept = {}
        #: The parameters of the adapter that have had no gradient so far; None before the first step.
        self._idle: set[str] | None = None
        set_seed(args.seed)  # an adapter's first weights are random
        model = self.stage_model(stage)
        super().__init__(model=model, args=args, train_dataset=self.with_replay(stage), processing_class=tokenizer)
        if self.aux_loss_enabled:
            # TRL makes the model always return its router's logits. Generation can fail with them, here and from a full
            # checkpoint. Our losses ask for them where they need them.
            model.config.get_text_config().output_router_logits = False
        if self.columns:
            self.data_collator = partial(with_columns, self.data_collator, self.columns)
        # TRL's losses and ours divide by the items of the whole step themselves, whatever the model's forward accepts.
        self.model_accepts_loss_kwargs = True
        self.check_saved()
        self.add_callback(_StepHooks(self))
        follow(self)

    # ------------------------------------------------------------------------------------------------------- hooks

    #: Whether the method decides itself which earlier rows are trained on. Then `replay_ratio` is refused.
    own_memory: ClassVar[bool] = False

    @classmethod
    def prepare(cls, config: Any, model_args: ModelConfig) -> dict[str, Any]:
        """Checks what the method needs before anything expensive starts. It may change the configuration.

        Args:
            config: The settings of the run.
            model_args: TRL's arguments of the model; the model's name is already what `from_pretrained` takes.

        Returns:
            Entries for the manifest. They must be the same when the run is resumed.
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
        """The model to train: that of the stage before, with its adapter or all of its parameters trainable."""
        return self.trainable_model(self.previous.checkpoint)

    def begin_stage(self) -> None:
        """Called before the training of the stage: load what the method needs of earlier stages."""

    def end_stage(self) -> None:
        """Called after the training, before the checkpoint is saved: write the method's state."""

    def adjust_gradients(self, model: Any) -> None:
        """Called once per optimizer step with the accumulated gradient, before clipping.

        Add the gradient of a penalty here. A penalty in the loss would be scaled by the number of micro-batches and
        processes.
        """

    def before_step(self) -> None:
        """Called before each step of the optimizer, after the gradients were adjusted and clipped."""

    def after_step(self) -> None:
        """Called after each step of the optimizer: the parameters have moved."""

    def record(self) -> dict[str, Any]:
        """Entries that the method adds to the stage's train.json."""
        return {}

    # --------------------------------------------------------------------------------------------------- for methods

    def task_texts(self, task: str, limit: int | None = None) -> list[tuple[str, str]]:
        """Prompts and answers of the first `limit` training rows of a task (None = `train_rows`)."""
        if limit is None and task in self.run.rows:
            return self.run.rows[task]
        tasks = load_tasks([task])
        checks.check_tasks(self.run, tasks)
        return training_rows(tasks[task], limit or self.config.train_rows, self.chat)

    def task_dataset(self, task: str, limit: int | None = None) -> Dataset:
        """The rows of `task_texts` as token ids."""
        return self.text_dataset(self.task_texts(task, limit))

    def text_dataset(self, rows: list[tuple[str, str]]) -> Dataset:
        """Prompts and answers as token ids, in the form that `stage_dataset` returns."""
        prompts, answers = zip(*rows, strict=True) if rows else ((), ())
        limits = self.config.max_prompt_length, self.config.max_answer_length
        return Dataset.from_list(example_ids(self.tokenizer, prompts, answers, *limits, self.chat))

    def earlier_rows(self, stage: Stage, ratio: float, choice: str) -> dict[str, Dataset]:
        """A share of the training rows of each earlier task, at least one row each."""
        found = {}
        for task in self.run.tasks[: stage.index - 1] if ratio else ():
            rows = self.task_dataset(task)
            found[task] = choose_rows(rows, max(1, round(ratio * len(rows))), choice, self.config.seed)
        return found

    def with_replay(self, stage: Stage) -> Dataset:
        """The method's training set of a stage, with the earlier rows that `replay_ratio` adds."""
        rows, c = self.stage_dataset(stage), self.config
        if isinstance(rows, Dataset) and not len(rows):
            raise RunError(f"stage_dataset returned no rows for stage {stage.name}. Return at least one.")
        self._replayed_rows: dict[str, int] = {}
        if self.own_memory or not c.replay_ratio:
            return rows
        earlier = self.earlier_rows(stage, c.replay_ratio, c.replay_choice or "random")
        self._replayed_rows = {task: len(part) for task, part in earlier.items()}
        return concatenate_datasets([rows, *earlier.values()])

    answers = writing.answers

    def trainable_model(self, checkpoint: Path | None) -> Any:
        """A model to train on from a checkpoint (None = the base model): its adapter, or all of its parameters."""
        if not self.model_args.use_peft:
            return self.load_model(checkpoint)
        base = self.load_model(None)
        # ZeRO-3 wants all parameters in one dtype; TRL does the same for it.
        plugin = self.config.deepspeed_plugin
        one_type = plugin is not None and plugin.zero_stage == 3
        if checkpoint is not None:
            model = models.with_adapter(base, checkpoint, is_trainable=True, autocast_adapter_dtype=not one_type)
        else:
            adapter: Any = get_peft_config(self.model_args)
            model = get_peft_model(base, adapter, autocast_adapter_dtype=not one_type)
        if self.config.bf16:
            # PEFT casts each layer's input to the adapter's float32, and autocast casts it back to bf16 at once: two
            # copies of every activation for nothing. DoRA needs the cast: it computes norms in the input's dtype.
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.cast_input_dtype_enabled = self.model_args.use_dora  # type: ignore[attr-defined]
            frozen_in_bf16(model)
        return model

    def load_model(self, checkpoint: Path | None) -> Any:
        """Loads the model of a checkpoint (None = the base model), an adapter unmerged and frozen."""
        args = self.model_args
        assert args.model_name_or_path is not None
        kwargs: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": self.config.trust_remote_code}
        if args.attn_implementation is not None:
            kwargs["attn_implementation"] = args.attn_implementation
        return models.load_model(args.model_name_or_path, checkpoint, args.model_revision, **kwargs)

    def frozen_model(self, checkpoint: Path | None) -> Any:
        """A second model in memory that is never trained: `load_model`, on the device and without dropout."""
        # Unmerged: a merge would round the adapter's update to the precision of the weights.
        model = self.load_model(checkpoint).requires_grad_(False).eval().to(self.accelerator.device)
        if self.config.bf16:
            frozen_in_bf16(model)
        return model

    def write_as_trained(self, stage: Stage) -> None:
        """Writes `as_trained` for the stage whose model is in memory: this one, or the base model before the first.

        Nothing is written where the method may save a different model, or begin with one.

        Raises:
            RunError: if the model gives NaN: no later step would notice that the last one of a stage has diverged.
        """
        if stage is self.stage:
            same = self.saves_same_model or type(self).save_checkpoint is CLTrainer.save_checkpoint
        else:  # shards are put together by the training only
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            same = stage.index == 0 and type(self).stage_model is CLTrainer.stage_model and not sharded
        rows = self.as_trained() if same else []
        if not all(math.isfinite(part["nats"]) for row in rows for part in row["parts"].values()):
            raise RunError(
                f"The model of {stage.name} gives NaN for training rows, so nothing could be trained from it or "
                "evaluated. If its last step has diverged, begin a new run with a lower learning_rate or max_grad_norm."
            )
        if rows and self.is_world_process_zero():
            write_jsonl(stage.path / AS_TRAINED, rows)

    # ------------------------------------------------------------------------------------------------- HF's own hooks

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """TRL's step, then `adjust_gradients` when the gradient of the optimizer step is complete."""
        self._in_step = num_items_in_batch is not None  # without them HF divides by the number of micro-batches
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._in_step = False
        if not torch.isfinite(loss):
            # HF would log 0 and go on, and every later stage would begin with these weights.
            raise RunError(
                f"The loss of stage {self.stage.name} is {loss.item()} at step {self.state.global_step + 1}: training "
                "has diverged. Begin a new run with a lower learning_rate or max_grad_norm."
            )
        if self.accelerator.sync_gradients:
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # their gradients are not in parameter.grad
            if self.model_args.use_peft and not sharded and self._idle != set():
                idle = {name for name, parameter in self.trained().items() if parameter.grad is None}
                self._idle = idle if self._idle is None else self._idle & idle
            self.adjust_gradients(model)
        return loss

    def warn_of_idle(self) -> None:
        """Warns of an adapter's parameters that never had a gradient: fused kernels may bypass the adapter."""
        if self._idle:
            log.warning(
                "%d of the adapter's tensors had no gradient in stage %s, such as %s: the model does not use them, so "
                "they do not change. Leave these layers out of lora_target_modules.",
                len(self._idle),
                self.stage.name,
                min(self._idle),
            )

    @property
    def order_seed(self) -> int:
        """The seed of the order of rows, chosen as HF does."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """HF's sampler; with `train_sampling_strategy: group_by_length` our own."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        # The batches of all processes make one group, since the processes wait for the longest batch.
        self.grouped = LengthGrouped(lengths, self.args.train_batch_size * self.args.world_size, self.order_seed)
        return self.grouped


class _StepHooks(TrainerCallback):
    """Calls a trainer's hooks around the optimizer's step."""

    def __init__(self, trainer: CLTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def frozen_in_bf16(model: Any) -> None:
    """Keeps frozen weights of linear layers in bf16; otherwise autocast would convert them in every step.

    The embeddings, and a head tied to them, keep their precision, since all hidden states start from them.
    """
    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
            for parameter in module.parameters():
                # Under ZeRO-3 a parameter may be empty here.
                if not parameter.requires_grad and parameter.numel() and parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)
