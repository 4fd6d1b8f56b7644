"""Tests of the demo data."""

import hashlib
import json
import re
from collections import Counter

import pytest

from trace_bench import data, demo
from trace_tasks import scoring

TASKS = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]
SIZES = [(64, 8, 24), (300, 20, 50), (5, 1, 2)]

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
    return demo.make_demo(rows=(300, 20, 50))


@pytest.fixture(scope="module")
def reasoning():
    return demo.make_reasoning(rows=(300, 20, 50))


def all_rows(data, task):
    return [row for split in data[task].values() for row in split]


@pytest.mark.parametrize("rows", SIZES)
def test_sizes_and_order(rows):
    data = demo.make_demo(rows=rows)
    assert list(data) == TASKS == list(demo.TASKS)
    for splits in data.values():
        assert {split: len(made) for split, made in splits.items()} == dict(
            zip(("train", "eval", "test"), rows, strict=True)
        )


@pytest.mark.parametrize("task", TASKS)
def test_frames(made, task):
    for row in all_rows(made, task):
        assert set(row) == {"prompt", "answer"}
        assert re.fullmatch(FRAMES[task], row["prompt"]), row["prompt"]
        assert re.fullmatch(ANSWERS[task], row["answer"]), row["answer"]
        assert row["answer"].strip()
        assert "{" not in row["prompt"] + row["answer"]  # a slot that was not filled


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_twice(task, rows):
    prompts = [row["prompt"] for row in all_rows(demo.make_demo(rows=rows), task)]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("task", ["C-STANCE", "FOMC", "ScienceQA"])
def test_labels_are_balanced(task, rows):
    for made in demo.make_demo(rows=rows)[task].values():
        counts = Counter(row["answer"][0] for row in made)
        assert max(counts.values()) - min(counts[letter] for letter in "ABC") <= 1


def test_scienceqa_letter_is_the_choice_that_the_reason_names(made):
    for row in all_rows(made, "ScienceQA"):
        choices = dict(re.findall(r"^([ABC])\. (.+)$", row["prompt"], re.MULTILINE))
        letter, reason = row["answer"].split("\n")
        named = [mark for mark, thing in choices.items() if f" is {thing}." in reason]
        assert named == [letter]


def test_slots_of_the_answer_come_from_the_prompt(made):
    for row in all_rows(made, "MeetingBank"):
        assert all(number in row["prompt"] for number in re.findall(r"\d+", row["answer"]))
    for row in all_rows(made, "Py150"):
        name = re.findall(r"\w+", row["answer"].replace("None", "").replace("= ", ""))[-1]
        assert re.search(rf"(\b|_){name}\b", row["prompt"])
    for row in all_rows(made, "20Minuten"):
        assert any(town in row["prompt"] and town in row["answer"] for town in demo._NEWS_TOWNS)


def test_math_answers(made):
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
    for split in demo.SPLITS:
        for plain, row in zip(made[task][split], reasoning[task][split], strict=True):
            assert re.fullmatch(REASONING_FRAMES[task], row["prompt"]), row["prompt"]
            answer = plain["answer"][0] if task == "ScienceQA" else plain["answer"]
            if split == "train":
                assert re.fullmatch(REASONED.get(task, r"[^\n]+\.\nAnswer:[^\n]+"), row["answer"]), row["answer"]
                form = {"MeetingBank": "summary", "Py150": "code", "20Minuten": "text"}.get(task, "line")
                assert scoring.extract_answer(form, row["answer"]) == answer.strip()
                assert "{" not in row["answer"] and len(row["answer"].split()) < 45
            else:
                assert row["answer"] == answer, "bare, as officially"


def test_the_reasoning_leads_to_the_answer(reasoning):
    for task in ("NumGLUE-cm", "NumGLUE-ds"):
        for row in reasoning[task]["train"]:
            reason, answer = row["answer"].split("\nAnswer:")
            if sum_ := re.search(r"(\d+) ([*/]) (\d+) = (\d+)\.$", reason):
                a, b = int(sum_[1]), int(sum_[3])
                assert (a * b if sum_[2] == "*" else a / b) == int(sum_[4]) == int(answer)
            else:
                assert re.search(rf"\b{answer}\.$", reason)
    for row in reasoning["ScienceQA"]["train"]:
        reason, letter = row["answer"].split("\nAnswer:")
        choice = re.search(r"So it is (.+), which is (\w)\.", reason)
        assert choice[2] == letter and f"\n{letter}. {choice[1]}\n" in row["prompt"]
    stances = {"A": "支持", "B": "反对", "C": "中立"}
    assert all(stances[row["answer"][-1]] in row["answer"] for row in reasoning["C-STANCE"]["train"])
    policies = {"A": "dovish", "B": "hawkish", "C": "neutral"}
    assert all(f"is {policies[row['answer'][-1]]}." in row["answer"] for row in reasoning["FOMC"]["train"])


