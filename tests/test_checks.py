"""The checks that a run is still what it began as: its settings, tasks, the origin of stages, and its files."""

import json
import logging
import re
import shutil
from importlib.metadata import version

import numpy as np
import pytest
from conftest import train, write_task
from made_runs import TASKS, make_rich_run

from judges import judging
from trace_bench import checks, evaluate, judgements, records
from trace_bench.judgements import judge_file
from trace_bench.report import Results, compare, write_report
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_bench.tasks import load_tasks
from trace_tasks import data
from trace_tasks.data.files import fingerprint, write_json, write_jsonl


def change(file, **changes):
    write_json(file, {**read_json(file), **changes})


# ----------------------------------------------------------------------------------------------------- what a task is

YAML = """doc_to_text: "{{q}} "
process_results: !function mine.score
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
CODE = """
from rules import right


def score(doc, results):
    return {"right": float(right(results[0], doc["a"]))}
"""
RULES = "def right(text, answer):\n    return text.strip() == answer\n"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a user's own task: a YAML, a function, and a module that the function imports."""
    rows = [{"q": f"Question {i}?", "a": f"{i}"} for i in range(16)]
    folder = write_task(tmp_path / "own", "mine", rows, YAML)
    (folder / "mine.py").write_text(CODE)
    (folder / "rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TRACE_TASKS", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return folder


def defined():
    return checks.definitions(load_tasks(["mine"]))["mine"]


def replace(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_definition_keeps_the_types_of_numbers(own):
    assert defined()["generation_kwargs"]["max_gen_toks"] == 4


@pytest.mark.parametrize(
    "file, old, new, what",
    [
        ("mine.yaml", '"{{q}} "', '"Say: {{q}} "', "doc_to_text"),
        ("mine.yaml", '"max_gen_toks": 4', '"max_gen_toks": 1', "generation_kwargs"),
        ("mine.yaml", "higher_is_better: true", "higher_is_better: false", "metric_list"),
        ("mine.yaml", "process_results", 'description: "Be brief."\nprocess_results', "description"),
        ("mine.py", '"right": float', '"right": 1 - float', "process_results"),
        ("rules.py", "text.strip() ==", "text ==", "process_results"),
    ],
)
def test_a_changed_task_with_the_same_name_and_version_has_a_different_definition(own, file, old, new, what):
    before = defined()
    replace(own / file, old, new)
    after = defined()
    names = {key for key in before | after if before.get(key) != after.get(key)}
    assert what in names and names <= {what, "examples", "fewshot_config"}


def test_a_definition_ignores_comments_and_layout_but_not_the_texts_of_other_files(own):
    (own / "instruction.txt").write_text("Answer: ")
    replace(own / "mine.yaml", 'doc_to_text: "{{q}} "', "doc_to_text: !function mine.ask")
    with (own / "mine.py").open("a") as f:
        f.write(f"\n\ndef ask(doc):\n    return open({str(own / 'instruction.txt')!r}).read() + doc['q']\n")
    before = defined()
    replace(own / "rules.py", "    return", "    # as the paper says\n    return")
    replace(own / "mine.py", "def score(doc, results):", "def score(doc,\n          results):")
    (own / "another.py").write_text("print('not imported')\n")
    replace(own / "mine.yaml", 'task: "mine"', '# mine\ntask: "mine"')
    assert defined() == before
    (own / "instruction.txt").write_text("Do not answer: ")
    assert {k for k, v in defined().items() if v != before[k]} == {"examples"}


def test_a_run_of_an_older_program_goes_on_if_its_own_tasks_are_the_same(own, options, monkeypatch):
    del options["data"]
    options |= {"tasks": ["mine"], "test_rows": 2, "max_steps": 1, "train_rows": 8}
    with monkeypatch.context() as older:
        definition = checks._definition
        older.setattr(checks, "_definition", lambda task, of_code: definition(task, checks._older_digest))
        run = train(options)
        assert evaluate.evaluate(run, stages=[0]) == 1
    assert defined() != run.manifest["task_definitions"]["mine"]
    assert train(options).manifest == run.manifest and evaluate.evaluate(run, stages=[1]) == 1
    assert not [line for line in Results(Run.open(run.path)).other_versions if line.startswith("definition")]
    run.stages[1].eval_file("mine").unlink()
    replace(own / "rules.py", "==", "!=")
    for go_on in (lambda: train(options), lambda: evaluate.evaluate(run)):
        with pytest.raises(RunError, match=r"mine\.process_results: "):
            go_on()


def test_a_task_edited_between_two_stages_is_refused_by_evaluation_and_training(own, options):
    del options["data"]
    options |= {"tasks": ["mine"], "test_rows": 2, "max_steps": 1, "train_rows": 8}
    run = train(options)
    assert evaluate.evaluate(run, stages=[0]) == 1
    replace(own / "rules.py", "==", "!=")
    with pytest.raises(RunError, match=r"(?s)A task has changed since the run began.*mine.*Restore its YAML"):
        evaluate.evaluate(run, stages=[1])
    with pytest.raises(RunError, match=r"(?s)a different configuration.*task_definitions.mine"):
        train(options)
    # A run of an older version: its manifest has no definitions of tasks, but its cells have.
    write_json(run.path / "manifest.json", {k: v for k, v in run.manifest.items() if k != "task_definitions"})
    trained = read_json(run.stages[1].train_file)
    write_json(run.stages[1].train_file, {k: v for k, v in trained.items() if k not in ("run", "parent", "date")})
    with pytest.raises(RunError, match="before the prompts or the scoring of"):
        evaluate.evaluate(Run.open(run.path), stages=[1])
    assert train(options).path == run.path, "it can be gone on with"
    (own / "rules.py").write_text(RULES)
    assert evaluate.evaluate(Run.open(run.path), stages=[1]) == 1


def test_cells_record_the_versions_that_made_them_and_reports_name_differences(run, monkeypatch, caplog):
    evaluate.evaluate(run, stages=[0])
    made = read_json(run.stages[0].eval_file("trace_fomc"))
    assert made["made_with"]["transformers"] == version("transformers") and made["run"] == run.identity
    assert made["made_with"]["code of the scoring"] == checks.made_with()["code of the scoring"]
    older = {**made["made_with"], "scoring code": "with comments"}
    write_json(run.stages[0].eval_file("trace_fomc"), {**made, "made_with": older})
    now = checks.made_with()
    monkeypatch.setattr(checks, "made_with", lambda: {**now, "transformers": "6.0", "code of the scoring": "f00"})
    with caplog.at_level(logging.WARNING):
        evaluate.evaluate(run, stages=[1])
    assert f"transformers {now['transformers']} then, 6.0 now" in caplog.text and "code of the scoring" in caplog.text
    assert "with comments" not in caplog.text, "an older program's, which says nothing about this code"
    write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "Cells of different versions" in text
    assert f"transformers: {now['transformers']} at 0_base; 6.0 at 1_trace_fomc" in text
    assert "**Cells of different versions** in `run`: transformers" in compare([run]).markdown()


def test_cells_record_a_fingerprint_of_the_scoring_code(tmp_path, monkeypatch):
    before = checks.made_with()
    shutil.copytree(data.TASKS_PATH, tmp_path / "tasks")
    monkeypatch.setattr(data, "TASKS_PATH", tmp_path / "tasks")
    with (tmp_path / "tasks" / "errors.py").open("a") as f:
        f.write("\nwhat_a_message_says = 'no part of a score'\n")
    for file in (tmp_path / "tasks").glob("*.py"):
        file.write_text(file.read_text(encoding="utf-8") + "\n# A comment is none either.\n", encoding="utf-8")
    assert checks.made_with.__wrapped__() == before
    with (tmp_path / "tasks" / "scoring.py").open("a") as f:
        f.write("\naccuracy = max\n")
    assert checks.made_with.__wrapped__()["code of the scoring"] != before["code of the scoring"]


# ---------------------------------------------------------------------------------------------- where stages are from


def test_a_lost_manifest_is_restored_only_by_the_same_command(options, run):
    before = read_json(run.path / "manifest.json")
    for stage in run.stages[1:]:
        change(stage.train_file, date="2020-02-02")
    (run.path / "manifest.json").unlink()
    for other in ({"learning_rate": 1e-3}, {"tasks": options["tasks"][::-1]}):
        with pytest.raises(RunError, match=r"results but no manifest.json.*Run the command that made it"):
            train({**options, **other})
        assert not (run.path / "manifest.json").exists()
    again = train(options)
    assert again.identity == run.identity
    assert read_json(run.path / "manifest.json") == {**before, "date": "2020-02-02"}, "a template is told the same day"
    (run.path / "manifest.json").unlink()
    trained = read_json(run.stages[1].train_file)
    write_json(run.stages[1].train_file, {k: v for k, v in trained.items() if k != "run"})
    with pytest.raises(RunError, match="its configuration is not on record"):
        train(options)


def test_the_manifest_of_external_checkpoints_is_restored_only_by_the_same_command(run, tiny_model, tmp_path):
    given = {s.task: str(s.checkpoint) for s in run.stages[1:]}
    settings = {k: v for k, v in run.manifest["config"].items() if k in ("test_rows", "max_prompt_length", "backend")}

    def external(**changes):
        asked = {"model": str(tiny_model), "tasks": run.tasks, "settings": settings, "data_path": "demo", **changes}
        return evaluate.external_run(tmp_path / "external", given, **asked)

    write_json(external().stages[1].eval_file("trace_fomc"), {"run": external().identity})
    manifest = tmp_path / "external" / "manifest.json"
    before = manifest.read_text()
    manifest.unlink()
    with pytest.raises(RunError, match="results but no manifest"):
        external(settings={**settings, "test_rows": 3})
    assert external().manifest == json.loads(before)


def test_a_manifest_that_was_edited_is_refused(run):
    change(run.path / "manifest.json", config={**run.manifest["config"], "test_rows": 3})
    changed = Run.open(run.path)
    for step in (evaluate.evaluate, lambda run: Results(run).R, lambda run: judging.plan(run, None)):
        with pytest.raises(RunError, match="a different configuration than"):
            step(changed)


def test_all_stages_after_a_stage_that_was_trained_again_are_stale(make):
    run, single = make(), make(name="single", method="single")
    for made in (run, single):
        for stage in made.stages[1:]:
            change(stage.train_file, **records.origin(made, stage))
        assert records.stale(made) == {}
        change(made.stages[1].train_file, checkpoint="other weights")
    assert records.stale(single) == {}, "a model per task has no stage before it"
    assert list(records.stale(run)) == [2, 3]
    assert str(run.stages[2].train_file) in records.stale(run)[2] and str(run.stages[1].path) in records.stale(run)[2]
    for step in (evaluate.evaluate, lambda run: judging.plan(run, None)):
        with pytest.raises(
            RunError, match=r"2_trace_fomc is stale: stage 1_trace_cstance, which it continues, was trained again"
        ):
            step(run)
    records.check_stages(run, run.stages[:2])  # the other stages can be measured
    write_report(run)
    assert "**Stale**: 2_trace_fomc, 3_trace_meetingbank" in (run.path / "report.md").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- what files mean


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "2_trace_fomc"}, r"was written for {'stage': '2_trace_fomc'}"),
        ({"task": "trace_cstance"}, r"was written for {'task': 'trace_cstance'}"),
        ({"metrics": {"accuracy": {"value": 3.0, "stderr": None}}}, "accuracy is 3.0, which is not between 0 and 1"),
        ({"metrics": {"accuracy": {"value": "0.5", "stderr": None}}}, "'metrics.accuracy.value' is '0.5'"),
        ({"metrics": {"accuracy": {"value": 0.5, "stderr": -1}}}, "standard error of accuracy is -1"),
        ({"metrics": {}}, "has no headline score"),
        ({"n": 0}, "n=0 is not a number of rows"),
        ({"n_cut": 101}, "n_cut=101 does not fit n=100 rows"),
    ],
)
def test_an_impossible_cell_is_an_error(make, changes, message):
    run = make()
    change(run.stages[3].eval_file(TASKS[1]), **changes)
    with pytest.raises(RunError, match=re.escape(message)) as e:
        _ = Results(run).R
    assert "evaluate again" in str(e.value)


