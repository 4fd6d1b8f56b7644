"""Finds out whether a model ignores the padding of shorter prompts in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def masks_padding(model: Any, pad: int, ids: list[int]) -> bool:
    """Whether padding leaves a prompt's answer unchanged: some state-space models ignore the attention mask.

    Tested once for each model, on the logits of a few generated tokens: a model may heed the mask while it reads the
    prompt, and not afterwards.

    Args:
        model: Of transformers, in evaluation.
        pad: The token of the padding.
        ids: A few tokens of a text.
    """
    if model not in _KNOWN:
        rows = torch.tensor([[token] * 17 + ids for token in (pad, ids[0])], device=model.device)
        mask = torch.ones_like(rows)
        mask[:, :17] = 0
        one, other = _logits_of(model, ids[:4], rows, mask)
        (alone,) = _logits_of(model, ids[:4], rows[:1, 17:], torch.ones_like(rows[:1, 17:]))
        # Other tokens under the mask may change nothing. Without any padding the rounding differs: by 0.03 in bf16. A
        # model that reads the padding, or counts its positions, differs by 0.1 or more.
        _KNOWN[model] = _apart(one, other) < 0.02 and _apart(one, alone) < 0.08
    return _KNOWN[model]


def quiet_router(model: Any) -> dict[str, bool]:
    """Generation arguments that switch the router's outputs off: TRL saves them on, and Mixtral's generation fails."""
    routed = hasattr(model.config.get_text_config(), "output_router_logits")
    return {"output_router_logits": False} if routed else {}


def _logits_of(model: Any, tokens: Sequence[int], rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits at the positions of `tokens`, which every row is made to generate: (rows, tokens, vocabulary)."""
    with torch.no_grad():
        out = model.generate(
            **{"input_ids": rows, "attention_mask": mask, "max_new_tokens": len(tokens), "do_sample": False},
            **{"output_logits": True, "return_dict_in_generate": True, **quiet_router(model)},
            prefix_allowed_tokens_fn=lambda _, ids: [tokens[len(ids) - rows.shape[1]]],
        )
    return torch.stack(out.logits, dim=1).float()


def _apart(some: torch.Tensor, others: torch.Tensor) -> float:
    """The largest difference over the tokens: root mean square in standard deviations; shapes (tokens, vocabulary)."""
    found = []
    for one, other in zip(some, others, strict=True):
        possible = other > other.max() - 100  # some models rule tokens out
        change = (one - other)[possible]
        found.append(float((change - change.mean()).square().mean().sqrt() / other[possible].std()))
    return max(found)
