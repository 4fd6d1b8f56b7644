"""Whether a model leaves out the padding of shorter prompts in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, LogitsProcessorList

_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def masks_padding(model: Any, pad: int, ids: list[int]) -> bool:
    """Whether a prompt is answered alike whatever fills its row: some models with a state do not see the mask.

    Asked once of a model, of the logits of a few tokens, since it may heed the mask in the prompt and not behind it.

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
        # With other tokens under the mask nothing may change. Without any, more is rounded in another way: by 0.03 in
        # bf16, where a model that reads them, or counts their positions, is 0.1 away and more.
        _KNOWN[model] = _apart(one, other) < 0.02 and _apart(one, alone) < 0.08
    return _KNOWN[model]


def quiet_router(model: Any) -> dict[str, bool]:
    """TRL leaves the router's outputs on in full models, and Mixtral's generation fails with them."""
    routed = hasattr(model.config.get_text_config(), "output_router_logits")
    return {"output_router_logits": False} if routed else {}


def _logits_of(model: Any, tokens: Sequence[int], rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits in place of tokens that are given behind each of the rows: (rows, tokens, vocabulary)."""
    with torch.no_grad():
        out = model.generate(
            **{"input_ids": rows, "attention_mask": mask, "max_new_tokens": len(tokens), "do_sample": False},
            **{"output_logits": True, "return_dict_in_generate": True, **quiet_router(model)},
            logits_processor=LogitsProcessorList([_Given(tokens)]),
        )
    return torch.stack(out.logits, dim=1).float()


def _apart(some: torch.Tensor, others: torch.Tensor) -> float:
    """How far logits differ, of shape (tokens, vocabulary): root mean square in standard deviations, of the worst."""
    found = []
    for one, other in zip(some, others, strict=True):
        possible = other > other.max() - 100  # some models rule tokens out
        change = (one - other)[possible]
        found.append(float((change - change.mean()).square().mean().sqrt() / other[possible].std()))
    return max(found)


class _Given(LogitsProcessor):
    """Has an answer be these tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, next(self.tokens)] = 0
        return chosen
