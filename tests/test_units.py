"""Metrics with a unit and a direction of their own, from the evaluation to every report."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from made_runs import NAN, SINGLE, cell, make_run, write_cell
from test_comparison import compared, differences

from trace_bench import evaluate
from trace_bench.metrics import difference_interval, standard_error
from trace_bench.report import Results, compare, write_comparison, write_report
from trace_bench.report.figures import pictures
from trace_bench.report.tables import DASH, Unit, shade, shared_unit
from trace_bench.run import Run, read_json, read_jsonl
from trace_bench.tasks import load_tasks
from trace_tasks import data
from trace_tasks.data.files import write_json

#: Metric -> whether higher is better, and its scale.
KINDS = {"ter": (False, 100), "bleu": (True, 100), "mae": (False, None), "accuracy": (True, 1), "wer": (False, 1)}
# Errors of three tasks after each stage: each falls at its own stage and rises later; all is measured.
TER = np.array([[90.0, 80, 70], [40, 75, 72], [55, 30, 71], [60, 45, 20]])


def unit_cell(stage, task, value, metric, known=True):
    """A cell whose headline is this metric; `known` = with the unit, as cells have it now."""
    better, scale = KINDS[metric]
    unit = {"higher_is_better": {metric: better}, "scale": {metric: scale}} if known else {}
    return cell(stage, task, 0.0, headline=metric, metrics={metric: {"value": value, "stderr": None}}, **unit)


def run_of(make, R, metrics, known=True, **options):
    """A run with these scores; the headline of column i is `metrics[i]`."""
    tasks = [f"t{i}" for i in range(len(metrics))]
    run = make(np.full_like(R, NAN), tasks=tasks, **options)
    for stage in run.stages:
        for task, value, metric in zip(tasks, R[stage.index], metrics, strict=True):
            if not np.isnan(value):
                write_json(stage.eval_file(task), unit_cell(stage, task, float(value), metric, known))
    return run


def rows_of(markdown):
    """Tables of a report: first cell of a row -> its other cells; the last row of a name counts."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in lines}


