"""A gate: whether a drop is within its limit, worse than it, or cannot be told at this many rows.

A drop is what was lost, positive where scores got worse, in the unit of its limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from trace_bench.metrics import Estimate, holm

WITHIN, WORSE, UNKNOWN = "within", "worse", "cannot be told"
#: How often a check may call something worse that is at its limit, over all that it tests together.
FALSE_ALARMS = 0.05
#: How often the verdict comes with as many rows as `rows_needed` says.
POWER = 0.8
#: More rows than these no test set has.
MOST_ROWS = 1_000_000

_quantile = NormalDist().inv_cdf
#: Standard errors from an estimate to an end of its 95 % interval.
_ENDS = _quantile(0.975)


def verdicts(
    drops: Sequence[Estimate], limits: Sequence[float], rows: Sequence[int], weights: Sequence[float]
) -> list[str]:
    """The verdict on each of several drops, given with their 95 % intervals and how many test rows they are made of.

    `WITHIN`: the whole interval is. Where a decision needs several drops to be within, it is wrong in at most one of
    forty cases however many they are (intersection-union test; Berger 1982, Technometrics 24).

    `WORSE`: the whole interval is beyond the limit, and the drop is certain to be among all of them (`holm`, one-sided
    at the level `FALSE_ALARMS`), so that more drops do not mean more false alarms. `weights` are the shares of that
    level that the drops begin with. Simulated with drops that are at their limits, of one or seven tasks of 24 to 1000
    rows of 0/1 scores, or with normal or beta differences of 4 to 200 rows, at most 5 % of checks call one worse, and
    of a single drop 1 to 3.5 % call it within. Where few rows change by different amounts it is called within too often
    (a tenth of the rows, by -.3 to .7: 11 % with 24 rows, 3 % with 200): no interval shows what the sample lacks.

    `UNKNOWN`: neither, or there is no interval (NaN): of graded scores, rows that all have the same drop say nothing of
    others.
    """
    certain = holm([p_worse(*each) for each in zip(drops, limits, rows, strict=True)], weights)
    found = []
    for drop, limit, sure in zip(drops, limits, certain, strict=True):
        if drop.low < drop.high <= limit:
            found.append(WITHIN)
        else:
            found.append(WORSE if sure and drop.low > limit else UNKNOWN)
    return found


def p_worse(drop: Estimate, limit: float, rows: int) -> float:
    """The one-sided p-value of "the drop is no more than its limit", from the interval (Student's t).

    Its lower end is 1.96 standard errors away (Altman and Bland 2011, BMJ 343:d2304); of few graded rows it is further,
    so that p is too large. NaN without an interval.
    """
    from scipy.special import stdtr

    error = (drop.value - drop.low) / _ENDS
    return float(stdtr(max(1, rows - 1), (limit - drop.value) / error)) if error > 0 else math.nan


def rows_needed(drop: Estimate, limit: float, rows: int, share: float = 1.0) -> int | None:
    """How many test rows tell on which side of its limit a drop is, if its true value is the one that was measured.

    n = (z_verdict + z_power)^2 s^2 / (drop - limit)^2 (Julious 2004, Statistics in Medicine 23), where s is the
    standard deviation of a row's paired difference, as the interval has it: the distance to its end on the side of the
    limit is 1.96 s / sqrt(rows). The verdict comes in four of five cases then (`POWER`).

    Args:
        drop: The measured drop.
        limit: Its limit.
        rows: The number of test rows that it was measured on; of a mean over tasks, those of all of them.
        share: The share of `FALSE_ALARMS` that the drop has among all drops of a check.

    Returns:
        The number of rows, None if it is above `MOST_ROWS` or not known.
    """
    distance = limit - drop.value
    half = drop.high - drop.value if distance > 0 else drop.value - drop.low
    if not (half > 0 and distance):  # NaN, too
        return None
    z = _ENDS if distance > 0 else max(_ENDS, _quantile(1 - FALSE_ALARMS * share))
    needed = rows * ((z + _quantile(POWER)) * half / (_ENDS * distance)) ** 2
    return math.ceil(needed) if needed <= MOST_ROWS else None
