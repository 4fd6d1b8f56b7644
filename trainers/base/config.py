"""The configuration of a run. Each option says its default, its help and what is allowed in one place."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import torch
from trl import SFTConfig

from trace_bench.engine import bf16_is_slow
from trace_bench.evaluate import EXTRA_SETTINGS
from trace_bench.keys import refuse_secrets
from trace_bench.run import RunError
from trace_tasks import data
from trace_tasks.errors import TraceError
from trainers.base.rows import CHOICES

#: The engine arguments that set the context length (vllm, hf).
ENGINE_CONTEXT = ("max_length", "max_model_len")  # where both are given, hf takes the first
#: Settings of HF that decide the result: always in the manifest, also with their default.
_DECIDING = {
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "max_steps", "optim", "seed", "bf16"),
}
#: Settings about where and how to run, which do not change the result: never in the manifest.
_INDIFFERENT = {
    *("output_dir", "data", "disable_tqdm", "logging_steps", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataset_num_proc", "local_rank", "use_cpu", "eos_token", "log_level", "save_strategy", "save_steps"),
    *("save_total_limit", "dataset_kwargs", "ddp_timeout", "keep", "tuned"),
}
#: Settings that older runs do not have: in the manifest only if they are set.
_LATER = {"replay_ratio", "replay_choice"}
#: Limit -> how an error names it, and how it is checked.
_LIMITS = {
    "least": ("of at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("of at most", operator.le),
    "below": ("below", operator.lt),
}
#: The limits of options that HF and TRL define.
_LIMITS_OF_HF: dict[str, dict[str, float]] = {
    "num_train_epochs": {"above": 0},
    "learning_rate": {"least": 0},
    "seed": {"least": 0, "most": 2**32 - 1},
    "per_device_train_batch_size": {"least": 1},
    "gradient_accumulation_steps": {"least": 1},
    "max_steps": {"least": -1},
    "save_steps": {"above": 0},
}
_TOKENIZER = "TRL would change the tokenizer in training, but not in evaluation. Change the base model's files instead."
_NO_EVALUATION = "training has no rows to evaluate on. Leave it out; to measure each stage, use keep: evaluated."
#: Options of HF and TRL that are refused unless they have their default -> why: the evaluation could not follow them,
#: the training ignores them, or a stage would stop early or not resume as it was.
_REFUSED = {
    "eos_token": _TOKENIZER,
    "chat_template_path": _TOKENIZER,
    "max_length": "it would cut answers off. Use max_prompt_length and max_answer_length.",
    "truncation_mode": "prompts are cut on the left and answers on the right. Leave it out.",
    "model_init_kwargs": "TRL would not use it, nor would the evaluation. Use dtype and attn_implementation.",
    "assistant_only_loss": "the loss already covers only the answers. Leave it out.",
    "eval_strategy": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "load_best_model_at_end": _NO_EVALUATION,
    "resume_from_checkpoint": "HF does not read it. Run the same command with the same output_dir to continue.",
    "enable_jit_checkpoint": "a stage that is stopped would count as trained. Use save_strategy: steps.",
    "ignore_data_skip": "a stage that is continued would see different rows. Leave it out.",
    "dataloader_in_order": "the order of the rows would depend on the speed of the workers. Leave it out.",
    "push_to_hub": "HF would upload the folder that a stage works in. Upload the checkpoints afterwards.",
}
if TYPE_CHECKING:
    Epochs = float
else:
    Epochs = str  # HF's parser reads `5,3,7` as one word; `CLConfig` converts it to numbers


class ConfigError(TraceError):
    """The configuration cannot be run; the message says which value and what is allowed."""


class Help(str):
    """The help text of an option. It carries the limits: HF's parser passes any other metadata on to argparse."""

    limits: dict[str, float]


def option(default: Any, help: str, *, choices: list[str] | None = None, **limits: float) -> Any:
    """A field of a config: `CLConfig` checks its value, and `--help` shows its text, choices and default.

    Args:
        default: The default. None is allowed if the type of the field allows it.
        help: What the option is for.
        choices: All allowed values.
        **limits: Limits of a number: `least` and `most` (inclusive), `above` and `below` (exclusive).
    """
    if not limits.keys() <= _LIMITS.keys():
        raise TypeError(f"{', '.join(limits)}: the limits of an option are {', '.join(_LIMITS)}.")
    text = Help(help)
    text.limits = limits
    metadata = {"help": text} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_losses(config: CLConfig, why: str) -> None:
    """Refuses losses other than plain cross entropy. The message is: the setting, `why`, the allowed setting."""
    for name, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
        if (found := getattr(config, name)) != plain:
            raise ConfigError(f"{name}={found} {why}{name}: {plain}.")


