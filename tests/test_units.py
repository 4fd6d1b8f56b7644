"""Metrics with their own unit and direction, from the evaluation to every report."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_task
from made_runs import NAN, SINGLE, cell, make_run, write_cell
from test_comparison import compared, differences

from trace_bench import evaluate
from trace_bench.metrics import difference_interval, standard_error
from trace_bench.report import Results, compare, write_comparison, write_report
from trace_bench.report.drawing import draw
from trace_bench.report.figures import OF_A_RUN
from trace_bench.report.samples import embed, read_answers
from trace_bench.report.tables import DASH, Unit, shade, shared_unit
from trace_bench.run import read_json, read_jsonl
from trace_bench.tasks import load_tasks
from trace_tasks import data
from trace_tasks.data.files import write_json

#: Metric -> whether higher is better, and its scale.
KINDS = {"ter": (False, 100), "bleu": (True, 100), "mae": (False, None), "accuracy": (True, 1), "wer": (False, 1)}
MAE = {"higher_is_better": {"mae": False}, "scale": {"mae": None}}
# Errors of three tasks after each stage. Each falls at its own stage and rises later. All cells are measured.
TER = np.array([[90.0, 80, 70], [40, 75, 72], [55, 30, 71], [60, 45, 20]])
# Scores of three tasks in different units.
MIXED = np.array([[0.1, 20, 80.0], [0.8, NAN, NAN], [0.6, 45, NAN], [0.7, 30, 50]])


def run_of(make, R, metrics, known=True, **options):
    """A run with these scores; `metrics[i]` is the headline of column i. `known` = cells record their units."""
    run = make(np.full_like(R, NAN), tasks=[f"t{i}" for i in range(len(metrics))], **options)
    for stage in run.stages:
        for task, value, metric in zip(run.tasks, R[stage.index], metrics, strict=True):
            better, scale = KINDS[metric]
            unit = {"higher_is_better": {metric: better}, "scale": {metric: scale}} if known else {}
            scores = {"headline": metric, "metrics": {metric: {"value": float(value), "stderr": None}}}
            if not np.isnan(value):
                write_json(stage.eval_file(task), cell(stage, task, 0.0, **scores, **unit))
    return run


def run_of_errors(make, **columns):
    """A run with the metric `mae`: task -> mean error, less about a half, at each stage."""
    name = columns.pop("name", "mine")
    rng = np.random.default_rng(list(name.encode()))
    count = max(map(len, columns.values()))
    run = make(np.full((count, len(columns)), NAN), tasks=list(columns), name=name)
    for task, means in columns.items():
        for stage, mean in zip(run.stages, means, strict=True):
            if mean is not None:
                write_cell(stage, task, {"mae": mean + rng.random(40)}, **MAE)
    return run


def rows_of(markdown):
    """First cell of a row in a report's tables -> its other cells. The last row with a name counts."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in lines}


def report_of(run, *others):
    line = write_report(run, others)
    return line, (run.path / "report.md").read_text(), (run.path / "report.html").read_text()


def section(text, heading, end="\n## "):
    return text.split(f"## {heading}\n")[1].split(end)[0]


# ------------------------------------------------------------------------------------------------------------ numbers


def test_forgetting_follows_the_direction_of_the_metric(make):
    results = Results(run_of(make, TER, ["ter"] * 3))
    sequence = {name: [e.value for e in estimates] for name, estimates in results.sequence.items()}
    assert sequence["OP"] == pytest.approx([40, 42.5, 125 / 3]), "the mean of the scores themselves"
    assert sequence["BWT"][1:] == pytest.approx([-15, -(20 + 15) / 2]), "negative = forgotten"
    assert sequence["Forgetting"][1:] == pytest.approx([15, (20 + 15) / 2]), "from the least errors"
    assert sequence["FWT"] == pytest.approx([((80 - 75) + (70 - 71)) / 2])
    assert sequence["mean OP"] == pytest.approx([(40 + 42.5 + 125 / 3) / 3])
    assert results.change(2, 0, 3).value == 50 and results.change(0, 1, 3).value == -20
    assert np.array_equal(results.R, TER), "scores stay what they are"
    results = Results(run_of(make, TER, ["bleu"] * 3, name="bleu"))
    sequence = {name: estimates[-1].value for name, estimates in results.sequence.items()}
    assert (sequence["OP"], sequence["BWT"]) == pytest.approx((125 / 3, 17.5))
    assert sequence["Forgetting"] == pytest.approx(((55 - 60) + (30 - 45)) / 2)
    assert results.change(2, 0, 3).value == -50


