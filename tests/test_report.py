"""Tests of `trace_bench.report` on runs written by hand: numbers, missing cells, intervals, bounds."""

import csv
import os
import re
import subprocess
import sys
from html import unescape

import numpy as np
import pytest
from made_runs import ICL, JOINT, NAN, SINGLE, TASKS, R, cell, make_rich_run, without
from markdown_it import MarkdownIt

from trace_bench import metrics
from trace_bench.cli import main
from trace_bench.judgements import judge_file, sample_fingerprints
from trace_bench.report import compare, write_report
from trace_bench.report.tables import DASH, Table, latex_text, markdown
from trace_bench.run import Run, read_json
from trace_bench.text import cell as csv_cell
from trace_bench.text import markdown_text, one_line
from trace_tasks.data.files import write_json, write_jsonl


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    """Writes no page: test_html tests it and its figures, and drawing them for all tests would take a minute."""
    monkeypatch.setattr("trace_bench.report.write.write_page", lambda *_, **__: None)


PERCENT = [["10.0", "20.0", "30.0"], ["80.0", DASH, DASH], ["60.0", "90.0", DASH], ["70.0", "0.0", "50.0"]]


def text(run):
    return (run.path / "report.md").read_text(encoding="utf-8")


def table(run, heading, number=1):
    """The rows of a table below a heading (the first by default): first cell -> the other cells."""
    section = "\n" + text(run).split(f"{heading}\n", 1)[1]
    below = section.split("\n\n| ", number)[number].split("\n\n", 1)[0]
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in below.splitlines()]
    return {first: rest for first, *rest in rows}


def test_the_report_tells_how_far_the_engine_is_from_the_trainer(make):
    run = make()
    write_report(run)
    assert "nats per token" not in text(run), "older runs have no such number"
    files = [run.stages[i].eval_file(task) for i, task in ((0, TASKS[0]), (2, TASKS[0]), (2, TASKS[1]))]
    for file, difference in zip(files, (0.000002, 0.0184, 0.003), strict=True):
        write_json(file, read_json(file) | {"from_training": difference})
    write_report(run)
    assert "and by the trainer: at most 0.018 nats per token apart, compared in 2 of 4 stages" in text(run)
    assert "by transformers" not in text(run)
    write_json(files[0], read_json(files[0]) | {"from_transformers": 0.0})
    write_report(run)
    assert "and by transformers: at most 0 nats per token apart, compared in 1 of 4 stages" in text(run)


