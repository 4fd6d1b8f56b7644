"""Tests of `trace_bench.report.results`: the intervals that the samples of a run allow."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from made_runs import EIGHT, NAN, TASKS, cell, write_cell

from trace_bench import metrics
from trace_bench.report.results import Change, Results
from trace_bench.report.rows import Rows
from trace_bench.report.tables import Unit
from trace_bench.run import RunError, read_json, read_jsonl
from trace_tasks.data.files import write_json, write_jsonl

N = 30


def rows(seed=0):
    """Scores of a task that is learned at stage 1 and half forgotten at stage 3: shape (rows, stages)."""
    x = np.random.default_rng(seed).random((N, 4)) / 2
    x[:, 1] += 0.5
    return x


@pytest.fixture
def run(make):
    return make(rows={TASKS[0]: {"accuracy": (rows() > 0.3).astype(float)}, TASKS[1]: {"score": rows(1)}})


def test_every_change_equals_that_of_the_matrix_and_lies_in_its_interval(run):
    results = Results(run)
    since_own = [(i, t) for i in (0, 1, 2) for t in range(i + 2, 4)]
    assert [key for key in results.changes if key.earlier] == [(TASKS[i], i + 1, t) for i, t in since_own]
    for i, t in since_own:
        change = results.change(i, i + 1, t)
        assert change.value == pytest.approx(results.R[t, i] - results.R[i + 1, i])
        assert change.low < change.value < change.high
    assert results.change(0, 1, 3).sign == -1 and {key.later for key in results.changes} == {1, 2, 3}
    op, bwt = results.sequence["OP"], results.sequence["BWT"]
    assert op[1].value == metrics.overall_performance(results.R, 2) and op[1].low < op[1].value < op[1].high
    assert bwt[1].value == metrics.backward_transfer(results.R, 2) and bwt[1].low < bwt[1].value < bwt[1].high
    assert np.isnan(op[2]).all() and not np.isnan(bwt[2]).any(), (
        "the third task is not evaluated, and BWT does not need it"
    )


def test_the_interval_of_bwt_pairs_rows(make):
    """If the rows of a stage are shuffled, the score is the same, but the pairs are lost."""
    paired = make(rows={t: {"score": np.linspace(0, 1, N)[:, None] * [[0.5, 0.9, 0.8, 0.7]]} for t in TASKS})
    wide = Results(paired).sequence["BWT"][2]
    file = paired.stages[3].samples_file(TASKS[0])
    lines = read_jsonl(file)
    scores = np.random.default_rng(0).permutation([line["score"] for line in lines])
    write_jsonl(file, [{**line, "score": score} for line, score in zip(lines, scores, strict=True)])
    unpaired = Results(paired).sequence["BWT"][2]
    assert unpaired.value == wide.value and unpaired.high - unpaired.low > 1.5 * (wide.high - wide.low)


@pytest.mark.parametrize("damage", ["no samples", "another value", "rows that are no numbers", "older weights"])
def test_a_score_that_is_not_the_mean_of_its_rows_has_no_interval(run, damage):
    stage, key = run.stages[3], (3, TASKS[1], "score")
    before = Results(run).intervals
    file, scored = stage.samples_file(TASKS[1]), stage.eval_file(TASKS[1])
    if damage == "no samples":
        file.unlink()
    elif damage == "another value":
        content = read_json(scored)
        content["metrics"]["score"]["value"] += 0.01
        write_json(scored, content)
    elif damage == "older weights":
        write_json(scored, cell(stage, TASKS[1], 0.5, "weights before"))
    else:
        lines = read_jsonl(file)
        write_jsonl(file, [{**lines[0], "score": [lines[0]["score"]]}, *lines[1:]])
    after = Results(run)
    assert np.isnan(after.change(1, 2, 3)[1:]).all()
    assert np.isnan(after.change(1, 2, 3).value) == (damage == "older weights")
    assert key in before and list(after.intervals) == [k for k in before if k != key]
    assert np.array(list(after.intervals.values())) == pytest.approx(np.array([before[k] for k in after.intervals]))


def put_suite(run, index, suite, scores, subtasks, equal=False):
    """Writes a general-ability suite with subtasks weighted by size or equally."""
    parts = {name: [s for s, label in zip(scores, subtasks, strict=True) if label == name] for name in subtasks}
    value = np.mean([np.mean(part) for part in parts.values()]) if equal else np.mean(scores)
    changes = {"metrics": {"acc": {"value": float(value), "stderr": None}}, "version": "1.0"}
    settings = {"backend": "hf", "general_rows": None, "data": "hub"}
    write_cell(run.stages[index], suite, {"acc": np.array(scores)}, subtasks, n_cut=0, settings=settings, **changes)


def test_the_delta_of_suites_is_paired_with_any_weights_of_subtasks(run):
    labels = ["a"] * 90 + ["b"] * 10
    before = [float(i % 2) for i in range(90)] + [0.0] * 10
    after = [1.0 if i % 10 == 0 else x for i, x in enumerate(before)]  # a tenth of the rows is better in "a" and "b"
    for suite, equal in (("general_mmlu", False), ("general_tydiqa", True)):
        put_suite(run, 0, suite, before, labels, equal)
        put_suite(run, 3, suite, after, labels, equal)
    results = Results(run)
    assert list(results.general) == [3]
    delta = results.general[3]
    assert delta.value == pytest.approx(0.1) and delta.sign == 1 and delta.high - delta.low < 0.25
    assert len(results.rows["general_mmlu"].parts) == 1
    assert len(results.rows["general_tydiqa"].parts) == 2
    low, high = results.intervals[3, "general_tydiqa", "acc"]
    assert high - low > 0.2, "half of the score rests on ten rows"
    run.stages[3].samples_file("general_mmlu").unlink()
    without = Results(run).general[3]
    assert without.value == delta.value and np.isnan(without.low)


def test_form_and_knowledge_add_up_to_the_loss(make):
    strict, tolerant = np.ones((N, 4)), np.ones((N, 4))
    strict[:20, 3], tolerant[:5, 3] = 0, 0
    answers = {"accuracy": strict, "accuracy_tolerant": tolerant}
    run = make(rows={TASKS[0]: answers, TASKS[1]: {"accuracy": strict}, TASKS[2]: answers})
    [form] = Results(run).forms
    assert form.task == TASKS[0]  # the second has no tolerant score, the third was learned last
    assert (form.strict.value, form.tolerant.value) == pytest.approx((20 / N, 5 / N))
    assert form.form == pytest.approx((15 / N, *metrics.net_interval(15, 0, N)))
    assert form.tolerant[1:] == pytest.approx(metrics.net_interval(5, 0, N))
    for stage in run.stages:
        stage.samples_file(TASKS[0]).unlink()
    [form] = Results(run).forms
    assert form.form.value == pytest.approx(15 / N) and np.isnan(form.form.low)


def test_a_full_matrix_has_forward_transfer_and_single_uses_each_tasks_own_stage(make):
    run = make(rows={t: {"score": rows(i)} for i, t in enumerate(TASKS)})
    fwt = Results(run).sequence["FWT"][0]
    assert fwt.value == metrics.forward_transfer(Results(run).R) and fwt.low < fwt.value < fwt.high
    x = rows()
    own = [np.where(np.arange(4) == i + 1, x[:, [1]], NAN) for i in range(3)]
    run = make(name="single", method="single", rows={t: {"score": own[i]} for i, t in enumerate(TASKS)})
    results = Results(run)
    assert results.final_stages == [1, 2, 3] and results.mean.value == pytest.approx(x[:, 1].mean())
    assert results.mean.low < results.mean.value < results.mean.high


def test_intervals_ignore_rows_that_are_left_out(run):
    seen = replace(run, left_out={TASKS[0]: set(range(10))})
    cell = Results(seen).cell(3, 0)
    right = Results(run).rows[TASKS[0]].scores["accuracy"][10:, 3]
    assert cell == pytest.approx((right.mean(), *metrics.wilson_interval(int(right.sum()), N - 10)))
    assert Results(seen).left_out == {TASKS[0]: (10, N)} and Results(run).left_out == {}
    with run.stages[1].samples_file(TASKS[0]).open("a", encoding="utf-8") as file:
        file.write('{"doc_id": 30, "accuracy":\n')
    with pytest.raises(RunError, match=rf"{TASKS[0]}.jsonl, line 31 is damaged.*evaluate again"):
        _ = Results(run).intervals


# ------------------------------------------------------------------------------------------------ marks of a report


def simulated(run, rng, n, gain=()):
    """The results of an eight-task run without real changes, except for the gains: (task, first stage) -> gain.

    Rows are 0/1 with a rate between .05 and .95, or graded like ROUGE: many zeros, the others anywhere up to 1. The
    answers of stages to a row are correlated, because rows are easy or hard.
    """
    rows, units, gain = {}, {}, dict(gain)
    for i, task in enumerate(run.tasks):
        metric = "rouge_l" if i % 3 == 2 else "accuracy"
        latent = (rng.standard_normal((n, 1)) + rng.standard_normal((n, 9))) / 2**0.5
        level = np.full(9, NormalDist().inv_cdf(rng.uniform(0.05, 0.95)))
        for (name, since), shift in gain.items():
            if name == task:
                level = np.array([NormalDist().inv_cdf(0.8 + shift * (stage >= since)) for stage in range(9)])
        x = (latent < level).astype(float) if metric == "accuracy" else np.clip((latent + level) / 4, 0, 1)
        rows[task] = Rows([("", k) for k in range(n)], {metric: x}, [np.arange(n)])
        units[task] = Unit(metric)
    R = np.stack([rows[task].scores[units[task].metric].mean(axis=0) for task in run.tasks], axis=1)
    seen = {"rows": rows, "units": units, "R": R, "cells": {}}
    return type("Simulated", (Results,), {**seen, "headlines": {t: u.metric for t, u in units.items()}})(run)


def test_reports_without_real_changes_show_an_arrow_in_one_of_twenty_cases(make):
    eight, rng = make(np.full((9, 8), NAN), tasks=EIGHT), np.random.default_rng(100)
    reports = [simulated(eight, rng, 100) for _ in range(100)]
    assert len(reports[0].tested) == 28 + 15, "what BWT is made of, and learned and in all"
    marked = np.mean([bool(r.marks) for r in reports])
    assert marked <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5
    # This many intervals exclude zero. Without the correction all of them would have an arrow.
    assert np.mean([any(e.sign for e in r.changes.values()) for r in reports[:10]]) > 5 * 0.05


@pytest.mark.parametrize("n, lost", [(100, 0.35), (500, 0.15)])
def test_only_real_changes_are_marked_and_nearly_always(make, n, lost):
    eight, rng = make(np.full((9, 8), NAN), tasks=EIGHT), np.random.default_rng(n)
    reports = [simulated(eight, rng, n, {(EIGHT[1], 6): -lost}) for _ in range(20)]
    changed = {Change(EIGHT[1], 2, t) for t in (6, 7, 8)} | {Change(EIGHT[1], 0, 8)}
    found = [r.marks for r in reports]
    assert np.mean([changed <= marks.keys() for marks in found]) >= 0.8
    assert {marks.get(change, -1) for marks in found for change in changed} == {-1}
    assert np.mean([bool(marks.keys() - changed) for marks in found]) <= 0.05 + 2 * (0.05 * 0.95 / 20) ** 0.5