def test_there_is_no_mean_over_different_units(make):
    results = Results(run_of(make, MIXED, ["accuracy", "bleu", "ter"]))
    assert results.unit is None and math.isnan(results.mean.value)
    assert all(math.isnan(e.value) for estimates in results.sequence.values() for e in estimates)
    assert results.change(1, 2, 3).value == -15 and results.change(2, 0, 3).value == 30
    for metrics in ("accuracy", "bleu"), ("bleu", "ter"), ("accuracy", "wer"), ("mae", "wer"):
        assert shared_unit(Unit(m, KINDS[m][1], KINDS[m][0]) for m in metrics) is None
    assert shared_unit([Unit("accuracy"), Unit("rouge_l"), Unit("sari")]) == Unit("sari")
    assert shared_unit([Unit("mae", None, False)] * 2) == Unit("mae", None, False)


def test_older_cells_are_fractions_with_higher_better_unless_one_says_otherwise(make):
    run = run_of(make, np.array([[0.1, 0.2], [0.8, NAN], [0.6, 0.9]]), ["wer"] * 2, known=False)
    assert Results(run).unit == Unit("wer") and not Results(run).not_percent
    assert Results(run).sequence["BWT"][-1].value == pytest.approx(-0.2)
    file = run.stages[2].eval_file("t0")
    write_json(file, read_json(file) | {"higher_is_better": {"wer": False}, "scale": {"wer": 1}})
    assert Results(run).units == {"t0": Unit("wer", 1, False), "t1": Unit("wer")}, "one cell that says it is enough"
    run = run_of(make, np.array([[0.0], [7.5]]), ["accuracy"], name="no-fraction")
    for stage, scale in zip(run.stages, (1, None), strict=True):
        write_json(stage.eval_file("t0"), read_json(stage.eval_file("t0")) | {"scale": {"accuracy": scale}})
    assert Results(run).units["t0"] == Unit("accuracy", None)
    assert rows_of(section(report_of(run)[1], "Scores", "| OP_t |"))["1_t0"][0] == "7.50"


@pytest.mark.parametrize("metric", ["mae", "accuracy"])
def test_rows_of_a_metric_without_a_scale_are_no_proportion(make, metric):
    run = make(np.full((2, 1), NAN), tasks=["t0"])
    rows = np.array([[0.0, 1], [0, 1], [1, 1], [0, 0], [1, 1], [0, 1]])
    for stage in run.stages:
        unit = {"higher_is_better": {metric: KINDS[metric][0]}, "scale": {metric: KINDS[metric][1]}}
        write_cell(stage, "t0", {metric: rows[:, stage.index]}, **unit)
    gained = Results(run).change(0, 0, 1)
    low, high = difference_interval(rows[:, [1]] - rows[:, [0]], fractions=metric == "accuracy")
    expected = (0.5, low[0], high[0]) if metric == "accuracy" else (-0.5, -high[0], -low[0])
    assert gained == pytest.approx(expected, abs=1e-9)
    low, high = Results(run).intervals[1, "t0", metric]
    # Wilson's interval for 4 of 6 lies within 0 and 1, Student's does not.
    assert (0 < low < high < 1) == (metric == "accuracy")


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("unit", "value", "text", "gain"),
    [
        (Unit("rouge_l"), 0.4567, "45.7", "+45.7"),
        (Unit("ter", 100, False), 100.0, "100.0", "+100.0"),
        (Unit("mae", None, False), 0.31234, "0.312", "+0.312"),
        (Unit("mae", None, False), 9.5, "9.50", "+9.50"),
        (Unit("mse", None, False), 99.97, "100.0", "+100.0"),
        (Unit("mse", None, False), 12345.6, "12345.6", "+12345.6"),
        (Unit("mae", None, False), 5e-17, "0.00", "+0.00"),
        (Unit("mae", None, False), NAN, DASH, DASH),
    ],
)
def test_scores_are_shown_in_their_unit(unit, value, text, gain):
    assert unit.text(value) == text and unit.text(value, sign=True) == gain


