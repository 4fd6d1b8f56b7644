"""Tests of `trace_bench.report` on run directories written here: numbers, missing cells, bounds, comparisons."""

import csv
import io
import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest

from trace_bench import metrics
from trace_bench.cli import main
from trace_bench.report import DASH, compare, score_matrix, write_report
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
    def make(matrix=R, demo=False, config=None, checkpoints=None, name="mine", metric=None, **manifest):
        run = Run.create(
            tmp_path / "runs" / name,
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
            for i, task in enumerate(run.tasks):
                if not np.isnan(matrix[stage.index, i]):
                    content = cell(stage, task, float(matrix[stage.index, i]))
                    content["metrics"] |= metric or {}
                    write_json(stage.eval_file(task), content)
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


# -------------------------------------------------------------------------------- runs without a sequence, and bounds

SINGLE = np.array([[0.1, 0.2, 0.3], [0.9, NAN, NAN], [NAN, 0.8, NAN], [NAN, NAN, 0.7]])
JOINT = np.array([[0.1, 0.2, 0.3], [0.6, 0.6, 0.9]])
ICL = np.array([[0.3, 0.4, 0.5]])


@pytest.fixture
def bounds(make):
    """A run of each method that bounds another, with options for all of them."""

    def bounds(**options):
        config = options.pop("config", {})
        return {
            "single": make(SINGLE, name="a-single", method="single", config=config, **options),
            "joint": make(JOINT, name="a-joint", method="joint", stages=["joint"], config=config, **options),
            "icl": make(ICL, name="an-icl", method="icl", stages=[], config={"num_fewshot": 6, **config}, **options),
        }

    return bounds


@pytest.mark.parametrize(
    "method, mean, words",
    [
        ("single", "80.0", "each task with its own model"),
        ("joint", "70.0", "one model, after stage 1_joint"),
        ("icl", "40.0", "with 6 demonstrations"),
    ],
)
def test_a_run_without_a_sequence_has_a_mean_and_no_op_and_no_bwt(bounds, method, mean, words):
    run = bounds()[method]
    assert write_report(run).endswith(f"; mean of the tasks {mean}")
    shown, explanation = table(run, f"# {run.path.name}")["mean of the tasks"]
    assert shown == mean and words in explanation
    assert "OP_" not in text(run) and "BWT_" not in text(run) and "## Bounds" not in text(run)


def test_single_and_joint_say_what_was_learned_and_icl_that_nothing_is_trained(bounds):
    runs = bounds()
    for run in runs.values():
        write_report(run)
    assert table(runs["single"], "## Learning")["fomc"] == ["20.0", "80.0", "+60.0"]
    assert table(runs["joint"], "## Learning")["meetingbank"] == ["30.0", "90.0", "+60.0"]
    assert table(runs["single"], "## Scores")["2_trace_fomc"] == [DASH, "80.0", DASH]
    assert "nothing is trained" in text(runs["icl"]) and "## Learning" not in text(runs["icl"])


def test_a_model_per_task_that_is_not_complete_has_no_mean(make):
    run = make(without((1, 0)) * np.nan, name="a-single", method="single")
    assert write_report(run).endswith("0 cells of 12")
    assert table(run, "# a-single")["mean of the tasks"][0] == DASH


def test_a_model_per_task_evaluated_on_all_tasks_has_the_mean_of_their_own(make):
    run = make(np.where(np.isnan(SINGLE), 0.0, SINGLE), name="a-single", method="single")
    assert write_report(run).endswith("mean of the tasks 80.0")


def test_bounds_are_the_comparable_runs_beside_it(make, bounds):
    bounds(tasks=TASKS[::-1])  # in another order of the tasks
    run = make()
    write_report(run)
    rows = table(run, "## Bounds")
    assert list(rows) == [
        "model",
        "---",
        "base, zero-shot",
        "ICL, 6 demonstrations",
        "this run (stage 3)",
        "single (a model per task)",
        "joint (multi-task)",
    ]
    assert rows["model"] == ["cstance", "fomc", "meetingbank", "mean"]
    assert rows["base, zero-shot"] == ["10.0", "20.0", "30.0", "20.0"]
    assert rows["this run (stage 3)"] == ["70.0", "0.0", "50.0", "40.0"]
    assert rows["single (a model per task)"] == ["70.0", "80.0", "90.0", "80.0"]
    assert rows["joint (multi-task)"] == ["90.0", "60.0", "60.0", "70.0"]
    assert rows["ICL, 6 demonstrations"] == ["50.0", "40.0", "30.0", "40.0"]
    assert "is missing" not in text(run) and "its training is another" not in text(run)


def test_a_missing_bound_says_how_to_get_it(make):
    run = make()
    write_report(run)
    assert list(table(run, "## Bounds"))[2:] == ["base, zero-shot", "this run (stage 3)"]
    for method in ("icl", "single", "joint"):
        assert f"- {method} is missing: `make {method}-train CONFIG=...`" in text(run)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "other/model", "revision": "main"}},
        {"model": {"name": "a/model", "revision": "older"}},
        {"tasks": [*TASKS[:2], "trace_py150"]},
        {"data": {"path": "p", "demo": True, "fingerprint": dict.fromkeys(TASKS, "f01")}},
        {"task_versions": dict.fromkeys(TASKS, 2)},
        {"config": {"test_rows": 5}},
        {"config": {"max_new_tokens": 5}},
        {"config": {"chat_template": True}},
    ],
    ids=str,
)
def test_what_is_measured_on_something_else_is_no_bound(make, bounds, change):
    bounds(**change)
    run = make()
    write_report(run)
    assert len(table(run, "## Bounds")) == 4 and text(run).count("is missing") == 3


