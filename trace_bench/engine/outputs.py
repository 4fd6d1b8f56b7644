"""Reads log-probabilities from vLLM's outputs."""

from __future__ import annotations

from typing import Any


def matching_logprobs(reference: tuple[int, ...], output: Any) -> list[float]:
    """The log-probabilities of a reference answer's first tokens, as far as the generated answer agrees with it."""
    found: list[float] = []
    for n, (token, step) in enumerate(zip(reference, output.logprobs or (), strict=False)):
        if token not in step or tuple(output.token_ids[:n]) != reference[:n]:
            break
        found.append(step[token].logprob)
    return found


def same_answers(one: list[Any], other: list[Any]) -> bool:
    """Whether two probes (tokens and their log-probabilities) have the same tokens and, up to rounding, numbers."""
    return all(
        a_ids == b_ids and all(abs(x - y) < 0.05 for x, y in zip(a, b, strict=True))
        for (a_ids, a), (b_ids, b) in zip(one, other, strict=True)
    )