def report_of(run, *others):
    line = write_report(run, others)
    return line, (run.path / "report.md").read_text(), (run.path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------ numbers


def test_more_errors_are_forgetting(make):
    results = Results(run_of(make, TER, ["ter"] * 3))
    sequence = {name: [e.value for e in estimates] for name, estimates in results.sequence.items()}
    assert sequence["OP"] == pytest.approx([40, 42.5, 125 / 3]), "the mean of the scores themselves"
    assert sequence["BWT"][1:] == pytest.approx([-15, -(20 + 15) / 2]), "negative = forgotten"
    assert sequence["Forgetting"][1:] == pytest.approx([15, (20 + 15) / 2]), "from the least errors"
    assert sequence["FWT"] == pytest.approx([((80 - 75) + (70 - 71)) / 2])
    assert sequence["mean OP"] == pytest.approx([(40 + 42.5 + 125 / 3) / 3])
    assert results.since_base[3, 2].value == 50 and results.since_own[3, 0].value == -20
    assert results.since_before[3, 1].value == -15
    assert np.array_equal(results.R, TER), "scores stay what they are"


def test_of_a_score_the_same_changes_mean_the_opposite(make):
    results = Results(run_of(make, TER, ["bleu"] * 3))
    assert results.sequence["OP"][-1].value == pytest.approx(125 / 3)
    assert results.sequence["BWT"][-1].value == pytest.approx(17.5)
    assert results.sequence["Forgetting"][-1].value == pytest.approx(((55 - 60) + (30 - 45)) / 2)
    assert results.since_base[3, 2].value == -50


def test_no_mean_is_taken_over_different_units(make):
    R = np.array([[0.1, 20, 80.0], [0.8, NAN, NAN], [0.6, 45, NAN], [0.7, 30, 50]])
    results = Results(run_of(make, R, ["accuracy", "bleu", "ter"]))
    assert results.unit is None and math.isnan(results.mean.value)
    assert all(math.isnan(e.value) for estimates in results.sequence.values() for e in estimates)
    assert results.since_own[3, 1].value == -15 and results.since_base[3, 2].value == 30


@pytest.mark.parametrize("metrics", [["accuracy", "bleu"], ["bleu", "ter"], ["accuracy", "wer"], ["mae", "wer"]])
def test_units_and_directions_are_not_mixed(metrics):
    assert shared_unit(Unit(m, KINDS[m][1], KINDS[m][0]) for m in metrics) is None


def test_percent_of_other_metrics_is_one_unit():
    assert shared_unit([Unit("accuracy"), Unit("rouge_l"), Unit("sari")]) == Unit("sari")
    assert shared_unit([Unit("mae", None, False)] * 2) == Unit("mae", None, False)


def test_cells_of_before_are_fractions_of_which_more_is_better(make):
    R = np.array([[0.1, 0.2], [0.8, NAN], [0.6, 0.9]])
    old = Results(run_of(make, R, ["wer"] * 2, known=False))
    assert old.unit == Unit("wer") and not old.not_percent
    assert old.sequence["BWT"][-1].value == pytest.approx(-0.2)
    stage = old.run.stages[2]
    write_json(stage.eval_file("t0"), unit_cell(stage, "t0", 0.6, "wer"))
    assert Results(old.run).units == {"t0": Unit("wer", 1, False), "t1": Unit("wer")}, "one cell that says it is enough"


def test_a_metric_is_no_fraction_once_a_cell_shows_it(make):
    run = run_of(make, np.array([[0.0, NAN], [7.5, NAN], [6.0, NAN]]), ["accuracy", "accuracy"])
    for stage, scale in zip(run.stages, (1, None, None), strict=True):
        write_json(stage.eval_file("t0"), read_json(stage.eval_file("t0")) | {"scale": {"accuracy": scale}})
    _, text, _ = report_of(run)
    assert Results(run).units["t0"] == Unit("accuracy", None)
    assert rows_of(text.split("## Scores")[1].split("| OP_t |")[0])["1_t0"][0] == "7.50" and "750.0" not in text


def test_rows_of_a_metric_without_a_scale_are_no_proportion(make):
    run = make(np.full((2, 1), NAN), tasks=["t0"])
    rows = np.array([[0.0, 1], [0, 1], [1, 1], [0, 0], [1, 1], [0, 1]])
    for metric in ("mae", "accuracy"):
        better, scale = KINDS[metric]
        for stage in run.stages:
            unit = {"higher_is_better": {metric: better}, "scale": {metric: scale}}
            write_cell(stage, "t0", {metric: rows[:, stage.index]}, **unit)
        gained = Results(run).since_base[1, 0]
        low, high = difference_interval(rows[:, [1]] - rows[:, [0]], fractions=metric == "accuracy")
        if metric == "accuracy":
            assert gained == pytest.approx((0.5, low[0], high[0]))
        else:
            assert gained == pytest.approx((-0.5, -high[0], -low[0]), abs=1e-9) and gained.low == pytest.approx(-1)
        low, high = Results(run).intervals[1, "t0", metric]
        # Wilson's interval of 5 of 6 begins at 0.44, the bootstrap's over 5 draws at 0.4 or 0.2.
        assert (low > 0.43) == (metric == "accuracy")


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("unit", "value", "text", "gain"),
    [
        (Unit("rouge_l"), 0.4567, "45.7", "+45.7"),
        (Unit("wer", 1, False), 0.25, "25.0", "+25.0"),
        (Unit("ter", 100, False), 100.0, "100.0", "+100.0"),
        (Unit("mae", None, False), 0.31234, "0.312", "+0.312"),
        (Unit("mae", None, False), 9.5, "9.50", "+9.50"),
        (Unit("mse", None, False), 99.97, "100.0", "+100.0"),
        (Unit("mse", None, False), 12345.6, "12345.6", "+12345.6"),
        (Unit("mae", None, False), 5e-17, "0.00", "+0.00"),
        (Unit("mae", None, False), NAN, DASH, DASH),
    ],
)
def test_a_score_is_shown_in_its_unit(unit, value, text, gain):
    assert unit.text(value) == text and unit.text(value, sign=True) == gain


