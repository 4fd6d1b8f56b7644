"""Makes a request of vLLM give tokens that are known before, so that their probabilities are read in one go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forcing(AdapterLogitsProcessor):
    """Leaves a request that has `extra_args={"forced": tokens}` no other choice, token by token.

    The log-probabilities that vLLM tells are those from before.
    """

    def is_argmax_invariant(self) -> bool:
        """It decides which token is the likeliest."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Any], Any] | None:
        """What is done to the logits of a request; None = nothing."""
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def force(output: list[int], logits: Any) -> Any:
            logits.fill_(float("-inf"))
            logits[forced[len(output)]] = 0.0
            return logits

        return force
