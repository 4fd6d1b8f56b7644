"""Imported predictions get the scores of the official code and lm-eval, or are refused."""

import json
import shutil

import numpy as np
import pytest
from conftest import SHARED

from trace_bench import evaluate
from trace_bench.cli import main
from trace_bench.evaluate import imported as imported_module
from trace_bench.report.comparison import compare
from trace_bench.report.conditions import other_prompts, same_conditions
from trace_bench.report.result_file import protocol
from trace_bench.report.results import Results
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_tasks import data

ORDER = ["trace_fomc", "trace_numglue_ds"]
needs_golden = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the golden files are not here")


def official(folder, stages, order=ORDER):
    """Files of the official code: stage -> task -> [(prompt, label, result)]."""
    folder.mkdir(exist_ok=True)
    for round_, cells in enumerate(stages):
        for task, triples in cells.items():
            name = f"results-{round_}-{order.index(task)}-{data.FOLDERS[task]}.json"
            prompts, labels, results = (list(column) for column in zip(*triples, strict=True))
            content = {"eval": {"accuracy": 0.123}, "prompts": prompts, "results": results, "labels": labels}
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def demo_rows(task, answers, n=6):
    """The first rows of the demo data with the answers of a model: "right", or a text."""
    rows = data.read_split(data.find_data("demo"), data.FOLDERS[task], "test")[:n]
    return [(r["prompt"], r["answer"], r["answer"] if a == "right" else a) for r, a in zip(rows, answers, strict=True)]


@pytest.fixture
def folder(tmp_path):
    """Two rounds on six demo rows each: FOMC falls from 4 of 6 to 1 of 6."""
    good, bad = ["right"] * 4 + ["", "x"], ["right"] + ["The answer is A."] * 5
    stages = [{"trace_fomc": demo_rows("trace_fomc", good)}]
    stages += [{"trace_fomc": demo_rows("trace_fomc", bad), "trace_numglue_ds": demo_rows("trace_numglue_ds", good)}]
    return official(tmp_path / "official", stages)


def imported(tmp_path, *words, name="run"):
    main(["import", str(tmp_path / name), *map(str, words)])
    return Run.open(tmp_path / name)