def test_the_report_has_the_matrix_and_numbers_worked_by_hand(make, as_the_paper):
    run = make()
    assert write_report(run).endswith("report.md: 9 cells of 9; OP_3 40.0, BWT_3 -50.0")
    rows = table(run, "## Scores")
    assert [rows[s.name] for s in run.stages] == PERCENT
    assert rows["stage"] == ["C-STANCE<br>accuracy", "FOMC<br>accuracy", "MeetingBank<br>rouge_l"]
    # OP_t, BWT_t and forgetting_t, worked by hand
    rows = table(run, "## Scores", 2)
    assert rows["stage"] == ["OP_t", "BWT_t", "Forgetting_t"] and "0_base" not in rows
    assert rows["1_trace_cstance"] == ["80.0", DASH, DASH]
    assert rows["2_trace_fomc"] == ["75.0", "-20.0", "20.0"]  # (60 + 90) / 2; 60 - 80
    assert rows["3_trace_meetingbank"] == ["40.0", "-50.0", "50.0"]  # 120 / 3; (-10 - 90) / 2
    top = table(run, "# mine")
    assert (top["OP_3"][0], top["BWT_3"][0], top["Forgetting_3"][0]) == ("40.0", "-50.0", "50.0")
    assert "divided by t-1" in top["BWT_3"][1] and top["FWT"][0] == DASH  # it needs cells that are not measured
    rows = table(run, "## Learning and forgetting")
    assert rows["task"] == ["base", "own stage", "stage 3", "learned", "since then", "in all"]
    assert rows["C-STANCE"] == ["10.0", "80.0", "70.0", "+70.0", "-10.0", "+60.0"]
    assert rows["FOMC"] == ["20.0", "90.0", "0.0", "+70.0", "-90.0", "-20.0"]
    assert rows["MeetingBank"] == ["30.0", "50.0", "50.0", "+20.0", DASH, "+20.0"]
    assert "[" not in "".join(text(run).split("## Bounds")[0]), "without samples there is no interval"
    rows = table(run, "### Form-tolerant accuracy")
    assert rows["stage"] == ["C-STANCE", "FOMC"] and rows["3_trace_meetingbank"] == ["85.0", "50.0"]
    rows = table(run, "## The paper's numbers for this method (LoraSeqFT)")
    assert rows["model"] == ["train rows", "epochs", "OP", "BWT", "general", "instruction", "safety"]
    assert rows["LLaMA-2-7B-Chat"] == ["5000", "5,3,7,5,3,5,5,7", "12.7", "-45.7", "-7.0", DASH, DASH]
    assert rows["LLaMA-2-13B-Chat"][4:] == ["-7.8", "-91.0", "-14.0"]  # won 3 and lost 94; 0 and 14
    assert not any(words in text(run) for words in ("extracted", "Limited rows", "Demo data"))
    with (run.path / "scores.csv").open(encoding="utf-8", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["stage", "task", "metric", "value", "stderr", "n", "n_unscored", "low", "high"]
    assert rows[0] == ["0_base", "trace_cstance", "accuracy", "0.1", "0.01", "100", "0", "", ""]
    assert ["3_trace_meetingbank", "trace_fomc", "accuracy", "0.0", "0.01", "100", "0", "", ""] in rows
    assert ["1_trace_cstance", "trace_cstance", "accuracy_tolerant", "0.9", "", "100", "0", "", ""] in rows
    assert len(rows) == 9 + 7  # 9 cells, 7 of them with a second metric


def test_missing_cells_never_count_as_0(make):
    run = make(without((3, 1), (0, 2)))
    assert "OP_2 75.0, BWT_2 -20.0" in write_report(run)
    assert "OP_3" not in text(run)
    rows, by_stage = table(run, "## Scores"), table(run, "## Scores", 2)
    assert rows["3_trace_meetingbank"] == ["70.0", DASH, "50.0"] and rows["0_base"] == ["10.0", "20.0", DASH]
    assert by_stage["3_trace_meetingbank"] == [DASH, DASH, DASH]
    assert "0.0" not in [c for row in [*rows.values(), *by_stage.values()] for c in row]
    last = table(run, "## Learning and forgetting")
    assert last["task"][2] == "stage 2" and last["MeetingBank"] == [DASH, "50.0", DASH, DASH, DASH, DASH]
    run = make(np.full((4, 3), NAN), name="nothing")
    assert write_report(run).endswith("0 cells of 9")
    rows = table(run, "## Scores")
    assert {c for s in run.stages for c in rows[s.name]} == {DASH} and "OP_3" not in text(run)


def test_failed_scores_and_scores_of_an_older_checkpoint_are_missing(make):
    run = make()
    write_json(run.stages[3].eval_file(TASKS[2]), cell(run.stages[3], TASKS[2], None))
    # The stage was trained again but not yet evaluated again.
    write_json(run.stages[2].eval_file(TASKS[0]), cell(run.stages[2], TASKS[0], 0.6, "weights before"))
    write_report(run)
    rows = table(run, "## Scores")
    assert rows["3_trace_meetingbank"][2] == DASH and rows["2_trace_fomc"][:3] == [DASH, "90.0", DASH]
    assert table(run, "## Scores", 2)["3_trace_meetingbank"] == [DASH, "-50.0", DASH], "BWT needs neither of them"


def test_demo_data_and_limited_rows_are_announced(make):
    for name, config, note in (
        ("test", {"test_rows": 24, "train_rows": None}, "**Limited rows** (test rows: first 24 of each task)"),
        ("both", {"test_rows": 5, "train_rows": 64}, "(train rows: first 64 of each task, test rows: first 5 of"),
    ):
        run = make(name=name, config=config, demo=True)
        write_report(run)
        assert note in text(run) and "> **Demo data.**" in text(run)


# ---------------------------------------------------------------------------------------------------------- intervals


def right(*counts, n=40):
    """0/1 rows with a column for each stage. The first `count` rows are right, so stages correlate. None = NaN."""
    columns = [np.full(n, NAN) if c is None else (np.arange(n) < c).astype(float) for c in counts]
    return np.stack(columns, axis=1)


@pytest.fixture
def measured(make):
    """40 rows per task. C-STANCE loses 30 right rows and regains 26; its tolerant score loses 10. FOMC loses 2 rows."""
    strict = right(4, 36, 6, 32)
    return make(
        rows={
            TASKS[0]: {"accuracy": strict, "accuracy_tolerant": np.maximum(strict, right(4, 36, 26, 34))},
            TASKS[1]: {"accuracy": right(0, None, 22, 20)},
            TASKS[2]: {"rouge_l": np.random.default_rng(0).random((40, 1)) * [[0.2, NAN, NAN, 1.0]]},
        }
    )


def test_op_and_bwt_have_intervals_and_certain_changes_an_arrow(measured):
    assert ", BWT_3 -7.5" in write_report(measured)
    rows = table(measured, "## Scores")
    assert [rows[s.name][:2] for s in measured.stages] == [
        ["10.0", "0.0"],
        ["90.0", DASH],
        ["15.0 ↓", "55.0"],
        ["80.0", "50.0"],  # only four or two rows are lost, so no change is certain
    ]
    rows = table(measured, "## Learning and forgetting")
    assert rows["C-STANCE"][3].startswith("+80.0 [") and rows["C-STANCE"][3].endswith("] ↑")
    assert rows["C-STANCE"][4].startswith("-10.0 [") and rows["C-STANCE"][4].endswith("]")
    assert rows["MeetingBank"][3].endswith("] ↑") and rows["MeetingBank"][4] == DASH
    assert text(measured).count("Arrows are corrected") == 2 and "Intervals are not corrected" in text(measured)
    top = table(measured, "# mine")

    def bounds(cell):
        value, low, high = map(float, cell.replace("[", "").replace("]", "").replace(",", "").split())
        return low, value, high

    low, op, high = bounds(top["OP_3"][0])
    assert low < op < high and 4 < high - low < 20
    low, bwt, high = bounds(top["BWT_3"][0])
    assert low < bwt == -7.5 < high and 8 < high - low < 25
    assert top["Forgetting_3"][0] == "7.5" and "biased" in top["Forgetting_3"][1]
    low, _, high = bounds(top["mean OP_t"][0])
    assert low < high
    assert top["FWT"][0] == DASH and "training seeds" in text(measured)
    with (measured.path / "scores.csv").open(encoding="utf-8", newline="") as f:
        rows = {(r["stage"], r["task"], r["metric"]): r for r in csv.DictReader(f)}
    row = rows["1_trace_cstance", "trace_cstance", "accuracy"]
    assert (float(row["low"]), float(row["high"])) == pytest.approx(metrics.wilson_interval(36, 40))
    row = rows["3_trace_meetingbank", "trace_meetingbank", "rouge_l"]
    assert float(row["low"]) < float(row["value"]) < float(row["high"])


def test_the_loss_is_divided_into_form_and_knowledge(measured):
    measured.stages[3].eval_file(TASKS[1]).unlink()
    measured.stages[3].eval_file(TASKS[2]).unlink()
    write_report(measured)  # the last complete stage is 2, where C-STANCE lost 30 rows, 20 of them only in form
    assert "from its own stage to stage 2" in text(measured)
    rows = table(measured, "### Form or knowledge")
    assert list(rows) == ["task", "---", "C-STANCE"] and rows["C-STANCE"][2] == "67 %"
    lost, form, _, knowledge = rows["C-STANCE"]
    assert lost.startswith("75.0 [") and form.startswith("50.0 [") and knowledge.startswith("25.0 [")


def test_a_share_above_100_percent_is_explained(make):
    lost, gained = right(2, 30, 30, 10), right(2, 30, 30, 40)
    run = make(rows={task: {"accuracy": lost, "accuracy_tolerant": gained} for task in TASKS})
    write_report(run)
    assert table(run, "### Form or knowledge")["C-STANCE"][2] == "150 %" and "A share above 100 %" in text(run)


def test_a_run_without_a_sequence_and_tolerant_accuracy_has_intervals(make):
    rows = {task: {"accuracy": right(2, 30, 30, 30)} for task in TASKS}
    run = make(name="a-single", method="single", rows=rows)
    write_report(run)
    assert table(run, "# a-single")["mean of the tasks"][0].startswith("75.0 [") and "### Form" not in text(run)
    assert table(run, "## Learning")["FOMC"][2].endswith("] ↑")


def test_external_checkpoints_get_op_and_bwt_only_if_named_like_all_tasks_in_order(make):
    run = make(R[:3], checkpoints={"mine": "a", "theirs": "b"})
    assert "OP" not in write_report(run).replace(str(run.path), "")
    assert "OP_" not in text(run) and "BWT" not in text(run)
    assert "\n- 2_theirs: `b`, fingerprint `weights 2`\n" in text(run)
    assert [table(run, "## Scores")[s.name] for s in run.stages] == PERCENT[:3]
    assert "OP_3 40.0, BWT_3 -50.0" in write_report(make(name="all", checkpoints=dict.fromkeys(TASKS, "a")))


def test_the_report_has_the_cost_of_each_stage_and_the_total(make):
    run = make_rich_run(make, n=5)
    write_report(run)
    rows = table(run, "## Cost")
    heads = ["rows", "steps", "tokens", "train s", "tokens/s", "peak GiB", "evaluation s", "judge tokens"]
    assert rows["stage"] == heads and len(rows) == 12
    assert rows["0_base"] == [*[DASH] * 6, rows["0_base"][6], "18,120"]
    assert rows["1_trace_cstance"][:6] == ["176", "22", "33,000", "55", "500", "1.0 (process)"]
    steps = [20 + 2 * t for t in range(1, 9)]
    assert rows["in all"][:6] == [*(f"{k * sum(steps):,.0f}" for k in (8, 1, 1500, 2.5)), DASH, DASH]
    assert rows["in all"][7] == f"{9 * 18120:,}"
    run = make(name="untrained", method="icl", stages=[])
    write_report(run)
    assert table(run, "## Cost")["stage"] == ["evaluation s"]


def test_the_report_takes_seconds_and_loads_neither_engine_nor_evaluation(make):
    run = make()
    code = """
import sys
from trace_bench.report import write_report
from trace_bench.run import Run, read_json
write_report(Run.open(sys.argv[1]))
heavy = {'torch', 'lm_eval', 'transformers', 'vllm', 'datasets'}
above = {'trace_bench.evaluate', 'trace_bench.engine', 'judges', 'trainers'}
loaded = {m for m in sys.modules if m in heavy or any(f'{m}.'.startswith(f'{name}.') for name in above)}
assert not loaded, loaded
"""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - before.children_user < 4, "it takes 1.5 s on two idle cores"
    assert table(run, "# mine")["OP_3"][0] == "40.0"


# -------------------------------------------------------------------------------- runs without a sequence, and bounds


def test_runs_without_a_sequence_have_a_mean_and_no_op_and_no_bwt(bounds):
    runs = bounds()
    for method, mean, words in (
        ("single", "80.0", "each task with its own model"),
        ("joint", "70.0", "one model, after stage 1_joint"),
        ("icl", "40.0", "with 6 demonstrations"),
    ):
        run = runs[method]
        assert write_report(run).endswith(f"; mean of the tasks {mean}")
        shown, explanation = table(run, f"# {run.path.name}")["mean of the tasks"]
        assert shown == mean and words in explanation
        assert "OP_" not in text(run) and "BWT_" not in text(run) and "## Bounds" not in text(run)
    assert table(runs["single"], "## Learning")["FOMC"] == ["20.0", "80.0", "+60.0"]
    assert table(runs["joint"], "## Learning")["MeetingBank"] == ["30.0", "90.0", "+60.0"]
    assert table(runs["single"], "## Scores")["2_trace_fomc"] == [DASH, "80.0", DASH]
    assert "nothing is trained" in text(runs["icl"]) and "## Learning" not in text(runs["icl"])


def bounded(run, others):
    write_report(run, others)
    return table(run, "## Bounds")


def test_bounds_are_the_comparable_runs_that_are_reported_with_it(make, bounds):
    others = bounds(tasks=TASKS[::-1])  # in a different order of the tasks
    run = make()
    rows = bounded(run, others.values())
    names = ["ICL, 6 demonstrations", "this run (stage 3)", "single (a model per task)", "joint (multi-task)"]
    assert list(rows) == ["model", "---", "base, zero-shot", *names]
    assert rows["model"] == ["C-STANCE", "FOMC", "MeetingBank", "mean"]
    assert rows["base, zero-shot"] == ["10.0", "20.0", "30.0", "20.0"]
    assert rows["this run (stage 3)"] == ["70.0", "0.0", "50.0", "40.0"]
    assert rows["single (a model per task)"] == ["70.0", "80.0", "90.0", "80.0"]
    assert rows["joint (multi-task)"] == ["90.0", "60.0", "60.0", "70.0"]
    assert rows["ICL, 6 demonstrations"] == ["50.0", "40.0", "30.0", "40.0"]
    assert "is missing" not in text(run) and "its training is another" not in text(run)
    # Runs that are not named are not searched for, and the report says how to make the missing ones.
    main(["report", str(run.path)])
    assert list(table(run, "## Bounds"))[2:] == ["base, zero-shot", "this run (stage 3)"]
    for method in ("icl", "single", "joint"):
        assert f"- {method} is missing: `trace-bench train {method} --like {run.path} --output_dir" in text(run)
    main(["report", str(run.path), str(others["joint"].path)])
    assert table(run, "## Bounds")["joint (multi-task)"][-1] == "70.0" and text(run).count("is missing") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "other/model", "revision": "main"}},
        {"tasks": [*TASKS[:2], "trace_py150"]},
        {"config": {"test_rows": 5}},
    ],
    ids=str,
)
def test_a_run_with_a_different_model_tasks_or_rows_is_no_bound(make, bounds, change):
    """These are examples; test_comparison has all settings that are compared."""
    run = make()
    assert len(bounded(run, bounds(**change).values())) == 4 and text(run).count("is missing") == 3


