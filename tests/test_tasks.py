"""The lm-eval tasks: all eight load, plain and with reasoning, and need only trace_tasks."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import SHARED
from lm_eval.tasks import TaskManager

from trace_bench.tasks import load_tasks, task_manager, training_rows
from trace_tasks import data

HEADLINES = {
    **dict.fromkeys(data.FOLDERS, "accuracy"),
    **{"trace_meetingbank": "rouge_l", "trace_py150": "similarity", "trace_20minuten": "sari"},
}
HEADLINES |= {task.replace("trace_", "reasoning_"): headline for task, headline in HEADLINES.items()}


@pytest.fixture
def task(request: pytest.FixtureRequest, demo_data: None):
    return load_tasks([request.param])[request.param]


def test_every_yaml_of_the_folder_is_in_the_index():
    # lm-eval silently skips a YAML that fails to load.
    names = {p.stem for p in data.TASKS_PATH.glob("*.yaml")}
    known = data.FOLDERS, data.REASONING, data.CL_BENCHMARK, data.SUITES, data.JUDGED, data.GROUPS
    assert names >= {"trace", "reasoning", "cl"}.union(*known)
    assert set(task_manager().all_tasks) == names
    assert sorted(data.ORDERS["order2"]) == sorted(data.ORDERS["order1"])


@pytest.mark.parametrize(("prefix", "order"), [("trace", "order1"), ("reasoning", "reasoning_order1"), ("cl", "long4")])
def test_glob_and_group_select_all_tasks_once(prefix, order, demo_data: None):
    manager = task_manager()
    assert set(manager.match_tasks([f"{prefix}_*"])) >= set(data.ORDERS[order])
    assert list(manager.load([prefix])["tasks"]) == data.ORDERS[order]


BLOCK = """\
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("trace_bench", "trainers", "judges", "bench"):
            raise ModuleNotFoundError(f"{name} is not part of trace_tasks", name=name)
sys.meta_path.insert(0, Block())
import lm_eval.tasks
# Without an index of all that lm-eval has, which takes ten seconds.
lm_eval.tasks.TaskManager.__init__.__defaults__ = (None, None, False, None)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.parametrize(("tiny_model", "accuracy"), [("pieces", 1.0), ("bytes", 0.0)], indirect=["tiny_model"])
def test_a_space_that_only_vllm_puts_in_front_of_an_answer_is_not_scored(
    tiny_model, accuracy, demo_data, tmp_path, monkeypatch
):
    """As `lm_eval --model vllm` does with a SentencePiece tokenizer. With others the model has written the space."""

    def loaded(name="trace_fomc", **arguments):
        paths = [data.TASKS_PATH, str(tmp_path)]
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=arguments)
        return manager.load([name])["tasks"][name]

    def scored(**arguments):
        fomc = loaded(**arguments)
        fomc.build_all_requests(limit=1)
        (request,) = fomc.instances
        request.resps = [" A"]
        fomc.apply_filters()
        answers = set(request.filtered_resps.values())
        assert answers == set(request.resps), "logs have what is scored"
        return fomc.process_results({"prompt": "?", "answer": "A"}, list(answers))["accuracy"]

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", None)
    assert scored(pretrained=str(tiny_model)) == accuracy
    assert scored(pretrained="an/unknown", tokenizer=str(tiny_model)) == accuracy
    with pytest.raises(OSError, match="couldn't find them"):  # not when all answers are there
        loaded(pretrained="an/unknown").build_all_requests(limit=1)
    choice = f"include: {data.TASKS_PATH}/trace_fomc.yaml\ntask: own\noutput_type: multiple_choice\nprocess_results:\n"
    (tmp_path / "own.yaml").write_text(choice + "doc_to_choice: [A, B]\nmetric_list: [metric: acc]\n")
    own = loaded("own", pretrained=str(tiny_model))
    own.build_all_requests(limit=1)
    for request in own.instances:
        request.resps = [(-1.0, True)]
    own.apply_filters()  # likelihoods have no space
    assert scored() == 0.0, "trace-bench evaluate decodes an answer alone"
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms")
    assert scored(pretrained=str(tiny_model)) == 0.0, "so does --model hf"


