"""Tests of the fates of test rows, corrected for chance, and of the chosen options."""

import csv

import numpy as np
import pytest
from made_runs import make_run, write_cell

from trace_bench.measures import choices, transitions
from trace_bench.measures.transitions import CAME_BACK, GAINED, KEPT, LOST, NEVER, UNKNOWN
from trace_bench.metrics import wilson_interval
from trace_bench.report import write_report
from trace_bench.report.results import Results
from trace_bench.run import read_jsonl
from trace_tasks.data.files import write_jsonl

NAN = float("nan")
FOMC = "What is the stance? A. dovish, B. hawkish, C. neutral. Choose one from A, B and C.\nText: {}\nStance:"


def test_the_fates_of_right_and_wrong_rows_are_counted():
    scores = [[0, 1, 1, NAN, 1], [0, 1, 0, NAN, 1], [1, 1, 0, NAN, 0], [1, 0, 1, NAN, 0], [1, 0, 0, NAN, 1]]
    found = transitions.fates(scores, 1)
    assert (found[:, [0, 1, 3]] == UNKNOWN).all()
    assert found[:, 2].tolist() == [KEPT, LOST, LOST, GAINED, NEVER]
    assert found[:, 4].tolist() == [KEPT, CAME_BACK, LOST, NEVER, GAINED]
    assert transitions.first_lost(found).tolist() == [-1, 2, 2, -1, -1]
    assert (transitions.fates(scores, 3) == UNKNOWN).all(), "nothing is known of the reference"


def test_graded_rows_are_lost_only_beyond_the_tolerance():
    scores = [[0.5, 0.4, 0.39], [0.5, 0.3, 0.45], [0.05, 0.0, 0.2], [0.05, 0.1, 0.0], [0.3, 0.41, 0.4]]
    found = transitions.fates(scores, 0, tolerance=0.1)
    assert found[:, 1].tolist() == [KEPT, LOST, NEVER, NEVER, GAINED]
    assert found[:, 2].tolist() == [LOST, CAME_BACK, GAINED, NEVER, KEPT]
    rounded = transitions.fates([[0.3, 0.4], [0.4, 0.3]], 0, tolerance=0.1)
    assert 0.4 - 0.3 > 0.1 and rounded[:, 1].tolist() == [KEPT, KEPT], "a tenth is no more than the tolerance"


def test_chance_equals_the_papers_if_all_rows_have_k_options():
    right, wrong = np.ones(6, dtype=bool), np.zeros(4, dtype=bool)
    before, after = np.concatenate([right, wrong]), np.concatenate([wrong[:2], right[:5], wrong[:3]])
    named = np.ones(10, dtype=bool)
    lost, gained = transitions.beyond_chance(before, after, named, named, np.full(10, 4))
    chance = (1 - 0.6) * (1 - 0.5) / (4 - 1)
    assert (lost.observed, gained.observed) == pytest.approx((0.2, 0.1))
    assert (lost.by_chance, gained.by_chance) == pytest.approx((chance, chance))
    assert lost.corrected.value == pytest.approx(0.2 - chance) and gained.corrected.value == pytest.approx(0.1 - chance)
    assert lost.corrected.low < 0.2 - chance < lost.corrected.high
    # If only one of 40 rows changed, the rate is uncertain: the bootstrap would be narrower than Wilson's interval.
    right, letters = np.arange(40) < 38, np.ones(40, dtype=bool)
    lost, _ = transitions.beyond_chance(right, right & (np.arange(40) > 0), letters, letters, np.full(40, 4))
    ends = np.array(wilson_interval(1, 40)) - lost.by_chance
    assert lost.corrected.low <= ends[0] + 1e-12 and lost.corrected.high == pytest.approx(ends[1])
    # Answers that name no option are never guessed right.
    lost, gained = transitions.beyond_chance(before, after, before, named, np.full(10, 4))
    assert lost.by_chance == 0 and gained.by_chance == pytest.approx((0.5 / 3) * 0.4)


def test_guesses_are_neither_loss_nor_gain_beyond_chance():
    """The model knows some rows, guesses among 2 to 5 options, and sometimes names none."""
    rng, n = np.random.default_rng(0), 20_000
    options = rng.integers(2, 6, n)

    def answers(known, silent):
        named = known | (rng.random(n) > silent)
        return known | (named & (rng.random(n) < 1 / options)), named

    knows = rng.random((2, n)) < [[0.0], [0.3]]
    before, named_before = answers(knows[0], 0.2)
    after, named_after = answers(knows[1], 0.0)
    lost, gained = transitions.beyond_chance(before, after, named_before, named_after, options)
    assert lost.observed > 0.1 and abs(lost.corrected.value) < 0.008
    really = (knows[1] & ~before).mean()  # wrong before, known after
    assert gained.corrected.value == pytest.approx(really, abs=0.008)
    for low, high in (lost.corrected[1:], gained.corrected[1:]):
        assert 0 < high - low < 0.02, "so many rows leave no doubt"