def test_icl_is_a_bound_with_any_prompt_length_but_not_without_demonstrations(make, bounds):
    run = make()
    bounded(run, bounds(config={"max_prompt_length": 64}).values())
    assert text(run).count("is missing") == 2 and "- icl: the run `an-icl`" in text(run)
    zero, three = (make(ICL, name=f"with-{n}", method="icl", stages=[], config={"num_fewshot": n}) for n in (0, 3))
    bounded(run, [zero])
    assert "- icl is missing" in text(run)
    assert bounded(run, [zero, three])["ICL, 3 demonstrations"][-1] == "40.0"


def test_a_bound_with_a_different_training_budget_is_marked_and_one_without_scores_missing(make, bounds):
    there = {"train_rows": 64, "epochs": [3, 2, 1], "num_train_epochs": 3.0, "chat_template": False}
    here = {"train_rows": 16, "epochs": [1, 2, 3], "num_train_epochs": 9.0}
    same = {"learning_rate": 0.1}
    others = list(bounds(config=there | same, tasks=TASKS[::-1]).values())
    run = make(config=here | same)
    bounded(run, others)
    assert "- icl: the run `an-icl`\n" in text(run)
    assert "- single: the run `a-single`; its training differs (there, here): train_rows 64, 16\n" in text(run)
    bounded(run, [*others, make(JOINT, name="b-joint", method="joint", stages=["joint"], config=here | same)])
    assert "- joint: the run `b-joint`\n" in text(run), "the one with the same training is taken"
    nothing = make(SINGLE * np.nan, name="c-single", method="single")
    part = make(np.array([[NAN, NAN, NAN], [0.5, NAN, 0.5]]), name="c-joint", method="joint", stages=["joint"])
    run = make(name="other")
    assert bounded(run, [nothing, part])["joint (multi-task)"] == ["50.0", DASH, "50.0", DASH]
    assert "- single is missing" in text(run), "it is not evaluated"
    assert write_report(nothing).endswith("0 cells of 9")
    assert table(nothing, "# c-single")["mean of the tasks"][0] == DASH