def test_demonstrations_may_take_longer_prompts(make, bounds):
    bounds(config={"max_prompt_length": 64})
    run = make()
    write_report(run)
    assert text(run).count("is missing") == 2 and "- icl: the run `an-icl`" in text(run)


def test_a_bound_of_another_training_budget_says_so(make, bounds):
    there = {
        "train_rows": 64,
        "epochs": [3, 2, 1],
        "num_train_epochs": 3.0,
        "learning_rate": 0.1,
        "chat_template": False,
    }
    here = {"train_rows": 16, "epochs": [1, 2, 3], "num_train_epochs": 9.0, "learning_rate": 0.1}
    bounds(config=there, tasks=TASKS[::-1])
    run = make(config=here)
    write_report(run)
    assert "- icl: the run `an-icl`\n" in text(run)
    assert "- single: the run `a-single`; its training is another (there, here): train_rows 64, 16\n" in text(run)
    make(JOINT, name="b-joint", method="joint", stages=["joint"], config=here)
    write_report(run)
    assert "- joint: the run `b-joint`\n" in text(run), "the one with the same training is taken"


def test_demonstrations_of_another_number_are_named_and_none_are_no_bound(make):
    make(ICL, name="zero", method="icl", stages=[], config={"num_fewshot": 0})
    run = make()
    write_report(run)
    assert "- icl is missing" in text(run)
    make(ICL, name="three", method="icl", stages=[], config={"num_fewshot": 3})
    write_report(run)
    assert table(run, "## Bounds")["ICL, 3 demonstrations"][-1] == "40.0"


def test_a_bound_that_is_not_evaluated_is_missing_and_a_part_of_it_has_no_mean(make):
    make(SINGLE * np.nan, name="a-single", method="single")
    make(np.array([[NAN, NAN, NAN], [0.5, NAN, 0.5]]), name="a-joint", method="joint", stages=["joint"])
    run = make()
    write_report(run)
    assert "- single is missing" in text(run)
    assert table(run, "## Bounds")["joint (multi-task)"] == ["50.0", DASH, "50.0", DASH]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "method": "single", "model": 3}'],
)
def test_a_damaged_run_beside_it_is_passed_over_with_a_warning(make, bounds, caplog, content):
    bounds()
    run = make()
    other = run.path.parent / "0-damaged"
    other.mkdir()
    (other / "manifest.json").write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        write_report(run)
    assert "0-damaged is left out of the bounds" in caplog.text
    assert len(table(run, "## Bounds")) == 7


