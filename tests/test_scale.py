"""A user's own tasks, and many of them: no code depends on the number eight."""

import json
import time

import numpy as np
import pytest
from conftest import train, write_task

from trace_bench import evaluate, metrics, report
from trace_bench.run import RunError, read_json, read_jsonl
from trainers.base import CLTrainer

#: Few tokens, to save time.
SHORT = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 2}\nmetadata: {version: 1.0}\n'


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """Thirty tasks in the folder of TRACE_TASKS. The answer is the letter after that of the task."""
    for i in range(30):
        rows = [{"q": f"task {i} row {j}: ", "a": chr(97 + (i + j) % 26)} for j in range(4)]
        write_task(tmp_path / "tasks", f"mine_{i:02}", rows, SHORT)
    monkeypatch.setenv("TRACE_TASKS", str(tmp_path / "tasks"))
    return [f"mine_{i:02}" for i in range(30)]


@pytest.mark.slow
def test_thirty_stages_of_a_users_tasks_have_constant_cost(options, own_tasks):
    del options["data"]
    run = train({**options, "tasks": own_tasks, "max_steps": 1, "per_device_train_batch_size": 4, "test_rows": 2})
    assert evaluate.evaluate(run) == 30 + 30 * 31 // 2
    R = report.Results(run).R
    assert R.shape == (31, 30) and np.isfinite(R[30]).all() and np.isnan(R[1, 1:]).all()
    seconds = [json.loads(s.train_file.read_text())["seconds"] for s in run.stages[1:]]
    assert np.median(seconds[20:]) < 3 * np.median(seconds[:10]), "the cost of a stage does not grow with its number"
    sizes = [sum(f.stat().st_size for f in s.checkpoint.iterdir()) for s in run.stages[1:]]
    assert max(sizes) < 1.01 * min(sizes)
    report.write_report(run)


@pytest.fixture
def two(options, own_tasks):
    """Options of a run on two of the tasks."""
    del options["data"]
    return {**options, "tasks": own_tasks[:2], "max_steps": 1, "per_device_train_batch_size": 4, "test_rows": None}


def change(tmp_path, name, new):
    file = tmp_path / "tasks" / f"{name}_test.jsonl"
    before = file.read_text()
    file.write_text(new(before))
    assert file.read_text() != before


def test_changed_rows_of_a_users_task_are_refused(two, tmp_path):
    class Changed(CLTrainer):
        def begin_stage(self):
            if self.stage.index == 1:
                change(tmp_path, "mine_01", lambda text: text.replace("row 3", "row 4"))

    Changed.__module__ = CLTrainer.__module__
    run = train(two, Changed)  # on the rows that it made when it began
    assert run.manifest["data"]["fingerprint"].keys() == {"mine_00", "mine_01"}
    with pytest.raises(RunError, match=r"rows of mine_01 are not those that the run began with"):
        evaluate.evaluate(run)
    with pytest.raises(RunError, match=r"data\.fingerprint\.mine_01: '\w{16}' -> '\w{16}'"):
        train(two)
    change(tmp_path, "mine_01", lambda text: text.replace("row 4", "row 3"))
    assert evaluate.evaluate(run) == 5


def test_the_first_of_several_filters_counts_and_shots_of_a_task_are_ignored(two, tmp_path):
    yaml = tmp_path / "tasks" / "mine_00.yaml"
    lines = [
        f"  - {{name: {name}, filter: [{{function: regex, regex_pattern: '(never)', fallback: {name}}}, "
        "{function: take_first}]}"
        for name in ("one", "two")
    ]
    shots = "num_fewshot: 2\nfewshot_split: train\n"
    yaml.write_text(yaml.read_text() + shots + "filter_list:\n" + "\n".join(lines) + "\n")
    run = train({**two, "tasks": two["tasks"][:1]})
    evaluate.evaluate(run, stages=[1])
    cell = read_json(run.stages[1].eval_file("mine_00"))
    samples = read_jsonl(run.stages[1].samples_file("mine_00"))
    assert cell["n"] == 4 and [s["response"] for s in samples] == ["one"] * 4
    assert cell["metrics"]["exact_match"]["value"] == np.mean([s["exact_match"] for s in samples])
    assert [s["prompt"] for s in samples] == [f"task 0 row {j}: " for j in range(4)]


def test_a_report_of_many_tasks_takes_seconds(make):
    names = [f"task_{i:03}" for i in range(40)]
    scores = np.random.default_rng(0).integers(11, size=(41, 40)) / 10
    scores[np.triu_indices(41, 0, 40)] = np.nan  # not seen yet
    scores[0] = 0.5
    run = make(scores, tasks=names, task_versions={}, data={"path": None, "demo": False, "fingerprint": {}})
    started = time.process_time()
    report.write_report(run)
    assert time.process_time() - started < 10
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert f"{100 * metrics.overall_performance(scores):.1f}" in text
