"""Weights that several layers of a model share, and adapters of such layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_bench.engine.hub import ModelError


def inner(module: Any) -> Any:
    """An embedding or head without the modules that PEFT put around it."""
    while hasattr(module, "original_module") or hasattr(module, "base_layer"):
        module = module.original_module if hasattr(module, "original_module") else module.base_layer
    return module


def shared_weights(adapted: Any) -> str | None:
    """The name of an adapted layer that shares its weights with another layer; None if there is none.

    For example, Zamba's layers share their attention. A head that is tied to the embeddings does not count.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = {id(inner(m)) for m in (adapted.get_input_embeddings(), adapted.get_output_embeddings()) if m is not None}
    names: dict[int, str] = {}
    owners: dict[int, set[int]] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module.get_base_layer()) not in ends:
            names[id(module.get_base_layer())] = name.removeprefix("base_model.model.")
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    shared = (names.get(owner) for found in owners.values() if len(found) > 1 for owner in found)
    return next(filter(None, shared), None)


def shared_layer(adapter: str | Path, layer: str) -> ModelError:
    """The error for an adapter that cannot be merged because of `shared_weights`."""
    return ModelError(
        f"{adapter} changes only {layer}, but other layers share its weights. vLLM needs merged weights, so the other "
        "layers would change too. Use the backend hf, or train other lora_target_modules."
    )
