"""Nothing in the code knows the number eight: thirty stages of one's own tasks, a hundred tasks in a report."""

import json
import time

import numpy as np
import pytest
from conftest import train

from trace_bench import data, evaluate, metrics, report, results

YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/{name}.jsonl, test: {folder}/{name}.jsonl}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 2}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """Folder of TRACE_TASKS with thirty tasks: spell the letter that follows the one of the task."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for i in range(30):
        name = f"mine_{i:02}"
        rows = [{"q": f"task {i} row {j}: ", "a": chr(97 + (i + j) % 26)} for j in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder))
    monkeypatch.setenv("TRACE_TASKS", str(folder))
    return [f"mine_{i:02}" for i in range(30)]


@pytest.mark.slow
def test_thirty_stages_of_ones_own_tasks(options, own_tasks):
    del options["data"]
    run = train({**options, "tasks": own_tasks, "max_steps": 1, "per_device_train_batch_size": 4, "test_rows": 2})
    assert evaluate.evaluate(run) == 30 + 30 * 31 // 2
    R = results.score_matrix(run)
    assert R.shape == (31, 30) and np.isfinite(R[30]).all() and np.isnan(R[1, 1:]).all()
    seconds = [json.loads(s.train_file.read_text())["seconds"] for s in run.stages[1:]]
    assert np.median(seconds[20:]) < 3 * np.median(seconds[:10]), "the cost of a stage does not grow with its number"
    sizes = [sum(f.stat().st_size for f in s.checkpoint.iterdir()) for s in run.stages[1:]]
    assert max(sizes) < 1.01 * min(sizes)
    report.write_report(run)


def test_a_folder_without_tasks_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_TASKS", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataError, match=r"TRACE_TASKS=.*nowhere is no folder with task YAMLs"):
        data.load_tasks(["mine"])


def test_a_report_of_a_hundred_tasks_takes_seconds(make):
    names = [f"task_{i:03}" for i in range(100)]
    scores = np.random.default_rng(0).integers(11, size=(101, 100)) / 10
    scores[np.triu_indices(101, 0, 100)] = np.nan  # not seen yet
    scores[0] = 0.5
    run = make(scores, tasks=names, task_versions={}, data={"path": None, "demo": False, "fingerprint": {}})
    started = time.perf_counter()
    report.write_report(run)
    assert time.perf_counter() - started < 20
    R = results.score_matrix(run)
    assert R.shape == (101, 100)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert f"{100 * metrics.overall_performance(R):.1f}" in text