@pytest.mark.slow  # starts lm_eval
def test_plain_lm_eval_runs_the_tasks_with_only_trace_tasks(tmp_path):
    shutil.copytree(data.TASKS_PATH, tmp_path / "trace_tasks", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRACE_DATA": "demo"}
    command = [sys.executable, "-c", BLOCK, "run", "--model", "dummy", "--tasks", "trace_*,reasoning_fomc,cl_agnews"]
    command += ["--limit", "2", "--include_path", str(tmp_path / "trace_tasks")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for task in (*data.FOLDERS, "reasoning_fomc", "cl_agnews"):
        table = re.search(rf"\|{task} *\|.*\n(?:\| +\|.*\n)*", done.stdout)
        assert table and f"|{HEADLINES.get(task, 'accuracy')} " in table[0], done.stdout


@pytest.mark.parametrize("task", list(HEADLINES), indirect=True)
def test_a_task_reads_its_own_rows_and_references_score_in_full(task):
    name, reasoned = task.task_name, task.task_name in data.REASONING
    root, folder = (data.find_reasoning() if reasoned else data.find_data()), {**data.FOLDERS, **data.REASONING}[name]
    rows = data.read_split(root, folder, "test")
    doc, headline, metrics = rows[0], HEADLINES[name], list(task.aggregation())
    assert list(task.test_docs()) == rows
    # lm-eval's results must name the data: the name of a task is the same for demo rows and real rows.
    assert task.dump_config()["metadata"]["data"] == {"TRACE_DATA": "demo"}
    assert task.config.metadata["rows"] == data.rows_digest([rows])
    trained = data.read_split(root, folder, "train")
    assert training_rows(task) == [(row["prompt"], row["answer"]) for row in trained]
    assert task.fewshot_context(doc, 0) == doc["prompt"], "the raw prompt, nothing around it"
    assert task.doc_to_target(doc) == doc["answer"] and metrics[0] == headline
    assert ("accuracy_tolerant" in metrics) == (headline == "accuracy") and ("extracted" in metrics) == reasoned
    if reasoned:
        assert task.config.generation_kwargs == {"do_sample": False, "max_gen_toks": 512, "until": []}
        marked = {"reasoning_meetingbank": "So.Therefore, the summary of the meeting transcripts is:\n{}"}
        marked["reasoning_py150"] = "{}\nReasoning:So."
        right = task.process_results(doc, [marked.get(name, "So.\nAnswer: {}\n").format(doc["answer"])])
        assert right[headline] > 0.99 and right["extracted"] == 1
        for text in ("Reasoning: none" if name == "reasoning_py150" else doc["answer"], ""):
            assert task.process_results(doc, [text]) == dict.fromkeys(metrics, 0.0), "without its marker"
        return
    assert task.process_results(doc, [doc["answer"]])[headline] > 0.99
    # SARI rewards deletions from a long source, so even an empty text scores about a half.
    assert task.process_results(doc, ["~"])[headline] < (0.55 if headline == "sari" else 0.05)
    assert set(task.process_results(doc, [""])) == set(metrics)


@pytest.mark.parametrize("task", ["trace_fomc", "trace_meetingbank"], indirect=True)
def test_demonstrations_are_balanced_over_labels_or_have_different_answers(task):  # prompts made of them: test_icl.py
    drawn = list(task.sampler.sample(6))
    counts = [2, 2, 2] if task.task_name == "trace_fomc" else [1] * 6
    assert list(Counter(d["answer"] for d in drawn).values()) == counts
    assert sum(len((d["prompt"] + d["answer"]).encode()) for d in drawn) <= task.sampler.budget / 2


def test_a_training_row_with_a_test_prompt_is_no_demonstration(tmp_path, monkeypatch):
    (tmp_path / "FOMC").mkdir()
    train = [{"prompt": f"p{i}", "answer": "ABC"[i % 3]} for i in range(12)]
    for split, rows in {"train": train, "eval": train[:1], "test": train[:5]}.items():
        (tmp_path / "FOMC" / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setenv("TRACE_DATA", str(tmp_path))
    task = load_tasks(["trace_fomc"])["trace_fomc"]
    task.set_fewshot_seed(0)
    assert {d["prompt"] for d in task.sampler.sample(6)} <= {f"p{i}" for i in range(5, 12)}


@pytest.mark.parametrize("name", ["trace_cstance", "trace_fomc", "trace_numglue_cm", "trace_numglue_ds"])
def test_the_limit_of_tokens_cuts_no_right_answer(name, monkeypatch):
    # These tasks generate few tokens. Strict equality needs that every right answer fits.
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, the real TRACE data")
    monkeypatch.setenv("TRACE_DATA", str(SHARED / "data" / "trace"))
    task = load_tasks([name])[name]
    longest = max(len(d["answer"].encode()) for d in [*task.test_docs(), *task.training_docs()])
    assert longest <= task.config.generation_kwargs["max_gen_toks"], "at worst a token a byte"
