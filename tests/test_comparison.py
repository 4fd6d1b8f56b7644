"""Tests of comparisons on runs written by hand: numbers, differences, seeds, warnings, formats."""

import csv
import io
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import TASKS, R, cell, make_rich_run, verdict_row, without, write_cell
from scipy.stats import ttest_ind

from trace_bench.cli import main
from trace_bench.judgements import judge_file, sample_fingerprints
from trace_bench.measures.seeds import seed_difference
from trace_bench.metrics import Estimate, mean_of, net_interval
from trace_bench.report import DASH, compare, write, write_comparison, write_report, write_reports
from trace_bench.report.seeds import marks_of
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_tasks.data import ORDERS
from trace_tasks.data.files import write_json, write_jsonl


def rows_of(table):
    """First cell of a row -> head of a column -> the cell."""
    return {name: dict(zip(table.header[1:], rest, strict=True)) for name, *rest in table.rows}


def table_of(comparison, title):
    """The first table whose title begins with this text."""
    return next(t for t in comparison.tables if t.title.startswith(title))


def lines_of(comparison):
    """First cell -> row of the CSV."""
    return {row["run"]: row for row in csv.DictReader(io.StringIO(comparison.csv()))}


def compared(runs, baseline=None):
    """The tables of runs and of final scores, the notes, and the CSV; rows are found by their first cell."""
    comparison = compare(runs, baseline)
    rows = {t.title: {name: list(rest) for name, *rest in (t.header, *t.rows)} for t in comparison.tables}
    first, finals = rows["Runs"], rows.get("Final score of each task, run by run", rows["Final score of each task"])
    return first, finals, "\n".join([*comparison.warnings, *comparison.notes]), lines_of(comparison)


def differences(runs, baseline=None):
    """The table of differences; rows are found by their first cell."""
    table = table_of(compare(runs, baseline), "Difference to")
    return table.caption, rows_of(table)


def interval(text, value):
    """The ends of the interval after a value."""
    return tuple(map(float, text.removeprefix(f"{value} [").removesuffix("]").split(", ")))


def has_arrows(comparison):
    return any(c.endswith(("↑", "↓")) for table in comparison.tables for row in table.rows for c in row)


def test_a_comparison_has_one_row_per_run(make, bounds):
    runs = [make(config={"train_rows": 64}), *bounds().values()]
    first, second, notes, _ = compared(runs)
    # Settings that all runs share are left out, and so are settings that no run has.
    costs = ["training min", "evaluation min", "trained tokens"]
    assert first["run"] == ["method", "trains", "train rows", "OP", "BWT", "Forgetting", "base", *costs]
    assert compare(runs).tables[0].caption.endswith("(in all: tasks 3 (C-STANCE, FOMC, MeetingBank))")
    assert first["mine"] == ["sequential", "lora", "first 64", "40.0", "-50.0", "50.0", "20.0", "0.1", "0.2", "3,000"]
    assert first["a-single"] == ["single", "lora", "all", "80.0", DASH, DASH, "20.0", "0.1", "0.1", "3,000"]
    assert first["a-joint"] == ["joint", "lora", "all", "70.0", DASH, DASH, "20.0", "0.0", "0.1", "1,000"]
    # ICL trains nothing, so its cost is 0 and not unknown. Its base model has demonstrations: zero-shot is unknown.
    assert first["an-icl"] == ["icl", DASH, DASH, "40.0", DASH, DASH, DASH, "0.0", "0.1", "0"]
    assert second["run"] == ["C-STANCE", "FOMC", "MeetingBank"]
    assert second["mine"] == ["70.0", "0.0", "50.0"] and second["a-single"] == ["90.0", "80.0", "70.0"]
    assert "mean of the tasks, and BWT is not defined: `a-single`, `a-joint`, `an-icl`" in notes
    assert "Not comparable" not in notes and "Demo" not in notes and "Not complete" not in notes


def test_missing_values_are_a_dash_in_tables_and_empty_in_the_csv(make):
    runs = [make(), make(without((3, 1)), name="unfinished", seed=2)]
    first, second, notes, lines = compared(runs)
    over = rows_of(table_of(compare(runs), "Methods"))["mine and its seeds"]
    means = list(rows_of(table_of(compare(runs), "Final"))["mine and its seeds"].values())
    assert first["run"][:3] == ["OP", "BWT", "Forgetting"] and first["unfinished"][:3] == [DASH, DASH, DASH]
    assert second["unfinished"] == ["70.0", DASH, "50.0"]
    assert "OP" not in over and means == [f"70.0 ± {DASH}", DASH, f"50.0 ± {DASH}"]
    assert "Not complete, so numbers are missing: `unfinished`" in notes
    assert float(lines["mine"]["OP"]) == pytest.approx(40) and float(lines["mine"]["FOMC"]) == 0
    assert lines["unfinished"]["OP"] == lines["unfinished"]["FOMC"] == lines["unfinished"]["BWT"] == ""
    runs[1].stages[3].train_file.unlink()  # the cost is unknown if a stage is not trained
    first, _, _, lines = compared(runs[1:])
    assert "training min" not in first["run"] and lines["unfinished"]["trained tokens"] == ""


# ----------------------------------------------------------------------------------------------------- names of tasks