@needs_golden
def test_imported_predictions_get_the_scores_of_the_official_code(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACE_DATA", raising=False)
    golden = {task: json.loads((SHARED / f"golden/{f}.json").read_text()) for task, f in data.FOLDERS.items()}
    rows = {t: [(r["source"], r["reference"], r["prediction"]) for r in rs] for t, rs in golden.items()}
    order = list(data.FOLDERS)
    run = imported(tmp_path, "--official", official(tmp_path / "f", [rows] * 2, order))
    assert run.tasks == order and [s.task for s in run.stages[1:]] == order
    expected = json.loads((SHARED / "golden/official_scores.json").read_text())
    checked = 0
    for task, scores in expected.items():
        name = next(t for t, f in data.FOLDERS.items() if f == task)
        cell = read_json(run.stages[2].eval_file(name))
        for metric, value in scores.items():
            key = metric.replace("-", "_").lower()
            scale = 100 if key in ("similarity", "sari") else 1
            assert cell["metrics"][key]["value"] == pytest.approx(value / scale, abs=1e-9), (task, metric)
            checked += 1
        assert cell["n"] == 60 and "n_cut" not in cell
    assert checked == 16
    assert "not compared with TRACE's data" in run.manifest["answers_only"]
    assert run.manifest["model"]["name"] == "unknown" and run.manifest["data"]["path"] is None
    main(["report", str(run.path)])
    assert "Answers without weights" in (run.path / "report.md").read_text()


def test_rounds_become_stages_and_scores_in_the_files_are_ignored(tmp_path, folder, demo_data):
    run = imported(tmp_path, "--official", folder)
    results = Results(run)
    assert [s.name for s in run.stages] == ["0_base", "1_trace_fomc", "2_trace_numglue_ds"] and run.tasks == ORDER
    assert results.is_sequential and results.R[1, 0] == 4 / 6 and results.R[2].tolist() == [1 / 6, 4 / 6]
    assert results.sequence["BWT"][1].value == pytest.approx(-0.5)
    assert results.sequence["BWT"][1].low < -0.5 < results.sequence["BWT"][1].high
    assert run.manifest["config"]["test_rows"] == 6 and run.manifest["data"]["demo"]
    samples = read_jsonl(run.stages[2].samples_file("trace_fomc"))
    assert samples[1]["response"] == "The answer is A." and samples[0]["accuracy"] == 1.0
    with pytest.raises(RunError, match=r"answers but no weights: imported from the official code's results"):
        evaluate.evaluate(run)
    with pytest.raises(RunError, match="begin a run in a new folder"):
        evaluate.measured_run(run.path)
    assert not same_conditions(results, results), "nobody knows whether two unknown models are one"
    again = Results(imported(tmp_path, "--official", folder, "--model", "a/model", name="named"))
    assert same_conditions(again, again)


def test_imported_logs_of_lm_eval_get_the_scores_of_lm_eval(tmp_path, demo_data, monkeypatch, capsys):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from trace_bench.evaluate.imported import _Answers
    from trace_bench.tasks import task_manager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds
    answers = {"base": ["A"] * 8, "later": ["B", "", "C", "A", "B.", "hawkish", "A", "B"]}
    theirs = {}
    for name, texts in answers.items():
        lm, tracker = _Answers({"trace_fomc": texts}), EvaluationTracker(output_path=str(tmp_path / name))
        options = {"task_manager": task_manager(), "limit": 8, "bootstrap_iters": 0, "log_samples": True}
        results = lm_eval.simple_evaluate(model=lm, tasks=["trace_fomc"], **options)
        theirs[name] = results["results"]["trace_fomc"]
        tracker.general_config_tracker.model_name_sanitized = "a_model"
        tracker.save_results_aggregated(results=results, samples=results["samples"])
        tracker.save_results_samples(task_name="trace_fomc", samples=results["samples"]["trace_fomc"])
    words = [w for name in answers for w in ("--samples", f"{name}={tmp_path / name}")]
    run = imported(tmp_path, *words)
    assert [s.name for s in run.stages] == ["0_base", "1_later"] and run.tasks == ["trace_fomc"]
    for stage, (name, texts) in zip(run.stages, answers.items(), strict=True):
        cell = read_json(stage.eval_file("trace_fomc"))
        for metric, score in cell["metrics"].items():
            assert score["value"] == theirs[name][f"{metric},none"]
        assert [row["response"] for row in read_jsonl(stage.samples_file("trace_fomc"))] == texts
    imported(tmp_path, *words, "--tasks", "trace_fomc", "trace_py150", name="without")
    assert "imported 2 cells of 2 models, none for trace_py150. Next: trace-bench report" in capsys.readouterr().out
    file = next((tmp_path / "later").rglob("samples_*"))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit, match="has 7 rows of trace_fomc, but other files have 8"):
        imported(tmp_path, *words, name="fewer")
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(SystemExit, match=r"line 9 .* row 0 is there twice"):
        imported(tmp_path, *words, name="twice")
    asked = json.loads(lines[3])
    asked["arguments"]["gen_args_0"]["arg_0"] = "<chat>" + asked["doc"]["prompt"]
    file.write_text("\n".join([*lines[:3], json.dumps(asked), *lines[4:]]))
    with pytest.raises(SystemExit, match=r"has changed prompts"):
        imported(tmp_path, *words, name="chat")
    for file in tmp_path.rglob("samples_*"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["arguments"]["gen_args_0"]["arg_0"] = "<chat>" + row["doc"]["prompt"]
        file.write_text("\n".join(map(json.dumps, rows)))
    one, two = (Results(imported(tmp_path, *words[:k], "--model", "a/model", name=f"chat-{k}")) for k in (2, 4))
    assert other_prompts(one) == ["trace_fomc"] and "prompts" not in one.run.manifest["config"], "cells say it, as ever"
    assert not same_conditions(one, one), "what they are is not known"
    facts = [protocol(results) for results in (one, two)]
    assert facts[0] != facts[1] and facts[0]["chat template"] == facts[0]["decoding"] == "unknown"
    comparison = compare([one, two])
    assert any("**Not comparable** in prompts, which were changed" in warning for warning in comparison.warnings)


def test_different_predictions_of_unknown_base_models_are_different_protocols(tmp_path, demo_data):
    facts = []
    for name, answers in (("one", ["right"] * 6), ("two", ["right"] * 5 + ["x"])):
        lines = [
            {"doc_id": i, "filter": "none", "resps": [[text]], "doc": {"prompt": prompt, "answer": answer}}
            | {"arguments": {"gen_args_0": {"arg_0": prompt}}}
            for i, (prompt, answer, text) in enumerate(demo_rows("trace_fomc", answers))
        ]
        (tmp_path / name).mkdir()
        file = tmp_path / name / "samples_trace_fomc_2026-01-01T00-00-00.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        run = imported(tmp_path, "--samples", f"base={tmp_path / name}", name=f"run-{name}")
        facts.append(protocol(Results(run)))
    assert facts[0].pop("predictions") != facts[1].pop("predictions") and facts[0] == facts[1]
    assert facts[0]["decoding"] == facts[0]["answer limit"] == "unknown" and facts[0]["chat template"] is False


def test_sari_of_prompts_with_demonstrations_is_refused(tmp_path, demo_data):
    # It compares with the whole prompt: lm-eval logs 0.62 for what would be 0.71 here.
    (tmp_path / "f").mkdir()
    for task in ("trace_20minuten", "trace_fomc"):
        prompt, answer, _ = demo_rows(task, ["right"] * 6)[0]
        opening = "We will give you several examples and you should follow them to accomplish the task.\n Examples:\n"
        line = {"doc_id": 0, "filter": "none", "resps": [[answer]], "doc": {"prompt": prompt, "answer": answer}}
        asked = json.dumps([{"role": "user", "content": opening + prompt}])  # as an API for chats has it
        line |= {"arguments": {"gen_args_0": {"arg_0": [asked]}}}
        (tmp_path / "f" / f"samples_{task}_2026-01-01T00-00-00.jsonl").write_text(json.dumps(line))
    with pytest.raises(SystemExit, match=r"samples_trace_20minuten.*demonstrations\. SARI.*--tasks"):
        imported(tmp_path, "--samples", f"base={tmp_path / 'f'}")
    assert not (tmp_path / "run").exists()
    run = imported(tmp_path, "--samples", f"base={tmp_path / 'f'}", "--tasks", "trace_fomc")
    assert read_json(run.stages[0].eval_file("trace_fomc"))["metrics"]["accuracy"]["value"] == 1.0


def test_a_round_without_files_is_a_stage_without_scores(tmp_path, folder, demo_data):
    (folder / "results-0-0-FOMC.json").unlink()
    results = Results(imported(tmp_path, "--official", folder))
    assert results.is_sequential and np.isnan(results.R[1]).all() and results.R[2].tolist() == [1 / 6, 4 / 6]
    assert np.isnan(results.sequence["BWT"][1].value) and results.sequence["OP"][1].value == pytest.approx(2.5 / 6)


def change(folder, key, row, value, name="results-1-0-FOMC.json"):
    content = json.loads((folder / name).read_text())
    content[key][row] = value
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(
    "key, message",
    [("labels", "results-1-0-FOMC.json, row 3: its answer is 'Z', but the"), ("prompts", "row 3: its prompt is 'Z'")],
)
def test_different_prompts_and_labels_are_refused_with_their_row(
    tmp_path, folder, monkeypatch, with_data, key, message
):
    monkeypatch.setenv("TRACE_DATA", "demo") if with_data else monkeypatch.delenv("TRACE_DATA", raising=False)
    change(folder, key, 3, "Z")
    with pytest.raises(SystemExit, match=message):
        imported(tmp_path, "--official", folder)
    assert not (tmp_path / "run").exists()


def test_a_task_without_predictions_needs_its_rows(monkeypatch):
    monkeypatch.delenv("TRACE_DATA", raising=False)
    with (
        pytest.raises(data.DataError, match=r"trace_py150: there are no predictions.* leave the task out of --tasks"),
        imported_module._rows_of({"v1": {"trace_fomc": None}}, ["trace_fomc", "trace_py150"], None),
    ):
        pass


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.move(f / "results-1-1-NumGLUE-ds.json", f / "results-1-2-NumGLUE-ds.json"), "without a gap"),
        (lambda f: shutil.move(f / "results-1-0-FOMC.json", f / "results-4-0-FOMC.json"), r"rounds \[4\]"),
        (lambda f: shutil.copy(f / "results-1-0-FOMC.json", f / "results-1-2-Papyrus-f.json"), "Papyrus-f"),
        (lambda f: shutil.copytree(f, f / "seed 2"), r"two files of round \d and task"),
        (lambda f: shutil.copy(f / "results-1-0-FOMC.json", f / "results-01-0-FOMC.json"), "two files of round 1"),
        (lambda f: (f / "results-1-0-FOMC.json").write_text("[]"), "not a file of the official code"),
        (lambda f: change(f, "results", 0, None), "not a file of the official code"),
        (lambda f: change(f, "results", slice(0, 1), []), "not a file of the official code"),
        (lambda f: [change(f, key, slice(0, 9), []) for key in ("results", "labels", "prompts")], "has no rows"),
        (lambda f: [file.unlink() for file in f.iterdir()], "has no file results-ROUND"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, folder, demo_data, damage, message):
    damage(folder)
    with pytest.raises(SystemExit, match=message):
        imported(tmp_path, "--official", folder)


def test_the_same_command_completes_an_import_and_a_different_one_is_refused(tmp_path, folder, demo_data):
    run = imported(tmp_path, "--official", folder)
    lost = run.stages[2].eval_file("trace_fomc")
    before = read_json(lost)
    lost.unlink()
    imported(tmp_path, "--official", folder)
    changed = {"seconds"}
    assert {k: v for k, v in read_json(lost).items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    with pytest.raises(SystemExit, match=r"model\.name: 'unknown' -> 'another'"):
        imported(tmp_path, "--official", folder, "--model", "another")
    next(folder.glob("results-1-0-*.json")).unlink()
    with pytest.raises(SystemExit, match=r"no predictions for trace_fomc at this stage"):
        imported(tmp_path, "--official", folder)
