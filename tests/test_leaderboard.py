"""Tests of result.json and of the leaderboard made from such files."""

import csv
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from made_runs import TASKS, make_rich_run, without

from trace_bench.cli import main
from trace_bench.report import html, write_report
from trace_bench.report.leaderboard import differing, leaderboard
from trace_bench.report.results import Results
from trace_bench.run import RunError
from trace_tasks.data.files import write_json

ROOT = Path(__file__).parents[1]
HOSTILE = '</script><img src=x onerror="window.hacked = 1"> **b** | $x$ =1+1'


def reported(run):
    write_report(run)
    return json.loads((run.path / "result.json").read_text(encoding="utf-8"))


def test_result_json_has_the_numbers_of_the_report_and_no_path(make, tmp_path):
    run = make_rich_run(
        make,
        tasks=TASKS,
        n=20,
        model={"name": f"{tmp_path}/models/mine", "path": f"{tmp_path}/models/mine", "revision": None},
        data={"path": str(tmp_path), "demo": True, "fingerprint": dict.fromkeys(TASKS, "f00")},
        config={"train_rows": 8, "output_dir": str(tmp_path)},
        packages={"torch": "2"},
    )
    content, results = reported(run), Results(run)
    assert str(tmp_path) not in json.dumps(content) and content["protocol"]["base model"] == "mine"
    bwt = results.sequence["BWT"][-1]
    assert content["scores"]["BWT"] == {"value": bwt.value, "low": bwt.low, "high": bwt.high}
    assert content["scores"]["Forgetting"].keys() == {"value"}, "no interval of a maximum"
    assert "FWT" not in content["scores"], "what is not known is not there, and no 0"
    assert content["tasks"][TASKS[1]]["value"] == results.R[3, 1] and content["tasks"][TASKS[1]]["n"] == 20
    assert content["training"]["rows"] == 8 and content["protocol"]["data"] == "demo"
    assert content["training"]["tokens"] == sum(t["tokens"] for t in results.training.values())


def test_a_leaderboard_has_a_table_for_each_protocol_sorted_by_score(make, tmp_path):
    for name, value in (("low", 0.2), ("high", 0.7), ("none", np.nan)):
        matrix = without()
        matrix[3, 0] = value
        reported(make(matrix, name=name))
    reported(make(name="other", config={"test_rows": 5, "chat_template": True, "epochs": [3], "max_steps": 4}, seed=2))
    board = leaderboard(tmp_path / "runs")
    assert [[line.name for line in group.lines] for group in board.groups] == [["high", "low", "none"], ["other"]]
    text = board.markdown()
    assert "Not comparable with protocol 1 in test rows (5 against all); chat template (yes against no)." in text
    assert board.groups[1].lines[0].texts["epochs"] == "4 steps", "which go before epochs"
    table = board.groups[0].table()
    ops = [row[table.header.index("OP")] for row in table.rows]
    assert ops == ["40.0", "23.3", "–"] and "seed 1" in table.about
    rows = list(csv.DictReader(io.StringIO(board.csv())))
    assert [row["run"] for row in rows] == ["high", "low", "none", "other"]
    assert float(rows[0]["OP"]) == pytest.approx(100 * (0.7 + 0.0 + 0.5) / 3) and rows[2]["OP"] == ""
    assert not board.skipped


def test_the_leaderboard_has_the_soft_bwt_in_nats(make, tmp_path):
    content = reported(make(name="one"))
    content["scores"]["soft BWT"] = {"value": -4.6245, "low": -4.9, "high": -4.3}
    write_json(tmp_path / "board" / "one.json", content)
    (group,) = leaderboard(tmp_path / "board").groups
    table = group.table()
    assert table.rows[0][table.header.index("soft BWT")].startswith("-4.62")
    assert "in percent, soft BWT in nats per token, in brackets" in table.about