def test_answers_that_could_be_extracted_are_counted(make):
    run = make(metric={"extracted": {"value": 0.97, "stderr": None}})
    unknown = cell(run.stages[3], TASKS[0], 0.5) | {"n": 100}
    unknown["metrics"]["extracted"] = {"value": None, "stderr": None}
    write_json(run.stages[3].eval_file(TASKS[0]), unknown)
    write_report(run)
    rows = table(run, "### Answers that could be extracted")
    assert rows["stage"] == ["C-STANCE", "FOMC", "MeetingBank"]
    assert rows["0_base"] == ["97.0 (3)"] * 3
    assert rows["2_trace_fomc"] == ["97.0 (3)", "97.0 (3)", DASH]
    assert rows["3_trace_meetingbank"] == [DASH, "97.0 (3)", "97.0 (3)"]


# ------------------------------------------------------------------------------------------------- names from elsewhere

HOSTILE = [
    "![x](http://evil.example/a.png)",
    "[click](http://evil.example)",
    "<img src=http://evil.example/a.png>",
    "<script>alert(1)</script>",
    "a | b",
    "`code` ![x](http://evil.example)",
    "``` ![x](http://evil.example)",
    "a` <img src=x> `b",
    "\\<img src=x>",
    "\\![x](http://evil.example)",
    "**bold** _so_ ~~gone~~",
    "a\n\n# Heading\n\n![x](http://evil.example)",
    "a\n\n[x]: http://evil.example\n\n[x]",
    "<http://evil.example>",
    "&lt;img&gt; &#33;",
    "![x][y]\n[y]: http://evil.example",
    "$x$ \\(y\\)",
    "=1+1",
]


