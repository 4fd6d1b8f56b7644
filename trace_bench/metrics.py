"""The numbers of continual learning: pure functions of the score matrix, and their intervals over test rows.

`R` is a float array of shape (T+1, T). Row 0 is the base model, row t the model after stage t (`t=None`: the last).
Column i-1 is the i-th task of the order; `R[t, i]` in the formulas counts tasks from 1. NaN means not evaluated, and
makes every result that needs the cell NaN. Inputs are never changed. Higher scores are better. For a metric where lower
is better, pass -R to the functions of changes, so that their signs keep their meaning.

Every function of R also takes replicates of shape (..., T+1, T) and returns an array of the leading dimensions. So
`bootstrap_interval(rows, backward_transfer)` is the interval of BWT. Intervals are pairs (low, high) with coverage
`level`; they are NaN if there are too few rows. A level outside 0 to 1 is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isclose
from numbers import Real
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
#: A float; an array where R has leading dimensions.
Value = Any

#: How many numbers the bootstrap holds at a time, so that it needs only some ten megabytes of memory.
CHUNK = 2**20


class Estimate(NamedTuple):
    """A number with its 95 % interval; the bounds are NaN if there is no interval."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def __neg__(self) -> Estimate:
        """The estimate of the negative number, such as a loss that was measured as a gain."""
        return Estimate(-self.value, -self.high, -self.low)

    @property
    def sign(self) -> int:
        """1 if the whole interval is above zero, -1 if it is below, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def _matrix(R: ArrayLike) -> Matrix:
    array = np.asarray(R, dtype=np.float64)
    if array.ndim < 2 or array.shape[-2] != array.shape[-1] + 1 or array.shape[-1] == 0:
        raise ValueError(f"R has the shape {array.shape}; use (T+1, T): rows for the base model and T stages, T tasks.")
    return array


def _value(array: Matrix) -> Value:
    return float(array) if np.ndim(array) == 0 else array


def _mean_over_tasks(values: Matrix) -> Value:
    """The mean over the last dimension; NaN without tasks."""
    return _value(values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan))


def _stage(t: int | None, T: int) -> int:
    t = T if t is None else t
    if not 1 <= t <= T:
        raise ValueError(f"t={t} is not a stage: use a number from 1 to {T}.")
    return t


def overall_performance(R: ArrayLike, t: int | None = None) -> Value:
    """OP_t = 1/t sum_{i<=t} R[t, i]: the mean score on the tasks seen so far (TRACE, section 3.3, equation 1)."""
    R = _matrix(R)
    t = _stage(t, R.shape[-1])
    return _value(R[..., t, :t].mean(axis=-1))


def backward_transfer(R: ArrayLike, t: int | None = None) -> Value:
    """BWT_t = 1/(t-1) sum_{i<t} (R[t, i] - R[i, i]): what later stages did to a task (TRACE, section 3.3).

    Negative = forgetting. NaN at t = 1. The paper prints 1/t in its formula; its tables are made with 1/(t-1), as here.
    """
    R = _matrix(R)
    t = _stage(t, R.shape[-1])
    i = np.arange(t - 1)
    return _mean_over_tasks(R[..., t, i] - R[..., i + 1, i])


def forward_transfer(R: ArrayLike) -> Value:
    """FWT = 1/(T-1) sum_{i>1} (R[i-1, i] - R[0, i]): what earlier stages did to a task not trained yet.

    Lopez-Paz & Ranzato 2017 (GEM), equation 4, with the base model's zero-shot score as the reference where they
    have a random initialisation. Needs the cells above the diagonal (`cells: all`). NaN with one task.
    """
    R = _matrix(R)
    i = np.arange(1, R.shape[-1])
    return _mean_over_tasks(R[..., i, i] - R[..., 0, i])


def forgetting(R: ArrayLike, t: int | None = None) -> Value:
    """F_t = 1/(t-1) sum_{i<t} (max_{i<=l<t} R[l, i] - R[t, i]): the drop from a task's best score so far.

    Chaudhry et al. 2018 (Riemannian Walk), section 4; their maximum is over all l < t, which differs if a task was
    better before its own stage. Positive = forgetting. It differs from -BWT if a task improved after its stage. The
    best of several measured scores is too high by chance: if nothing is forgotten in eight tasks, F is 6 points with 40
    test rows and 2 with 200. NaN at t = 1.
    """
    R = _matrix(R)
    t = _stage(t, R.shape[-1])
    drops = [R[..., i + 1 : t, i].max(axis=-1) - R[..., t, i] for i in range(t - 1)]
    return _value(np.mean(drops, axis=0) if drops else np.full(R.shape[:-2], np.nan))


def average_accuracy(R: ArrayLike) -> Value:
    """The mean of OP_t over all stages ("average incremental accuracy", Rebuffi et al. 2017, iCaRL)."""
    R = _matrix(R)
    return _value(np.mean([overall_performance(R, t) for t in range(1, R.shape[-1] + 1)], axis=0))


def general_ability_delta(base: Mapping[str, Value], after: Mapping[str, Value]) -> Value:
    """Mean over the suites of (after - base) (TRACE, section 3.3); both arguments are suite -> score.

    Raises:
        ValueError: if the suites differ, since means over different suites cannot be compared.
    """
    if base.keys() != after.keys() or not base:
        raise ValueError(f"Both models need the same suites; found {sorted(base)} and {sorted(after)}.")
    return _value(np.mean([after[suite] - base[suite] for suite in base], axis=0))


def bootstrap_interval(
    rows: Sequence[ArrayLike],
    statistic: Callable[[Matrix], Any] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Value, Value]:
    """Percentile bootstrap interval over test rows, paired (Efron and Tibshirani 1993, chapters 6 and 13).

    Whole rows of a group (the test set of a task) are drawn with replacement, so all columns (stages) are means over
    the same draw. Groups are drawn independently. Of n rows n-1 are drawn, so that the mean has the unbiased variance
    s^2/n also in small groups (McCarthy and Snowden 1985).

    Simulated coverage of OP and BWT (four or eight tasks, 0/1 rows with rates .1 to .9, 24, 40 or 200 rows): 93 to
    96 %. Near 0 and 1 the interval is too narrow, since equal rows have no spread: OP of four tasks at .02 and .98 is
    covered in 73 % with 24 rows, 90 % with 40, 93 % with 200. Reports therefore use `mean_interval`,
    `difference_interval` and `mean_of`. Do not use it for `forgetting`, whose maximum is biased: with eight tasks of
    equal scores the coverage is 27 to 30 %, whatever the number of rows.

    Args:
        rows: The groups, each of shape (n,), or (n, columns) with the same number of columns in every group. A NaN
            makes its column of the group NaN.
        statistic: Maps replicates of the groups' means, shape (resamples, groups) or (resamples, columns, groups), to
            an array whose first dimension is the resamples. If columns are stages and groups are tasks, each replicate
            is an R. None = the mean over the groups.
        level: The coverage.
        resamples: The number of resamples.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: if the groups differ in their columns.
    """
    _check_level(level)
    groups = [np.asarray(group, dtype=np.float64) for group in rows]
    if not groups:
        return np.nan, np.nan
    columns = groups[0].shape[1:]
    if any(g.ndim not in (1, 2) or g.shape[1:] != columns for g in groups):
        shapes = ", ".join(str(shape) for shape in sorted({g.shape for g in groups}))
        raise ValueError(f"The groups have the shapes {shapes}: use (n,) for all, or (n, columns) with equal columns.")
    statistic = statistic or (lambda R: R.mean(axis=-1))
    if any(len(g) < 2 for g in groups):
        unknown = _value(np.asarray(statistic(np.full((1, *columns, len(groups)), np.nan)))[0])
        return unknown, unknown
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // max(len(groups) * int(np.prod(columns)), *map(len, groups), 1))
    values = []
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        values.append(statistic(np.stack([_resampled_means(g, count, rng) for g in groups], axis=-1)))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return _value(low), _value(high)


def _resampled_means(group: Matrix, count: int, rng: np.random.Generator) -> Matrix:
    """The means of `count` resamples of the rows, computed from how often each row was drawn."""
    n = len(group)
    drawn = rng.integers(0, n, (count, n - 1), dtype=np.int32) + np.arange(count)[:, None] * n
    weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
    return weights.astype(np.float64) @ group / (n - 1)


def mean_interval(scores: ArrayLike, *, level: float = 0.95, fractions: bool = True) -> tuple[Matrix, Matrix]:
    """Intervals of the column means of `scores` (rows, columns): Wilson's if all rows are 0 or 1, else Student's t.

    With `fractions=False` scores are not fractions of 1, so a column of zeros and ones is no proportion. An interval is
    NaN if no variance can be estimated: a row is NaN, or Student's t has only one row or only equal rows.

    Simulated coverage with graded rows (beta, U-shaped, half of them 1, in tenths, normal): 91 to 97 % with 4 rows, 92
    to 96 % with 10 or more. A percentile bootstrap has 80 to 88 % with 4 and 90 to 93 % with 10. Long tails are covered
    less (log-normal: 85 % with 10, 88 % with 30, 91 % with 100). For fractions that are mostly 0, or mostly 1, see
    `difference_interval`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    kinds = (0, 1) if fractions else ()
    low, high = _by_kind(scores, kinds, lambda c: wilson_interval(int(c.sum()), len(c), level=level), level, kinds)
    return (low.clip(0, 1), high.clip(0, 1)) if fractions else (low, high)