def test_deltas_on_different_rows_or_by_different_judges_are_not_comparable(make, tmp_path):
    content = reported(make_rich_run(make, name="one", n=8, tasks=TASKS))
    assert content["delta_conditions"].keys() == {"general", "instruction", "safety"}
    write_json(tmp_path / "board" / "one.json", content)
    write_json(tmp_path / "board" / "two.json", content | {"run": "two"})
    old = {key: value for key, value in content.items() if key != "delta_conditions"}
    write_json(tmp_path / "board" / "older.json", old | {"run": "older"})
    assert "Not comparable" not in leaderboard(tmp_path / "board").markdown()
    other = content | {"run": "other", "delta_conditions": content["delta_conditions"] | {"safety": "another"}}
    write_json(tmp_path / "board" / "other.json", other)
    text = leaderboard(tmp_path / "board").markdown()
    assert "**Not comparable** in safety: measured on different rows" in text and text.count("Not comparable") == 1


def test_a_judge_in_a_different_folder_is_the_same(make):
    found = []
    for place in ("/here/judge", "/home/x/models/judge/", "/here/another"):
        run = make_rich_run(make, name=f"run-{len(found)}", n=8, tasks=TASKS)
        for file in run.path.glob("stages/*/judge/*.json"):
            content = json.loads(file.read_text())
            content["settings"]["judge"] = place
            write_json(file, content)
        found.append(reported(run)["delta_conditions"])
    assert found[0] == found[1] and found[0]["safety"] != found[2]["safety"]


def test_differing_tasks_data_and_definitions_are_named_by_task():
    one = {"data of the tasks": {"trace_fomc": "a", "trace_py150": "b"}, "tasks": "trace_fomc, trace_py150"}
    assert differing(one, one) == []
    assert differing(one, one | {"data of the tasks": {"trace_fomc": "a", "trace_py150": "c"}}) == [
        "data of the tasks (Py150)"
    ]
    assert differing(one, {"data of the tasks": {"trace_fomc": "a"}, "tasks": "trace_fomc"}) == [
        "tasks (FOMC against FOMC, Py150)"
    ]
    assert differing(one, one | {"data of the tasks": {}}) == ["data of the tasks (of one not on record)"]
    (told,) = differing(one | {"predictions": "0123abcd"}, one)
    assert "0123abcd" not in told and "an import" in told


def test_renamed_result_files_count_and_foreign_or_damaged_ones_are_named(make, tmp_path, capsys):
    content = reported(make(name="one"))
    folder = tmp_path / "board"
    write_json(folder / "a" / "theirs.json", content)
    write_json(folder / "b" / "theirs.json", content | {"run": "two"})
    write_json(folder / "c" / "again.json", content)
    for name, text in {
        "foreign.json": "{}",
        "broken.json": '{"format": "trace-bench result",',
        "newer.json": json.dumps(content | {"version": 2}),
        "wrong.json": json.dumps(content | {"scores": {"OP": {"value": "high"}}}),
        "infinite.json": json.dumps(content | {"scores": {"OP": {"value": float("inf")}}}),
        "large.json": " " * 2**21,
        "readme.txt": "no JSON",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "run" / "manifest.json", {})
    for name in ("adapter_config.json", "trainer_state.json"):
        write_json(folder / "training" / "checkpoint-1" / name, {})  # such files are silently skipped
    main(["results", str(folder)])
    shown = capsys.readouterr().out
    left_out = [line for line in shown.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 7
    for name in ("foreign.json", "broken.json", "newer.json", "wrong.json", "infinite.json", "large.json"):
        assert sum(f"{folder}/{name} is not a result file" in line for line in left_out) == 1, name
    assert any("trace-bench report" in line and "/run" in line for line in left_out)
    assert "3 runs" in shown and "| a/theirs |" in shown and "| two |" in shown and "| c/again |" in shown


def test_a_leaderboard_without_results_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="is not a folder"):
        leaderboard(tmp_path / "nowhere")
    with pytest.raises(RunError, match="trace-bench report RUN"):
        leaderboard(tmp_path)
    with pytest.raises(SystemExit):
        main(["results", str(tmp_path), "--output", str(tmp_path / "board.pdf")])
    assert not list(tmp_path.iterdir())