def test_colours_go_from_worst_to_best():
    assert [shade(v, Unit("bleu", 100).ends([])) for v in (0, 25, 100)] == [0, 0.25, 1]
    assert [shade(v, Unit("ter", 100, False).ends([])) for v in (0, 25, 100)] == [1, 0.75, 0]
    ends = Unit("mae", None, False).ends([3.0, NAN, 5.0])
    assert ends == (5, 3) and shade(4.0, ends) == 0.5
    assert shade(3.0, Unit("mae", None).ends([3.0])) == 0, "all the same: no division by zero"


def test_a_report_and_its_bounds_use_the_unit(make):
    R = np.array([[50.0, 60, 70], [20, NAN, NAN], [NAN, 30, NAN], [NAN, NAN, 40]])
    single = run_of(make, R, ["ter"] * 3, name="a-single", method="single")
    line, text, page = report_of(run_of(make, TER, ["ter"] * 3), single)
    assert line.endswith("; OP_3 41.7, BWT_3 -17.5 (ter, lower is better)")
    rows = rows_of(text)
    assert "|  | ter |  |" in text and rows["OP_3"][1] == "mean of the 3 tasks seen, at stage 3; lower is better"
    assert rows["OP_3"][0] == "41.7" and rows["BWT_3"][0] == "-17.5" and rows["Forgetting_3"][0] == "17.5"
    learning = rows_of(section(text, "Learning and forgetting"))
    assert learning["t0"] == ["ter, lower is better", "90.0", "40.0", "60.0", "+50.0", "-20.0", "+30.0"]
    scores = section(text, "Scores")
    assert "| stage | t0<br>ter<br>lower is better |" in scores and "percent" not in scores and "9000.0" not in text
    assert rows_of(scores)["0_base"] == ["90.0", "80.0", "70.0"]
    bounds = rows_of(section(text, "Bounds"))
    assert bounds["this run (stage 3)"][-1] == "41.7"
    assert bounds["single (a model per task)"] == ["20.0", "30.0", "40.0", "30.0"]
    # The fewer errors the darker, and the unit in the tiles.
    assert re.search(r'<td class="q2">90.0</td><td class="q4">80.0</td>', page)
    assert '<td class="q16 own">20.0</td>' in page and "Colour: worst" in page and "Colour: 0 " not in page
    assert "<b>41.7</b>" in page and "mean of the tasks seen; ter, lower is better" in page
    line, text, _ = report_of(single)
    assert line.endswith("; mean of the tasks 30.0 (ter, lower is better)")
    assert rows_of(section(text, "Learning"))["t0"] == ["ter, lower is better", "50.0", "20.0", "+30.0"]


def test_a_report_of_mixed_units_says_why_there_is_no_mean(make):
    run = run_of(make, MIXED, ["accuracy", "bleu", "mae"])
    line, text, page = report_of(run)
    assert line.endswith("no mean over tasks of different units")
    assert text.count("There is no mean over different units") == 1
    assert "t0: percent; t1: bleu; t2: mae, lower is better" in text
    rows = rows_of(text)
    assert [rows[name][0] for name in ("OP_3", "BWT_3", "Forgetting_3", "FWT", "mean OP_t")] == [DASH] * 5
    assert rows_of(section(text, "Bounds"))["base, zero-shot"] == ["10.0", "20.0", "80.0", DASH]
    learning = rows_of(section(text, "Learning and forgetting"))
    assert learning["t1"] == ["bleu", "20.0", "45.0", "30.0", "+25.0", "-15.0", "+10.0"]
    assert learning["t2"][-1] == "+30.0"
    assert page.count("the tasks have different units") == 3, "OP, BWT and Forgetting"
    drawn = {picture.name: picture for picture in draw(OF_A_RUN, Results(run))}
    assert "sequence" not in drawn and {"matrix", "tasks"} <= drawn.keys()
    svg = drawn["tasks"].svg
    assert all(f">{name}</text>" in svg for name in ("percent", "bleu", "mae, lower is better"))
    assert ">45.0</text>" in drawn["matrix"].svg and ">4500.0</text>" not in drawn["matrix"].svg
    values = [row["value"] for row in csv.DictReader(io.StringIO((run.path / "scores.csv").read_text()))]
    assert list(map(float, values)) == MIXED[~np.isnan(MIXED)].tolist(), "as the metrics give them"


