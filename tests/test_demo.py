"""Tests of the demo data."""

import hashlib
import json
import re
from collections import Counter

import pytest

from trace_tasks import data
from trace_tasks.answers import split_answer
from trace_tasks.data import demo
from trace_tasks.data.demo.__main__ import main
from trace_tasks.reasoning import FRAMES as FORMS
from trace_tasks.reasoning import reasoning_prompt

TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
ROWS = (300, 20, 50)

MATH = r"Solve the following math problem\.\nQuestion:\n[^\n]+\nAnswer:"
# The official frames. The parts between them must not contain a line break.
FRAMES = {
    "C-STANCE": r"判断以下文本对指定对象的态度，选择一项：A\.支持，B\.反对，C\.中立。输出A，B或者C。\n"
    r"文本：\n[^\n]+\n对象：\n[^\n]+\n态度：",
    "FOMC": r"What is the monetary policy stance for the following text\? "
    r"A\. dovish, B\. hawkish, C\. neutral\. Choose one from A, B and C\.\nText:\n[^\n]+\nStance:",
    "MeetingBank": r"Write a summary of the following meeting transcripts\.\n"
    r"Meeting transcripts:\n[^\n]+\nSummary:",
    "Py150": r"<s> [^\n]+ <EOL>",
    "ScienceQA": r"Choose an answer for the following question and give your reasons\.\n\nQuestion:\n[^\n]+"
    r"(\n\nHint:\n[^\n]+)?\n\nChoices:\nA\. [^\n]+\nB\. [^\n]+(\nC\. [^\n]+)?\n\nAnswer:",
    "NumGLUE-cm": MATH,
    "NumGLUE-ds": MATH,
    "20Minuten": r"Provide a simplified version of the following paragraph in German\.\n\n"
    r"Paragraph:\n[^\n]+\n\nSimplification:",
}
ANSWERS = {
    "C-STANCE": r"[ABC]",
    "FOMC": r"[ABC]",
    "MeetingBank": r"CB \d{3}: an ordinance [^\n]+ in Council District \d\.",
    "Py150": r"[^\n<]+",
    "ScienceQA": r"[ABC]\n[^\n]+\.",
    "NumGLUE-cm": r"\d+|[A-Z][a-z]+day",
    "NumGLUE-ds": r"\d+",
    "20Minuten": r"[^\n]+\.\n",
}


@pytest.fixture(scope="module")
def made():
    return demo.make_demo(rows=ROWS)


def all_rows(data, task):
    return [row for split in data[task].values() for row in split]


def test_demo_rows_are_unchanged_within_a_version():
    """Different rows with the same VERSION would silently be compared. Change VERSION and this digest together."""
    made = [demo.make_demo(), demo.make_reasoning(), demo.make_lima(), demo.make_sets()]
    digests = [hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16] for data in made]
    # The first digest is also that of version 1: published numbers are based on these rows.
    assert (demo.VERSION, digests) == (
        4,
        ["88dcc01948494544", "e3427a219540ce05", "2777bcb077643961", "ae8fbb3ce43d091a"],
    )
    assert demo.make_demo(3) != demo.make_demo(4)


@pytest.mark.parametrize("task", TASKS)
def test_demo_rows_have_the_official_frames_and_different_prompts(made, task):
    assert list(made) == TASKS
    assert [(split, len(rows)) for split, rows in made[task].items()] == list(zip(data.SPLITS, ROWS, strict=True))
    rows = all_rows(made, task)
    for row in rows:
        assert set(row) == {"prompt", "answer"}
        assert re.fullmatch(FRAMES[task], row["prompt"]), row["prompt"]
        assert re.fullmatch(ANSWERS[task], row["answer"]), row["answer"]
        assert "{" not in row["prompt"] + row["answer"]  # a slot that was not filled
    assert len({row["prompt"] for row in rows}) == len(rows)
    for split in made[task].values() if task in ("C-STANCE", "FOMC", "ScienceQA") else ():
        counts = Counter(row["answer"][0] for row in split)
        assert max(counts.values()) - min(counts[letter] for letter in "ABC") <= 1, "labels are balanced"


