"""Checks options of LoRA, the optimizer and its schedule now: HF, TRL and PEFT do so when a stage begins, or never."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from trl import ModelConfig

from trace_tasks.errors import brief
from trainers.base.config import CLConfig, ConfigError, check_number

log = logging.getLogger(__name__)


def check_model_args(args: ModelConfig) -> None:
    """Refuses bad values of TRL's model arguments in a config file, and warns of LoRA options that have no effect.

    Raises:
        ConfigError: naming the value and what is allowed.
    """
    for f in fields(args):
        value, choices = getattr(args, f.name), f.metadata.get("choices")
        if choices and value not in (None, *choices):
            raise ConfigError(f"{f.name}={value!r} is not allowed: use {' or '.join(choices)}.")
    for name in ("lora_r", "lora_alpha"):  # PEFT accepts an alpha of 0, with which nothing is trained
        check_number(name, getattr(args, name), int, {"least": 1})
    for name in ("lora_modules_to_save", "lora_target_parameters"):  # PEFT reads a text as a list of its letters
        if isinstance(value := getattr(args, name), str):
            raise ConfigError(f"{name}={value!r} is not allowed: use a list of names, [{value}].")
    plain = ModelConfig()
    unused = [f.name for f in fields(args) if "lora" in f.name and getattr(args, f.name) != getattr(plain, f.name)]
    if unused and not args.use_peft:
        log.warning(
            "%s has no effect, because all parameters are trained. For LoRA, set use_peft: true.", ", ".join(unused)
        )


def check_optimizer(config: CLConfig) -> None:
    """Refuses an optimizer or schedule that cannot be made, and arguments that the optimizer ignores.

    Raises:
        ConfigError: naming them.
    """
    name = str(config.optim.value)  # type: ignore[attr-defined]
    if name.startswith("schedule_free"):
        raise ConfigError(
            f"optim={name}: this optimizer trains an average of the weights, but HF saves the weights without the "
            "average. Use a different optimizer."
        )
    if "layerwise" in name or "lomo" in name:
        raise ConfigError(
            f"optim={name} updates weights while gradients are computed, so a method or max_grad_norm cannot "
            "change them, and a stage cannot continue with its state. Use a different optimizer."
        )
    given = config.optim_args
    if given is not None and not isinstance(given, str):
        raise ConfigError(f"optim_args={given!r} is not allowed: use text, such as momentum=0.9,nesterov=true.")
    words = [word for word in (given or "").replace(" ", "").split(",") if word]
    known = _optimizer(config, []) is not None
    for word in words if known else ():
        others = [other for other in words if other is not word]
        decay = word.startswith("weight_decay=")  # HF sets it for each group of parameters
        if decay or _optimizer(config, others) == _optimizer(config, words):
            instead = "Use weight_decay." if decay else "Leave it out."
            raise ConfigError(f"optim_args={given!r}: {name} ignores {word}. {instead}")
    kind: Any = config.lr_scheduler_type
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    kwargs: Any = copy.deepcopy(config.lr_scheduler_kwargs)
    try:
        get_scheduler(kind, optimizer, 0, 10, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as e:
        texts = [value for value in (kwargs or {}).values() if isinstance(value, str)]
        hint = f" {texts[0]!r} is a text: in YAML write 1.0e-5, because 1e-5 is not a number." if texts else ""
        raise ConfigError(f"lr_scheduler_kwargs={kwargs} does not fit {kind.value}: {brief(e)}{hint}") from e


def _optimizer(config: CLConfig, words: list[str]) -> Any:
    """HF's class and arguments of the optimizer; None if HF needs the model to choose them."""
    config, name = copy.copy(config), config.optim.value  # type: ignore[attr-defined]
    config.optim_args = ",".join(words)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(config)
    except ImportError as e:
        raise ConfigError(f"optim={name}: {brief(e)}") from e
    except (AttributeError, TypeError, ValueError) as e:
        if words:
            raise ConfigError(f"optim_args={config.optim_args!r} does not fit {name}: {brief(e)}") from e
        return None
