"""Tests of methods over several orders of the tasks."""

import numpy as np
import pytest
from made_runs import TASKS, R
from scipy.stats import t, ttest_1samp
from test_comparison import lines_of, rows_of, table_of

from trace_bench.measures.seeds import order_difference, seed_difference
from trace_bench.report import compare

TURNED = TASKS[::-1]


def test_the_interval_of_a_mean_over_orders_combines_the_seeds_within_orders():
    one, two = {0: 1.0, 1: 3.0, 2: 8.0}, {0: 0.0, 1: 1.0, 2: 9.0}
    assert order_difference([(one, two)]) == seed_difference(one, two)
    # The orders differ much, and the seeds vary equally in each: four degrees of freedom.
    zeros = dict.fromkeys(range(3), 0.0)
    estimate, p = order_difference([({0: 0.0, 1: 1.0, 2: 2.0}, zeros), ({0: 10.0, 1: 12.0, 2: 11.0}, zeros)])
    error = (2 / 3) ** 0.5 / 2
    assert estimate == pytest.approx((6, 6 - t.ppf(0.975, 4) * error, 6 + t.ppf(0.975, 4) * error))
    assert p == pytest.approx(2 * t.sf(6 / error, 4))
    # With one seed per order, the variance is that of the orders.
    estimate, p = order_difference([({0: x}, {0: 1.0}) for x in (2.0, 4.0, 9.0)])
    right = ttest_1samp([1.0, 3.0, 8.0], 0)
    assert (*estimate[1:], p) == pytest.approx((*right.confidence_interval(), right.pvalue))
    for few in (
        [({0: 1.0}, {0: 2.0})],
        [({0: 1.0}, {1: 2.0}), ({0: 1.0}, {1: 3.0})],
        [(one, two), ({0: 1.0}, {0: 2.0})],
    ):
        assert np.isnan([*order_difference(few)[0][1:], order_difference(few)[1]]).all()
    assert np.isnan(order_difference([(one, two), ({}, {})])[0].value)


def test_the_interval_over_orders_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        mine = rng.normal([[0], [20]], [[1], [3]], (2, 3))
        theirs = rng.normal(0, 1, (2, 3))
        (_, low, high), _ = order_difference(
            [(dict(enumerate(a)), dict(enumerate(b))) for a, b in zip(mine, theirs, strict=True)]
        )
        covered.append(low <= 10 <= high)
    assert 0.93 <= np.mean(covered) <= 0.99


def trained(make, method, tasks, finals, *, first=0, stem=None, **config):
    """One run per seed, with these final scores in percent, in this order of the tasks."""
    runs = []
    for seed, final in enumerate(finals, first):
        matrix = R.copy()
        matrix[[1, 2], [0, 1]], matrix[3] = 0.9, final / 100
        config |= {"tasks": tasks, "seed": seed}
        name = f"{'plain' if tasks == TASKS else 'turned'}-{stem or method}-seed{seed}"
        runs.append(make(matrix, name=name, method=method, tasks=tasks, seed=seed, config=dict(config)))
    return runs


def test_methods_in_several_orders_are_compared_per_order_and_over_all(make):
    runs = [
        *trained(make, "sequential", TASKS, [40, 42, 41], epochs=[5, 3, 7]),
        *trained(make, "ewc", TASKS, [60, 64, 62], epochs=[5, 3, 7]),
        *trained(make, "sequential", TURNED, [20, 22, 21], epochs=[7, 3, 5]),
        *trained(make, "ewc", TURNED, [30, 31, 35], epochs=[7, 3, 5]),
    ]
    comparison = compare(runs)
    over = rows_of(table_of(comparison, "Over orders"))
    assert over["sequential"] == {"orders": "2", "runs": "6", "OP": "31.0 ± 14.1", "BWT": "-59.0 ± 14.1"} | {
        "Forgetting": over["sequential"]["Forgetting"]
    }
    assert over["ewc"]["OP"] == "47.0 ± 21.2"
    table = table_of(comparison, "Difference over orders to `sequential`")
    expected, _ = order_difference(
        [({0: 20, 1: 22, 2: 21}, dict.fromkeys(range(3), 0)), ({0: 10, 1: 9, 2: 14}, dict.fromkeys(range(3), 0))]
    )
    low, high = expected[1:]
    assert rows_of(table) == {"ewc": rows_of(table)["ewc"]}
    assert rows_of(table)["ewc"]["OP"] == f"+16.0 [+{low:.1f}, +{high:.1f}]"
    # Each order is compared with the baseline in the same order, so differences of methods do not contain its effect.
    rows = rows_of(table_of(comparison, "Difference of seed means to `plain-sequential`"))
    assert list(rows) == ["plain-ewc", "turned-sequential", "turned-ewc against turned-sequential"]
    assert rows["turned-ewc against turned-sequential"]["OP"].startswith("+11.0 [")
    assert list(rows_of(table_of(comparison, "Differences of seed means between"))) == ["plain-ewc against turned-ewc"]
    said = "\n".join(comparison.notes)
    assert "mix the effects of the method and of the order" not in said
    assert "Orders of the tasks: C-STANCE, FOMC, MeetingBank; MeetingBank, FOMC, C-STANCE." in said
    assert "compared with the same method in that order: turned-ewc against turned-sequential." in said
    lines = lines_of(comparison)
    assert float(lines["ewc: mean over 2 orders"]["OP"]) == pytest.approx(47)
    ends = [
        float(lines[f"{end}, ewc against the baseline"]["OP"])
        for end in ("low end of the 95 % interval", "high end of the 95 % interval")
    ]
    assert ends == pytest.approx([low, high])


def test_only_methods_with_the_orders_of_the_baseline_are_compared_over_orders(make):
    other = [TASKS[1], TASKS[0], TASKS[2]]
    runs = [
        *trained(make, "sequential", TASKS, [40]),
        *trained(make, "sequential", TURNED, [20]),
        *trained(make, "ewc", TASKS, [60]),
        *trained(make, "ewc", TURNED, [30]),
        *trained(make, "ewc", TASKS, [50], stem="strong", ewc_lambda=9),
        *trained(make, "ewc", TURNED, [50], stem="strong", ewc_lambda=9, first=5),  # its seed does not matter
        *trained(make, "replay", TASKS, [60, 61]),
        *trained(make, "lwf", TASKS, [10], epochs=[1, 2, 3]),
        *trained(make, "lwf", TURNED, [10], epochs=[1, 2, 3]),
        *trained(make, "freeze", TASKS, [70]),
        *trained(make, "freeze", other, [70]),
        *trained(make, "migu", TASKS, [70], test_rows=5),
        *trained(make, "migu", TURNED, [70], test_rows=5),
    ]
    comparison = compare(runs)
    # The epochs of lwf differ for the same tasks, so these are two settings, not one method in two orders.
    strong = "plain-strong-seed0 and its orders"
    families = ["sequential", "plain-ewc-seed0 and its orders", strong, "freeze", "migu"]
    assert list(rows_of(table_of(comparison, "Over orders"))) == families
    # Orders and test rows that the baseline does not have are not compared.
    rows = rows_of(table_of(comparison, "Difference over orders to `sequential`"))
    assert list(rows) == families[1:3]
    right = ttest_1samp([20.0, 10.0], 0).confidence_interval()
    assert rows[families[1]]["OP"] == f"+15.0 [{right[0]:.1f}, +{right[1]:.1f}]"
    assert rows[strong]["OP"] == "+20.0", "other seeds are not paired, and one in each order has no variance"
    assert not any("Over orders" in table.title for table in compare(runs[6:8]).tables)