def test_reasoning_and_plain_tasks_share_a_column_unless_a_run_has_both(make):
    names = [t.replace("trace_", "reasoning_") for t in TASKS]
    data = {"path": "p", "demo": False, "fingerprint": dict.fromkeys(names, "f01")}
    rcl = make(name="rcl", method="rcl", tasks=names, data=data, task_versions=dict.fromkeys(names, 5))
    first, second, notes, _ = compared([make(), rcl])
    assert second["run"] == ["C-STANCE", "FOMC", "MeetingBank"] and second["rcl"] == second["mine"]
    assert first["run"][:2] == ["method", "tasks"]
    assert first["rcl"][1] == "3 (C-STANCE (R), FOMC (R), MeetingBank (R))"
    assert "in data of C-STANCE, data of FOMC, data of MeetingBank: `mine` against `rcl`" in notes
    assert "version" not in notes and "tasks" not in notes.replace("mean of the tasks", "")
    names = ["trace_fomc", "reasoning_fomc", "reasoning_py150"]
    both = make(name="both", tasks=names, data={"path": "p", "demo": False, "fingerprint": {}})
    assert compared([both])[1]["run"] == ["FOMC", "FOMC (R)", "Py150"]


def test_tasks_named_like_other_columns_keep_their_scores(make):
    tasks = ["trace_fomc", "FOMC", "OP"]
    run = make(tasks=tasks, data={"path": "p", "demo": False, "fingerprint": dict.fromkeys(tasks, "f")})
    _, finals, _, lines = compared([run])
    assert finals["run"] == ["task trace_fomc", "task FOMC", "task OP"] and finals["mine"] == ["70.0", "0.0", "50.0"]
    assert float(lines["mine"]["OP"]) == pytest.approx(40) and float(lines["mine"]["task OP"]) == 50


def test_tasks_that_a_run_lacks_are_missing_and_means_over_different_tasks_have_no_difference(make):
    runs = [make(), make(name="other", tasks=["trace_fomc", "trace_py150", "trace_cstance"])]
    _, second, notes, _ = compared(runs)
    assert second["run"] == ["C-STANCE", "FOMC", "MeetingBank", "Py150"]
    assert second["mine"] == ["70.0", "0.0", "50.0", DASH] and second["other"] == ["50.0", "70.0", DASH, "0.0"]
    assert "**Not comparable** in tasks" in notes
    assert not any(table.title.startswith("Difference") for table in compare(runs).tables)
    first, second, *_ = compared([make(R[:3], name="c", checkpoints={"mine": "a", "theirs": "b"})])
    assert first["run"] == ["method", "tasks", "base", "evaluation min"] and first["c"][2] == "20.0"
    assert second["c"] == ["60.0", "90.0", DASH], "checkpoints of unknown training have no OP and no cost"


def test_long_lists_of_tasks_are_shortened_orders_named_and_runs_of_one_name_told_apart(make, tmp_path):
    names = {"order2": ORDERS["order2"], "reasoning_order1": ORDERS["reasoning_order1"], "5": ORDERS["order1"][:5]}
    runs = [make(np.full((9, 8), 0.5), name=f"run-{n}", tasks=tasks) for n, tasks in names.items()]
    lines = compared(runs)[3]
    short = "5 (C-STANCE, FOMC, MeetingBank, …)"
    assert [lines[f"run-{n}"]["tasks"] for n in names] == ["8 (order2)", "8 (reasoning_order1)", short]
    copy = tmp_path / "elsewhere" / "run-5"
    write_json(copy / "manifest.json", read_json(runs[2].path / "manifest.json"))
    assert {str(runs[2].path), str(copy)} <= set(compared([runs[2], Run.open(copy)])[0])


# ------------------------------------------------------------------------------------------------------- comparability


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
            "data of FOMC: `mine` against `other`",
        ),
        ({"task_versions": {**dict.fromkeys(TASKS, 1), TASKS[1]: 2}}, "version of trace_fomc: 1 in `mine`; 2 in"),
        ({"config": {"train_rows": 3, "learning_rate": 1.0}}, None),
    ],
)
def test_reasons_why_runs_are_not_comparable_are_named(make, change, words):
    notes = compared([make(), make(name="other", **change)])[2]
    assert notes.count("Not comparable") == (words is not None)
    assert words is None or f"**Not comparable** in {words}" in notes


def test_backend_demo_data_and_limits_are_named(make):
    vllm = make(name="other", demo=True)
    for file in vllm.path.glob("stages/*/eval/*.json"):
        write_json(file, read_json(file) | {"settings": {"backend": "vllm"}})
    notes = compared([make(), vllm])[2]
    assert "in backend: hf in `mine`; vllm in `other`" in notes
    assert "**Demo data**, not comparable with TRACE: `other`" in notes
    limited = [make(name=f"limited{k}", config={"test_rows": 5}) for k in range(2)]
    notes = compared(limited)[2]
    assert "**Limited test rows**" in notes and "Not comparable" not in notes
    # Rows are left out of one of the runs.
    notes = compared([make(name="a", rows=learned(0.5, 0.5, 0.5)), make(name="b", rows=learned(0.5, 0.5, 0.5, n=30))])[
        2
    ]
    assert "rows of C-STANCE, rows of FOMC, rows of MeetingBank: 40 in `a`; 30 in `b`" in notes
    notes = compared([*(make(name=f"r{i}") for i in range(5)), limited[0]])[2]
    assert "test_rows: not set in all others; 5 in `limited0`" in notes