def refuse_reentrant(config: CLConfig, why: str) -> None:
    """Refuses reentrant gradient checkpointing, which breaks `torch.autograd.grad`; `why` says what would go wrong."""
    kwargs: Any = config.gradient_checkpointing_kwargs or {}
    if kwargs.get("use_reentrant"):
        raise ConfigError(f"gradient_checkpointing_kwargs, use_reentrant=true: {why}. Use false.")


def check_number(name: str, value: Any, kind: Any, limits: dict[str, float]) -> None:
    """Refuses a value that is not a number of the type `kind` within `limits`."""
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return
    whole = float not in kinds
    number = isinstance(value, int if whole else int | float) and value < math.inf
    if not number or not all(_LIMITS[key][1](value, limit) for key, limit in limits.items()):
        allowed = " and ".join(f"{_LIMITS[key][0]} {limit}" for key, limit in limits.items())
        raise ConfigError(f"{name}={value!r} is not allowed: use a {'whole ' * whole}number {allowed}.")


def _as_number(text: str) -> Any:
    """Converts a text to a number; a text that is no number is returned, and `check_number` refuses it."""
    try:
        return float(text)
    except ValueError:
        return text


@cache
def _option_types(config: type) -> dict[str, Any]:
    """The types of a config's options by name."""
    return get_type_hints(config)