def test_arrows_and_colours_say_better_and_worse(make):
    run = run_of_errors(make, t0=(9.0, 3.0, 6.0), t1=(9.0, None, 3.0))
    _, text, page = report_of(run)
    learned, since = rows_of(section(text, "Learning and forgetting"))["t0"][4:6]
    assert float(learned.split()[0]) == pytest.approx(6, abs=0.2) and learned.endswith("↑")
    assert float(since.split()[0]) == pytest.approx(-3, abs=0.2) and since.endswith("↓")
    assert f'<td class="number up">{learned}' in page and f'<td class="number down">{since}' in page
    assert re.search(r'<td class="q\d+" title="95 % interval 6.\d\d to 6.\d\d">6.\d\d ↓</td>', page), "more errors"
    bwt = Results(run).sequence["BWT"][1]
    assert bwt.sign == -1 and bwt.low < -2
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert embedded["units"] == [[1, -1, "mae"]] * 2 and embedded["binary"] == [False, False]
    run = make(np.full((2, 1), NAN), tasks=["t0"], name="few")
    write_cell(run.stages[0], "t0", {"mae": np.array([5.0, 5, 5])}, **MAE)
    write_cell(run.stages[1], "t0", {"mae": np.array([1.0, 5, 9])}, **MAE)
    results = Results(run)
    rows = json.loads(embed(results, read_answers(results)).json)["rows"]
    assert [row[1] for row in rows] == ["2", "0", "1"], "more errors come first, then fewer errors, then the same"


def test_external_checkpoints_are_compared_in_gains(make):
    run = run_of(make, TER[:3], ["ter", "bleu", "bleu"], checkpoints={"a": "/x/a", "b": "/x/b"})
    _, text, _ = report_of(run)
    assert rows_of(section(text, "Changes since the checkpoint before"))["2_b"][0] == "-15.0"
    assert "In points" not in text and "There is no mean" not in text, "of such a run no mean is taken at all"


# -------------------------------------------------------------------------------------------------------- comparisons


def test_comparisons_use_the_unit(make, tmp_path):
    better = TER.copy()
    better[3] = [50, 45, 11]
    runs = [run_of(make, TER, ["ter"] * 3), run_of(make, better, ["ter"] * 3, name="better")]
    first, finals, notes, lines = compared(runs)
    at = first["run"].index
    assert [first["mine"][at(n)] for n in ("OP", "BWT", "base")] == ["41.7", "-17.5", "80.0"]
    assert finals["run"] == [f"t{i}<br>ter, lower is better" for i in range(3)]
    assert finals["better"] == ["50.0", "45.0", "11.0"]
    assert "t0 ter, lower is better & t1" in compare(runs).latex()
    assert "`mine`, `better` ter, lower is better" in notes
    assert float(lines["mine"]["OP"]) == pytest.approx(125 / 3) and float(lines["mine"]["t0"]) == 60
    assert lines["better"]["unit of OP"] == "ter, lower is better"
    _, versus = differences(runs)
    assert versus["better"]["OP"] == "+6.3" and versus["better"]["BWT"] == "+5.0", "fewer errors are better"
    write_comparison(runs, tmp_path / "page.html")
    assert re.search(r'<td class="q18">11.0</td>', (tmp_path / "page.html").read_text())
    assert ">OP (ter, lower is better)</text>" in (tmp_path / "page-figures" / "runs.svg").read_text()
    paired = [run_of_errors(make, name=name, t0=(error, error)) for name, error in (("one", 5.0), ("two", 2.0))]
    assert re.fullmatch(r"\+\d\.\d\d \[\+2\.\d\d, \+3\.\d\d\]", differences(paired)[1]["two"]["OP"])


def test_runs_of_different_units_have_no_difference(make, tmp_path):
    mixed = run_of(make, TER / 100, ["accuracy", "bleu", "ter"], name="mixed")
    percent = run_of(make, TER / 100, ["accuracy"] * 3, name="percent")
    first, _, notes, lines = compared([mixed, percent])
    at = first["run"].index
    assert first["mixed"][at("OP")] == DASH and first["percent"][at("OP")] == "41.7"
    assert first["mixed"][at("base")] == DASH and lines["mixed"]["OP"] == ""
    assert "`mixed` different units; `percent` percent" in notes
    assert all(math.isnan(v.value) for v in compare([mixed, percent]).versus["percent"].values())
    for ending in ("tex", "html"):
        write_comparison([mixed, percent], tmp_path / f"c.{ending}")
    # Runs agree on whether a score is a fraction.
    many = run_of(make, TER, ["accuracy"] * 3, name="many")
    for file in many.path.glob("stages/*/eval/*.json"):
        write_json(file, read_json(file) | {"scale": {"accuracy": None}})
    _, finals, _, _ = compared([percent, many])
    assert finals["percent"] == ["0.600", "0.450", "0.200"] and finals["many"] == ["60.0", "45.0", "20.0"]