def test_different_memory_sizes_are_named(make):
    runs = [make(name="gem", method="gem"), make(name="replay", method="replay"), make()]

    def kept(run, **record):
        file = run.stages[-1].train_file
        write_json(file, {**read_json(file), **record})

    kept(runs[0], memory_rows={TASKS[0]: 256, TASKS[1]: 256})
    kept(runs[1], replayed={TASKS[0]: 50, TASKS[1]: 40, "alignment": 1030})
    [warning] = [w for w in compare(runs).warnings if "Unequal" in w]
    assert "rows kept of an earlier task: 256 in `gem`; 50 in `replay`." in warning
    kept(runs[1], replayed={TASKS[0]: 256, TASKS[1]: 256, "alignment": 1030})
    assert not [w for w in compare(runs).warnings if "Unequal" in w]
    more = make(name="agem", method="agem", config={"memory_rows": 64})
    assert "256 in `gem`, `replay`; 64 in `agem`" in "\n".join(compare([*runs, more]).warnings)
    # Another author's method may record something other than a number of rows.
    kept(runs[1], replayed={TASKS[0]: {"rows": 4}, TASKS[1]: {"rows": 4}})
    assert "256 in `gem`; 64 in `agem`" in "\n".join(compare([*runs, more]).warnings)


# --------------------------------------------------------------------------------------------------------------- forms


def test_report_compares_several_runs_and_writes_to_the_given_file(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trace_bench.report.write.write_page", lambda *_, **__: None)
    paths = [str(make().path), str(make(name="other").path)]
    comparison = compare([Run.open(p) for p in paths])
    for form, content in (("md", comparison.markdown()), ("csv", comparison.csv()), ("tex", comparison.latex())):
        file = tmp_path / form / f"summary.{form}"
        main(["report", *paths, f"{paths[1]}/.", "--output", str(file)])  # one run by two paths counts once
        assert capsys.readouterr().out == comparison.markdown()
        assert list(file.parent.iterdir()) == [file] and file.read_text(encoding="utf-8") == content
    for path in paths:
        assert {"report.md", "scores.csv"} <= {file.name for file in Run.open(path).path.iterdir()}
    main(["report", paths[0], "--baseline", paths[1]])
    assert "Difference to `other`, in points" in capsys.readouterr().out
    run = make(name="new")
    with pytest.raises(SystemExit) as e:
        main(["report", str(run.path), "--output", str(tmp_path / "summary.pdf")])
    assert "ends in .md, .csv, .tex, .html" in str(e.value.code) and not (run.path / "report.md").exists()


def test_the_latex_has_every_row_and_no_commands_from_names(make):
    runs = [make(name="100%_a&b", rows=learned(0.5, 0.5, 0.5)), make(name="[lower]$", rows=learned(0.1, 0.5, 0.5))]
    comparison = compare(runs)
    text = comparison.latex()
    assert text.count(r"\toprule") == len(comparison.tables) == text.count(r"\end{table}")
    assert r"100\%\_a\&b & " in text and r"{[}lower{]}\$ & " in text
    assert r"$-$13.3 {[}$-$" in text and r"\texttt{100\%\_a\&b}" in text
    for table, part in zip(comparison.tables, text.split(r"\toprule")[1:], strict=True):
        lines = [line for line in part.split(r"\bottomrule")[0].splitlines() if line.endswith(r" \\")]
        assert len(lines) == 1 + len(table.rows) and {line.count(" & ") for line in lines} == {len(table.header) - 1}
    assert "↓" not in text and "–" not in text and "**" not in text and "`" not in text


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "-1"])
def test_names_in_the_csv_are_no_formulas_and_numbers_stay_numbers(make, name):
    tasks = [*TASKS[:2], f"{name} task"]
    more = {"tasks": tasks, "task_versions": dict.fromkeys(tasks, 1), "method": name}
    rows = list(csv.reader(io.StringIO(compare([make(name=name.replace("/", ":"), **more), make(name="other")]).csv())))
    assert not [c for row in rows for c in row if c.startswith(("=", "+", "@"))]
    negative = [c for row in rows for c in row if c.startswith("-")]
    assert negative and all(float(c) < 0 for c in negative)
    assert f"'{name} task" in rows[0] and rows[1][0] == f"'{name.replace('/', ':')}" and rows[1][1] == f"'{name}"


def test_the_papers_numbers_are_separate_rows_below_the_runs(make, bounds, as_the_paper):
    comparison = compare([make(), *bounds().values()])
    table = comparison.tables[0]
    assert table.apart == 4 and not any(t.apart for t in comparison.tables[1:])
    rows = dict(list(rows_of(table).items())[-4:])
    assert list(rows) == ["paper: LoraSeqFT", "paper: SingleFT", "paper: MT", "paper: ICL-6shot"]
    assert rows["paper: LoraSeqFT"]["OP"] == "12.7" and rows["paper: LoraSeqFT"]["BWT"] == "-45.7"
    assert rows["paper: LoraSeqFT"]["base"] == DASH and "general" not in table.header, "no run has one"
    assert rows["paper: MT"]["OP"] == "52.3" and rows["paper: MT"]["BWT"] == DASH
    setup, lora = comparison.notes[-5:-3]
    assert "arXiv 2310.06762" in setup and "the numbers differ" in setup
    assert lora == "paper: LoraSeqFT: LLaMA-2-7B-Chat, training rows a task 5000, epochs 5,3,7,5,3,5,5,7."
    assert comparison.notes[-2] == "paper: MT: LLaMA-2-7B-Chat."
    line = next(row for row in comparison.lines if row["run"] == "paper: LoraSeqFT, LLaMA-2-7B-Chat")
    assert (line["OP"], line["BWT"], line["general"], line["train rows"]) == ("12.7", "-45.7", "-7.0", "5000")
    assert "| *paper: LoraSeqFT* |" in comparison.markdown() and "| mine |" in comparison.markdown()
    latex = comparison.latex()
    assert r"\textcolor{gray}{paper: LoraSeqFT}" in latex and latex.startswith(r"% \usepackage{booktabs,xcolor}")
    assert "paper" not in compare([make(name="ewc", method="ewc")]).markdown()


