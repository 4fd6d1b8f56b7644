"""Chooses an attention kernel that computes all that a model needs."""

from __future__ import annotations

from typing import Any


def keep_softcap(model: Any) -> None:
    """Gives a model whose attention has a soft cap (Gemma 2) a kernel that computes it: torch's SDPA ignores it.

    vLLM has it, as those who trained the model had. transformers' default would train and answer without.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
