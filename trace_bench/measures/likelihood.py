"""Soft forgetting: what became of the log-likelihood of the reference answers.

`L` is a matrix as R is (`trace_bench.metrics`), in nats per token, so that `overall_performance`, `backward_transfer`
and the intervals of differences hold for it, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from trace_bench.metrics import Matrix

#: The metric of a cell, and of each row of its samples: the mean log-probability of a reference answer's token.
LIKELIHOOD = "log_likelihood"


def share_of_gain(L: ArrayLike, t: int | None = None) -> Matrix:
    """(L[t, i] - L[i, i]) / (L[i, i] - L[0, i]): the change since a task's own stage as a share of what that gained.

    -1: all that was learned is gone; below -1: the answers are less likely than under the base model. It is the BWT of
    one task divided by its learning, which makes tasks with long and short answers comparable.

    Args:
        L: Nats per token, shape (T+1, T).
        t: The later stage; None = the last.

    Returns:
        Shape (T,); NaN where the own stage gained nothing, or comes after t.
    """
    L = np.asarray(L, dtype=np.float64)
    i = np.arange(L.shape[1])
    t = L.shape[1] if t is None else t
    own = L[i + 1, i]
    learned = own - L[0]
    known = (learned > 0) & (i < t)
    return np.where(known, (L[t] - own) / np.where(known, learned, 1), np.nan)


def rows_needed(groups: Sequence[ArrayLike]) -> int | None:
    """How many rows of each group show that the mean of paired differences is not zero, in four of five tests.

    The tests are two-sided t-tests at 5 %. Guenther 1981 (The American Statistician 35), for one sample: n = (z_level +
    z_power)^2 s^2 / m^2 + z_level^2 / 2, of the mean m and the variance s^2 of the differences. For the mean over k
    groups of n rows each, s^2 / m^2 is the sum of the variances divided by the square of the sum of the means, and the
    second term is divided by k.

    Args:
        groups: The differences of each test set, shape (rows,).

    Returns:
        At least 2; None where the mean is zero or not known, or a group has one row.
    """
    x = [np.asarray(group, dtype=np.float64) for group in groups]
    if not x or any(len(group) < 2 or np.isnan(group).any() for group in x):
        return None
    effect, variance = (float(sum(of(group) for group in x)) for of in (np.mean, partial(np.var, ddof=1)))
    if abs(effect) < 1e-9:
        return None
    z, more = map(NormalDist().inv_cdf, (0.975, 0.8))
    return max(2, math.ceil((z + more) ** 2 * variance / effect**2 + z**2 / 2 / len(x)))