# ---------------------------------------------------------------------------------------------------------- a baseline


def learned(*rates, n=40):
    """Rows of three tasks with these final rates. The first rows are right, the same ones at every stage."""
    return {
        t: {"accuracy": (np.arange(n)[:, None] < [[rate * n] * 4]).astype(float)}
        for t, rate in zip(TASKS, rates, strict=True)
    }


def forgot(own, last, n=40, tasks=TASKS):
    """Rows of three tasks in sequence: `own` is how many are right at a task's own stage, `last` at later stages."""
    rows = {}
    for i, task in enumerate(tasks):
        right = np.array([0] * (i + 1) + [own] + [last[task]] * (3 - i - 1))
        rows[task] = {"accuracy": (np.arange(n)[:, None] < right).astype(float)}
    return rows


def test_differences_to_the_baseline_are_paired_over_equal_rows(make):
    runs = [
        make(rows=learned(0.5, 0.5, 0.5)),
        make(name="better", rows=learned(0.9, 0.6, 0.5), config={"learning_rate": 1.0}),
        make(name="others", rows=learned(0.9, 0.6, 0.5), data={"path": "p", "demo": False, "fingerprint": {}}),
        make(name="without samples"),
    ]
    title, rows = differences(runs)
    assert title == "Difference to `mine`, in points" and list(rows) == ["better", "others", "without samples"]
    low, high = interval(rows["better"]["OP"], "+16.7")
    assert 0 < low < 16.7 < high
    assert rows["others"]["OP"] == "+16.7", "other data: no pairs and no interval"
    assert rows["without samples"]["OP"] == "-10.0" and rows["without samples"]["BWT"] == "-50.0"
    first, finals, notes, lines = compared(runs)
    assert first["mine"][0].startswith("50.0 [") and "Differences are paired" in notes
    # 16 rows are won and none lost; this says nothing about other trainings
    assert finals["better"] == ["90.0", "60.0", "50.0"] and not has_arrows(compare(runs))
    assert "There are no arrows for differences of single runs" in notes and "here no two methods have them" in notes
    assert float(lines["better"]["OP difference low"]) == pytest.approx(low, abs=0.05)
    assert lines["mine"]["OP difference"] == "" and lines["others"]["OP difference low"] == ""
    # Both runs share their rows, so the interval of the difference is narrower than those of the runs.
    assert high - low < float(lines["mine"]["OP high"]) - float(lines["mine"]["OP low"])


def test_the_difference_in_bwt_is_paired_in_any_order(make):
    order = [TASKS[1], TASKS[0], TASKS[2]]
    little, much = dict.fromkeys(TASKS, 32), dict.fromkeys(TASKS, 12)
    runs = [
        make(rows=forgot(40, little)),
        make(name="forgot", rows=forgot(40, much)),
        make(name="ordered", tasks=order, rows=forgot(40, much, tasks=order)),
        make(name="lastly", tasks=TASKS[::-1], rows=forgot(40, much, tasks=TASKS[::-1])),
    ]
    _, rows = differences(runs)
    assert rows["forgot"]["BWT"] == rows["ordered"]["BWT"]
    low, high = interval(rows["forgot"]["BWT"], "-50.0")
    first, _, notes, lines = compared(runs)
    widths = [float(lines[run]["BWT high"]) - float(lines[run]["BWT low"]) for run in ("mine", "forgot")]
    assert high - low < np.hypot(*widths), "narrower than that of two runs on rows of their own"
    # A different task is the last one, which cannot be forgotten: BWT is a mean over different tasks.
    assert rows["lastly"]["BWT"] == "-50.0" and "In runs of different orders they may be" in notes
    bwt = dict(zip(first["run"], first["forgot"], strict=True))["BWT"]
    assert bwt.startswith("-70.0 [") and bwt.endswith("]")
    assert float(lines["ordered"]["BWT difference low"]) == pytest.approx(low, abs=0.05)


def test_the_difference_in_fwt_is_paired(make):
    """Before their training 20 of 40 rows of the second task and 30 of the third become right, or none."""
    ahead = {"trace_fomc": 20, "trace_meetingbank": 30}

    def rows(factor):
        right = {t: (np.arange(40) < factor * ahead.get(t, 0)).astype(float) for t in TASKS}
        return {t: {"accuracy": np.stack([np.zeros(40), *[right[t]] * 3], axis=1)} for t in TASKS}

    _, found = differences([make(rows=rows(0)), make(name="other", rows=rows(1))])
    one, two = (Estimate(n / 40, *net_interval(n, 0, 40)) for n in ahead.values())
    _, low, high = (100 * x for x in mean_of([one, two]))
    assert found["other"]["FWT"] == f"+62.5 [+{low:.1f}, +{high:.1f}]"


