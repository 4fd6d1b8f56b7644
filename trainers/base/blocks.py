"""The blocks of a decoder, for methods that treat them differently."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


def shape(parameter: torch.Tensor) -> torch.Size:
    """That of the whole parameter: while ZeRO-3 has divided it, each process holds an empty one."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count(parameters: Iterable[torch.Tensor]) -> int:
    """The entries of whole parameters."""
    return sum(math.prod(shape(p)) for p in parameters)


def decoder_blocks(model: Any) -> torch.nn.ModuleList:
    """The blocks (layers) of the text model, the lowest first; of a model with an adapter, with the adapter in them.

    Their list has no common name ("layers", "h", "blocks"). It is the one with the most parameters.
    """
    lists = [module for module in text_model(model).modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda module: count(module.parameters()))  # the outer one of equals


def text_model(model: Any) -> Any:
    """The decoder without its head, with or without an adapter in it."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()


def adapted_parameters(model: Any) -> list[str]:
    """The names of the modules of which PEFT adapts parameters without a layer that is called, such as experts."""
    from peft.tuners.lora.layer import ParamWrapper

    return [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