def test_a_damaged_cell_of_a_bound_is_passed_over_with_a_warning(make, bounds, caplog):
    joint = bounds()["joint"]
    joint.stages[1].eval_file(TASKS[0]).write_text("{", encoding="utf-8")
    run = make()
    write_report(run)
    assert "a-joint is left out" in caplog.text and "- joint is missing" in text(run)


def test_answers_that_could_be_extracted_are_counted(make):
    run = make(metric={"extracted": {"value": 0.97, "stderr": None}})
    unknown = cell(run.stages[3], TASKS[0], 0.5) | {"n": 100}
    unknown["metrics"]["extracted"] = {"value": None, "stderr": None}
    write_json(run.stages[3].eval_file(TASKS[0]), unknown)
    write_report(run)
    rows = table(run, "### Answers that could be extracted")
    assert rows["stage"] == ["cstance", "fomc", "meetingbank"]
    assert rows["0_base"] == ["97.0 (3)"] * 3
    assert rows["2_trace_fomc"] == ["97.0 (3)", "97.0 (3)", DASH]
    assert rows["3_trace_meetingbank"] == [DASH, "97.0 (3)", "97.0 (3)"]


def test_without_extraction_there_is_no_such_section(make):
    run = make()
    write_report(run)
    assert "extracted" not in text(run)


# --------------------------------------------------------------------------------------------------------- comparison


def compared(runs):
    """The two tables of a comparison, each as rows by their first cell, the notes, and the rows of the CSV."""
    markdown, table = compare(runs)
    first, _, second, *notes = markdown.strip().split("\n\n")
    tables = []
    for part in (first, second):
        rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in part.splitlines()]
        tables.append({name: rest for name, *rest in rows})
    return (*tables, "\n".join(notes), {row["run"]: row for row in csv.DictReader(io.StringIO(table))})


def test_a_comparison_has_one_row_a_run(make, bounds):
    runs = [make(config={"train_rows": 64}), *bounds().values()]
    first, second, notes, _ = compared(runs)
    assert first["run"] == [
        *("method", "trains", "tasks", "train rows"),
        *("OP", "BWT", "Forgetting", "base", "training min", "trained tokens"),
    ]
    tasks = "3 (cstance, fomc, meetingbank)"
    assert first["mine"] == ["sequential", "lora", tasks, "first 64", "40.0", "-50.0", "50.0", "20.0", "0.1", "3,000"]
    assert first["a-single"] == ["single", "lora", tasks, "all", "80.0", DASH, DASH, "20.0", "0.1", "3,000"]
    assert first["a-joint"] == ["joint", "lora", tasks, "all", "70.0", DASH, DASH, "20.0", "0.0", "1,000"]
    # Nothing was trained, which is 0 and not unknown; its base model has demonstrations, so zero-shot is unknown.
    assert first["an-icl"] == ["icl", DASH, tasks, DASH, "40.0", DASH, DASH, DASH, "0.0", "0"]
    assert second["run"] == ["cstance", "fomc", "meetingbank"]
    assert second["mine"] == ["70.0", "0.0", "50.0"] and second["a-single"] == ["90.0", "80.0", "70.0"]
    assert "mean of the tasks, and BWT is not defined: `a-single`, `a-joint`, `an-icl`" in notes
    assert "Not comparable" not in notes and "Demo" not in notes and "Not complete" not in notes


def test_the_csv_has_the_same_numbers_and_nothing_where_nothing_is_known(make):
    _, _, _, rows = compared([make(), make(without((3, 1)), name="unfinished")])
    assert float(rows["mine"]["OP"]) == pytest.approx(40) and float(rows["mine"]["fomc"]) == 0
    assert rows["unfinished"]["OP"] == rows["unfinished"]["fomc"] == rows["unfinished"]["BWT"] == ""
    assert float(rows["unfinished"]["cstance"]) == pytest.approx(70)


def test_an_unfinished_run_has_no_op_in_a_comparison(make):
    first, second, notes, _ = compared([make(), make(without((3, 1)), name="unfinished")])
    assert first["unfinished"][4:7] == [DASH, DASH, DASH] and second["unfinished"] == ["70.0", DASH, "50.0"]
    assert "Not complete, so that numbers are missing: `unfinished`" in notes


