"""How far a model has moved from the base model: the forward KL divergence, from log-probabilities of some tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
#: The least mass that is left for the tokens that were not asked: log-probabilities come with rounding errors.
_LEAST = 1e-9


def forward_kl(base: ArrayLike, stage: ArrayLike) -> tuple[Array, Array]:
    """KL(base || stage) of next tokens, in nats: a lower bound, and the mass that it does not see.

    The distance of "RL's Razor" (Shenfeld, Pari and Agrawal 2025, arXiv 2509.04259), with p the base model, q the
    model after a stage and x a prompt of the new task:

        E_x [ KL(p || q) ] = E_x [ sum_y p(y|x) log(p(y|x) / q(y|x)) ]

    Here y is the next token, at each token of the base model's own answer. With all tokens of the vocabulary the sum is
    the divergence itself. With some of them, the set S, all others count as one token, which can only lower it (data
    processing inequality; Cover and Thomas 2006, section 2.8):

        KL(p || q) >= sum_{y in S} p(y) log(p(y) / q(y)) + (1 - p(S)) log((1 - p(S)) / (1 - q(S)))

    What is missing is (1 - p(S)) times the divergence between p and q within the tokens outside of S (chain rule).

    Args:
        base: Log-probabilities that the base model gives to the tokens of S, shape (..., tokens).
        stage: Those that the other model gives to the same tokens.

    Returns:
        The bound and the unseen mass 1 - p(S), of the shape (...).
    """
    p_log, q_log = np.asarray(base, dtype=np.float64), np.asarray(stage, dtype=np.float64)
    p = np.exp(p_log)
    unseen, left = (np.clip(1 - np.exp(x).sum(axis=-1), 0, 1) for x in (p_log, q_log))
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(p > 0, p * (p_log - q_log), 0).sum(axis=-1)
        rest = np.where(unseen > _LEAST, unseen * np.log(unseen / np.maximum(left, _LEAST)), 0)
    return np.maximum(seen + rest, 0), unseen


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, equal numbers sharing their mean rank; NaN where one side has no spread."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any() or not (np.ptp(a) > 0 and np.ptp(b) > 0):
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
