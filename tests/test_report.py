"""Tests of `trace_bench.report` on run directories written here: the numbers, missing cells, warnings, scores.csv."""

import csv
import subprocess
import sys
import time

import numpy as np
import pytest

from trace_bench import metrics
from trace_bench.report import DASH, score_matrix, write_report
from trace_bench.run import Run, write_json

TASKS = ["trace_cstance", "trace_fomc", "trace_meetingbank"]
NAN = float("nan")
# The base model and three stages; scores above the diagonal are not measured. A true 0 is in it.
R = np.array([[0.1, 0.2, 0.3], [0.8, NAN, NAN], [0.6, 0.9, NAN], [0.7, 0.0, 0.5]])
PERCENT = [["10.0", "20.0", "30.0"], ["80.0", DASH, DASH], ["60.0", "90.0", DASH], ["70.0", "0.0", "50.0"]]
SETTINGS = {"backend": "hf"}


def without(*cells):
    matrix = R.copy()
    for cell in cells:
        matrix[cell] = NAN
    return matrix


@pytest.fixture
def make(tmp_path):
    def make(matrix=R, demo=False, config=None, checkpoints=None, **manifest):
        run = Run.create(
            tmp_path / "runs" / "mine",
            {
                "method": "external" if checkpoints else "sequential",
                **({"checkpoints": checkpoints} if checkpoints else {"trains": "lora"}),
                "model": {"name": "a/model", "revision": "main"},
                "tasks": TASKS,
                "task_versions": dict.fromkeys(TASKS, 1),
                "data": {"path": "somewhere", "demo": demo, "fingerprint": dict.fromkeys(TASKS, "f00")},
                "config": config or {},
                "seed": 1,
                **manifest,
            },
        )
        for stage in run.stages:
            if stage.index and not checkpoints:
                write_json(
                    stage.train_file,
                    {
                        "checkpoint": f"weights {stage.index}",
                        "rows": 10,
                        "steps": 5,
                        "tokens": 1000,
                        "seconds": 2.0,
                        "tokens_per_second": 500.0,
                        "peak_memory_bytes": 2**30,
                        "memory_of": "process",
                    },
                )
            for i, task in enumerate(TASKS):
                if not np.isnan(matrix[stage.index, i]):
                    write_json(stage.eval_file(task), cell(stage, task, float(matrix[stage.index, i])))
        return run

    return make


def cell(stage, task, value, checkpoint=None, **changes):
    headline = "rouge_l" if task == "trace_meetingbank" else "accuracy"
    scores = {headline: {"value": value, "stderr": 0.01}}
    if headline == "accuracy":
        scores["accuracy_tolerant"] = {"value": (1 + value) / 2, "stderr": None}
    return {
        "stage": stage.name,
        "task": task,
        "n": 100,
        "headline": headline,
        "metrics": scores,
        "checkpoint": checkpoint or (f"weights {stage.index}" if stage.index else None),
        "settings": SETTINGS,
        "seconds": 1.5,
        **changes,
    }


def text(run):
    return (run.path / "report.md").read_text(encoding="utf-8")


def table(run, heading):
    """The rows of the first table below a heading ("" = the top of the report): first cell -> the others."""
    below = text(run).split(f"{heading}\n", 1)[1].split("\n| ", 1)[1].split("\n\n", 1)[0]
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in below.splitlines()]
    return {first: rest for first, *rest in rows}


def test_the_matrix_shows_every_cell_and_a_dash_where_there_is_none(make):
    run = make()
    write_report(run)
    rows = table(run, "## Scores")
    assert [rows[s.name][:3] for s in run.stages] == PERCENT
    assert rows["stage"][:3] == ["cstance<br>accuracy", "fomc<br>accuracy", "meetingbank<br>rouge_l"]
    # OP_t, BWT_t and forgetting_t, worked by hand
    assert rows["0_base"][3:] == [DASH] * 3
    assert rows["1_trace_cstance"][3:] == ["80.0", DASH, DASH]
    assert rows["2_trace_fomc"][3:] == ["75.0", "-20.0", "20.0"]  # (60 + 90) / 2; 60 - 80
    assert rows["3_trace_meetingbank"][3:] == ["40.0", "-50.0", "50.0"]  # 120 / 3; (-10 - 90) / 2


def test_the_top_states_op_and_bwt_and_how_they_are_made(make):
    run = make()
    line = write_report(run)
    assert line.endswith("report.md: 9 cells of 12; OP_3 40.0, BWT_3 -50.0")
    top = table(run, "# mine")
    assert (top["OP_3"][0], top["BWT_3"][0], top["Forgetting_3"][0]) == ("40.0", "-50.0", "50.0")
    assert "divided by t-1" in top["BWT_3"][1]
    assert top["FWT"][0] == DASH  # needs cells that are not measured
    rows = table(run, "## Learning and forgetting")
    assert rows["cstance"] == ["10.0", "80.0", "70.0", "+70.0", "-10.0"]
    assert rows["fomc"] == ["20.0", "90.0", "0.0", "+70.0", "-90.0"]
    assert rows["meetingbank"] == ["30.0", "50.0", "50.0", "+20.0", DASH]