def test_names_and_fields_in_result_files_are_only_text(make, tmp_path, capsys):
    content = reported(make())
    content |= {"run": HOSTILE, "method": HOSTILE, "measures": {HOSTILE: {"value": 1.0}}}
    content["protocol"] = {HOSTILE: HOSTILE, "base model": HOSTILE, "tasks": HOSTILE, "engine": {HOSTILE: [HOSTILE]}}
    write_json(tmp_path / "board" / "x.json", content)
    write_json(tmp_path / "board" / "y.json", content | {"protocol": {"bwt rule": HOSTILE, "data": [HOSTILE]}})
    for form in ("html", "md", "csv"):
        main(["results", str(tmp_path / "board"), "--output", str(tmp_path / f"board.{form}")])
    page, text = ((tmp_path / f"board.{form}").read_text(encoding="utf-8") for form in ("html", "md"))
    assert "<img" not in page and "\\<img" in text and "\n|" in text
    assert html.sha256((ROOT / "trace_bench" / "report" / "page.js").read_text(encoding="utf-8")) in page


def test_a_hundred_runs_are_quick_and_in_one_table_of_the_page(make, tmp_path):
    content = reported(make())
    for k in range(100):
        write_json(tmp_path / "board" / f"{k}.json", content | {"run": f"run {k}", "seed": k})
    start = time.process_time()
    main(["results", str(tmp_path / "board"), "--output", str(tmp_path / "board.html")])
    assert time.process_time() - start < 5, "it takes half a second"
    page = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 101 and 'class="sortable"' in page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A leaderboard in a browser; the test fails if the page complains."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on the PATH")
    file = tmp_path_factory.mktemp("board") / "board.html"
    main(["results", str(ROOT / "docs" / "leaderboard"), "--output", str(file)])
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        shown, problems = browser.new_page(viewport={"width": 390, "height": 900}), []
        shown.on("console", lambda message: problems.append(message.text))
        shown.goto(file.as_uri())
        yield shown
        browser.close()
        assert not problems


def test_a_click_on_a_column_head_sorts_numbers_texts_and_dashes(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def column(name):
        table = page.locator("table.sortable").first
        heads = [head.inner_text() for head in table.locator("thead th").all()]
        place = heads.index(name)
        return [row.locator("th, td").nth(place).inner_text() for row in table.locator("tbody tr").all()]

    def click(name):
        page.locator("table.sortable").first.get_by_role("button", name=name, exact=True).click()
        return column(name)

    first = [float(text.split()[0]) for text in column("OP")]
    assert first == sorted(first, reverse=True), "the best first, without a click"
    for sign, way in ((-1, "largest first"), (1, "then smallest first")):
        bwt = click("BWT")
        numbers = [float(text.split()[0]) for text in bwt if text != "–"]
        assert numbers == sorted(numbers, key=lambda x: sign * x), way
        assert set(bwt[len(numbers) :]) == {"–"}, "dashes are last both ways"
    tokens = [int(text.replace(",", "")) for text in click("trained tokens")]
    assert tokens == sorted(tokens, reverse=True) and min(tokens) > 1000, "with separators"
    assert click("method") == sorted(column("method"))


def test_the_leaderboard_in_the_docs_is_that_of_their_files():
    text = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    board = leaderboard(ROOT / "docs" / "leaderboard")
    assert board.markdown().strip() in text and not board.skipped
    for file in (ROOT / "docs" / "leaderboard").rglob("*.json"):
        assert "/" not in file.read_text(encoding="utf-8").replace("1/(T-1)", ""), "no path of a machine"