def test_colours_go_from_worst_to_best():
    assert [shade(v, Unit("bleu", 100).ends([])) for v in (0, 25, 100)] == [0, 0.25, 1]
    assert [shade(v, Unit("ter", 100, False).ends([])) for v in (0, 25, 100)] == [1, 0.75, 0]
    ends = Unit("mae", None, False).ends([3.0, NAN, 5.0])
    assert ends == (5, 3) and shade(4.0, ends) == 0.5
    assert shade(3.0, Unit("mae", None).ends([3.0])) == 0, "all the same: no division by zero"


def test_a_report_in_a_unit_of_its_own(make):
    line, text, page = report_of(run_of(make, TER, ["ter"] * 3))
    assert line.endswith("; OP_3 41.7, BWT_3 -17.5 (ter, lower is better)")
    rows = rows_of(text)
    assert "|  | ter |  |" in text and rows["OP_3"][1] == "mean of the 3 tasks seen, at stage 3; lower is better"
    assert rows["OP_3"][0] == "41.7" and rows["BWT_3"][0] == "-17.5" and rows["Forgetting_3"][0] == "17.5"
    learning = text.split("## Learning and forgetting")[1].split("## Bounds")[0]
    assert rows_of(learning)["t0"] == ["ter, lower is better", "90.0", "40.0", "60.0", "+50.0", "-20.0", "+30.0"]
    scores = text.split("## Scores")[1].split("## ")[0]
    assert "| stage | t0<br>ter<br>lower is better |" in scores and "percent" not in scores and "9000.0" not in text
    assert rows_of(scores)["0_base"] == ["90.0", "80.0", "70.0"]
    assert rows_of(text.split("## Bounds")[1])["this run (stage 3)"][-1] == "41.7"
    # The fewer errors the darker, and the unit in the tiles.
    assert re.search(r'<td class="q2">90.0</td><td class="q4">80.0</td>', page)
    assert '<td class="q16 own">20.0</td>' in page and "Colour: worst" in page and "Colour: 0 " not in page
    assert "<b>41.7</b>" in page and "mean of the tasks seen; ter, lower is better" in page


def test_scores_csv_holds_the_scores_as_they_are(make):
    run = run_of(make, TER, ["ter", "bleu", "mae"])
    write_report(run)
    lines = list(csv.DictReader(io.StringIO((run.path / "scores.csv").read_text())))
    assert list(lines[0]) == ["stage", "task", "metric", "value", "stderr", "n", "n_unscored", "low", "high"]
    assert [float(row["value"]) for row in lines] == TER.ravel().tolist()


def test_a_report_of_mixed_units_says_why_there_is_no_mean(make):
    R = np.array([[0.1, 20, 80.0], [0.8, NAN, NAN], [0.6, 45, NAN], [0.7, 30, 50]])
    run = run_of(make, R, ["accuracy", "bleu", "mae"])
    line, text, page = report_of(run)
    assert line.endswith("no mean over tasks of different units")
    assert text.count("No mean is taken over different units") == 1
    assert "t0: percent; t1: bleu; t2: mae, lower is better" in text
    rows = rows_of(text)
    assert [rows[name][0] for name in ("OP_3", "BWT_3", "Forgetting_3", "FWT", "mean OP_t")] == [DASH] * 5
    assert rows_of(text.split("## Bounds")[1])["base, zero-shot"] == ["10.0", "20.0", "80.0", DASH]
    learning = text.split("## Learning and forgetting")[1].split("## Bounds")[0]
    assert rows_of(learning)["t1"] == ["bleu", "20.0", "45.0", "30.0", "+25.0", "-15.0", "+10.0"]
    assert rows_of(learning)["t2"][-1] == "+30.0"
    assert page.count("the tasks have different units") == 3, "OP, BWT and Forgetting"
    drawn = {picture.name: picture for picture in pictures(Results(run))}
    assert "sequence" not in drawn and {"matrix", "tasks"} <= drawn.keys()
    svg = drawn["tasks"].svg
    assert all(f">{name}</text>" in svg for name in ("percent", "bleu", "mae, lower is better"))
    assert ">45.0</text>" in drawn["matrix"].svg and ">4500.0</text>" not in drawn["matrix"].svg