def test_the_alignment_set_is_short_answers_to_different_questions():
    lima = demo.make_lima()
    assert {split: len(rows) for split, rows in lima.items()} == {"train": 48, "eval": 8, "test": 8}
    rows = [row for part in lima.values() for row in part]
    assert len({row["prompt"] for row in rows}) == len({row["answer"] for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].strip() and row["answer"].strip()
        assert len(row["answer"].split()) <= 40
    for part in lima.values():
        assert any(re.search("[\u4e00-\u9fff]", row["prompt"]) for row in part)
        assert any(re.search(r"\b(der|die|das|von|bedeutet|ein)\b", row["prompt"]) for row in part)


def test_a_seed_gives_the_same_rows():
    assert demo.make_demo(3) == demo.make_demo(3)
    assert demo.make_demo(3) != demo.make_demo(4)


def test_test_rows_do_not_depend_on_the_number_of_training_rows():
    few, many = demo.make_demo(rows=(16, 8, 24)), demo.make_demo(rows=(200, 8, 24))
    assert all(few[task]["test"] == many[task]["test"] for task in TASKS)


def test_rows_are_those_of_this_version():
    """Other rows under the same VERSION would silently be compared; bump VERSION and this digest together."""
    made = [demo.make_demo(), demo.make_reasoning(), demo.make_lima()]
    digests = [hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16] for data in made]
    # The first is that of version 1 too: published numbers stand on these rows.
    assert (demo.VERSION, digests) == (3, ["88dcc01948494544", "e3427a219540ce05", "2777bcb077643961"])


def test_too_many_rows():
    with pytest.raises(ValueError, match="too few different rows"):
        demo.make_demo(rows=(100_000, 8, 24))


def test_write(tmp_path, capsys):
    demo.main([str(tmp_path / "out")])
    assert "8 demo tasks" in capsys.readouterr().out
    assert "NOT comparable" in (tmp_path / "out/README.txt").read_text(encoding="utf-8")
    expected = demo.make_demo()
    expected |= {f"LLM-CL-Benchmark_Reasoning/{task}": splits for task, splits in demo.make_reasoning().items()}
    expected["Lima"] = demo.make_lima()
    for folder, splits in expected.items():
        assert sorted(p.name for p in (tmp_path / "out" / folder).iterdir()) == [
            "eval.json",
            "test.json",
            "train.json",
        ]
        for split, made in splits.items():
            assert data.read_split(tmp_path / "out", folder, split) == made


def test_the_demo_is_one_data_set_with_its_reasoning_variant_in_it(tmp_path):
    demo.write_demo(tmp_path)
    assert data.data_sets(tmp_path) == [tmp_path]
    assert data.find_data(str(tmp_path)) == tmp_path
    assert data.find_reasoning(tmp_path) == tmp_path / "LLM-CL-Benchmark_Reasoning"
    assert data.is_demo(tmp_path)


def test_the_sets_to_be_judged_are_a_dozen_prompts_of_each_kind(tmp_path):
    demo.write_demo(tmp_path)
    for kind, sets in (("instruct", 5), ("safety", 4)):
        files = sorted(tmp_path.glob(f"{kind}/*/test.json"))
        prompts = {row["prompt"] for file in files for row in data.read_rows(file, answered=False)}
        assert len(files) == sets and len(prompts) == 12


def test_write_replaces_demo_data_only(tmp_path):
    demo.write_demo(tmp_path, seed=1)
    demo.write_demo(tmp_path)
    rows = json.loads((tmp_path / "FOMC/test.json").read_text(encoding="utf-8"))
    assert rows == demo.make_demo()["FOMC"]["test"]

    (tmp_path / "README.txt").unlink()
    with pytest.raises(FileExistsError, match="not demo data"):
        demo.write_demo(tmp_path)


def test_larger_demo_data_has_the_rows_that_were_asked_for(tmp_path):
    demo.main([str(tmp_path / "large"), "--rows", "100", "4", "30"])
    counts = {len(json.loads((tmp_path / "large" / t / "train.json").read_text())) for t in demo.TASKS}
    assert (
        counts == {100} and "100 training, 4 eval and 30 test rows" in (tmp_path / "large" / "README.txt").read_text()
    )
    with pytest.raises(SystemExit, match=r"too few different rows.* Ask for fewer"):
        demo.main([str(tmp_path / "huge"), "--rows", "100000", "8", "24"])