def test_the_baseline_is_the_first_or_the_named_run(make):
    runs = [make(), make(np.maximum(R - 0.1, 0), name="lower"), make(R / 2, name="half")]
    assert list(differences(runs)[1]) == ["lower", "half"]
    title, rows = differences(runs, runs[1])
    assert title == "Difference to `lower`, in points" and rows["mine"]["OP"] == "+6.7"
    assert differences(runs[:2], runs[2])[1]["mine"]["OP"] == "+20.0", "it need not be among the runs"
    # Conditions that differ only in the room for demonstrations are paired.
    icl = {t: {"accuracy": x["accuracy"][:, :1]} for t, x in learned(0.1, 0.1, 0.1).items()}
    config = {"num_fewshot": 6, "max_prompt_length": 512}
    shown = make(rows=icl, name="an-icl", method="icl", stages=[], config=config)
    assert differences([make(name="rows", rows=learned(0.9, 0.9, 0.9)), shown])[1]["an-icl"]["OP"].endswith("]")


# -------------------------------------------------------------------------------------------------------------- deltas


def suite(run, index, value, rows=None, data="hub", n=20):
    stage = run.stages[index]
    content = cell(stage, "general_mmlu", value, settings={"backend": "hf", "general_rows": rows, "data": data})
    content |= {"n": n, "version": "1.0", "n_cut": 0, "headline": "accuracy"}
    write_json(stage.eval_file("general_mmlu"), content)


def judged(run, win, lose, judge="a/judge", n=10, **more):
    stage, base = run.stages[-1], run.stages[0]
    for s in (base, stage):
        write_cell(s, "safety_cona", {"characters": np.ones(n)})
    counts = {"n": n, "win": win, "tie": n - win - lose, "lose": lose, "unscored": 0, "identical": 0}
    counts |= {"judged": n, "disagreements": 0, "first": win + lose, "second": win + lose}
    direct = {"n": n, "unscored": 0, "safe": n - 1, "unsafe": 1, "rate": 1 - 1 / n}
    numbers = {"settings": {"judge": judge, "sampling": {}, "prompts": 1}, "pairs": counts, "direct": direct}
    numbers |= {"samples": sample_fingerprints(base, stage, "safety_cona"), "limit": None, "failed": 0, "unpaired": 0}
    write_json(judge_file(stage, "safety_cona"), numbers | {"prompt_tokens": 1000, "completion_tokens": 500} | more)


@pytest.fixture
def with_deltas(make):
    runs = [make(), make(name="other")]
    for run, after in zip(runs, (0.4, 0.3), strict=True):
        suite(run, 0, 0.5)
        suite(run, 3, after)
        judged(run, 4, 1)
    return runs


def test_the_table_has_the_deltas_and_their_cost(with_deltas):
    first, _, notes, lines = compared(with_deltas)
    row = dict(zip(first["run"], first["mine"], strict=True))
    assert (row["general"], row["safety"], row["judge tokens"]) == ("-10.0", "+30.0 [-15.8, +65.8]", "1,500")
    assert "instruction" not in row and "Not comparable" not in notes and "net win rate" in notes
    _, rows = differences(with_deltas)
    assert (rows["other"]["general"], rows["other"]["safety"]) == ("-10.0", "+0.0")
    assert float(lines["other"]["general"]) == pytest.approx(-20)


@pytest.mark.parametrize(
    "change, words, delta",
    [
        (lambda run: suite(run, 3, 0.4, n=10), "rows of general_mmlu: 20 in `mine`; 10 in `other`", "general"),
        (lambda run: suite(run, 3, 0.4, data="f00"), "data of general_mmlu: `mine` against `other`", "general"),
        (lambda run: judged(run, 4, 1, "b/judge"), "judge of safety: ", "safety"),
        (lambda run: judged(run, 4, 1, models={"a/judge": 9, "june": 1}), "judge of safety: ", "safety"),
        (lambda run: other_prompts(run), "data of safety_cona: `mine` against `other`", "safety"),
    ],
    ids=["rows", "copy", "judge", "alias", "prompts"],
)
def test_deltas_with_different_settings_are_named_and_have_no_difference(with_deltas, change, words, delta):
    assert differences(with_deltas)[1]["other"][delta] != DASH
    change(with_deltas[1])
    notes = compared(with_deltas)[2]
    assert f"**Not comparable** in {words}" in notes
    assert delta not in differences(with_deltas)[1]["other"]
    assert ("**Local copies** of general suites" in notes) == ("data of general" in words)


def other_prompts(run):
    file = run.stages[-1].eval_file("safety_cona")
    write_json(file, {**read_json(file), "settings": {"backend": "hf", "data": "f01"}})


