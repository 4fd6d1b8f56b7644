"""The arithmetic of pairwise judgements: two orders to one result, results to rates with intervals. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trace_bench.metrics import net_interval, wilson_interval

#: The counts of `tally`; those of several suites can be added up.
COUNTS = ("n", "win", "tie", "lose", "unscored", "identical", "judged", "disagreements", "first", "second")

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
        COUNTS -> number. `judged` = pairs that were scored by verdicts, which those of identical answers were not;
        `first` and `second` = single verdicts for the answer in that position.
    """
    rows = list(rows)
    results = Counter(row["combined"] for row in rows)
    verdicts = Counter(v for row in rows for v in row["verdicts"])
    return {
        "n": len(rows),
        **{name: results[name] for name in ("win", "tie", "lose", "unscored")},
        "identical": sum(row["identical"] for row in rows),
        "judged": sum(not row["identical"] and row["combined"] != "unscored" for row in rows),
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
    scored = counts["n"] - counts["unscored"]
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
        `n`, `unscored`, each word in lower case -> number, and `rate` with its Wilson `interval`.
    """
    found = Counter(verdicts)
    scored = sum(found[word] for word in kind.words)
    return {
        "n": found.total(),
        "unscored": found.total() - scored,
        **{word.lower(): found[word] for word in kind.words},
        "rate": _share(found[kind.counted], scored),
        "interval": interval(found[kind.counted], scored),
    }


def interval(count: int, n: int) -> tuple[float, float] | None:
    """The Wilson interval as JSON can hold it: None instead of NaN."""
    return wilson_interval(count, n) if n else None


def _share(count: int, n: int) -> float | None:
    return count / n if n else None