def test_a_stage_that_is_not_trained_leaves_the_cost_open(make):
    run = make(name="unfinished")
    run.stages[3].train_file.unlink()
    assert compared([run])[0]["unfinished"][-2:] == [DASH, DASH]


def test_reasoning_and_plain_tasks_share_a_column(make):
    names = [t.replace("trace_", "reasoning_") for t in TASKS]
    data = {"path": "p", "demo": False, "fingerprint": dict.fromkeys(names, "f01")}
    rcl = make(name="rcl", method="rcl", tasks=names, data=data, task_versions=dict.fromkeys(names, 5))
    first, second, notes, _ = compared([make(), rcl])
    assert second["run"] == ["cstance", "fomc", "meetingbank"] and second["rcl"] == second["mine"]
    assert first["rcl"][2] == "3 (reasoning_cstance, reasoning_fomc, reasoning_meetingbank)"
    assert "in data of cstance, data of fomc, data of meetingbank: `mine` against `rcl`" in notes
    assert "version" not in notes and "tasks" not in notes.replace("mean of the tasks", "")


def test_a_run_with_both_variants_of_a_task_keeps_them_apart(make):
    names = ["trace_fomc", "reasoning_fomc", "reasoning_py150"]
    both = make(name="both", tasks=names, data={"path": "p", "demo": False, "fingerprint": {}})
    assert compared([both])[1]["run"] == ["fomc", "reasoning_fomc", "py150"]


def test_tasks_that_a_run_does_not_have_are_missing(make):
    other = make(name="other", tasks=["trace_fomc", "trace_py150", "trace_cstance"])
    _, second, notes, _ = compared([make(), other])
    assert second["run"] == ["cstance", "fomc", "meetingbank", "py150"]
    assert second["mine"] == ["70.0", "0.0", "50.0", DASH] and second["other"] == ["50.0", "70.0", DASH, "0.0"]
    assert "**Not comparable** in tasks" in notes


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": {"test_rows": 5}}, "test_rows: not set in `mine`; 5 in `other`"),
        ({"config": {"max_prompt_length": 64}}, "max_prompt_length: not set in `mine`; 64 in `other`"),
        ({"config": {"max_new_tokens": 8}}, "max_new_tokens: not set in `mine`; 8 in `other`"),
        ({"config": {"chat_template": True}}, "chat_template: not set in `mine`; True in `other`"),
        ({"model": {"name": "b/model", "revision": "main"}}, "base model: a/model in `mine`; b/model in `other`"),
        ({"model": {"name": "a/model", "revision": "v2"}}, "revision: main in `mine`; v2 in `other`"),
        (
            {"data": {"path": "p", "demo": False, "fingerprint": {**dict.fromkeys(TASKS, "f00"), TASKS[1]: "f01"}}},
            "data of fomc: `mine` against `other`",
        ),
        ({"task_versions": {**dict.fromkeys(TASKS, 1), TASKS[1]: 2}}, "version of trace_fomc: 1 in `mine`; 2 in"),
    ],
)
def test_what_keeps_runs_from_being_comparable_is_named(make, change, words):
    notes = compared([make(), make(name="other", **change)])[2]
    assert f"**Not comparable** in {words}" in notes and notes.count("Not comparable") == 1


def test_another_backend_is_named_and_other_training_is_not(make):
    other = make(name="other", config={"train_rows": 3, "learning_rate": 1.0})
    assert "Not comparable" not in compared([make(), other])[2]
    for task in TASKS:
        write_json(other.stages[0].eval_file(task), cell(other.stages[0], task, 0.5, settings={"backend": "vllm"}))
    for stage in other.stages[1:]:
        for task in TASKS:
            stage.eval_file(task).unlink(missing_ok=True)
    assert "in backend: hf in `mine`; vllm in `other`" in compared([make(), other])[2]


def test_demo_data_is_announced_in_a_comparison(make):
    assert "**Demo data**, not comparable with TRACE: `other`" in compared([make(), make(name="other", demo=True)])[2]