def test_differences_of_the_deltas_are_paired(make):
    n, runs = 60, [make(), make(name="other")]
    settings = {"backend": "hf", "general_rows": None, "data": "hub"}
    for run, after, lost in zip(runs, (20, 45), (2, 12), strict=True):
        for index, right in ((0, 50), (3, after)):
            columns, labels = {"accuracy": np.arange(n) < right}, ["a", "b"] * (n // 2)
            write_cell(run.stages[index], "general_mmlu", columns, labels, settings=settings, version="1.0")
        judged(run, 4, lost, n=20)
        results = ["lose" if i < lost else "win" if i >= 16 else "tie" for i in range(20)]
        rows = [verdict_row(i, result, "SAFE" if i else "UNSAFE") for i, result in enumerate(results)]
        write_jsonl(judge_file(run.stages[-1], "safety_cona").with_suffix(".jsonl"), rows)
    _, rows = differences(runs)
    assert rows["other"]["general"].startswith("+41.7 [") and rows["other"]["general"].endswith("]")
    assert rows["other"]["safety"].startswith("-50.0 [") and rows["other"]["safety"].endswith("]")
    line = compared(runs)[3]["other"]
    low, high = (float(line[f"safety difference {end}"]) for end in ("low", "high"))
    # Only one run lost 10 of 20 prompts.
    assert (low, high) == pytest.approx([100 * x for x in net_interval(0, 10, 20)])
    # Different tasks and training conditions do not matter here.
    manifest = runs[1].path / "manifest.json"
    write_json(manifest, {**read_json(manifest), "config": {"max_prompt_length": 64}})
    assert differences([runs[0], Run.open(runs[1].path)])[1]["other"]["safety"] == rows["other"]["safety"]
    # If the verdicts are on different rows, there is no paired difference.
    file = judge_file(runs[1].stages[-1], "safety_cona").with_suffix(".jsonl")
    write_jsonl(file, [{**line, "doc_id": line["doc_id"] + 1} for line in read_jsonl(file)])
    assert differences(runs)[1]["other"]["safety"] == "-50.0"


# --------------------------------------------------------------------------------------------- methods over their seeds


def seeded(make, name, finals, seeds=None, **options):
    """One run per seed, with these final scores in percent (one number = all tasks), learned in the own stage."""
    runs = []
    for seed, final in zip(seeds or range(len(finals)), finals, strict=True):
        matrix = R.copy()
        matrix[3] = np.broadcast_to(final, 3) / 100
        matrix[[1, 2, 3], [0, 1, 2]] = 0.9, 0.9, matrix[3, 2]
        manifest = {"method": name, "seed": seed, **options, "config": {"seed": seed, **options.get("config", {})}}
        runs.append(make(matrix, name=f"{name}-seed{seed}", **manifest))
    return runs


def over_seeds(comparison, title="Difference of seed means to"):
    table = table_of(comparison, title)
    return table.title, rows_of(table)


def test_runs_that_differ_only_by_seed_have_a_mean_and_a_deviation(make, as_the_paper):
    runs = [
        make(name="s1", config={"seed": 1}),
        make(R - np.array([0.1, 0.0, 0.2]), name="s2", seed=2, config={"seed": 2}),
        make(name="more", config={"seed": 1, "train_rows": 5}),
    ]
    first, second, notes, rows = compared(runs)
    assert list(first) == ["run", "s1", "s2", "more"]
    methods, finals = compare(runs).tables[0], table_of(compare(runs), "Final")
    assert methods.title == "Methods" and list(rows_of(methods)) == ["s1 and its seeds", "more", "paper: LoraSeqFT"]
    mean, single = rows_of(methods)["s1 and its seeds"], rows_of(methods)["more"]
    assert "single runs: score [95 % interval over test rows]" in methods.about
    assert (mean["seeds"], single["seeds"]) == ("2", "1") and single["OP"] == first["more"][first["run"].index("OP")]
    assert "Unequal budgets" in notes and "numbers of seeds: 2 in `s1 and its seeds`; 1 in `more`" in notes
    # OP: 40 and 30, so 35 ± 10 / sqrt(2); BWT does not change
    assert mean["train rows"] == first["s1"][0]
    # Two equal numbers give no estimate of the variance: neither ± 0.0 nor an interval without width.
    assert (mean["BWT"], mean["Forgetting"], mean["base"]) == (f"-50.0 ± {DASH}", f"50.0 ± {DASH}", "15.0 ± 7.1")
    # Student's t with one degree of freedom is 12.7, so two seeds give a wide interval: 35 ± 12.706 * 5
    assert mean["OP"] == "35.0 ± 7.1 [-28.5, 98.5]"
    assert list(rows_of(finals)["s1 and its seeds"].values()) == ["65.0 ± 7.1", f"0.0 ± {DASH}", "40.0 ± 14.1"]
    assert list(rows_of(finals)["more"].values()) == second["more"]
    assert "variance cannot be estimated" in notes
    assert "seeds are those of `s1`, `s2`" in notes and "single new training" in notes
    assert float(rows["s1 and its seeds: mean over 2 seeds"]["OP"]) == pytest.approx(35)
    assert float(rows["s1 and its seeds: standard deviation over 2 seeds"]["MeetingBank"]) == pytest.approx(
        14.142, abs=1e-3
    )
    assert float(rows["s1 and its seeds: high end of the 95 % interval over 2 seeds"]["OP"]) == pytest.approx(
        98.53, abs=0.01
    )
    again = compare([make(name="s3"), make(name="s4")])
    assert again.tables[0].title == "Runs", "the same seed twice is no deviation"


def test_methods_are_compared_over_their_seeds_paired_and_marked(make, tmp_path):
    runs = [*seeded(make, "sequential", [40, 41, 44]), *seeded(make, "replay", [60, 62, 63])]
    comparison = compare(runs)
    title, rows = over_seeds(comparison)
    # Differences 20, 21, 19: 20 ± 4.3027 / sqrt(3)
    assert title == "Difference of seed means to `sequential`" and list(rows) == ["replay"]
    assert rows["replay"]["OP"] == "+20.0 [+17.5, +22.5] ↑"
    finals, by_run = (t for t in comparison.tables if t.title.startswith("Final"))
    assert "worse or better than `sequential` over the seeds" in finals.about
    cells = {name: rest for name, *rest in finals.rows}
    assert cells["replay"] == ["61.7 ± 1.5 ↑"] * 3 and cells.keys() == {"sequential", "replay"}
    assert not [c for rest in (*by_run.rows, cells["sequential"]) for c in rest if "↑" in c]
    assert [t.title for t in comparison.tables if t.detail] == [
        "Runs",
        "Difference to `sequential-seed0`",
        by_run.title,
    ]
    notes = "\n".join(comparison.notes)
    assert "`replay` paired by seed" in notes and "Arrows are corrected" in notes and "Intervals are not" in notes
    low = lines_of(comparison)["low end of the 95 % interval, replay against sequential"]
    assert float(low["OP"]) == pytest.approx(17.516, abs=1e-3) == float(low["FOMC"])
    assert "+20.0 [+17.5, +22.5] ↑" in comparison.markdown()
    assert r"+20.0 {[}+17.5, +22.5{]} $\uparrow$" in comparison.latex() and "±" not in comparison.latex()
    write_comparison(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<details><summary>") == 3 and "<summary>6 runs</summary>" in page
    assert '<td class="number up">+20.0 [+17.5, +22.5] ↑</td>' in page and "<h2>Spread</h2>" in page
    assert (
        "There are no arrows for differences of single runs" in page and "Seeds that each of two methods needs" in page
    )


def test_different_seeds_are_compared_by_welchs_test_and_arrows_need_seeds_on_both_sides(make):
    sequential = seeded(make, "sequential", [40, 41, 44])
    comparison = compare([*sequential, *seeded(make, "replay", [60, 62, 63, 61], seeds=[1, 2, 3, 4])])
    low, high = ttest_ind([60, 62, 63, 61], [40, 41, 44], equal_var=False).confidence_interval()
    assert over_seeds(comparison)[1]["replay"]["OP"] == f"+19.8 [+{low:.1f}, +{high:.1f}] ↑"
    assert "`replay` Welch's, since the seeds differ" in "\n".join(comparison.notes)
    assert "**Unequal budgets**" in comparison.warnings[0]
    assert "numbers of seeds: 3 in `sequential`; 4 in `replay`" in comparison.warnings[0]
    lone = seeded(make, "lone", [80])
    alone = compare([*sequential, *lone], lone[0])
    assert not [t for t in alone.tables if "seed means" in t.title] and not has_arrows(alone)
    assert "here no two methods have them" in "\n".join(alone.notes)
    data = {"path": "p", "demo": False, "fingerprint": dict.fromkeys(TASKS, "f01")}
    comparison = compare([*sequential, *seeded(make, "ewc", [60, 62, 63], data=data)])
    assert over_seeds(comparison)[1]["ewc"]["OP"] == "+20.0 [+17.5, +22.5]"
    assert any("Not comparable" in w for w in comparison.warnings)
    # In a different order BWT is a mean over different tasks, which may explain a difference.
    turned = compare([*sequential, *seeded(make, "turned", [10, 12, 11], tasks=TASKS[::-1])])
    said = "in a different order or on different tasks than `sequential`: `turned`"
    assert said in "\n".join(turned.notes) and "in another order" not in "\n".join(comparison.notes)
    found = over_seeds(turned)[1]["turned"]
    assert found["BWT"] == "-30.7" and found["OP"].startswith("-30.7 [") and found["OP"].endswith("↓")


@pytest.mark.parametrize("seeds", [None, [7, 8]])
def test_seeds_with_equal_scores_get_no_interval_and_no_arrow(make, seeds):
    comparison = compare([*seeded(make, "sequential", [40, 40]), *seeded(make, "replay", [60, 60], seeds=seeds)])
    assert over_seeds(comparison)[1]["replay"]["OP"] == "+20.0" and not has_arrows(comparison)
    text = comparison.markdown() + comparison.latex() + comparison.csv()
    assert "± 0.0" not in text and "[60.0, 60.0]" not in text and "Seeds that each" not in text
    # Differences that are rounded to 0 get no interval without width either.
    assert "[40.0, 40.0]" not in compare(seeded(make, "ewc", [40, 40.0001])).markdown()


def test_methods_other_than_the_baseline_are_compared_with_each_other(make):
    runs = [*seeded(make, "a", [40, 41, 44]), *seeded(make, "b", [60, 62, 63]), *seeded(make, "c", [70, 71, 74])]
    title, rows = over_seeds(compare(runs), "Differences of seed means between")
    assert list(rows) == ["b against c"] and rows["b against c"]["OP"] == "-10.0 [-12.5, -7.5]"
    title, rows = over_seeds(compare(runs, runs[4]))
    assert title == "Difference of seed means to `b`" and list(rows) == ["a", "c"] and rows["a"]["OP"].endswith("↓")


def test_fewer_errors_over_seeds_are_a_gain(make):
    unit = {"higher_is_better": {"mae": False}, "scale": {"mae": None}}
    runs = []
    for name, errors in (("one", (5.0, 5.2, 5.3)), ("two", (2.1, 2.0, 2.4))):
        for seed, error in enumerate(errors):
            run = make(np.full((2, 1), np.nan), tasks=["t0"], name=f"{name}-seed{seed}", method=name, seed=seed)
            for stage in run.stages:
                write_cell(stage, "t0", {"mae": error + np.linspace(-0.1, 0.1, 30)}, **unit)
            runs.append(run)
    comparison = compare(runs)
    op = over_seeds(comparison)[1]["two"]["OP"]
    assert op.startswith("+3.00 [+2.5") and op.endswith("↑")
    assert "the 3.00 mae between the two best (`two`, `one`): 2 seeds" in "\n".join(comparison.notes)


def test_a_comparison_has_both_components_of_the_variance_and_the_needed_seeds(make):
    rates = (0.5, 0.6, 0.7)
    comparison = compare([make(name=f"x-seed{k}", rows=learned(r, 0.5, r), seed=k) for k, r in enumerate(rates)])
    _, rows = over_seeds(comparison, "Spread")
    assert rows["x: between seeds"] == {"OP": "6.7", "C-STANCE": "10.0", "FOMC": DASH, "MeetingBank": "10.0"}
    # For 40 rows: the root of the mean of p (1 - p) / 39 over the runs
    error = 100 * np.mean([p * (1 - p) / 39 for p in rates]) ** 0.5
    assert rows["x: test rows"]["C-STANCE"] == f"{error:.1f}" and rows["x: test rows"]["FOMC"] == "8.0"
    [line] = [note for note in comparison.notes if note.startswith("Seeds that each")]
    assert "standard deviation between seeds 6.7 points, 2 degrees of freedom): 2.0 points: 176 seeds." in line
    row = lines_of(comparison)["x: standard error over test rows, mean over 3 seeds"]
    assert float(row["C-STANCE"]) == pytest.approx(error) and "x: between seeds" in comparison.latex()


@pytest.mark.parametrize("seeds, means", [([0, 1, 2], "paired"), ([3, 4, 5], "Welch")])
def test_comparisons_of_equal_methods_show_an_arrow_in_one_of_twenty_cases(seeds, means):
    rng, marked, n = np.random.default_rng(0), [], 150
    keys = ["OP", *map(str, range(8))]
    for _ in range(n):
        found = []
        theirs = rng.normal(size=(3, 9))
        for name in "abc":
            mine = rng.normal(size=(3, 9)) + 0.5 * theirs * (means == "paired")
            columns = [(dict(zip(seeds, mine[:, k], strict=True)), dict(enumerate(theirs[:, k]))) for k in range(9)]
            pairs = {key: seed_difference(*column) for key, column in zip(keys, columns, strict=True)}
            estimates, p = ({key: pair[i] for key, pair in pairs.items()} for i in (0, 1))
            found.append(SimpleNamespace(group=SimpleNamespace(name=name), estimates=estimates, p=p))
        marked.append(bool(marks_of(found)))
    assert np.mean(marked) <= 0.05 + 2 * (0.05 * 0.95 / n) ** 0.5


@pytest.mark.parametrize(
    "names, group",
    [
        (["lora-ewc-seed0-order1", "lora-ewc-seed11-order1"], "lora-ewc-order1"),
        (["one", "two"], "one and its seeds"),
        (["seed0", "seed1"], "seed0 and its seeds"),
        (["ewc-seed0", "ewc-seed1", "ewc"], "ewc-seed0 and its seeds"),
    ],
)
def test_a_group_has_the_name_of_its_runs_without_the_seed(make, names, group):
    methods = ["m", "m", "other"]
    runs = [make(R * (1 - 0.1 * k), name=name, seed=k, method=methods[k]) for k, name in enumerate(names)]
    assert list(over_seeds(compare(runs), "Spread")[1]) == [f"{group}: between seeds", f"{group}: test rows"]


def test_reports_by_several_processes_equal_those_by_one(make, bounds, monkeypatch):
    runs = [*bounds().values(), *(make(name=f"run{k}", seed=k) for k in range(3))]
    runs += [make_rich_run(make, tasks=ORDERS["order1"][:3], n=8, seed=k, name=f"rich{k}") for k in range(2)]
    (runs[4].stages[1].eval_file(TASKS[0])).write_text("{")
    files = [run.path / name for run in runs[:4] for name in ("report.md", "scores.csv", "result.json")]
    lines = [write_report(run, runs) for run in runs[:4]]
    expected = [file.read_bytes() for file in files]
    for file in [*files, *(run.path / "report.html" for run in runs[:4])]:
        file.unlink()
    monkeypatch.setattr(write, "os", SimpleNamespace(cpu_count=lambda: 2))
    fork = get_context("fork")  # a fork of this process need not import matplotlib again
    monkeypatch.setattr(write, "get_context", lambda method: fork)
    made = write_reports(runs)
    assert [isinstance(one, RunError) for one in made] == [run is runs[4] for run in runs]
    assert [line for line, _ in made[:4]] == lines and [file.read_bytes() for file in files] == expected
    assert all((run.path / "report.html").exists() for run in runs[:4])
    others = [*runs[:4], *runs[5:]]
    loaded = compare([results for _, results in made[:4] + made[5:]])
    assert loaded.markdown() == compare(others).markdown() and loaded.csv() == compare(others).csv()
