"""The gate: verdicts on drops, how many rows they need, how often they are wrong, and `trace-bench check`."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from trace_bench.measures.gate import UNKNOWN, WITHIN, WORSE, p_worse, rows_needed, verdicts
from trace_bench.metrics import Estimate, difference_interval, mean_of

Z = NormalDist().inv_cdf(0.975)


def with_error(value, error):
    return Estimate(value, value - Z * error, value + Z * error)


# ------------------------------------------------------------------------------------------------- the pure functions


def test_a_drop_is_within_worse_or_cannot_be_told():
    """Limit 0.02, standard error 0.01, so an end is 0.0196 away: at 0.0004 and 0.0396 the verdict changes."""
    values = {-0.03: WITHIN, 0.0004: WITHIN, 0.0005: UNKNOWN, 0.02: UNKNOWN, 0.0395: UNKNOWN, 0.0397: WORSE}
    for value, verdict in values.items():
        assert verdicts([with_error(value, 0.01)], [0.02], [1]) == [verdict], value
    assert verdicts([Estimate(0.5), Estimate(0.0)], [0.02, 0.02], [1, 1]) == [UNKNOWN, UNKNOWN], "without an interval"
    assert p_worse(with_error(0.02 + Z * 0.01, 0.01), 0.02) == pytest.approx(0.025)
    assert p_worse(with_error(0.05, 0.01), 0.02) == pytest.approx(NormalDist().cdf(-3))


def test_one_of_several_has_to_be_certain_among_all_of_them():
    """Two standard errors beyond the limit (p = 0.023) are enough alone, and not as one of three of the same weight."""
    drop, still = with_error(0.04, 0.01), with_error(0.0, 0.001)
    assert verdicts([drop], [0.02], [1]) == [WORSE]
    assert verdicts([drop, still, still], [0.02] * 3, [1, 1, 1]) == [UNKNOWN, WITHIN, WITHIN]
    assert verdicts([drop, still, still], [0.02] * 3, [2, 1, 1])[0] == WORSE, "half of 0.05 is its share"
    # Once the first is certain the second is held against half of the level, and no longer a third (Holm).
    assert verdicts([with_error(0.06, 0.01), drop, still], [0.02] * 3, [1, 1, 1])[:2] == [WORSE, WORSE]


def test_rows_are_needed_by_the_variance_of_their_differences_and_the_distance_to_the_limit():
    """s = 0.2 on 100 rows; 0.01 from the limit: ((1.96 + 0.84) * 0.2 / 0.01)^2 = 3139.6 rows."""
    assert rows_needed(with_error(0.01, 0.02), 0.02, 100) == 3140
    assert rows_needed(with_error(0.03, 0.02), 0.02, 100) == 3140
    # A tenth of 0.05 is 2.576 standard errors: (2.576 + 0.842)^2 * 400.
    assert rows_needed(with_error(0.03, 0.02), 0.02, 100, share=0.1) == 4672
    assert rows_needed(with_error(0.01, 0.02), 0.02, 100, share=0.1) == 3140, "being within is not corrected"
    for drop in (with_error(0.02, 0.02), with_error(0.0199, 0.02), Estimate(0.01), Estimate(0.01, 0.01, 0.01)):
        assert rows_needed(drop, 0.02, 100) is None


def test_as_many_rows_as_are_said_to_be_needed_tell_in_four_of_five_cases():
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, -1.0, 0.0], [20, 20, 360])[:, None]  # a drop of zero, 10 % of the rows changed
    needed = rows_needed(Estimate(0.0, *(float(b[0]) for b in difference_interval(x))), 0.02, len(x))
    found = rng.choice([1.0, 0.0, -1.0], p=[0.05, 0.9, 0.05], size=(needed, 500))
    drops = [Estimate(*e) for e in zip(found.mean(0), *difference_interval(found), strict=True)]
    told = sum(verdicts([drop], [0.02], [1]) == [WITHIN] for drop in drops)
    assert 370 <= told <= 430, told


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("tasks", [1, 7])
def test_a_drop_that_is_at_its_limit_is_called_worse_in_one_of_twenty_checks_at_most(n, tasks):
    """All tasks lose exactly the limit: no verdict but "cannot be told" is right, of any task or their mean."""
    limit, checks = 0.02, 600
    rng = np.random.default_rng(n + tasks)
    lost = rng.uniform(0.05, 0.2, tasks)
    won = lost - limit
    found = [
        rng.choice([1.0, -1.0, 0.0], p=[a, b, 1 - a - b], size=(n, checks)) for a, b in zip(lost, won, strict=True)
    ]
    intervals = [(x.mean(0), *difference_interval(x)) for x in found]
    alarms = passes = 0
    for k in range(checks):
        drops = [Estimate(*(float(part[k]) for part in parts)) for parts in intervals]
        lines = drops if tasks == 1 else [mean_of(drops), *drops]
        mean, *rest = verdicts(lines, [limit] * len(lines), [tasks, *[1] * tasks][: len(lines)])
        alarms += WORSE in (mean, *rest)
        passes += mean == WITHIN
    most = checks * 0.05 + 2 * math.sqrt(checks * 0.05 * 0.95)
    assert alarms <= most and passes <= most, (alarms, passes)