def difference_interval(
    differences: ArrayLike, *, level: float = 0.95, fractions: bool = True
) -> tuple[Matrix, Matrix]:
    """Intervals of the column means of paired differences, one row a test row: shape (rows, columns).

    It is `net_interval` if all rows are -1, 0 or 1, as differences of 0/1 scores are; else Student's t. `fractions` and
    NaN are as in `mean_interval`.

    If at most half of the rows changed, two rows are added that change by the largest change seen, one in each
    direction, since a sample may lack rare changes; `net_interval` does the same. Simulated coverage: if 5 % of the
    rows lose up to 1, it is 92 to 96 % with 24 to 200 rows (88 to 92 % without the two rows). If 10 % change by -.3 to
    .7, it is 89 % with 24 and 40 rows (82 to 85 % without) and 96 % with 100.
    """

    def net(column: Matrix) -> tuple[float, float]:
        return net_interval(int((column > 0).sum()), int((column < 0).sum()), len(column), level=level)

    rows = np.asarray(differences, dtype=np.float64)
    return _by_kind(rows, (-1, 0, 1) if fractions else (), net, level, [0])


def mean_difference(differences: Matrix, *, fractions: bool = True) -> Estimate:
    """The mean of paired differences, one a test row, with its `difference_interval`."""
    low, high = difference_interval(differences[:, None], fractions=fractions)
    return Estimate(float(differences.mean()), float(low[0]), float(high[0]))


