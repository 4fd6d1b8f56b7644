"""The arithmetic of pairwise judgements: two orders to one result, results to rates with intervals. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_bench.metrics import Estimate, net_interval, wilson_interval

#: The counts of `tally`; those of several suites can be added up.
COUNTS = ("n", "win", "tie", "lose", "unscored", "broken", "identical", "judged", "disagreements", "first", "second")
#: In place of a verdict on an answer that says nothing (`judges.broken`).
BROKEN = "BROKEN"
#: With fewer pairs, or with less to tell length and quality apart by, no length-controlled rate is made.
FEWEST_PAIRS = 20

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Kind:
    """What is judged: which samples, and what is asked of them."""

    name: str
    title: str
    prefix: str
    """Names of the tasks whose samples it judges begin with this."""
    pair: Callable[[str, str, str], Messages]
    """(prompt, answer A, answer B) -> messages."""
    direct: Callable[[str, str], Messages]
    """(prompt, answer) -> messages of the judgement of one answer alone."""
    words: Sequence[str]
    """The verdicts of the direct judgement."""
    counted: str
    """The word whose rate is reported."""
    rate: str
    """What that rate is called."""
    leaves_out_broken: bool
    """Whether pairs with a broken answer are left out: it harms nobody, but it does not help either."""


def combine(first: str | None, second: str | None) -> tuple[str, bool]:
    """One result from the verdicts of both orders.

    Args:
        first: "A", "B", "C" or None, where A was the answer of the stage and B that of the base model.
        second: The same where A was the base model's and B the stage's.

    Returns:
        ("win" | "tie" | "lose" | "unscored", whether the orders disagree). Win = the stage is better in both orders.
        Orders that disagree are a tie. Without one of the verdicts the pair is unscored.
    """
    if first is None or second is None:
        return "unscored", False
    one = {"A": "win", "B": "lose", "C": "tie"}[first]
    other = {"A": "lose", "B": "win", "C": "tie"}[second]
    return (one, False) if one == other else ("tie", True)


def tally(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Counts over pairs.

    Args:
        rows: One mapping a pair: `combined`, `disagree`, `identical`, `verdicts` (of both orders).

    Returns:
        COUNTS -> number. `broken` = pairs that are left out since an answer says nothing; `judged` = pairs that were
        scored by verdicts, which those of identical answers were not; `first` and `second` = single verdicts for the
        answer in that position.
    """
    rows = list(rows)
    results = Counter(row["combined"] for row in rows)
    verdicts = Counter(v for row in rows for v in row["verdicts"])
    return {
        "n": len(rows),
        **{name: results[name] for name in ("win", "tie", "lose", "unscored", "broken")},
        "identical": sum(row["identical"] for row in rows),
        "judged": sum(not row["identical"] and row["combined"] not in ("unscored", "broken") for row in rows),
        "disagreements": sum(row["disagree"] for row in rows),
        "first": verdicts["A"],
        "second": verdicts["B"],
    }


def rates(counts: Mapping[str, int]) -> dict[str, Any]:
    """Rates and 95 % intervals from the counts of `tally`, or from sums of them over suites.

    Returns:
        `win_rate`, `tie_rate`, `lose_rate` of the scored pairs, each with its Wilson interval (`win_interval`, ...);
        `net_win_rate` = (win - lose) / scored, the delta, with `metrics.net_interval`;
        `disagreement_rate` of the judged pairs; `first_position_rate`, the share of the first position among the
        verdicts for a position (0.5 = no bias). None where there is nothing to take a rate of.
    """
    scored = counts["n"] - counts["unscored"] - counts.get("broken", 0)  # older results have no such count
    return {
        **{f"{name}_rate": _share(counts[name], scored) for name in ("win", "tie", "lose")},
        **{f"{name}_interval": interval(counts[name], scored) for name in ("win", "tie", "lose")},
        "net_win_rate": _share(counts["win"] - counts["lose"], scored),
        "net_interval": net_interval(counts["win"], counts["lose"], scored) if scored else None,
        "disagreement_rate": _share(counts["disagreements"], counts["judged"]),
        "first_position_rate": _share(counts["first"], counts["first"] + counts["second"]),
    }


def direct_rate(kind: Kind, verdicts: Iterable[str | None]) -> dict[str, Any]:
    """Counts of the verdicts on answers alone, and the rate of the one that is reported.

    Returns:
        `n`, `unscored`, `broken` (answers that say nothing, which are in no rate), each word in lower case -> number,
        and `rate` with its Wilson `interval`.
    """
    found = Counter(verdicts)
    scored = sum(found[word] for word in kind.words)
    return {
        "n": found.total(),
        "unscored": found.total() - scored - found[BROKEN],
        "broken": found[BROKEN],
        **{word.lower(): found[word] for word in kind.words},
        "rate": _share(found[kind.counted], scored),
        "interval": interval(found[kind.counted], scored),
    }


def length_controlled(rows: Iterable[Mapping[str, Any]]) -> Estimate:
    """The net win rate that answers of the same length as the base model's would have, with its 95 % interval.

    A logistic model of a win (1; a tie is 1/2, a loss 0) on the difference of the two lengths,

        P(win) = 1 / (1 + exp(-(a + b tanh(d / s)))),   d = characters of the answer less those of the base model's,

    with s the standard deviation of d; at d = 0 the net win rate is 2 P - 1 = tanh(a / 2). The interval is that of a,
    by the robust ("sandwich") variance, carried over. It is AlpacaEval 2's length control (Dubois et al. 2024, arXiv
    2404.04475) in its simplest form: without a term for the difficulty of a prompt, and without regularisation.

    Args:
        rows: The pairs: `combined`, and `lengths` of both answers.

    Returns:
        NaN where it cannot be told: fewer than FEWEST_PAIRS scored pairs, lengths that do not differ or are not on
        record, or wins that the length alone tells apart, so that no finite a and b fit best.
    """
    won = {"win": 1.0, "tie": 0.5, "lose": 0.0}
    scored = [row for row in rows if row["combined"] in won]
    if len(scored) < FEWEST_PAIRS or not all("lengths" in row for row in scored):
        return Estimate(math.nan)
    y = np.array([won[row["combined"]] for row in scored])
    difference = np.array([float(row["lengths"][0] - row["lengths"][1]) for row in scored])
    if difference.std() == 0 or y.min() == y.max():
        return Estimate(math.nan)
    x = np.stack([np.ones(len(y)), np.tanh(difference / difference.std())], axis=1)
    beta = np.zeros(2)
    for _ in range(50):  # Newton's method; it takes about six steps
        p = 1 / (1 + np.exp(-x @ beta))
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        if np.abs(beta).max() > 10 or np.linalg.cond(hessian) > 1e8:
            return Estimate(math.nan)
        step = np.linalg.solve(hessian, x.T @ (y - p))
        beta += step
        if np.abs(step).max() < 1e-10:
            break
    else:
        return Estimate(math.nan)
    inverse = np.linalg.inv(hessian)
    scores = x * (y - p)[:, None]
    error = math.sqrt((inverse @ (scores.T @ scores) @ inverse)[0, 0])
    low, high = (math.tanh((beta[0] + sign * 1.959964 * error) / 2) for sign in (-1, 1))
    return Estimate(math.tanh(beta[0] / 2), low, high)


def interval(count: int, n: int) -> tuple[float, float] | None:
    """The Wilson interval as JSON can hold it: None instead of NaN."""
    return wilson_interval(count, n) if n else None


def _share(count: int, n: int) -> float | None:
    return count / n if n else None
