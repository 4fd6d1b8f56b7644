"""Row by row: what became of each test row since a reference stage, and how much of it guessing alone explains.

A mean hides it: with as many rows lost as gained a score stays the same. Scores are arrays of shape (rows, stages),
from 0 (the worst) to 1 (the best); NaN = not evaluated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trace_bench.metrics import Estimate, bootstrap_interval, wilson_interval

#: The fates of a row; `UNKNOWN` where a stage is not evaluated, or does not come after the reference.
KEPT, CAME_BACK, GAINED, LOST, NEVER = range(5)
UNKNOWN = -1
NAMES = ("kept", "came back", "gained", "lost", "never")


def fates(scores: ArrayLike, reference: int, tolerance: float = 0.0) -> NDArray[np.int8]:
    """What became of each row at each stage after the reference stage.

    With scores of 0 and 1 these are the transitions of Harmon et al. 2025 (arXiv 2510.17776, section 3), of which those
    that are right at both ends are told apart by what was in between, as the forgetting events of Toneva et al. 2019
    (arXiv 1812.05159) do:

    - kept: right at the reference and at all evaluated stages since (1 -> 1);
    - came back: right at the reference, wrong in between, right now (1 -> 0 -> 1);
    - lost: right at the reference, wrong now (1 -> 0);
    - gained: wrong at the reference, right now (0 -> 1);
    - never: wrong at both (0 -> 0), whatever was in between.

    Graded scores need a `tolerance`: a row is lost or gained where its score is more than that below or above the
    reference, else kept; and never where it had no more than the tolerance to lose.

    Args:
        scores: Shape (rows, stages), from 0 to 1.
        reference: The stage that rows are compared with.
        tolerance: The largest change that is none; 0 for scores of 0 and 1.

    Returns:
        One of the five fates, shape (rows, stages); `UNKNOWN` where there is none.
    """
    x = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(x).any(axis=0) & (np.arange(x.shape[1]) > reference) & ~np.isnan(x[:, reference]).any()
    change = x - x[:, [reference]]
    # 0.4 - 0.3 is more than 0.1: what rounding adds is no change.
    fell, rose = change < -tolerance - 1e-9, change > tolerance + 1e-9
    fell_before = np.cumsum(fell & known, axis=1) > 0
    had = x[:, [reference]] > tolerance + 1e-9
    found = np.select([fell, rose & ~had, fell_before, ~had, rose], [LOST, GAINED, CAME_BACK, NEVER, GAINED], KEPT)
    return np.where(known, found, UNKNOWN).astype(np.int8)


def first_lost(found: NDArray[np.int8]) -> NDArray[np.intp]:
    """The stage at which each row was lost for the first time since the reference, shape (rows,); -1 = at none."""
    lost = found == LOST
    return np.where(lost.any(axis=1), lost.argmax(axis=1), -1)


class Corrected(NamedTuple):
    """A rate of transitions: as observed, as chance alone gives it, and the difference with its interval."""

    observed: float
    by_chance: float
    corrected: Estimate


def beyond_chance(
    before: ArrayLike, after: ArrayLike, named_before: ArrayLike, named_after: ArrayLike, options: ArrayLike
) -> tuple[Corrected, Corrected]:
    """Forgetting (1 -> 0) and backward transfer (0 -> 1) of choices, without what guessing alone gives.

    Harmon et al. 2025 (arXiv 2510.17776): of k options a model knows the answer, or guesses each with 1/k, and what is
    guessed before and after is independent. With accuracy a the share of guesses is G = (1-a) k/(k-1), of which G/k are
    right and (1-a) wrong. So a row is guessed rightly before with (1-a_pre)/(k-1) and wrong after with (1-a_post):

        F_chance = BT_chance = (1-a_pre)(1-a_post)/(k-1),    F = P(1 -> 0) - F_chance,    BT = P(0 -> 1) - BT_chance

    Two things are added, which change nothing where all rows have k options and all answers name one. Rows are taken
    apart by k, as their prompts list them, and the chances are averaged over the rows. And an answer that names no
    option is wrong but no guess, so that only those that name a wrong one, a share w, have right guesses among them:

        F_chance = sum_k n_k/n w_pre,k (1-a_post,k)/(k-1),    BT_chance = sum_k n_k/n w_post,k (1-a_pre,k)/(k-1)

    The authors set negative results to 0; here they stay, so that they are not biased, and F - BT is the change of the
    accuracy where all answers name an option. A model that always takes the same option does not guess, and where it
    knows the same rows before and after, more transitions are chance than this says.

    Args:
        before: Whether each row was right, shape (rows,).
        after: The same, later.
        named_before: Whether its answer named an option.
        named_after: The same, later.
        options: How many options the row has, at least 2.

    Returns:
        Forgetting and backward transfer, as fractions of the rows; with intervals over rows: the bootstrap's, and
        no narrower than Wilson's of the rate alone.
    """
    pre, post, k = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool), np.asarray(options)
    wrong_pre, wrong_post = ~pre & np.asarray(named_before, dtype=bool), ~post & np.asarray(named_after, dtype=bool)
    return _corrected(pre & ~post, wrong_pre, ~post, k), _corrected(~pre & post, wrong_post, ~pre, k)


def _corrected(
    changed: NDArray[np.bool_], guessed: NDArray[np.bool_], wrong: NDArray[np.bool_], options: NDArray[np.intp]
) -> Corrected:
    """The rate of rows that changed, less the chance that a guess is right at one stage and wrong at the other."""
    kinds = np.unique(options)
    having = options[:, None] == kinds
    columns = [changed[:, None], having & guessed[:, None], having & wrong[:, None], having]
    rows = np.concatenate(columns, axis=1).astype(np.float64)

    def chance(means: NDArray[np.float64]) -> NDArray[np.float64]:
        """From means of the columns, shape (resamples, columns)."""
        named, others, share = np.split(means[:, 1:], 3, axis=1)
        return (named * others / np.where(share > 0, share, 1) / (kinds - 1)).sum(axis=1)  # type: ignore[no-any-return]

    ends = bootstrap_interval([rows], lambda means: means[:, 0, 0] - chance(means[..., 0]))
    observed, by_chance = float(changed.mean()), float(chance(rows.mean(axis=0)[None])[0])
    # A few changed rows have too little spread: with 40 rows and one change in forty the coverage was 53 %.
    of_rate = [end - by_chance for end in wilson_interval(int(changed.sum()), len(changed))]
    low, high = float(np.minimum(ends[0], of_rate[0])), float(np.maximum(ends[1], of_rate[1]))
    return Corrected(observed, by_chance, Estimate(observed - by_chance, low, high))