def _by_kind(
    rows: Matrix,
    values: Sequence[int],
    formula: Callable[[Matrix], tuple[float, float]],
    level: float,
    usual: Sequence[int],
) -> tuple[Matrix, Matrix]:
    """The intervals of columns: by `formula` if a column holds only `values`, else Student's t.

    Student's t is widened if at least half of a column has one of the `usual` values, so that others are rare.
    """
    _check_level(level)
    low, high = _student(rows, level)
    for value in usual:
        other = rows != value
        few = other.any(axis=0) & (other.mean(axis=0) <= 0.5)
        if few.any():
            most = np.abs(rows[:, few] - value).max(axis=0, keepdims=True)
            wider = _student(np.concatenate([rows[:, few], value + most, value - most]), level)
            low[few], high[few] = np.minimum(low[few], wider[0]), np.maximum(high[few], wider[1])
    for column in np.flatnonzero(np.isin(rows, values).all(axis=0)):
        low[column], high[column] = formula(rows[:, column])
    return low, high


def _student(rows: Matrix, level: float) -> tuple[Matrix, Matrix]:
    """Student's t intervals of the means of columns; NaN if all rows are equal."""
    from scipy.special import stdtrit

    n = len(rows)
    if n < 2:
        return np.full(rows.shape[1], np.nan), np.full(rows.shape[1], np.nan)
    half = stdtrit(n - 1, (1 + level) / 2) * rows.std(axis=0, ddof=1) / n**0.5
    # Equal numbers may differ by rounding, which is no spread.
    half[~(np.ptp(rows, axis=0) > 1e-9 * np.abs(rows).max(axis=0))] = np.nan
    return rows.mean(axis=0) - half, rows.mean(axis=0) + half


