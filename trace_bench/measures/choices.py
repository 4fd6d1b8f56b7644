"""Which options a model chooses: their shares, the distance to those of the gold labels, and whether some vanish."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: An option is missed if the gold labels have it in at least this share of the rows,
GOLD_SHARE = 0.05
#: and in so many of them that chance alone would leave it out in one of twenty cases (exp(-3) is 0.05).
GOLD_ROWS = 3
#: An option takes all but a few answers if it is chosen in this share of at least so many answers,
MOST, ANSWERS = 0.95, 30
#: and the gold labels have it in no more than this share of the rows.
NOT_MOST = 0.85


def shares(chosen: ArrayLike, options: int) -> NDArray[np.float64]:
    """The share of each option among the answers that name one, shape (options,); NaN where none does.

    Args:
        chosen: The number of the option that each row's answer names, shape (rows,); negative = it names none.
        options: How many options there are.
    """
    picked = np.asarray(chosen)
    counts = np.bincount(picked[picked >= 0], minlength=options).astype(np.float64)
    return counts / counts.sum() if counts.sum() else np.full(options, np.nan)


def distance(p: ArrayLike, q: ArrayLike) -> float:
    """Total variation of two distributions: 1/2 sum |p - q|, from 0 (the same) to 1 (nothing in common).

    Levin, Peres and Wilmer 2009, Markov Chains and Mixing Times, proposition 4.2. It is the share of the answers that
    would have to name another option. NaN where one of both is.
    """
    return float(np.abs(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)).sum() / 2)


def collapse(chosen: ArrayLike, gold: ArrayLike, options: int) -> tuple[list[int], int | None]:
    """Which options are never chosen though the gold labels have them, and the one that takes all but a few answers.

    The limits are the constants of this module. For a model that chooses each option as often as the gold labels have
    it, chance alone makes a given option vanish in at most one of twenty cases. Where one option dominates, that is
    said, and not which others vanish.

    Args:
        chosen: As for `shares`.
        gold: The number of the right option of each row, of all rows.
        options: How many options there are.
    """
    of_model, of_gold = shares(chosen, options), shares(gold, options)
    n = int((np.asarray(chosen) >= 0).sum())
    if not n:
        return [], None
    top = int(np.argmax(of_model))
    if n >= ANSWERS and of_model[top] >= MOST and of_gold[top] <= NOT_MOST:
        return [], top
    least = max(GOLD_SHARE, GOLD_ROWS / n)
    return [i for i in range(options) if of_model[i] == 0 and of_gold[i] >= least], None