def test_a_metric_that_is_no_fraction_may_be_any_finite_number(make):
    run = make()
    file = run.stages[3].eval_file(TASKS[0])
    whole = file.read_text()
    for value in ("NaN", "-Infinity", "1e999"):
        file.write_text(whole.replace('"value": 0.7', f'"value": {value}'))
        with pytest.raises(RunError, match="damaged"):
            _ = Results(run).R
    file.write_text(whole)
    change(run.stages[3].eval_file(TASKS[1]), scale={"accuracy": None}, metrics={"accuracy": {"value": 812.5}})
    assert Results(run).R[3, 1] == 812.5


DAMAGED = {
    "lost": lambda rows: rows[1:],
    "both": lambda rows: [rows[0], rows[0], *rows[2:]],
    "other rows": lambda rows: [row | {"doc_id": row["doc_id"] + 1} for row in rows],
    "another order": lambda rows: rows[::-1],
    "text": lambda rows: [rows[0] | {"response": "another"}, *rows[1:]],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_samples_that_do_not_belong_to_the_score_are_an_error(make, damage):
    x = np.linspace(0, 1, 10)[:, None] * [[0.5, 0.9, 0.8, 0.7]]
    run = make(rows={TASKS[0]: {"accuracy": x}})
    file = run.stages[3].samples_file(TASKS[0])
    before = fingerprint(file)
    write_jsonl(file, DAMAGED[damage](read_jsonl(file)))
    if damage != "text":  # cells of older versions do not show this change
        with pytest.raises(RunError, match=r"(?s)samples.*valuate again"):
            _ = Results(run).sequence
    change(run.stages[3].eval_file(TASKS[0]), samples=before)
    with pytest.raises(RunError, match=r"(?s)samples.*valuate again"):
        _ = Results(run).sequence


def test_a_score_that_is_not_the_mean_of_its_rows_is_an_error(make):
    run = make(rows={TASKS[0]: {"accuracy": np.full((10, 4), 0.5)}})
    change(run.stages[3].eval_file(TASKS[0]), metrics={"accuracy": {"value": 0.9, "stderr": 0.1}})
    with pytest.raises(RunError, match="does not match the accuracy of its score"):
        _ = Results(run).intervals


# -------------------------------------------------------------------------------------------------------- judgements


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    from functools import partial

    from made_runs import make_run

    return make_rich_run(partial(make_run, tmp_path_factory.mktemp("judged")), tasks=TASKS).path


@pytest.fixture
def rich(judged, tmp_path):
    return Run.open(shutil.copytree(judged, tmp_path / "rich"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "1_trace_cstance"}, "was moved or copied"),
        ({"suite": "instruct_koala"}, "was moved or copied"),
        ({"direct": ("rate", 0.99)}, "direct.rate: 0.99"),
        ({"direct": ("n", 21)}, "direct.n: 21 -> 20"),
        ({"pairs": ("win", 20)}, "pairs.win: 20"),
        ({"pairs": ("net_win_rate", 1.0)}, "pairs.net_win_rate: 1.0"),
        ({"lines": "f00"}, "has changed since"),
    ],
)
def test_judgements_that_do_not_add_up_are_an_error(rich, changes, message):
    file = judge_file(rich.stages[3], "instruct_lima")
    there = read_json(file)
    for key, value in changes.items():
        there[key] = {**there[key], value[0]: value[1]} if isinstance(value, tuple) else value
    write_json(file, there)
    with pytest.raises(RunError, match="judge again") as e:
        write_report(rich)
    assert message in str(e.value)
    file.with_suffix(".jsonl").unlink()
    if "lines" not in changes:
        with pytest.raises(RunError, match="judge again"):
            write_report(rich)