def test_arrows_and_colours_say_better_and_worse(make):
    run = make(np.full((3, 2), NAN), tasks=["t0", "t1"])
    rng, unit = np.random.default_rng(0), {"higher_is_better": {"mae": False}, "scale": {"mae": None}}
    for stage, errors in zip(run.stages, (9.0, 3.0, 6.0), strict=True):
        write_cell(stage, "t0", {"mae": errors + rng.random(40)}, **unit)
    for stage, errors in ((run.stages[0], 9.0), (run.stages[2], 3.0)):
        write_cell(stage, "t1", {"mae": errors + rng.random(40)}, **unit)
    _, text, page = report_of(run)
    learning = rows_of(text.split("## Learning and forgetting")[1].split("## Bounds")[0])
    learned, since = learning["t0"][4:6]
    assert learned.startswith("+6.") and learned.endswith("↑") and since.startswith("-3.") and since.endswith("↓")
    assert '<td class="number up">+6.' in page and '<td class="number down">-3.' in page
    assert re.search(r'<td class="q\d+" title="95 % interval 6.\d\d to 6.\d\d">6.\d\d ↓</td>', page), "more errors"
    results = Results(run)
    assert results.sequence["BWT"][1].sign == -1 and results.sequence["BWT"][1].low < -2
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert embedded["units"] == [[1, -1, "mae"]] * 2 and embedded["binary"] == [False, False]


def test_answers_that_got_worse_come_first_whatever_the_direction(make):
    from trace_bench.report.samples import embed, read_answers

    run = make(np.full((2, 1), NAN), tasks=["t0"])
    unit = {"higher_is_better": {"mae": False}, "scale": {"mae": None}}
    write_cell(run.stages[0], "t0", {"mae": np.array([5.0, 5, 5])}, **unit)
    write_cell(run.stages[1], "t0", {"mae": np.array([1.0, 5, 9])}, **unit)
    results = Results(run)
    rows = json.loads(embed(results, read_answers(results)).json)["rows"]
    assert [row[1] for row in rows] == ["2", "0", "1"], "more errors, fewer errors, the same"


def test_checkpoints_of_unknown_training_are_set_against_each_other_in_gains(make):
    run = run_of(make, TER[:3], ["ter", "bleu", "bleu"], checkpoints={"a": "/x/a", "b": "/x/b"})
    _, text, _ = report_of(run)
    changes = rows_of(text.split("## Changes since the checkpoint before")[1].split("## Scores")[0])
    assert changes["2_b"][0] == "-15.0" and "In points" not in text
    assert "No mean" not in text, "of such a run no mean is taken at all"


def test_bounds_are_in_the_unit_of_the_run(make):
    R = np.array([[50.0, 60, 70], [20, NAN, NAN], [NAN, 30, NAN], [NAN, NAN, 40]])
    run = run_of(make, TER, ["ter"] * 3)
    _, text, _ = report_of(run, run_of(make, R, ["ter"] * 3, name="a-single", method="single"))
    assert rows_of(text.split("## Bounds")[1])["single (a model per task)"] == ["20.0", "30.0", "40.0", "30.0"]
    line, text, _ = report_of(Run.open(run.path.parent / "a-single"))
    assert line.endswith("; mean of the tasks 30.0 (ter, lower is better)")
    assert rows_of(text.split("## Learning")[1])["t0"] == ["ter, lower is better", "50.0", "20.0", "+30.0"]


# -------------------------------------------------------------------------------------------------------- comparisons


