"""The blocks of a decoder, for methods that treat them differently."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper


def shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter: under ZeRO-3 each process holds an empty placeholder."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count(parameters: Iterable[torch.Tensor]) -> int:
    """The number of entries of whole parameters."""
    return sum(math.prod(shape(p)) for p in parameters)


def decoder_blocks(model: Any) -> torch.nn.ModuleList:
    """The blocks (layers) of the text model, the lowest first, including the adapter's modules in them.

    Architectures name the list differently ("layers", "h", "blocks"), so the list with the most parameters is taken.
    """
    lists = [module for module in text_model(model).modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda module: count(module.parameters()))  # the outer one of equals


def text_model(model: Any) -> Any:
    """The decoder without its head, with or without an adapter in it."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()


def adapted_parameters(model: Any) -> list[str]:
    """The names of the modules whose parameters PEFT adapts directly, without a layer of its own, such as experts."""
    return [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