def test_distances_of_choices_and_collapsed_options_equal_those_by_hand():
    gold = np.repeat([0, 1, 2], [50, 40, 10])
    assert choices.shares([0, 0, 1, -1], 3).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert np.isnan(choices.shares([-1, -1], 3)).all() and np.isnan(choices.distance([NAN, NAN], [0.5, 0.5]))
    assert choices.distance([1, 0, 0], choices.shares(gold, 3)) == pytest.approx(0.5)
    assert choices.collapse(gold, gold, 3) == ([], None)
    assert choices.collapse(np.where(gold == 2, 0, gold), gold, 3) == ([2], None)
    assert choices.collapse(np.r_[np.zeros(97), np.ones(3)].astype(int), gold, 3) == ([], 0)
    few = np.where(np.arange(100) < 20, 0, -1)
    assert choices.collapse(few, gold, 3) == ([1], None), "20 answers without option 2 say nothing of it"
    rare = np.repeat([0, 1], [96, 4])
    assert choices.collapse(np.zeros(100, dtype=int), rare, 2) == ([], None), "nor is the gold share of 4 % missed"
    assert choices.collapse(np.full(100, -1), gold, 3) == ([], None)


@pytest.fixture
def run(tmp_path):
    """FOMC is learned at stage 1, all C at stage 2, and words at the last. A suite records the most likely option."""
    tasks = ["trace_fomc", "trace_meetingbank"]
    hub = {"data": "hub", "general_rows": None}
    n, gold = 40, [("A", "B", "C", "C")[k % 4] for k in range(40)]
    said = [["?"] * n, list(gold), ["C"] * n, ["The stance is neutral." if g == "C" else "?" for g in gold]]
    run = make_run(tmp_path, tasks=[*tasks, "trace_py150"], rows={})
    for stage, answers in zip(run.stages, said, strict=True):
        right = np.array([a == g for a, g in zip(answers, gold, strict=True)], dtype=float)
        write_cell(stage, "trace_fomc", {"accuracy": right})
        _fill(stage, "trace_fomc", [(FOMC.format(k), g, a) for k, (g, a) in enumerate(zip(gold, answers, strict=True))])
        if stage.index >= 2:
            write_cell(stage, "trace_meetingbank", {"rouge_l": np.linspace(0.2, 0.6, n) - 0.15 * (stage.index == 3)})
        if stage.index in (0, 3):
            chosen = [0 if stage.index else k % 2 for k in range(n)]
            scores = np.array([c == k % 2 for k, c in enumerate(chosen)], dtype=float)
            write_cell(stage, "general_boolq", {"acc": scores}, settings=hub, n_cut=0, version=1)
            rows = [("passage", k % 2, c) for k, c in enumerate(chosen)]
            _fill(stage, "general_boolq", rows, choices=[" no", " yes"])
    return run


def _fill(stage, name, texts, **more):
    file = stage.samples_file(name)
    keys = ("prompt", "target", "response")
    rows = zip(read_jsonl(file), texts, strict=True)
    write_jsonl(file, [row | dict(zip(keys, text, strict=True)) | more for row, text in rows])


def test_the_report_has_the_fates_of_rows_and_options(run):
    write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "| FOMC | 40 | 0.0 | 0.0 | 0.0 | 100.0 | 0.0 |" in text
    assert "| MeetingBank | 40 | 0.0 | 0.0 | 0.0 | 100.0 | 0.0 |" in text and "more than 10 % of the scale" in text
    assert "| 2_trace_meetingbank | 50.0 / 0.0 |" in text
    assert "| FOMC | 20 | 20 | 0 |" in text, "lost first at stage 2, and at stage 3"
    # In words the last stage is right only for C: half of the rows are lost, and guessing explains none of them.
    assert "| FOMC | 3 | 50.0 | 0.0 | +50.0" in text
    assert "FOMC: `C neutral` takes at least 95 % of the answers at stage 2 (MeetingBank)" in text
    assert "| 3_trace_py150 | 0.0 | 0.0 | 100.0 | 50.0 | 50.0 |" in text
    assert "boolq: `no` takes at least 95 % of the answers at stage 3 (Py150); of the gold labels it is 50.0 %." in text
    with (run.path / "scores.csv").open(encoding="utf-8", newline="") as f:
        rows = {(r["stage"], r["task"], r["metric"]): r for r in csv.DictReader(f)}
    lost = rows["2_trace_meetingbank", "trace_fomc", "lost"]
    assert float(lost["value"]) == 0.5 and float(lost["low"]) < 0.5 < float(lost["high"]) and lost["n"] == "40"
    assert rows["0_base", "trace_fomc", "distance_to_gold"]["value"] == "", "no answer names an option"
    assert float(rows["0_base", "trace_fomc", "no_option"]["value"]) == 1


def test_chosen_options_are_read_like_by_the_tolerant_accuracy(run):
    found = Results(run).choices
    assert found.keys() == {"trace_fomc", "general_boolq"}
    assert found["trace_fomc"].labels == ["A dovish", "B hawkish", "C neutral"]
    assert found["trace_fomc"].right(3).sum() == 20 and found["general_boolq"].labels == ["no", "yes"]
