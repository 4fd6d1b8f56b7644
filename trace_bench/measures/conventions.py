"""BWT and forgetting as other papers and their code compute them, from the one matrix.

`R` is as in `trace_bench.metrics`: shape (..., T+1, T), row 0 the base model, row t the model after stage t, more is
better (give -R where less is), NaN = not evaluated; `R[t, i]` in the formulas counts tasks from 1. Each function takes
the stage `t` (None = the last) and is NaN at t = 1, where nothing can be forgotten yet. BWT with 1/(t-1) is
`metrics.backward_transfer`, and the drop from the best stage `metrics.forgetting`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from trace_bench.metrics import Value, backward_transfer, forgetting


def _stage(R: ArrayLike, t: int | None) -> int:
    return np.shape(R)[-1] if t is None else t


def backward_transfer_of_all(R: ArrayLike, t: int | None = None) -> Value:
    """1/t sum_{i<=t} (R[t, i] - R[i, i]): BWT with the task just learned, whose change is 0, in the divisor.

    TRACE (arXiv 2310.06762) prints 1/t in section 3.3, though its tables are made with 1/(t-1). So do the codes of GEM
    (metrics/metrics.py, `confusion_matrix`) and of SEEKR (show_results.py), whose papers print 1/(T-1).
    """
    t = _stage(R, t)
    return backward_transfer(R, t) * (t - 1) / t


def clipped_backward_transfer(R: ArrayLike, t: int | None = None) -> Value:
    """1/t sum_{i<=t} min(R[t, i] - R[i, i], 0): gains of one task do not make up for losses of another.

    The code of TreeLoRA (arXiv 2506.10355, inference/collect_results.py). Never above `backward_transfer_of_all`.
    """
    R = np.asarray(R, dtype=np.float64)
    t = _stage(R, t)
    if t == 1:
        return backward_transfer(R, t)
    i = np.arange(t - 1)
    return np.minimum(R[..., t, i] - R[..., i + 1, i], 0).sum(axis=-1) / t


def mean_backward_transfer(R: ArrayLike, t: int | None = None) -> Value:
    """2/(t(t-1)) sum_{l=2..t} sum_{i<l} (R[l, i] - R[i, i]): the mean over all stages at which a task is an old one.

    Díaz-Rodríguez et al. 2018 (arXiv 1810.13166), "BWT". What was forgotten and came back counts while it was gone.
    """
    t = _stage(R, t)
    # The sum over the tasks of one stage is BWT of the stage times their number.
    sums = [backward_transfer(R, stage) * (stage - 1) for stage in range(2, t + 1)]
    return sum(sums) / (t * (t - 1) / 2) if sums else backward_transfer(R, t)


def clipped_forgetting(R: ArrayLike, t: int | None = None) -> Value:
    """1/(t-1) sum_{i<t} (max_{i<=l<=t} R[l, i] - R[t, i]): the drop from the best stage, the last one among them.

    So no task's drop is below 0: what was gained in the end counts as nothing forgotten. The code of mammoth
    (utils/metrics.py, `forgetting`). Chaudhry et al. 2018, `metrics.forgetting`, leave the last stage out.
    """
    R = np.asarray(R, dtype=np.float64)
    t = _stage(R, t)
    if t == 1:
        return forgetting(R, t)
    return np.mean([R[..., i + 1 : t + 1, i].max(axis=-1) - R[..., t, i] for i in range(t - 1)], axis=0)
