"""Tests of BWT by other rules, and of published results in a run's report."""

import json
import math

import numpy as np
import pytest
from made_runs import TASKS, make_rich_run

from trace_bench import metrics
from trace_bench.measures.conventions import (
    backward_transfer_of_all,
    clipped_backward_transfer,
    clipped_forgetting,
    mean_backward_transfer,
)
from trace_bench.report import paper
from trace_bench.report.conventions import CONVENTIONS, sections
from trace_bench.report.results import Results
from trace_tasks.data import ORDERS

# Changes since a task's own stage: task 1 by -.2 and then -.1, task 2 by +.1. Task 3 is the last.
R = np.array([[0.1, 0.2, 0.3], [0.8, 0.0, 0.0], [0.6, 0.9, 0.0], [0.7, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("function", "at_3", "at_2"),
    [
        (metrics.backward_transfer, (-0.1 + 0.1) / 2, -0.2),
        (backward_transfer_of_all, (-0.1 + 0.1) / 3, -0.2 / 2),
        (clipped_backward_transfer, -0.1 / 3, -0.2 / 2),
        (mean_backward_transfer, (-0.2 - 0.1 + 0.1) / 3, -0.2),
        (metrics.forgetting, (0.1 - 0.1) / 2, 0.2),
        (clipped_forgetting, (0.1 + 0.0) / 2, 0.2),
    ],
)
def test_bwt_by_each_rule_equals_values_worked_by_hand(function, at_3, at_2):
    assert function(R) == pytest.approx(at_3) and function(R, 2) == pytest.approx(at_2)
    assert math.isnan(function(R, 1)), "nothing can be forgotten after one stage"
    assert function(np.stack([R, R])) == pytest.approx(np.array([at_3, at_3]))
    missing = R.copy()
    missing[3, 0] = np.nan
    assert math.isnan(function(missing)) and function(missing, 2) == pytest.approx(at_2)


def test_the_bwt_printed_in_the_paper_divides_by_the_tasks_less_one():
    """The runs that the paper prints whole: 1/(T-1) gives its BWT, 1/T does not."""
    for run in paper._facts("paper_results.json")["runs"]:
        T = len(run["final"])
        matrix = np.full((T + 1, T), np.nan)
        matrix[np.arange(1, T), np.arange(T - 1)] = run["learned"]
        matrix[T] = run["final"]
        if abs(bwt := run["BWT_printed"]) > 0.05:
            assert metrics.backward_transfer(matrix) == pytest.approx(bwt, abs=0.006)
            assert abs(backward_transfer_of_all(matrix) - bwt) > 0.006


def test_a_report_has_each_rule_with_its_interval(make):
    results = Results(make_rich_run(make, tasks=TASKS, n=40))
    about, table, *_ = sections(results)
    assert "at stage 3" in about
    rows = {row[0]: row for row in table.rows}
    assert len(rows) == len(CONVENTIONS)
    first = rows["BWT"]
    unit = results.unit
    assert first[1] == unit.with_interval(results.sequence["BWT"][-1], sign=True), "the same as elsewhere in the report"
    of_all = results.sequence["BWT"][-1]
    assert rows["BWT, 1/T"][1] == unit.with_interval(type(of_all)(*(2 / 3 * x for x in of_all)), sign=True)
    # The change of the mean over stages is linear in the rows: its value lies in its interval, at the hand-made mean.
    x = [results.task_rows(task) for task in TASKS]
    by_hand = np.mean([x[0][:, 2] - x[0][:, 1], x[0][:, 3] - x[0][:, 1], x[1][:, 3] - x[1][:, 2]])
    assert rows["BWT, all stages"][1].startswith(f"{100 * by_hand:+.1f} [")
    assert "[" not in rows["Forgetting, clipped"][1], "a maximum is biased"
    tolerant = results.matrix("accuracy_tolerant")
    tolerant[:, 2] = results.R[:, 2]
    assert first[2].startswith(f"{100 * metrics.backward_transfer(tolerant):+.1f} [")


def test_a_run_in_which_nothing_can_be_forgotten_has_no_section_on_rules(make):
    assert not list(sections(Results(make(np.array([[0.1], [0.9]]), tasks=TASKS[:1]))))
    assert not list(sections(Results(make(name="joint", matrix=np.full((2, 3), 0.5), stages=["joint"]))))


def published_run(make, name="mine", **changes):
    matrix = np.full((9, 8), 0.5)
    options = {
        "tasks": ORDERS["reasoning_order1"],
        "trains": "full",
        "model": {"name": "meta-llama/Llama-2-7b-chat-hf"},
    }
    options |= {"data": {"path": "d", "demo": False, "fingerprint": {}}} | changes
    return Results(make(matrix, name=name, **options))


def test_published_results_are_only_shown_for_runs_of_the_same_protocol(make, monkeypatch):
    facts = json.loads(json.dumps(paper._facts("published_results.json")))
    seekr = facts["sources"][0]
    run = published_run(make)
    assert paper.differences(run, seekr, "LLaMA-2-7B-Chat") == seekr["differs"], "its papers and code disagree on BWT"
    about, table = paper.published(run)
    assert table.apart == len(table.rows) - 1 and {row[4].partition(":")[0] for row in table.rows[1:]} == {"no"}

    for method, printed in (("seekr", "SEEKR"), ("der", "DER++"), ("milora", "MiLoRA"), ("nlora", "N-LoRA")):
        about, table = paper.published(published_run(make, method, method=method, trains="lora"))
        assert {row[0].split()[0] for row in table.rows[1:]} == {printed}, "its name in papers"
        assert ("all parameters are trained there" in about) == (method in ("seekr", "der"))

    seekr["differs"] = []
    monkeypatch.setattr(paper, "_facts", lambda file: facts)
    about, table = paper.published(run)
    same, apart = table.rows[1 : len(table.rows) - table.apart], table.rows[len(table.rows) - table.apart :]
    assert [row[0] for row in same] == list(seekr["models"]["LLaMA-2-7B-Chat"]), "all methods of that paper"
    assert {row[4] for row in same} == {"yes"} and apart[0][4].startswith("no: order 2 there")
    assert {row[0] for row in apart} == {"SeqFT"}, "of others, this method alone"

    # Facts that all rows share are written once, above the table.
    about, table = paper.published(published_run(make, "demo", data={"path": None, "demo": True, "fingerprint": {}}))
    assert "demo data here" in about and not any("demo data" in row[4] for row in table.rows)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"path": None, "demo": True, "fingerprint": {}}}, "demo data here"),
        ({"tasks": ORDERS["order1"]}, "the reasoning variant there"),
        ({"tasks": ORDERS["reasoning_order2"]}, "order 1 there"),
        (
            {"model": {"name": "meta-llama/Llama-2-13b-chat-hf"}},
            "LLaMA-2-7B-Chat there, meta-llama/Llama-2-13b-chat-hf here",
        ),
        ({"config": {"test_rows": 50}}, "first 50 test rows here"),
        ({"config": {"chat_template": True}}, "a chat template here"),
    ],
)
def test_each_difference_to_a_published_protocol_is_named(make, changes, reason):
    seekr = paper._facts("published_results.json")["sources"][0] | {"differs": []}
    assert paper.differences(published_run(make, **changes), seekr, "LLaMA-2-7B-Chat") == [reason]
