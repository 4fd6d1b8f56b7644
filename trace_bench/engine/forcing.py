"""Makes a request of vLLM generate known tokens, so that one request returns all their probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forcing(AdapterLogitsProcessor):
    """Forces a request with `extra_args={"forced": tokens}` to generate these tokens.

    The log-probabilities that vLLM tells are those from before.
    """

    def is_argmax_invariant(self) -> bool:
        """False: it changes which token is the likeliest."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Any], Any] | None:
        """The function that changes a request's logits; None = they stay."""
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def force(output: list[int], logits: Any) -> Any:
            logits.fill_(float("-inf"))
            logits[forced[len(output)]] = 0.0
            return logits

        return force