def test_means_over_seeds_use_the_unit(make):
    runs = [run_of(make, TER / 1000 + k / 1000, ["mae"] * 3, name=f"s{k}", seed=k) for k in range(2)]
    methods, *_, finals, _, _ = compare(runs).tables
    means = dict(zip(methods.header, methods.rows[0], strict=True))
    assert means["OP"].startswith("0.0422 ± 0.000707 [") and finals.rows[0][1] == "0.0605 ± 0.000707"


# --------------------------------------------------------------------------------------------------------- evaluation

FUNCTIONS = """
def lengths(doc, results):
    return {"own_error": 0.5 + len(results[0]), "own_share": 0.5}

def several(references, predictions):
    return {"one": 0.25, "two": 0.75}
"""
LENGTHS = "process_results: !function own.lengths\nmetric_list: [{metric: own_error, aggregation: "
SHARE = "{metric: own_share, aggregation: mean, higher_is_better: true}]"
OWN = {
    "t_ter": "metric_list: [{metric: ter}, {metric: bleu}, {metric: chrf}, {metric: exact_match}]",
    "t_error": f"{LENGTHS}median, higher_is_better: false}}, {SHARE}",
    "t_several": "metric_list: [{metric: !function own.several, aggregation: mean, higher_is_better: false}]",
    "t_unknown": f"{LENGTHS}mean}}, {SHARE}",
}


def test_cells_record_the_unit_and_direction_of_their_scores(tiny_model, tmp_path, monkeypatch):
    rows, folder = [{"q": f"row {i}: ", "a": f"the answer of row {i}"} for i in range(3)], tmp_path / "tasks"
    for name, metrics in OWN.items():
        write_task(folder, name, rows, f"metadata: {{version: 1.0}}\n{metrics}")
    (folder / "own.py").write_text(FUNCTIONS)
    monkeypatch.setenv("TRACE_TASKS", str(folder))
    with pytest.raises(data.DataError, match=r"t_unknown .* own_error .*higher_is_better: true or false"):
        evaluate.external_run(tmp_path / "r", {}, model=str(tiny_model), tasks=["t_unknown"], settings={})
    assert not (tmp_path / "r").exists()

    tasks = ["t_ter", "t_error", "t_several"]
    run = evaluate.external_run(tmp_path / "run", {}, model=str(tiny_model), tasks=tasks, settings={"backend": "hf"})
    assert evaluate.evaluate(run, likelihood=False) == 3
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
    assert f"| 0_base | {ter['metrics']['ter']['value']:.1f} |" in report_of(run)[1]
    # A metric that is computed from all rows together has no score if rows are left out.
    seen = replace(run, left_out={"t_ter": {0}, "t_error": {0}})
    report_of(seen)
    assert np.isnan(Results(seen).R[0, 0])


def test_only_means_have_a_standard_error():
    assert standard_error([1.0, 2.0, 6.0], 3.0) == pytest.approx((7 / 3) ** 0.5)
    assert standard_error([1.0, 2.0, 6.0], 2.0) is None, "a median"
    assert standard_error([(0, 1), (1, 1)], 0.5) is None


def test_reports_of_trace_are_the_same_with_and_without_recorded_units(demo_data, tmp_path):
    tasks = load_tasks([*data.FOLDERS, *data.REASONING])
    assert all(better is True for task in tasks.values() for better in task.higher_is_better().values())
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
        # A page names the files that it was made of by their fingerprint.
        made_of = re.compile(rb'name="made-of" content="\w+"')
        texts.append({p.relative_to(folder): made_of.sub(b"", p.read_bytes()) for p in files})
        folder.rename(tmp_path / f"runs-{known}")
    assert texts[0] == texts[1]