#: The texts that a report and a comparison contain.
TAGS = {
    *("h1", "h2", "h3", "p", "ul", "li", "blockquote", "code", "strong"),
    *("table", "thead", "tbody", "tr", "th", "td", "br"),
}


def rendered(markdown):
    """The tags and the text that a renderer with tables and automatic links makes from Markdown."""
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    return set(re.findall(r"<(\w+)", page)), unescape(re.sub(r"<[^>]+>", "", page))


@pytest.mark.parametrize("text", HOSTILE)
def test_names_in_a_run_are_only_text_in_a_report(make, text):
    tags, shown = rendered(markdown_text(f"The model {one_line(text)} of {text.splitlines()[0]}."))
    assert tags <= {"p", "code", "strong"}
    if not {"`", "*"} & set(text):
        assert " ".join(text.split()) in " ".join(shown.split())
    tags, shown = rendered(markdown(Table(["head", f"{text}<br>second"], [[text, "1.0 [0.5, 1.5]"]], apart=0)))
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "code", "strong", "br"}
    assert "1.0 [0.5, 1.5]" in shown

    name = text.replace("/", ":")
    task = " ".join(name.split())
    tasks = [*TASKS[:2], task]
    run = make(
        name=name, method=text, model={"name": text, "revision": text}, tasks=tasks, packages={text: text},
        config={"epochs": text, "chat_template_args": {text: text}, "max_prompt_length": text, "test_rows": text},
        task_versions=dict.fromkeys(tasks, text), metric={text: {"value": 0.5, "stderr": None}},
        data={"path": text, "demo": False, "fingerprint": dict.fromkeys(tasks, text)},
    )  # fmt: skip
    for index, suite in ((0, "instruct_x"), (1, "instruct_x"), (1, f"instruct_{task}")):
        for stage in (run.stages[0], run.stages[index]):
            write_jsonl(stage.samples_file(suite), [])
        numbers = {
            **dict.fromkeys(("requests", "cut", "prompt_tokens", "completion_tokens"), 1),
            **dict.fromkeys(("failed", "forced", "unpaired", "unclosed"), 0),
            "settings": {"judge": text, "sampling": {text: text}, "prompts": text},
            "direct": {"n": 1, "unscored": 0, "answered": 1, "refused": 0, "rate": 0.0},
            "samples": sample_fingerprints(run.stages[0], run.stages[index], suite),
            "limit": None,
            "models": {text: 1, f"{text} again": 1},
        }
        write_json(judge_file(run.stages[index], suite), numbers)
    write_report(run)
    comparison = compare([run, make(name="other", method="ewc")])
    assert "\n\n\n" not in comparison.latex() and "\\input" not in comparison.latex()
    for made in (run.path.joinpath("report.md").read_text(), comparison.markdown()):
        tags, shown = rendered(made)
        assert tags <= TAGS
        assert not text.isprintable() or {"`", "*"} & set(text) or text in shown


