"""Gone or hidden: how much of what a task lost comes back with a few rows of training."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trace_bench import metrics
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
    """The 95 % interval of `share_recovered` over test rows, shape (rows, 3), by the paired bootstrap.

    It means something where the loss is certain: where own - last may be 0 the share may be anything. NaN where a score
    is NaN, and without any spread, which is no certainty.
    """
    low, high = metrics.bootstrap_interval([rows], lambda R: share_recovered(R[..., 0]))
    return (low, high) if high > low else (np.nan, np.nan)