@pytest.mark.parametrize("damage", ["lost", "doubled", "verdict", "result"])
def test_changed_lines_of_judgements_are_an_error(rich, damage):
    file = judge_file(rich.stages[3], "instruct_lima").with_suffix(".jsonl")
    rows = read_jsonl(file)
    lost = next(i for i, row in enumerate(rows) if row["combined"] == "lose")
    won = {"combined": "win"} if damage == "result" else {"combined": "win", "verdicts": ["A", "B"]}
    damaged = {"lost": rows[1:], "doubled": [*rows, rows[0]]}
    write_jsonl(file, damaged.get(damage) or [row | won if i == lost else row for i, row in enumerate(rows)])
    with pytest.raises(RunError, match="judge again"):
        write_report(rich)


def test_a_net_win_rate_is_pooled_only_over_the_same_sets(rich):
    kind = judgements.KINDS[0]
    for stage in rich.stages[:3]:
        for folder in ("eval/samples", "judge"):
            for file in stage.path.glob(f"{folder}/instruct_lima.json*"):
                shutil.copy(file, file.with_name(file.name.replace("lima", "koala")))
        change(judge_file(stage, "instruct_koala"), suite="instruct_koala")
    found = judgements.load(rich, kind)
    assert judgements.pooled(found, rich.stages[2])["n"] == 40
    assert judgements.pooled(found, rich.stages[3]) is None, "one of the two sets is missing there"
    write_report(rich)
    text = (rich.path / "report.md").read_text(encoding="utf-8")
    assert f"{rich.stages[3].name} was not judged on instruct_koala" in text