def test_an_unfinished_stage_gives_no_number_that_counts_it_as_0(make):
    run = make(without((3, 1), (0, 2)))
    assert "OP_2 75.0, BWT_2 -20.0" in write_report(run)
    assert "OP_3" not in text(run)
    rows = table(run, "## Scores")
    assert rows["3_trace_meetingbank"] == ["70.0", DASH, "50.0", DASH, DASH, DASH]
    assert rows["0_base"][:3] == ["10.0", "20.0", DASH]
    assert "0.0" not in [c for row in rows.values() for c in row]


def test_a_run_without_cells_has_a_report_of_dashes(make):
    run = make(np.full((4, 3), NAN))
    assert write_report(run).endswith("0 cells of 12")
    rows = table(run, "## Scores")
    assert {c for s in run.stages for c in rows[s.name]} == {DASH}
    assert "OP_3" not in text(run)


def test_a_score_that_could_not_be_made_is_missing(make):
    run = make()
    write_json(run.stages[3].eval_file(TASKS[2]), cell(run.stages[3], TASKS[2], None))
    write_report(run)
    assert table(run, "## Scores")["3_trace_meetingbank"][2:] == [DASH, DASH, "-50.0", "50.0"]  # BWT does not need it


def test_a_cell_of_an_older_checkpoint_is_not_mixed_in(make):
    """The stage was trained anew and not yet evaluated anew."""
    run = make()
    write_json(run.stages[2].eval_file(TASKS[0]), cell(run.stages[2], TASKS[0], 0.6, "weights before"))
    write_report(run)
    assert table(run, "## Scores")["2_trace_fomc"][:3] == [DASH, "90.0", DASH]


def test_the_score_matrix_is_what_the_metrics_take(make):
    run = make()
    assert np.array_equal(score_matrix(run), R, equal_nan=True)
    assert metrics.overall_performance(score_matrix(run)) == pytest.approx(0.4)
    tolerant = score_matrix(run, "accuracy_tolerant")
    assert tolerant[3, 1] == 0.5 and np.isnan(tolerant[:, 2]).all()


def test_form_tolerant_accuracy_is_shown_for_the_tasks_that_have_it(make):
    run = make()
    write_report(run)
    rows = table(run, "### Form-tolerant accuracy")
    assert rows["stage"] == ["cstance", "fomc"]
    assert rows["3_trace_meetingbank"] == ["85.0", "50.0"]


@pytest.mark.parametrize("demo", [True, False])
def test_demo_data_is_announced(make, demo):
    run = make(demo=demo)
    write_report(run)
    assert ("> **Demo data.**" in text(run)) == demo


@pytest.mark.parametrize(
    "config, notes",
    [
        ({"test_rows": 24, "train_rows": None}, ["test rows: first 24"]),
        ({"test_rows": 5, "train_rows": 64}, ["train rows: first 64", "test rows: first 5"]),
        ({"test_rows": None}, []),
    ],
)
def test_limited_rows_are_announced(make, config, notes):
    run = make(config=config)
    write_report(run)
    assert ("**Limited rows**" in text(run)) == bool(notes)
    assert all(note in text(run) for note in notes)


def test_the_paper_s_numbers_are_shown_for_a_method_it_has(make):
    run = make()
    write_report(run)
    assert table(run, "## The paper's numbers for this method (LoraSeqFT)")["LLaMA-2-7B-Chat"] == ["12.7", "-45.7"]


def test_scores_csv_has_one_line_for_each_score(make):
    run = make()
    write_report(run)
    with (run.path / "scores.csv").open(encoding="utf-8", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["stage", "task", "metric", "value", "stderr", "n", "n_unscored"]
    assert rows[0] == ["0_base", "trace_cstance", "accuracy", "0.1", "0.01", "100", "0"]
    assert ["3_trace_meetingbank", "trace_fomc", "accuracy", "0.0", "0.01", "100", "0"] in rows
    assert ["1_trace_cstance", "trace_cstance", "accuracy_tolerant", "0.9", "", "100", "0"] in rows
    assert len(rows) == 9 + 7  # 9 cells, 7 of them with a second metric


def test_checkpoints_whose_names_are_no_tasks_get_no_op_and_no_bwt(make):
    run = make(R[:3], checkpoints={"mine": "a", "theirs": "b"})
    assert "OP" not in write_report(run).replace(str(run.path), "")
    assert "OP_" not in text(run) and "BWT" not in text(run)
    assert [table(run, "## Scores")[s.name] for s in run.stages] == PERCENT[:3]


def test_checkpoints_of_every_task_in_order_get_op_and_bwt(make):
    run = make(checkpoints=dict.fromkeys(TASKS, "a"))
    assert "OP_3 40.0, BWT_3 -50.0" in write_report(run)


def test_the_report_takes_seconds_and_needs_no_torch(make):
    run = make()
    code = (
        "import sys\nfrom trace_bench.cli import main\nmain(['report', sys.argv[1]])\n"
        "heavy = {'torch', 'lm_eval', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 3
    assert table(run, "# mine")["OP_3"][0] == "40.0"