def test_runs_that_differ_by_seed_alone_have_a_mean_and_a_deviation(make):
    lower = R - np.array([0.1, 0.0, 0.2])
    runs = [
        make(name="s1", config={"seed": 1}),
        make(lower, name="s2", seed=2, config={"seed": 2}),
        make(name="more", config={"seed": 1, "train_rows": 5}),
    ]
    first, second, notes, rows = compared(runs)
    title = "mean ± standard deviation over 2 seeds"
    assert list(first)[2:] == ["s1", "s2", "more", title]
    # OP: 40 and 30, so 35 ± 10 / sqrt(2); BWT does not change
    assert first[title][:4] == first["s1"][:4]
    assert first[title][4:8] == ["35.0 ± 7.1", "-50.0 ± 0.0", "50.0 ± 0.0", "15.0 ± 7.1"]
    assert second[title] == ["65.0 ± 7.1", "0.0 ± 0.0", "40.0 ± 14.1"]
    assert "seeds are those of `s1`, `s2`" in notes
    assert float(rows["mean over 2 seeds"]["OP"]) == pytest.approx(35)
    assert float(rows["standard deviation over 2 seeds"]["meetingbank"]) == pytest.approx(14.142, abs=1e-3)


def test_the_same_seed_twice_is_no_deviation(make):
    assert not any("±" in name for name in compared([make(), make(name="again")])[0])


def test_the_mean_over_seeds_of_what_is_missing_is_missing(make):
    runs = [make(), make(without((3, 1)), name="other", seed=2)]
    first, second, *_ = compared(runs)
    title = "mean ± standard deviation over 2 seeds"
    assert first[title][4] == DASH and second[title] == ["70.0 ± 0.0", DASH, "50.0 ± 0.0"]


def test_long_lists_of_tasks_are_shortened_and_orders_named(make):
    from trace_bench.data import ORDERS

    names = {"order2": ORDERS["order2"], "reasoning_order1": ORDERS["reasoning_order1"], "5": ORDERS["order1"][:5]}
    runs = [make(np.full((9, 8), 0.5), name=f"run-{n}", tasks=tasks) for n, tasks in names.items()]
    first = compared(runs)[0]
    assert [first[f"run-{n}"][2] for n in names] == [
        "8 (order2)",
        "8 (reasoning_order1)",
        "5 (cstance, fomc, meetingbank, …)",
    ]


def test_checkpoints_of_unknown_training_have_no_op_and_no_cost(make):
    first, second, *_ = compared([make(R[:3], checkpoints={"mine": "a", "theirs": "b"})])
    assert first["mine"][1:2] + first["mine"][3:] == [DASH, DASH, DASH, DASH, DASH, "20.0", DASH, DASH]
    assert second["mine"] == ["60.0", "90.0", DASH]


def test_the_command_compares_several_runs_and_writes_where_asked(make, tmp_path, capsys):
    paths = [str(make().path), str(make(name="other").path)]
    main(["report", *paths, "--output", str(tmp_path / "out" / "summary.md")])
    printed = capsys.readouterr().out
    assert printed == compare([Run.open(p) for p in paths])[0]
    assert (tmp_path / "out" / "summary.md").read_text(encoding="utf-8") == printed
    assert (tmp_path / "out" / "summary.csv").read_text(encoding="utf-8").count("\n") == 3
    for path in paths:
        files = {p.name for p in Run.open(path).path.iterdir()}
        assert files == {"manifest.json", "stages", "report.md", "scores.csv"}


def test_the_output_of_a_comparison_is_a_markdown_file(make, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["report", str(make().path), "--output", str(tmp_path / "summary.csv")])
    assert "ends in .md" in str(e.value.code)


def test_runs_of_one_name_are_told_apart(make, tmp_path):
    run = make()
    copy = tmp_path / "elsewhere" / "mine"
    write_json(copy / "manifest.json", json.loads((run.path / "manifest.json").read_text(encoding="utf-8")))
    assert {str(run.path), str(copy)} <= set(compared([run, Run.open(copy)])[0])
