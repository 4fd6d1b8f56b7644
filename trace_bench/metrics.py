"""The numbers of continual learning: pure functions of the score matrix.

`R` is a float array of shape (T+1, T). Row 0 is the base model, row t the model after stage t; column i-1 is the
i-th task of the order. `R[t, i]` in the text below counts tasks from 1. NaN means not evaluated: a result that needs
such a cell is NaN. Inputs are never changed. Scores are fractions of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def _matrix(R: ArrayLike) -> Matrix:
    array = np.asarray(R, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] + 1 or array.shape[1] == 0:
        raise ValueError(f"R has the shape {array.shape}; it must be (T+1, T): the base model and T stages, T tasks.")
    return array


def _stage(t: int | None, T: int) -> int:
    t = T if t is None else t
    if not 1 <= t <= T:
        raise ValueError(f"t={t}: stages are counted from 1 to {T}.")
    return t


def overall_performance(R: ArrayLike, t: int | None = None) -> float:
    """OP_t = 1/t sum_{i<=t} R[t, i]: the mean score on the tasks seen so far (TRACE, section 3.3, equation 1).

    Args:
        R: Scores, shape (T+1, T).
        t: The stage; None = the last.
    """
    R = _matrix(R)
    t = _stage(t, R.shape[1])
    return float(R[t, :t].mean())


def backward_transfer(R: ArrayLike, t: int | None = None) -> float:
    """BWT_t = 1/(t-1) sum_{i<t} (R[t, i] - R[i, i]): what later stages did to a task (TRACE, section 3.3).

    Negative = forgetting. The paper's formula is printed with 1/t; its tables are made with 1/(t-1), as here.

    Args:
        R: Scores, shape (T+1, T).
        t: The stage; None = the last. At t = 1 there is no earlier task: NaN.
    """
    R = _matrix(R)
    t = _stage(t, R.shape[1])
    if t == 1:
        return float("nan")
    i = np.arange(t - 1)
    return float((R[t, i] - R[i + 1, i]).mean())


def forward_transfer(R: ArrayLike) -> float:
    """FWT = 1/(T-1) sum_{i>1} (R[i-1, i] - R[0, i]): what earlier stages did to a task not trained yet.

    Lopez-Paz & Ranzato 2017 (GEM), equation 4, with the base model's zero-shot score as the reference where they
    have a random initialisation. Needs the cells above the diagonal (`cells: all`).

    Args:
        R: Scores, shape (T+1, T). With T = 1: NaN.
    """
    R = _matrix(R)
    T = R.shape[1]
    if T == 1:
        return float("nan")
    i = np.arange(1, T)
    return float((R[i, i] - R[0, i]).mean())


def forgetting(R: ArrayLike, t: int | None = None) -> float:
    """F_t = 1/(t-1) sum_{i<t} (max_{i<=l<t} R[l, i] - R[t, i]): the drop from a task's best score so far.

    Chaudhry et al. 2018 (Riemannian Walk), section 4. Positive = forgetting. It differs from -BWT where a task got
    better after its own stage.

    Args:
        R: Scores, shape (T+1, T).
        t: The stage; None = the last. At t = 1: NaN.
    """
    R = _matrix(R)
    t = _stage(t, R.shape[1])
    if t == 1:
        return float("nan")
    return float(np.mean([R[i:t, i - 1].max() - R[t, i - 1] for i in range(1, t)]))


def average_accuracy(R: ArrayLike) -> float:
    """The mean of OP_t over all stages ("average incremental accuracy", Rebuffi et al. 2017, iCaRL).

    Args:
        R: Scores, shape (T+1, T).
    """
    R = _matrix(R)
    return float(np.mean([overall_performance(R, t) for t in range(1, R.shape[1] + 1)]))


def general_ability_delta(base: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean over the suites of (after - base) (TRACE, section 3.3, general ability delta).

    Args:
        base: Suite -> score of the original model.
        after: Suite -> score of the trained model, of the same suites.

    Raises:
        ValueError: if the suites differ, since a mean over other suites is another number.
    """
    if base.keys() != after.keys() or not base:
        raise ValueError(f"Both models need the same suites; found {sorted(base)} and {sorted(after)}.")
    return float(np.mean([after[suite] - base[suite] for suite in base]))


def bootstrap_interval(
    samples: Sequence[ArrayLike] | ArrayLike,
    statistic: Callable[[Sequence[Matrix]], float] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval over test rows (Efron 1979).

    Args:
        samples: Scores of test rows, or several groups of them (the test sets of several tasks). A group may be
            two-dimensional, (rows, conditions): its rows are drawn together, which makes the interval a paired one.
        statistic: From the resampled groups to a number. None: the mean over groups of each group's mean.
        level: Coverage.
        resamples: Number of resamples.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        (low, high); NaN for both if a group is empty.

    Raises:
        ValueError: if `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: use a number between 0 and 1, such as 0.95.")
    groups = _groups(samples)
    if not groups or any(len(g) == 0 for g in groups):
        return float("nan"), float("nan")
    statistic = statistic or (lambda gs: float(np.mean([g.mean() for g in gs])))
    rng = np.random.default_rng(seed)
    values = [statistic([g[rng.integers(0, len(g), len(g))] for g in groups]) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(count: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): sensible near 0 and 1 and for few rows.

    Args:
        count: Rows that have the property.
        n: Rows.
        level: Coverage.

    Returns:
        (low, high), within 0 and 1; NaN for both if there is no row.

    Raises:
        ValueError: if `level` is not between 0 and 1, or `count` not between 0 and `n`.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: use a number between 0 and 1, such as 0.95.")
    if not 0 <= count <= n:
        raise ValueError(f"count={count} of n={n}: use a count between 0 and n.")
    if n == 0:
        return float("nan"), float("nan")
    z, p = NormalDist().inv_cdf((1 + level) / 2), count / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def _groups(samples: Sequence[ArrayLike] | ArrayLike) -> list[Matrix]:
    if isinstance(samples, np.ndarray):
        return [samples.astype(np.float64)]
    samples = list(samples)  # type: ignore[arg-type]
    if all(np.ndim(s) == 0 for s in samples):
        return [np.asarray(samples, dtype=np.float64)]
    return [np.asarray(s, dtype=np.float64) for s in samples]
