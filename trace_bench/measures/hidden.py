"""Gone or hidden: how much of what a task lost comes back with a few rows of training."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trace_bench.metrics import Matrix, Value


def share_recovered(scores: ArrayLike) -> Value:
    """(relearned - last) / (own - last): the share of a loss that came back; 0 = none, 1 = all of it.

    After "Spurious Forgetting in Continual Learning of Language Models" (arXiv 2501.13453, section 2), where models
    that seemed to have forgotten a task were trained on a little of it again, and tested on rows of it that were not
    in that training. Whether more or less is better cancels out.

    Args:
        scores: The mean scores at the task's own stage, at the last stage, and after relearning from there, shape
            (..., 3).

    Returns:
        The share, shape (...); NaN where own = last, since nothing was lost.
    """
    own, last, relearned = np.moveaxis(np.asarray(scores, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(own == last, np.nan, (relearned - last) / (own - last))
    return float(share) if np.ndim(share) == 0 else share


def share_interval(rows: Matrix) -> tuple[float, float]:
    """The 95 % interval of `share_recovered` over test rows, shape (rows, 3), paired.

    Fieller's of a ratio of two means (1954, Journal of the Royal Statistical Society B 16): all shares s for which the
    mean of (relearned - last) - s (own - last) may be 0. It has an end only where the loss is certain. NaN where it has
    none, where a score is NaN, and without any spread of the rows, which is no certainty.
    """
    from scipy.special import stdtrit

    own, last, relearned = np.asarray(rows, dtype=np.float64).T
    gained, lost = relearned - last, own - last
    a, b, n = gained.mean(), lost.mean(), len(gained)
    t = stdtrit(max(1, n - 1), 0.975)
    variances = np.cov(gained, lost) * t**2 / n if n > 1 else np.full((2, 2), np.nan)
    # s solves p s^2 - 2 q s + r = 0.
    p, q, r = b**2 - variances[1, 1], a * b - variances[0, 1], a**2 - variances[0, 0]
    root = q**2 - p * r
    if not (p > 0 and root > 0):
        return np.nan, np.nan
    return float((q - root**0.5) / p), float((q + root**0.5) / p)
