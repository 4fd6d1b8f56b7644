"""Means over training seeds and orders of the tasks: what another training would change, on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_bench.metrics import Estimate

#: More seeds than these nobody trains.
MOST_SEEDS = 1000


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over training seeds (Student's t), one value a seed.

    It says what another training would change, on the same test rows; the intervals over test rows say what other
    rows would change, for the same training. NaN with less than two values, a NaN among them, or values that are all
    the same, from which no variance can be estimated.
    """
    numbers = {i: float(v) for i, v in enumerate(np.ravel(values))}
    estimate, _ = seed_difference(numbers, dict.fromkeys(numbers, 0.0))
    return estimate.low, estimate.high


def seed_difference(mine: Mapping[Any, float], theirs: Mapping[Any, float]) -> tuple[Estimate, float]:
    """The difference of two methods' means over training seeds, with its interval (Student's t), and its p-value.

    Paired by seed where both (seed -> number) have the same seeds, else Welch's (1947, Biometrika 34). Bounds
    and the two-sided p-value are NaN with less than two seeds, a NaN, or numbers that are all the same (when paired,
    differences that are), which say nothing of the variance.
    """
    return order_difference([(mine, theirs)])


def order_difference(orders: Sequence[tuple[Mapping[Any, float], Mapping[Any, float]]]) -> tuple[Estimate, float]:
    """The mean over orders of the tasks of `seed_difference`, with its interval and its p-value.

    It is that of these orders: the interval is over the seeds in each of them (Welch's sum of their variances). With
    one seed for each order, the same in both methods, it is over the orders, as over a sample of all of them.
    """
    from scipy.special import stdtr, stdtrit

    if not orders or not all(mine and theirs for mine, theirs in orders):
        return Estimate(np.nan), np.nan
    samples = []
    for mine, theirs in orders:
        if mine.keys() == theirs.keys():
            samples.append(np.array([mine[seed] - theirs[seed] for seed in mine]))
        else:
            samples += [np.array(list(of.values())) for of in (mine, theirs)]
    value = float(np.mean([np.mean(list(mine.values())) - np.mean(list(theirs.values())) for mine, theirs in orders]))
    shares = len(orders)
    if len(samples) == shares and all(len(x) == 1 for x in samples):
        samples, shares = [np.concatenate(samples)], 1
    largest = max(abs(number) for pair in orders for of in pair for number in of.values())
    if any(len(x) < 2 or not np.ptp(x) > 1e-9 * largest for x in samples):
        return Estimate(value), np.nan
    squares = [x.var(ddof=1) / len(x) / shares**2 for x in samples]
    error = sum(squares) ** 0.5
    freedom = sum(squares) ** 2 / sum(q**2 / (len(x) - 1) for q, x in zip(squares, samples, strict=True))
    half = stdtrit(freedom, 0.975) * error
    return Estimate(value, float(value - half), float(value + half)), float(2 * stdtr(freedom, -abs(value) / error))


def seeds_needed(deviation: float, difference: float) -> int | None:
    """How many seeds each of two methods needs to show a difference of their means in four of five two-sided t-tests.

    The tests are at the level 5 %; `deviation` is the standard deviation between seeds of both methods. At least 2;
    None if it is more than `MOST_SEEDS`.
    """
    from scipy.special import nctdtr, stdtrit

    if not (deviation > 0 and difference > 0):
        raise ValueError(f"deviation={deviation} and difference={difference}: use numbers above 0.")
    n = np.arange(2, MOST_SEEDS + 1)
    freedom = 2 * (n - 1)
    # Of an effect above 100 deviations two seeds are enough.
    shift = min(difference / deviation, 100) * np.sqrt(n / 2)
    enough = np.flatnonzero((shift > 20) | (nctdtr(freedom, shift, stdtrit(freedom, 0.975)) <= 1 - 0.8))
    return int(n[enough[0]]) if enough.size else None