def test_line_breaks_in_a_manifest_break_no_line_of_the_report_and_the_page(make, monkeypatch):
    monkeypatch.undo()  # this time with the page
    broken = "lora\n\n# PWNED\r\u2028## PWNED"
    run = make(
        method=broken,
        model={"name": broken, "revision": broken},
        config={"chat_template_args": {broken: broken}, broken: broken},
        data={"path": broken, "demo": False, "fingerprint": dict.fromkeys(TASKS, broken)},
        task_versions=dict.fromkeys(TASKS, broken),
    )
    content = read_json(run.path / "manifest.json")
    write_json(run.path / "manifest.json", content | {"packages": {broken: broken}, "commit": broken})
    run = Run.open(run.path)
    write_report(run)
    lines = [line for line in text(run).splitlines() if "PWNED" in line]
    assert len(lines) == 7 and not [line for line in lines if line.startswith("#")]
    assert all(line.count("lora  # PWNED  ## PWNED") == line.count("lora") for line in lines)
    page = (run.path / "report.html").read_text()
    assert "PWNED" in page and not [h for h in re.findall(r"<h\d.*?</h\d>", page, re.DOTALL) if "PWNED" in h]


def test_addresses_in_names_do_not_become_links():
    assert markdown_text("see http://evil.example or www.evil.example") == (
        "see http\\://evil.example or www\\.evil.example"
    )
    assert markdown_text("`http://a` OP_8, 1_trace_fomc [1.0, 2.0] **Bold**") == (
        "`http://a` OP_8, 1_trace_fomc [1.0, 2.0] **Bold**"
    ), "what is harmless stays readable"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "＝1", "\n=1"])
def test_texts_in_csv_files_are_no_formulas(make, text):
    assert csv_cell(text) == f"'{text}" and csv_cell(f"a{text}") == f"a{text}"
    assert csv_cell(-1.5) == -1.5 and csv_cell(None) is None
    if not text.isprintable():
        return  # no name of a task
    run = make(tasks=[text], matrix=np.array([[0.5], [0.7]]), metric={text: {"value": 0.25, "stderr": None}})
    write_report(run)
    with (run.path / "scores.csv").open(newline="") as f:
        rows = list(csv.reader(f))[1:]
    assert {row[1] for row in rows} == {f"'{text}"} and f"'{text}" in {row[2] for row in rows}
    assert "0.25" in {row[3] for row in rows}, "numbers are numbers"


def test_texts_are_escaped_in_latex():
    assert latex_text("\\ { } $ & # ^ _ ~ %") == (
        r"\textbackslash{} \{ \} \$ \& \# \textasciicircum{} \_ \textasciitilde{} \%"
    )
    assert latex_text("\\input{/etc/passwd}\n\nx ^^5cinput \x1b") == (
        r"\textbackslash{}input\{/etc/passwd\}  x \textasciicircum{}\textasciicircum{}5cinput \textbackslash{}x1b"
    )