def test_runs_are_compared_in_their_unit(make, tmp_path):
    better = TER.copy()
    better[3] = [50, 45, 11]
    runs = [run_of(make, TER, ["ter"] * 3), run_of(make, better, ["ter"] * 3, name="better")]
    first, finals, notes, lines = compared(runs)
    at = first["run"].index
    assert [first["mine"][at(n)] for n in ("OP", "BWT", "base")] == ["41.7", "-17.5", "80.0"]
    assert finals["run"] == ["t0<br>ter, lower is better", "t1<br>ter, lower is better", "t2<br>ter, lower is better"]
    assert finals["better"] == ["50.0", "45.0", "11.0"]
    assert "`mine`, `better` ter, lower is better" in notes
    assert float(lines["mine"]["OP"]) == pytest.approx(125 / 3) and float(lines["mine"]["t0"]) == 60
    assert lines["better"]["unit of OP"] == "ter, lower is better"
    _, versus = differences(runs)
    assert versus["better"]["OP"] == "+6.3" and versus["better"]["BWT"] == "+5.0", "fewer errors are better"
    write_comparison(runs, tmp_path / "page.html")
    assert re.search(r'<td class="q18">11.0</td>', (tmp_path / "page.html").read_text())
    assert ">OP (ter, lower is better)</text>" in (tmp_path / "page-figures" / "runs.svg").read_text()


def test_paired_differences_of_errors_are_gains(make):
    rng, unit = np.random.default_rng(0), {"higher_is_better": {"mae": False}, "scale": {"mae": None}}
    runs = []
    for name, errors in (("one", 5.0), ("two", 2.0)):
        run = make(np.full((2, 1), NAN), tasks=["t0"], name=name)
        for stage in run.stages:
            write_cell(stage, "t0", {"mae": errors + rng.random(30)}, **unit)
        runs.append(run)
    _, finals, _, _ = compared(runs)
    assert re.fullmatch(r"2\.\d\d", finals["two"][0])
    _, versus = differences(runs)
    assert re.fullmatch(r"\+\d\.\d\d \[\+2\.\d\d, \+3\.\d\d\]", versus["two"]["OP"])


def test_runs_of_different_units_have_no_difference(make, tmp_path):
    mixed = run_of(make, TER / 100, ["accuracy", "bleu", "ter"], name="mixed")
    percent = run_of(make, TER / 100, ["accuracy"] * 3, name="percent")
    first, _, notes, lines = compared([mixed, percent])
    at = first["run"].index
    assert first["mixed"][at("OP")] == DASH and first["percent"][at("OP")] == "41.7"
    assert first["mixed"][at("base")] == DASH and lines["mixed"]["OP"] == ""
    assert "`mixed` different units; `percent` percent" in notes
    assert all(math.isnan(v.value) for v in compare([mixed, percent]).versus["percent"].values())
    for ending in ("md", "tex", "html"):
        write_comparison([mixed, percent], tmp_path / f"c.{ending}")


def test_runs_agree_on_whether_a_score_is_a_fraction(make):
    few = run_of(make, TER / 100, ["accuracy"] * 3, name="few")
    many = run_of(make, TER, ["accuracy"] * 3, name="many")
    for stage in many.stages:
        for task in many.tasks:
            write_json(stage.eval_file(task), read_json(stage.eval_file(task)) | {"scale": {"accuracy": None}})
    _, finals, _, _ = compared([few, many])
    assert finals["few"] == ["0.600", "0.450", "0.200"] and finals["many"] == ["60.0", "45.0", "20.0"]


def test_a_mean_over_seeds_is_in_the_unit(make):
    runs = [run_of(make, TER / 1000 + k / 1000, ["mae"] * 3, name=f"s{k}", seed=k) for k in range(2)]
    first, finals, _, _ = compared(runs)
    [mean] = [row for name, row in first.items() if name.startswith("mean")]
    assert mean[first["run"].index("OP")] == "0.0422 ± 0.000707"
    assert finals["mean ± standard deviation over 2 seeds"][0] == "0.0605 ± 0.000707"


# --------------------------------------------------------------------------------------------------------- evaluation

YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/rows.jsonl, test: {folder}/rows.jsonl}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metadata: {{version: 1.0}}
{metrics}
"""
FUNCTIONS = """
def lengths(doc, results):
    return {"own_error": 0.5 + len(results[0]), "own_share": 0.5}

def several(references, predictions):
    return {"one": 0.25, "two": 0.75}
