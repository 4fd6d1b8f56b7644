"""Tests of the demo data."""

import hashlib
import json
import re
from collections import Counter

import pytest

from trace_tasks import data
from trace_tasks.answers import extract_answer
from trace_tasks.data import demo
from trace_tasks.data.demo.__main__ import main

TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
ROWS = (300, 20, 50)

MATH = r"Solve the following math problem\.\nQuestion:\n[^\n]+\nAnswer:"
# The official frames; the parts between them must not hold a line break of their own.
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
# The frames of the official reasoning variant; its ScienceQA has no empty line before the question.
FIRST = r" Give your reasoning first, and then the answer\."
REASONING_MATH = r"Solve the following math problem\." + FIRST + r"\nQuestion:\n[^\n]+\nReasoning:"
REASONING_FRAMES = {
    "C-STANCE": r"判断以下文本对指定对象的态度，选择一项：A\.支持，B\.反对，C\.中立。输出A，B或者C。"
    r"先给出推理，然后给出答案。\n文本：\n[^\n]+\n对象：\n[^\n]+\n推理：",
    "FOMC": r"What is the monetary policy stance for the following text\? A\. dovish, B\. hawkish, C\. neutral\. "
    r"Choose one from A, B and C\." + FIRST + r"\nText:\n[^\n]+\nReasoning:",
    "MeetingBank": r"Write a summary of the following meeting transcripts\." + FIRST + r"\n"
    r"Meeting transcripts:\n[^\n]+\nReasoning:",
    "Py150": r"Complete the next line of the following codes\. Give your answer first, and then the reasoning\.\n"
    r"<s> [^\n]+ <EOL>",
    "ScienceQA": r"Choose an answer for the following question\." + FIRST + r"\nQuestion:\n[^\n]+"
    r"(\n\nHint:\n[^\n]+)?\n\nChoices:\nA\. [^\n]+\nB\. [^\n]+(\nC\. [^\n]+)?\n\nReasoning:",
    "NumGLUE-cm": REASONING_MATH,
    "NumGLUE-ds": REASONING_MATH,
    "20Minuten": r"Provide a simplified version of the following paragraph in German\." + FIRST + r"\n\n"
    r"Paragraph:\n[^\n]+\n\nReasoning:",
}
REASONED = {
    "C-STANCE": r"[^\n]+。\n回答：[ABC]",
    "MeetingBank": r"[^\n]+\.Therefore, the summary of the meeting transcripts is:\n[^\n]+",
    "Py150": r"[^\n]+\nReasoning:[^\n]+",
}


@pytest.fixture(scope="module")
def made():
    return demo.make_demo(rows=ROWS)


@pytest.fixture(scope="module")
def reasoning():
    return demo.make_reasoning(rows=ROWS)


def all_rows(data, task):
    return [row for split in data[task].values() for row in split]


def test_rows_are_those_of_this_version():
    """Other rows under the same VERSION would silently be compared; bump VERSION and this digest together."""
    made = [demo.make_demo(), demo.make_reasoning(), demo.make_lima()]
    digests = [hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16] for data in made]
    # The first is that of version 1 too: published numbers stand on these rows.
    assert (demo.VERSION, digests) == (3, ["88dcc01948494544", "e3427a219540ce05", "2777bcb077643961"])
    assert demo.make_demo(3) == demo.make_demo(3) != demo.make_demo(4)


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_official_frames_and_no_prompt_occurs_twice(made, task):
    assert list(made) == TASKS
    assert [(split, len(rows)) for split, rows in made[task].items()] == list(zip(data.SPLITS, ROWS, strict=True))
    rows = all_rows(made, task)
    for row in rows:
        assert set(row) == {"prompt", "answer"}
        assert re.fullmatch(FRAMES[task], row["prompt"]), row["prompt"]
        assert re.fullmatch(ANSWERS[task], row["answer"]), row["answer"]
        assert "{" not in row["prompt"] + row["answer"]  # a slot that was not filled
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize("rows", [ROWS, (64, 8, 24), (5, 1, 2)])
def test_labels_are_balanced(rows):
    made = demo.make_demo(rows=rows)
    for task in ("C-STANCE", "FOMC", "ScienceQA"):
        for split in made[task].values():
            counts = Counter(row["answer"][0] for row in split)
            assert max(counts.values()) - min(counts[letter] for letter in "ABC") <= 1