def test_answers_follow_from_their_prompts(made):
    for row in all_rows(made, "ScienceQA"):
        choices = dict(re.findall(r"^([ABC])\. (.+)$", row["prompt"], re.MULTILINE))
        letter, reason = row["answer"].split("\n")
        assert [mark for mark, thing in choices.items() if f" is {thing}." in reason] == [letter]
    for row in all_rows(made, "MeetingBank"):
        assert all(number in row["prompt"] for number in re.findall(r"\d+", row["answer"]))
    for row in all_rows(made, "NumGLUE-ds"):
        if force := re.search(r"of (\d) kg .* at (\d) m/s\^2", row["prompt"]):
            assert int(row["answer"]) == int(force[1]) * int(force[2])
        if speed := re.search(r" (\d+) m in (\d) s\.", row["prompt"]):
            assert int(row["answer"]) * int(speed[2]) == int(speed[1])


@pytest.mark.parametrize("task", TASKS)
def test_the_reasoning_variant_asks_the_same_questions_and_its_reasoning_ends_in_the_answer(made, task):
    reasoning = demo.make_reasoning(rows=ROWS)
    named = {"C-STANCE": ("支持", "反对", "中立"), "FOMC": ("dovish.", "hawkish.", "neutral.")}
    for split in data.SPLITS:
        for plain, row in zip(made[task][split], reasoning[task][split], strict=True):
            assert row["prompt"] == reasoning_prompt(task, plain["prompt"])
            answer = plain["answer"][0] if task == "ScienceQA" else plain["answer"]
            if split != "train":
                assert row["answer"] == answer, "bare, as officially"
                continue
            path, read = split_answer(FORMS[task].form, row["answer"])
            assert read == answer.strip() and "{" not in path and 0 < len(path.split()) < 45
            if found := re.search(r"(\d+) ([*/]) (\d+) = (\d+)\.$", path):
                a, b = int(found[1]), int(found[3])
                assert (a * b if found[2] == "*" else a / b) == int(found[4]) == int(answer)
            if task in named:
                assert dict(zip("ABC", named[task], strict=True))[answer] in path
            if task == "ScienceQA":
                choice = re.search(r"So it is (.+), which is (\w)\.", path)
                assert choice[2] == answer and f"\n{answer}. {choice[1]}\n" in row["prompt"]


def test_the_number_of_training_rows_does_not_change_the_test_rows(tmp_path, capsys):
    main([str(tmp_path / "out"), "--rows", "200", "8", "24"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    first = (tmp_path / "out" / "README.txt").read_text(encoding="utf-8").split("\n")[0]
    assert first == "TRACE demo data, version 4, seed 0, 200 training, 8 eval and 24 test rows"
    for task, splits in demo.make_demo().items():
        assert data.read_split(tmp_path / "out", task, "test") == splits["test"]
        assert len(data.read_split(tmp_path / "out", task, "train")) == 200
    for number, message in (("100000", r"not 100000 \+ 8 \+ 24.*--rows"), ("0", "2")):
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path / "more"), "--rows", number, "8", "24"])
    assert "at least 1" in capsys.readouterr().err and not (tmp_path / "more").exists()


def test_the_written_demo_data_contains_all_sets(tmp_path):
    demo.write_demo(tmp_path, seed=1)
    demo.write_demo(tmp_path)  # demo data is replaced
    assert "NOT comparable" in (tmp_path / "README.txt").read_text(encoding="utf-8")
    assert data.find_data(str(tmp_path)) == tmp_path and data.is_demo(tmp_path)
    lima, reasoning = demo.make_lima(), data.find_reasoning(tmp_path)
    assert {split: len(rows) for split, rows in lima.items()} == {"train": 48, "eval": 8, "test": 8}
    assert reasoning == tmp_path / "LLM-CL-Benchmark_Reasoning"
    written = {tmp_path: {**demo.make_demo(), "Lima": lima}, reasoning: demo.make_reasoning()}
    for root, folders in written.items():
        for folder, splits in folders.items():
            assert sorted(p.stem for p in (root / folder).iterdir()) == sorted(data.SPLITS)
            assert {split: data.read_split(root, folder, split) for split in splits} == splits
    for kind, sets in (("instruct", 5), ("safety", 4)):
        files = sorted(tmp_path.glob(f"{kind}/*/test.json"))
        prompts = {row["prompt"] for file in files for row in data.read_rows(file, answered=False)}
        assert len(files) == sets and len(prompts) == 12
    (tmp_path / "README.txt").unlink()
    with pytest.raises(data.DataError, match="not demo data"):
        demo.write_demo(tmp_path)