"""
OWN = {
    "t_ter": "metric_list: [{metric: ter}, {metric: bleu}, {metric: chrf}, {metric: exact_match}]",
    "t_error": (
        "process_results: !function own.lengths\nmetric_list: [{metric: own_error, aggregation: median, "
        "higher_is_better: false}, {metric: own_share, aggregation: mean, higher_is_better: true}]"
    ),
    "t_several": "metric_list: [{metric: !function own.several, aggregation: mean, higher_is_better: false}]",
    "t_unknown": (
        "process_results: !function own.lengths\nmetric_list: [{metric: own_error, aggregation: mean}, "
        "{metric: own_share, aggregation: mean, higher_is_better: true}]"
    ),
}


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"row {i}: ", "a": f"the answer of row {i}"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.py").write_text(FUNCTIONS)
    for name, metrics in OWN.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder, metrics=metrics))
    monkeypatch.setenv("TRACE_TASKS", str(folder))


def test_cells_say_what_their_scores_are_measured_in(own_tasks, tiny_model, tmp_path):
    tasks = ["t_ter", "t_error", "t_several"]
    run = evaluate.external_run(tmp_path / "run", {}, model=str(tiny_model), tasks=tasks, settings={"backend": "hf"})
    assert evaluate.evaluate(run) == 3
    ter, error, several = (read_json(run.stages[0].eval_file(task)) for task in tasks)
    assert ter["headline"] == "ter" and ter["metrics"]["ter"]["value"] >= 1
    assert ter["higher_is_better"] == {"ter": False, "bleu": True, "chrf": True, "exact_match": True}
    assert ter["scale"] == {"ter": 100, "bleu": 100, "chrf": 100, "exact_match": 1}
    assert error["higher_is_better"] == {"own_error": False, "own_share": True}
    assert error["scale"] == {"own_error": None, "own_share": 1}
    rows = [row["own_error"] for row in read_jsonl(run.stages[0].samples_file("t_error"))]
    assert error["metrics"]["own_error"]["value"] == np.median(rows)
    assert several["higher_is_better"] == {"one": False, "two": False} and several["headline"] == "one"
    assert Results(run).units["t_ter"] == Unit("ter", 100, False)
    _, text, _ = report_of(run)
    assert f"| 0_base | {ter['metrics']['ter']['value']:.1f} |" in text
    # Leaving rows out has no score for what is made of all rows together.
    report_of(replace(run, left_out={"t_ter": {0}, "t_error": {0}}))
    assert np.isnan(Results(replace(run, left_out={"t_ter": {0}})).R[0, 0])


def test_the_error_of_a_mean_is_of_means_alone():
    assert standard_error([1.0, 2.0, 6.0], 3.0) == pytest.approx((7 / 3) ** 0.5)
    assert standard_error([1.0, 2.0, 6.0], 2.0) is None, "a median"
    assert standard_error([(0, 1), (1, 1)], 0.5) is None


def test_a_metric_of_unknown_direction_is_refused_before_anything_starts(own_tasks, tiny_model, tmp_path):
    with pytest.raises(data.DataError, match=r"t_unknown: .* own_error .*higher_is_better: true or false"):
        evaluate.external_run(tmp_path / "r", {}, model=str(tiny_model), tasks=["t_unknown"], settings={})
    assert not (tmp_path / "r").exists()


def test_the_tasks_of_trace_are_fractions_of_which_more_is_better(demo_data):
    tasks = load_tasks([*data.FOLDERS, *data.REASONING])
    assert all(better is True for task in tasks.values() for better in task.higher_is_better().values())


def test_reports_of_trace_are_the_same_with_and_without_units_in_the_cells(tmp_path):
    """What official metrics say of themselves changes nothing but the file of the cell."""
    texts, folder = [], tmp_path / "runs"
    for known in (False, True):
        runs = [make_run(folder), make_run(folder, SINGLE, name="single", method="single")]
        for file in folder.rglob("eval/*.json") if known else ():
            names = read_json(file)["metrics"]
            units = {"scale": dict.fromkeys(names, 1), "higher_is_better": dict.fromkeys(names, True)}
            write_json(file, read_json(file) | units)
        write_report(runs[0])
        write_comparison(runs, folder / "all.html")
        files = (p for p in folder.rglob("*") if p.is_file() and "eval" not in p.parts)
        texts.append({p.relative_to(folder): p.read_bytes() for p in files})
        folder.rename(tmp_path / f"runs-{known}")
    assert texts[0] == texts[1]