def test_answers_follow_from_their_prompts(made):
    for row in all_rows(made, "ScienceQA"):
        choices = dict(re.findall(r"^([ABC])\. (.+)$", row["prompt"], re.MULTILINE))
        letter, reason = row["answer"].split("\n")
        assert [mark for mark, thing in choices.items() if f" is {thing}." in reason] == [letter]
    for row in all_rows(made, "MeetingBank"):
        assert all(number in row["prompt"] for number in re.findall(r"\d+", row["answer"]))
    for row in all_rows(made, "Py150"):
        name = re.findall(r"\w+", row["answer"].replace("None", "").replace("= ", ""))[-1]
        assert re.search(rf"(\b|_){name}\b", row["prompt"])
    for row in all_rows(made, "NumGLUE-cm"):
        if weeks := re.search(r"for (\d) weeks", row["prompt"]):
            assert int(row["answer"]) == 7 * int(weeks[1])
    for row in all_rows(made, "NumGLUE-ds"):
        if force := re.search(r"of (\d) kg .* at (\d) m/s\^2", row["prompt"]):
            assert int(row["answer"]) == int(force[1]) * int(force[2])
        if speed := re.search(r" (\d+) m in (\d) s\.", row["prompt"]):
            assert int(row["answer"]) * int(speed[2]) == int(speed[1])


@pytest.mark.parametrize("task", TASKS)
def test_the_reasoning_variant_asks_the_same_in_the_official_frames(made, reasoning, task):
    for split in data.SPLITS:
        for plain, row in zip(made[task][split], reasoning[task][split], strict=True):
            assert re.fullmatch(REASONING_FRAMES[task], row["prompt"]), row["prompt"]
            answer = plain["answer"][0] if task == "ScienceQA" else plain["answer"]
            if split == "train":
                assert re.fullmatch(REASONED.get(task, r"[^\n]+\.\nAnswer:[^\n]+"), row["answer"]), row["answer"]
                form = {"MeetingBank": "summary", "Py150": "code", "20Minuten": "text"}.get(task, "line")
                assert extract_answer(form, row["answer"]) == answer.strip()
                assert "{" not in row["answer"] and len(row["answer"].split()) < 45
            else:
                assert row["answer"] == answer, "bare, as officially"


def test_the_reasoning_leads_to_the_answer(reasoning):
    for task in ("NumGLUE-cm", "NumGLUE-ds"):
        for row in reasoning[task]["train"]:
            reason, answer = row["answer"].split("\nAnswer:")
            if found := re.search(r"(\d+) ([*/]) (\d+) = (\d+)\.$", reason):
                a, b = int(found[1]), int(found[3])
                assert (a * b if found[2] == "*" else a / b) == int(found[4]) == int(answer)
            else:
                assert re.search(rf"\b{answer}\.$", reason)
    for row in reasoning["ScienceQA"]["train"]:
        reason, letter = row["answer"].split("\nAnswer:")
        choice = re.search(r"So it is (.+), which is (\w)\.", reason)
        assert choice[2] == letter and f"\n{letter}. {choice[1]}\n" in row["prompt"]
    for task, names in (("C-STANCE", ("支持", "反对", "中立")), ("FOMC", ("dovish.", "hawkish.", "neutral."))):
        assert all(
            dict(zip("ABC", names, strict=True))[r["answer"][-1]] in r["answer"] for r in reasoning[task]["train"]
        )


def test_the_alignment_set_is_short_answers_to_different_questions():
    lima = demo.make_lima()
    assert {split: len(rows) for split, rows in lima.items()} == {"train": 48, "eval": 8, "test": 8}
    rows = [row for part in lima.values() for row in part]
    assert len({row["prompt"] for row in rows}) == len({row["answer"] for row in rows}) == len(rows)
    assert all(row["prompt"].strip() and 0 < len(row["answer"].split()) <= 40 for row in rows)
    for language in ("[\u4e00-\u9fff]", r"\b(der|die|das|von|bedeutet|ein)\b"):
        assert all(any(re.search(language, row["prompt"]) for row in part) for part in lima.values())


def test_the_number_of_rows_is_chosen_and_leaves_the_test_rows_as_they_are(tmp_path, capsys):
    main([str(tmp_path / "out"), "--rows", "200", "8", "24"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    first = (tmp_path / "out" / "README.txt").read_text(encoding="utf-8").split("\n")[0]
    assert first == "TRACE demo data, version 3, seed 0, 200 training, 8 eval and 24 test rows"
    for task, splits in demo.make_demo().items():
        assert data.read_split(tmp_path / "out", task, "test") == splits["test"]
        assert len(data.read_split(tmp_path / "out", task, "train")) == 200
    with pytest.raises(SystemExit, match=r"do not give 100000 \+ 8 \+ 24 different rows.*--rows"):
        main([str(tmp_path / "more"), "--rows", "100000", "8", "24"])
    assert not (tmp_path / "more").exists()


def test_what_is_written_is_one_data_set_with_all_sets_in_it(tmp_path):
    demo.write_demo(tmp_path, seed=1)
    demo.write_demo(tmp_path)  # demo data is replaced
    assert "NOT comparable" in (tmp_path / "README.txt").read_text(encoding="utf-8")
    assert data.find_data(str(tmp_path)) == tmp_path and data.is_demo(tmp_path)
    reasoning = data.find_reasoning(tmp_path)
    assert reasoning == tmp_path / "LLM-CL-Benchmark_Reasoning"
    written = {tmp_path: {**demo.make_demo(), "Lima": demo.make_lima()}, reasoning: demo.make_reasoning()}
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