@dataclass
class CLConfig(SFTConfig):
    """Configuration of a run: TRL's SFTConfig with the sequence of tasks and how it is measured."""

    tuned: str | None = option(
        None, "A table of settings for methods: 135m, 7b, 70b, a file, or none. Its settings win over the config."
    )
    data: str | None = option(None, "The data: a folder, an archive, or demo; default: TRACE_DATA.")
    tasks: list[str] = option(["order1"], "lm-eval tasks in the order of training, or an order (order1, standard1).")
    epochs: list[Epochs] | None = option(
        None, "Epochs of each task, in the order of the tasks; default: num_train_epochs for all."
    )
    train_rows: int | None = option(None, "Number of training rows of each task (the first); default: all.", least=1)
    test_rows: int | None = option(None, "Number of test rows of each task (the first); default: all.", least=1)
    max_prompt_length: int = option(1024, "Most tokens of a prompt; longer ones are cut on the left.", least=1)
    max_answer_length: int = option(512, "Most tokens of an answer in training, with EOS.", least=1)
    max_new_tokens: int | None = option(None, "Most tokens generated for an answer; default: each task's own.", least=1)
    chat_template: bool = option(False, "Put prompts into the model's chat template, in training and evaluation.")
    chat_template_args: dict[str, Any] | str | None = option(
        None, "Variables of the chat template, as JSON: '{\"enable_thinking\": false}'. Also used for judged answers."
    )
    loss_weights: str = option("rows", "What has equal weight in the loss; HF uses tokens.", choices=["rows", "tokens"])
    replay_ratio: float | None = option(
        None, "Share of each earlier task's rows to mix into a stage; default: none.", least=0, most=1
    )
    replay_choice: str | None = option(
        None, "Which of these rows: first, random (the default) or balanced.", choices=CHOICES
    )
    cells: str = option("seen", "The tasks each stage is evaluated on.", choices=["seen", "all", "own"])
    keep: str = option(
        "all",
        "Checkpoints to keep on disk: all; last (earlier stages cannot be evaluated later); or evaluated (each stage "
        "is evaluated right after its training, then the checkpoint before it is removed).",
        choices=["all", "last", "evaluated"],
    )
    general: list[str] = option([], "General-ability suites to evaluate too: names, or general for the paper's six.")
    general_stages: str = option(
        "last", "Stages for general and judged: stage 0 and the last, or all.", choices=["last", "all"]
    )
    general_rows: int | None = option(
        None, "At least this many rows of each suite, equally from each subtask (rounded up); default: all.", least=1
    )
    judged: list[str] = option([], "Prompts answered for the judges: instruct, safety, or their names.")
    judged_rows: int | None = option(None, "Number of prompts of each judged set (the first); default: all.", least=1)
    judged_max_new_tokens: int | None = option(None, "Most tokens of an answer to be judged; default: 512.", least=1)
    distance: bool = option(False, "Measure how far each stage is from the base model (KL, see docs/evaluation.md).")
    backend: str = option("vllm", "Inference engine of the evaluation.", choices=["vllm", "hf"])
    engine_args: dict[str, Any] | str | None = option(None, "Arguments of vLLM's LLM or lm-eval's HFLM, as JSON.")

    # The paper's optimisation (its section 4.2 and the official scripts) where TRL's defaults differ.
    lr_scheduler_type: str = option("constant", "Learning rate schedule of each stage.")
    adam_beta2: float = option(0.95, "Beta2 of AdamW.")
    # The loss curve of a stage is part of its record, and stages are short.
    logging_steps: float = option(1, "Steps between two logged losses.")
    # Examples come as token ids, cut already: TRL's own limit would cut answers.
    max_length: int | None = option(None, "Not used: see max_prompt_length.")
    # HF's checkpoints, from which a killed stage goes on; they are removed when the stage is done.
    save_strategy: str = option("no", "Checkpoints within a stage, to continue from: no, steps (save_steps) or epoch.")
    save_total_limit: int | None = option(1, "Checkpoints within a stage to keep.", least=1)
    report_to: list[str] = option(["none"], "Trackers, such as trackio wandb tensorboard. Each stage is a run there.")

    # HF reads these fields as JSON when they come from the command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "engine_args", "chat_template_args"]  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Checks the values that can be checked without data or model.

        Raises:
            ConfigError: naming the value and what is allowed.
        """
        # Without an accelerator HF refuses bfloat16 unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None and not self.fp16 and bf16_is_slow():
            self.bf16 = False  # TRL's default is bfloat16
        self.output_dir = self.output_dir or ""  # HF would take the folder trainer_output
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) is False:
                setattr(self, name, "no")  # YAML reads `no` as false
        try:
            self._read_lists()
            super().__post_init__()
            refuse_secrets(self.to_dict(), "the configuration's")
        except (TypeError, ValueError, RunError) as e:  # TypeError, ValueError: HF's own checks
            raise ConfigError(str(e)) from e
        self._check_options()
        self._check_combinations()
        self._check_training()

    def _read_lists(self) -> None:
        """Splits lists written with spaces or commas, and replaces names of orders and groups by their members."""
        for name, kind in _option_types(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name) if kind in (list[str], list[str] | None) else None
            if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                setattr(self, name, data.split_names(value))
        if isinstance(self.epochs, list):
            self.epochs = [_as_number(value) if isinstance(value, str) else value for value in self.epochs]
        for name, known in (("tasks", None), ("general", data.SUITES), ("judged", data.JUDGED)):
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ConfigError(f"{name}={value!r} is not allowed: use a list of names.")
            try:
                setattr(self, name, data.expand(value, known) if known else data.expand_orders(value))
            except data.DataError as e:
                raise ConfigError(f"{name}={value}: {e}") from e

    def _check_options(self) -> None:
        """Checks each option against its limits and choices."""
        kinds = _option_types(type(self))  # type: ignore[arg-type]
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            optional = type(None) in get_args(kinds[f.name]) and value is None
            if choices and value not in choices and not optional:  # HF's parser checks the command line only
                raise ConfigError(f"{f.name}={value!r} is not allowed: use {' or '.join(choices)}.")
            if limits := self._limits(f.name):
                check_number(f.name, value, kinds[f.name], limits)
        for name in ("engine_args", "chat_template_args"):
            if not isinstance(getattr(self, name), dict | None):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: use a mapping of arguments.")
        for name, value in (self.engine_args or {}).items():  # type: ignore[union-attr]
            if name in ENGINE_CONTEXT:  # methods that write answers in training cut prompts to it
                check_number(f"engine_args: {name}", value, int | None, {"least": 1})
        plain = {f.name: f.default for f in fields(CLConfig)}
        for name, why in _REFUSED.items():
            if (value := getattr(self, name)) not in (None, plain[name]):
                raise ConfigError(f"{name}={getattr(value, 'value', value)!r}: {why}")

    @classmethod
    def _limits(cls, name: str) -> dict[str, float]:
        """The limits of an option. A method that overrides only the default inherits them."""
        for config in cls.__mro__:
            of_class = getattr(config, "__dataclass_fields__", {})
            if name in of_class and (limits := getattr(of_class[name].metadata.get("help"), "limits", None)):
                return limits
        return _LIMITS_OF_HF.get(name, {})

    def _check_combinations(self) -> None:
        if not self.tasks:
            raise ConfigError("tasks is empty: name at least one task.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks={self.tasks}: a task appears twice. Name each task only once.")
        if not isinstance(self.epochs, list | None):
            raise ConfigError(f"epochs={self.epochs!r} is not allowed: use a list with a number for each task.")
        for value in self.epochs or ():
            check_number("epochs", value, float, {"above": 0})
        if self.epochs is not None and len(self.epochs) != len(self.tasks):
            raise ConfigError(
                f"epochs has {len(self.epochs)} values for {len(self.tasks)} tasks ({', '.join(self.tasks)}). "
                "Give one for each task, or leave it out and set num_train_epochs."
            )
        if self.save_strategy != "no" and self.save_only_model:
            raise ConfigError(
                "save_only_model=true: a stage cannot continue without the optimizer's state. Leave it out."
            )
        if self.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size=true is not allowed: it would begin a stage again with half-trained weights and "
                "a different batch. Lower per_device_train_batch_size, and raise gradient_accumulation_steps by the "
                "same factor."
            )
        if self.activation_offloading and self.use_cpu:
            raise ConfigError(
                "activation_offloading=true has no effect without a GPU: it moves activations from the GPU to the "
                "CPU's memory. Leave it out."
            )
        if self.chat_template_args and not (self.chat_template or self.judged or self.distance):
            raise ConfigError("chat_template_args has no effect without a chat template. Set chat_template=true too.")
        if self.loss_weights == "rows":
            refuse_losses(self, "gives each token the same weight. Set loss_weights: tokens, or use ")

    def _check_training(self) -> None:
        """Refuses settings that HF accepts and then ignores, always or when a stage resumes."""
        if self.max_steps == 0:
            raise ConfigError("max_steps=0 is not allowed: use -1 to train whole epochs, or at least 1.")
        if self.completion_only_loss is False:
            raise ConfigError(
                "completion_only_loss=false is not allowed: the loss covers only the answers. Leave it out."
            )
        if self.save_strategy == "best":
            raise ConfigError(f"save_strategy='best': {_NO_EVALUATION} Use no, steps or epoch.")
        schedule: Any = self.lr_scheduler_type
        if self.warmup_steps and schedule == "constant":
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: HF's schedule constant has no warmup. Use lr_scheduler_type: "
                "constant_with_warmup, or a different schedule."
            )
        if self.lr_scheduler_kwargs and schedule in ("constant", "constant_with_warmup"):
            raise ConfigError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs}: {schedule.value} takes none. Leave it out."
            )
        accelerate: Any = self.accelerator_config
        if not accelerate.use_seedable_sampler:
            raise ConfigError(
                "accelerator_config, use_seedable_sampler=false: a stage that is continued would see its rows in a "
                "different order. Use true."
            )
        if "num_steps" in (accelerate.gradient_accumulation_kwargs or {}):
            raise ConfigError(
                "accelerator_config, gradient_accumulation_kwargs: num_steps would apply only to the first stage. Use "
                "gradient_accumulation_steps."
            )
        if self.dataloader_persistent_workers and self.save_strategy != "no":
            raise ConfigError(
                "dataloader_persistent_workers=true: a stage that is continued would get different random numbers, "
                "such as those of dropout. Leave it out, or leave save_strategy out."
            )

    @property
    def stages(self) -> list[str]:
        """The names of the stages. By default one for each task, named after it; a method may override this."""
        return self.tasks

    @property
    def virtual_tokens(self) -> int:
        """The most positions that a method's soft prompts take of the model's context."""
        return 0

    def manifest(self) -> dict[str, Any]:
        """The settings that decide the result: all of the project's own, and those of TRL that are not the default."""
        own = {f.name for f in fields(self)} - {f.name for f in fields(SFTConfig)}
        always = own - set(EXTRA_SETTINGS) | _DECIDING
        defaults = type(self)(output_dir=self.output_dir, use_cpu=self.use_cpu).to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in _INDIFFERENT
            and (name in always or value != defaults.get(name))
            and not (name in _LATER and value is None)
        }