class Judge:
    """The parts of a judge that planning needs."""

    model, revision, date, endpoint, sampling = "a/judge", None, None, "http://one/v1", {"temperature": 0}

    def __init__(self, **changes):
        vars(self).update(changes)


def test_a_stage_that_is_judged_alone_must_have_the_judge_of_the_others(rich):
    for stage in rich.stages:
        for suite in ("instruct_lima", "safety_cona"):
            change(judge_file(stage, suite), settings=judging.settings(Judge()), endpoint=Judge.endpoint)
    judge_file(rich.stages[3], "instruct_lima").unlink()
    [job] = judging.plan(rich, Judge(), stages=[3])
    assert job.suite == "instruct_lima"
    for changes, message in (
        ({"model": "another"}, "judge: 'a/judge' -> 'another'"),
        ({"endpoint": "http://two/v1"}, "endpoint: 'http://one/v1' -> 'http://two/v1'"),
        ({"sampling": {"temperature": 1}}, "sampling.temperature: 0 -> 1"),
    ):
        with pytest.raises(RunError, match=re.escape(message)):
            judging.plan(rich, Judge(**changes), stages=[3], suites=["instruct_lima"])
    with pytest.raises(RunError, match="limit None, not 5"):
        judging.plan(rich, Judge(), stages=[3], suites=["instruct_lima"], limit=5)
    assert len(judging.plan(rich, Judge(), suites=["instruct_lima"], limit=5)) == 4, "all of them, on the same rows"