def standard_error(values: Sequence[Any], score: float | None = None) -> float | None:
    """Standard error of the mean; None if there is one row, a value is not a number, or `score` is not the mean."""
    n = len(values)
    if n < 2 or not all(isinstance(v, Real) for v in values):
        return None
    mean = sum(values) / n
    if score is not None and not isclose(mean, score, rel_tol=1e-9, abs_tol=1e-9):
        return None
    return (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates (Zou and Donner 2008, Statistics in Medicine 27: variance estimates recovery).

    The test sets of tasks are independent. So OP is such a mean of cells with `mean_interval`, and BWT of paired
    differences with `difference_interval`. Rates of 0 and 1 keep their uncertainty. The mean has no interval if one of
    the estimates has none, and is NaN without estimates.

    If all rates are near 1 their upper bounds are near, too, and squares of these distances alone cover too little (OP
    of eight tasks at .98 with 40 rows: 89 %). So neither side is shorter than the result for the half widths, nor
    longer than the mean distance to the bounds. Simulated coverage of OP of 2 to 15 tasks of 0/1 rows: with equal rates
    of .5 to .98 91 to 100 % (10 to 500 rows a task; 86 to 100 % with 4), with rates from .1 to .9 94 to 96 %. BWT of 1
    to 7 tasks: 94 to 100 %.
    """
    if not estimates:
        return Estimate(np.nan)
    values, low, high = np.array(estimates).T
    mean, half = float(values.mean()), np.linalg.norm(high - low) / 2
    below, above = (
        float(np.minimum(np.maximum(np.linalg.norm(ends), half), ends.sum())) / len(values)
        for ends in (values - low, high - values)
    )
    return Estimate(mean, mean - below, mean + above)


def mean_over_stages(rows: Sequence[Matrix], *, fractions: bool = True) -> Estimate:
    """`average_accuracy` with its interval, from the rows of each task, shape (rows, T+1), in the order of the tasks.

    It is the mean over the tasks i of sum_{t>=i} R[t, i] / t, and each such sum is a mean over the rows of the task.
    """
    found = []
    for i, x in enumerate(rows, 1):
        shares = 1 / np.arange(i, len(rows) + 1)
        # The mean of zeros, or of ones, must be exactly 0 or 1 for `mean_interval`.
        means = np.round(x[:, i:] @ shares / shares.sum(), 12)[:, None]
        low, high = mean_interval(means, fractions=fractions)
        found.append(Estimate(*(float(shares.sum() * value) for value in (means.mean(), low[0], high[0]))))
    return mean_of(found)


def net_interval(plus: int, minus: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of (plus - minus) / n: a paired difference of two proportions, or a net win rate.

    The adjusted Wald interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics 37, which
    Fagerland, Lydersen and Laake (2014) recommend. Over a grid of rates its exact coverage is 93 to 100 % with 24 rows
    and 94 to 100 % with 200. The bootstrap falls to 38 %, since equal rows have no spread. `n` counts all rows,
    including those of 0. Counts that do not fit into `n` are a ValueError.
    """
    _check_level(level)
    if not (plus >= 0 and minus >= 0 and plus + minus <= n):
        raise ValueError(f"plus={plus} and minus={minus} of n={n}: use counts of at least 0 whose sum is at most n.")
    if n == 0:
        return np.nan, np.nan
    p, q = (plus + 1) / (n + 2), (minus + 1) / (n + 2)
    half = NormalDist().inv_cdf((1 + level) / 2) * ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def difference_p(parts: Sequence[ArrayLike], *, fractions: bool = True) -> Matrix:
    """Two-sided p-values of paired differences, one row a test row: how likely they are if nothing changed.

    If all rows are -1, 0 or 1, as differences of 0/1 scores are, it is the exact sign test of the rows that changed
    (McNemar's exact test); else Student's t. The p of Student's t is at least 2^(1-k), the chance that all k changed
    rows go the same way, so that few changed rows prove nothing. With several parts it is the t of the mean of their
    means, with Welch's degrees of freedom.

    Parts (usually one) have the shape (rows, columns), the p-values (columns,). A p-value is NaN if its column holds a
    NaN, or a part has one row that is not -1, 0 or 1. `fractions` is as in `difference_interval`.
    """
    from scipy.special import bdtr, stdtr

    groups = [np.asarray(part, dtype=np.float64) for part in parts]
    rows = np.concatenate(groups)
    plus, minus = (rows > 0).sum(axis=0), (rows < 0).sum(axis=0)
    if any(len(g) < 2 for g in groups):
        student = np.full(rows.shape[1], np.nan)
    else:
        squares = np.stack([g.var(axis=0, ddof=1) / len(g) for g in groups])
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.mean([g.mean(axis=0) for g in groups], axis=0) * len(groups) / np.sqrt(squares.sum(axis=0))
            freedom = squares.sum(axis=0) ** 2 / sum(q**2 / (len(g) - 1) for q, g in zip(squares, groups, strict=True))
        same = ~(squares.sum(axis=0) > 0) & ~np.isnan(rows).any(axis=0)  # no spread: only the signs count
        student = np.maximum(
            np.where(same, 0, 2 * stdtr(freedom, -np.abs(t))), np.minimum(1, 2.0 ** (1 - plus - minus))
        )
    if len(groups) > 1 or not fractions:
        return student
    exact = np.minimum(1, 2 * bdtr(np.minimum(plus, minus), plus + minus, 0.5))
    return np.where(np.isin(rows, (-1, 0, 1)).all(axis=0), exact, student)


def holm(p: ArrayLike, weights: ArrayLike | None = None, *, level: float = 0.05) -> NDArray[np.bool_]:
    """Which of several hypotheses are rejected; the probability that a true one is among them is at most `level`.

    Holm 1979, Scandinavian Journal of Statistics 6; the tests may depend on each other. The smallest p-value is
    compared with level / m, the next with level / (m - 1), and so on up to the first that is larger. A p of NaN is not
    tested. `weights` are the initial shares of the level of the tests; None = equal shares.
    """
    p = np.asarray(p, dtype=np.float64)
    share = np.ones(p.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    found, left = np.zeros(p.shape, dtype=bool), share[~np.isnan(p)].sum()
    for i in np.argsort(p / share, kind="stable"):
        if not p[i] * left <= level * share[i]:
            break
        found[i] = True
        left -= share[i]
    return found


def wilson_interval(count: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, `count` of `n` rows (Wilson 1927); also good near 0 and 1 and for few rows."""
    _check_level(level)
    if not 0 <= count <= n:
        raise ValueError(f"count={count} of n={n}: use a count between 0 and n.")
    if n == 0:
        return np.nan, np.nan
    z, p = NormalDist().inv_cdf((1 + level) / 2), count / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    # At 0 and 1 a bound equals the proportion; rounding must not put it on the wrong side.
    return min(p, max(0.0, center - half)), max(p, min(1.0, center + half))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: use a number between 0 and 1, such as 0.95.")