# ------------------------------------------------------------------------------------------------------- comparisons

BEGAN = {"task_definitions": {TASKS[0]: {"doc_to_text": "q"}}, "packages": {"torch": "2.0"}, "commit": "abc"}


@pytest.mark.parametrize(
    "cells, manifest, message",
    [
        ({}, {}, None),
        (
            {"settings": {"backend": "hf", "engine": {"quantization": "fp8"}}},
            {},
            "**Not comparable** in engine settings",
        ),
        ({"settings": {"backend": "hf", "engine": {"quantization": "fp8"}}}, {}, "quantization: fp8"),
        ({"settings": {"backend": "vllm"}}, {}, "**Not comparable** in backend"),
        ({"made_with": {"transformers": "6.0"}}, {}, "**Different versions**"),
        ({"made_with": {"code of the scoring": "f00"}}, {}, "code of the scoring"),
        ({"made_with": {"transformers": "5.0", "scoring code": "of an older program"}}, {}, None),
        ({"definition": "f00"}, {}, "definition of trace_"),
        ({}, {"packages": {"torch": "1.0"}}, "torch of the training"),
        ({}, {"commit": "f00"}, "commit"),
        ({}, {"trained": {"method_code": "f00"}}, "code of the method sequential"),
        ({}, {"trained": {"method_code": None, "method_source": "of an older program"}}, None),
        ({}, {"config": {"dtype": "float16"}}, "dtype of the training"),
        ({}, {"config": {"bf16": True}}, "bf16 of the training"),
        ({}, {"config": {"chat_template": True, "chat_template_args": {"thinking": True}}}, "chat_template_args"),
        ({}, {"task_definitions": {TASKS[0]: {"doc_to_text": "other"}}}, "definition of C-STANCE"),
    ],
)
def test_a_comparison_names_differences_in_settings_versions_and_definitions(make, cells, manifest, message):
    def made(name, cells, manifest):
        run = make(name=name)
        for stage in run.stages[1:]:
            change(stage.train_file, **{"method_code": "e00", **manifest.get("trained", {})})
        change(run.path / "manifest.json", **{**BEGAN, **manifest})
        for file in run.path.glob("stages/*/eval/*.json"):
            made_with = {"transformers": "5.0", "code of the scoring": "abc"}
            change(file, **{"made_with": made_with, "definition": "d", **cells})
        return Run.open(run.path)

    text = compare([made("one", {}, {}), made("two", cells, manifest)]).markdown()
    if message is None:
        assert "Not comparable" not in text and "Different versions" not in text and "commit" not in text
    else:
        assert message in text
