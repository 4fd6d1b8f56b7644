"""Tests of the annotator: it accepts no wrong answer, pays nothing twice, and writes rows that RCL can train on."""

import csv
import hashlib
import io
import json
import re

import pytest
from conftest import train
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import Server, with_key

from judges import JudgeError
from judges.prompts import neutralise
from judges.replies import Cache, Reply
from judges.teacher import prompts, review
from judges.teacher.paths import CHECKS, Row, read_path
from trace_bench.cli import main
from trace_bench.run import read_json
from trace_tasks import data
from trace_tasks.answers import extract_answer, split_answer
from trace_tasks.data import demo
from trace_tasks.data.files import write_json
from trace_tasks.reasoning import FRAMES, reasoning_answer
from trainers.rcl import RCLConfig, RCLTrainer


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACE_DATA", "demo")
    monkeypatch.chdir(tmp_path)
    with with_key(monkeypatch, tmp_path):
        yield


@pytest.fixture(scope="module")
def right():
    """The replies of a teacher that is always right: prompt -> the demo's own path and answer."""
    rows = [row for splits in demo.make_reasoning().values() for row in splits["train"]]
    return {neutralise(row["prompt"]): row["answer"] for row in rows}


def task_of(text):
    return text.rpartition("<<<TASK>>>\n")[2].partition("\n<<<END OF TASK>>>")[0]


def wrong(reply):
    """The same path to a wrong answer in any form: that of a different row of the task."""
    for marker in ("\nAnswer:", "\n回答：", "transcripts is:\n"):
        if marker in reply:
            return f"{reply.partition(marker)[0]}{marker}Z 77 wrong"
    return f"break\nReasoning:{reply.partition('Reasoning:')[2]}"


def in_another_form(reply):
    """A right reply whose answer differs in form from the data: 12.0 for 12, and a semicolon after a line of code."""
    return re.sub(r"(\nAnswer:\d+)\Z|(?<=.)(?=\nReasoning:)", lambda m: f"{m[1]}.0" if m[1] else ";", reply)


@pytest.fixture
def server(right):
    """A teacher that is right at the first, second or third attempt, or never, in turn over the rows."""
    turns = {task: i % 4 for i, task in enumerate(right)}

    def answer(text):
        task = task_of(text)
        good = turns[task] < 3 and server.seen[text] > turns[task]
        return in_another_form(right[task]) if good else wrong(right[task])

    with Server(answer) as server:
        yield server


def command(server, out, *argv):
    main(["annotate", str(out), "--model", "fake/teacher", "--base-url", server.url, *map(str, argv)])


def error(*argv):
    with pytest.raises(SystemExit) as e:
        main(["annotate", *map(str, argv)])
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    return e.value.code


def files(out):
    names = (p for p in out.rglob("*") if p.is_file() and not re.search(r"cache|\.lock$", p.name))
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in names}


def write_fomc(root, rows, test=()):
    """A data set of FOMC alone from (text, answer) pairs."""
    frame = "Choose one from A, B and C.\nText:\n{}\nStance:"
    for split, pairs in {"train": rows, "eval": [("e", "A")], "test": [("t", "B"), *test]}.items():
        write_json(root / "FOMC" / f"{split}.json", [{"prompt": frame.format(text), "answer": a} for text, a in pairs])
    return root


def numbers(out, task="trace_fomc"):
    return read_json(out / "annotation.json")["tasks"][task]


# ---------------------------------------------------------------------------------------------- the teacher's prompts


@pytest.mark.parametrize("task", data.FOLDERS)
def test_built_in_demonstrations_score_in_full_and_cover_the_labels(task, right):
    folder = data.FOLDERS[task]
    prompt = prompts.read_prompt(prompts.prompt_files([task])[task], folder)
    form = FRAMES[folder].form
    for demo_ in prompt.demonstrations:
        row = Row(task, 0, demo_.prompt, demo_.answer)
        reply = reasoning_answer(folder, demo_.reasoning, demo_.answer)
        assert read_path(row, Reply(reply)) == (demo_.reasoning, "")
        assert extract_answer(form, reply) == demo_.answer
        assert CHECKS[folder].score(row.prompt, demo_.answer, demo_.answer) > 0.98
        assert form != "line" or not review.answers_first(row, demo_.reasoning)
        assert 20 <= review.quality([(row, demo_.reasoning)])["words"]["min"] <= 120
    answers = [demo_.answer for demo_ in prompt.demonstrations]
    assert len(set(answers)) == 3
    if folder in ("C-STANCE", "FOMC", "ScienceQA"):
        assert sorted(answers) == ["A", "B", "C"]
    chinese = [any("\u4e00" <= c <= "\u9fff" for c in d.reasoning) for d in prompt.demonstrations]
    assert chinese == [folder == "C-STANCE"] * 3
    assert not {neutralise(d.prompt) for d in prompt.demonstrations} & right.keys(), "they are no rows of the demo data"


def test_the_built_in_prompts_are_unchanged():
    """Replies are cached by the request. If it changes, raise annotate.VERSION."""
    asked = [
        prompts.read_prompt(file, data.FOLDERS[task]).messages(data.FOLDERS[task], "PROMPT", answer)
        for task, file in prompts.prompt_files(data.FOLDERS).items()
        for answer in (None, "ANSWER")
    ]
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8] == "ac309270"


def test_the_teacher_is_asked_in_turns_and_sees_the_answer_only_where_it_should(server, tmp_path):
    (tmp_path / "own").mkdir()
    built_in = (prompts.FOLDER / "fomc.yaml").read_text(encoding="utf-8")
    (tmp_path / "own/fomc.yaml").write_text(built_in.replace("reasoning paths", "MY PATHS"))
    argv = ["--rows", 1, "--attempts", 1, "--tasks", "trace_fomc,trace_py150"]
    command(server, tmp_path / "out", *argv, "--prompts", tmp_path / "own")
    fomc, py150 = sorted((body["messages"] for body in server.bodies), key=lambda messages: "Python" in str(messages))
    assert [m["role"] for m in fomc] == ["user", "assistant"] * 3 + ["user"]
    assert fomc[-1]["content"].startswith("<<<TASK>>>\nWhat is the monetary") and fomc[-1]["content"].count("<<<") == 2
    assert "RIGHT ANSWER" not in str(fomc) and "right answer" not in str(fomc)
    assert "MY PATHS" in fomc[0]["content"] and "MY PATHS" not in str(py150)
    assert fomc[1]["content"].endswith("\nAnswer:A")
    assert py150[-1]["content"].count("<<<RIGHT ANSWER>>>\n") == 1 and "<s>" not in str(py150)
    assert str(py150).count("<<<RIGHT ANSWER>>>") == 4 and "The right line" in py150[0]["content"]
    assert {(b["temperature"], b["max_tokens"], b["seed"]) for b in server.bodies} == {(0.7, 1024, 1)}
    message = error(tmp_path / "out", "--model", "fake/teacher", "--base-url", server.url, *argv)
    assert "prompts.trace_fomc: '" in message and "prompts.trace_py150" not in message
    command(server, tmp_path / "shown", *argv, "--show-answers")
    assert any("RIGHT ANSWER>>>\nB\n<<<END OF" in body["messages"][-1]["content"] for body in server.bodies)
    assert "saw the right answers of all tasks" in (tmp_path / "shown/annotation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"(?s).*", "a: [", "not YAML"),
        (r"(?s).+", "- 1", "should be a dictionary"),
        ("shown:", "show:", "shown: Field required"),
        (r"(?s)  - prompt(?!.*  - prompt).*", "", "List should have at least 3 items"),
        ("answer: A", "answer: 1", "demonstrations.0.answer: Input should be a valid string .found 1"),
        ("Reasoning:\n", "Stance:\n", "demonstration 1: the prompt must contain"),
        ("The text reports", "Answer: A. The text", "demonstration 1: a marker in the path"),
    ],
)
def test_a_wrong_prompt_file_is_an_error_that_names_it(tmp_path, old, new, message):
    file = tmp_path / "fomc.yaml"
    text = (prompts.FOLDER / "fomc.yaml").read_text(encoding="utf-8")
    file.write_text(re.sub(old, new, text, count=1), encoding="utf-8")
    with pytest.raises(JudgeError, match=message) as e:
        prompts.read_prompt(file, "FOMC")
    assert str(file) in str(e.value)


# ---------------------------------------------------------------------------------------------------- reading replies

FOMC = Row("trace_fomc", 0, "Text:\nRates rose.\nReasoning:", "B")
NUMBER = Row("trace_numglue_ds", 0, "Question:\nHow much are 3 of 4?\nReasoning:", "12")
WORD = Row("trace_numglue_cm", 0, "Question:\nToday is Monday.\nReasoning:", "Friday")
STANCE = Row("trace_cstance", 0, "文本：\n很好。\n推理：", "A")
CODE = Row("trace_py150", 0, "<s> def f ( x ) : <EOL>", "return x ")
SUMMARY = Row("trace_meetingbank", 0, "Item 7.\nReasoning:", "CB 7: an ordinance about parks.\r\nIt passed.")
GERMAN = Row("trace_20minuten", 0, "Paragraph:\nDer Zug fährt nicht.\n\nReasoning:", "Kein Zug fährt heute.\n")
THEREFORE = "Therefore, the summary of the meeting transcripts is:"
#: The answer B as people read it in Markdown, and what is a different answer.
MARKDOWN = [
    *("Answer: **B**", "**Answer:** B", "**Answer: B**", "**Answer**: B", "### Answer: B", "**Final answer:** **B**"),
    *("Answer: `B`", "Answer: \\boxed{B}", "Answer: $\\boxed{\\text{B}}$", "Answer: B.", "__Answer:__\nB"),
    "**Answer:** **B**.",
]
WRONG = [
    "**Answer:** C",
    "Answer: \\boxed{C}",
    "Answer: \\boxed{B}{C}",
    "Answer: **B** or **C**",
    "Answer: B or C",
    "Answer: (B) (C)",
    "Answer: A. hawkish, B. dovish",
]
RIGHT, FORM = "Rates rose.\nAnswer:B", "no answer in the task's form"


@pytest.mark.parametrize(
    ("row", "text", "path", "reason"),
    [
        (FOMC, "\nReasoning: Rates rose.\n\nAnswer: B\nThat is it.", "Rates rose.", ""),
        (FOMC, "Rates rose. Answer: B", "Rates rose.", ""),
        (FOMC, "Is the stance A? No. The stance is B.\nAnswer: B", "Is the stance A? No. The stance is B.", ""),
        (FOMC, "Rates rose. So the stance is C.\nAnswer: B", "", "another answer in the path"),
        (STANCE, "文本批评它，所以态度是B。回答：A", "", "another answer in the path"),
        (FOMC, "<think>Is it A?\nAnswer:A</think>\nRates rose.\nAnswer:B", "Rates rose.", ""),
        (STANCE, "推理：文本称赞它。回答：A", "文本称赞它。", ""),
        (NUMBER, "3 * 4 = 12\nAnswer: 12.0", "3 * 4 = 12", ""),
        (WORD, "It is Friday then.\nAnswer: friday", "It is Friday then.", ""),
        (CODE, "return x\nReasoning: It returns x.\nSo it ends.", "It returns x.\nSo it ends.", ""),
        (SUMMARY, f"It passed.\n\n{THEREFORE} CB 7: an ordinance about parks.\nIt passed.", "It passed.", ""),
        (GERMAN, "The train.\nAnswer: Kein Zug fährt heute.", "The train.", ""),
        (FOMC, "Rates rose.\nAnswer:C", "", "wrong answer"),
        (FOMC, "It is B.", "", FORM),
        (FOMC, "Rates rose. So the final answer: B", "", FORM),
        (FOMC, "Rates rose.\n**Answer: B", "", FORM),
        *(
            (row, "Rates rose.\n" + form.replace("B", row.answer), "Rates rose.", "")
            for row in (FOMC, NUMBER, WORD)
            for form in MARKDOWN
        ),
        (FOMC, "**Reasoning:** Rates rose. **Answer:** B", "Rates rose.", ""),
        *((FOMC, f"Rates rose.\nAnswer: {b}", "Rates rose.", "") for b in ("(B)", "B. hawkish", "Option B")),
        (STANCE, "**推理**：文本称赞它。\n**回答：A**", "文本称赞它。", ""),
        (SUMMARY, f"It passed.\n\n**{THEREFORE}**\n{SUMMARY.answer}", "It passed.", ""),
        (CODE, "```python\nreturn x\n```\n\n**Reasoning:** It returns x.", "It returns x.", ""),
        (CODE, "`return x`\nReasoning: It returns x.", "It returns x.", ""),
        *((FOMC, f"Rates rose.\n{answer}", "", "wrong answer") for answer in WRONG),
        (FOMC, "So the **final answer**: B", "", FORM),
        (FOMC, "```\nRates rose.\nAnswer: B\n```", "", "a block of code that is not closed"),
        (CODE, "return x\nReasoning: It is\n```python\nreturn x", "", "a block of code that is not closed"),
        (CODE, "```\nreturn y\n```\nReasoning: It returns.", "", "wrong answer"),
        (FOMC, "\n \nAnswer:B", "", "no path"),
        (FOMC, "Reasoning:\nAnswer:B", "", "no path"),
        (FOMC, "Rates rose.\nAnswer: C. No:\nAnswer:B", "", "a marker in the path"),
        (FOMC, "Rates rose.\nAnswer:\nAnswer:B", "", "a marker in the path"),
        (NUMBER, "3 * 4 = 13\nAnswer: 13", "", "wrong answer"),
        (CODE, "return y\nReasoning: It returns y.", "", "wrong answer"),
        (CODE, "return x", "", "no path"),
        (CODE, "return x\nReasoning: It returns.\nReasoning: x", "", "a marker in the path"),
        (SUMMARY, f"It passed.{THEREFORE}\nParks were discussed.", "", "wrong answer"),
        (GERMAN, "The train.\nAnswer: Der Zug kommt nicht.", "", "wrong answer"),
        (FOMC, Reply(RIGHT, finish_reason="length"), "", "cut at the limit of tokens"),
        (FOMC, Reply(RIGHT, refusal=True), "", "refused"),
        (FOMC, f"<think>Rates fell.</think>\nNo.\n<think>{RIGHT}", "", "thinking not closed"),
        (FOMC, Reply("", thinking=RIGHT, unclosed=True), "", "thinking not closed"),
    ],
)
def test_a_path_to_the_right_answer_is_accepted_and_others_are_rejected_with_the_reason(row, text, path, reason):
    assert read_path(row, Reply(text) if isinstance(text, str) else text) == (path, reason)


PIECES = [
    *("Answer:", "\n回答：", "答案:", f"{THEREFORE}\n", "\nReasoning:", "\n", " "),
    *("A", "B", "12", "return x ", "It is."),
]


@given(st.sampled_from([FOMC, NUMBER, STANCE, CODE, SUMMARY, GERMAN]), st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=150, deadline=None)
def test_accepted_replies_are_read_back_as_the_right_answer(row, text):
    frame = FRAMES[row.folder]
    for reply in (text, reasoning_answer(row.folder, text, row.answer), f"{row.gold}{frame.marker}{text}"):
        path, reason = read_path(row, Reply(reply))
        assert bool(path) != bool(reason)
        if path:
            read, answer = split_answer(frame.form, reasoning_answer(row.folder, path, row.answer))
            assert (read.strip(), answer) == (path, row.gold)


def test_an_answer_that_comes_first_and_the_numbers_of_quality_worked_by_hand():
    a, asked = Row("trace_fomc", 0, "", "A"), Row("trace_numglue_ds", 0, "How many of 12?", "12")
    first = [
        *((FOMC, "The stance is B. Rates rose."), (FOMC, "B: rates rose.\nThat is hawkish.")),
        *(
            (FOMC, "Plan B was dropped. Rates rose."),
            (a, "Option A is best. Rates fell."),
            (STANCE, "选A。文本称赞它。"),
        ),
        *((NUMBER, "The result is 12.0 units. 3 * 4 = 12."), (WORD, "It is Friday. Count on.")),
    ]
    later = [
        (FOMC, "The answer is B"),  # nothing is explained afterwards
        *((FOMC, "Rates rose. The answer is B."), (a, "A rate cut is expected. It is dovish.")),
        *((STANCE, "文本称赞A股。它很好。"), (NUMBER, "The U.S. has 3. Then 3 * 4 = 12."), (NUMBER, "3 * 4 = 12.")),
        *((asked, "There are 12. All of them."), (WORD, "Fridays are nice. Count on.")),
    ]
    assert [path for row, path in first + later if review.answers_first(row, path)] == [path for _, path in first]
    rows = [Row("trace_fomc", i, "", "B") for i in range(3)]
    found = review.quality(list(zip(rows, ["It is B. So.", "It  is B.\nSo.", "Rates rose."], strict=True)))
    assert found["duplicates"] == 2 and found["answer_first"] == 2
    assert found["characters"] == {"min": 11, "p5": 11.1, "median": 12, "p95": 12.9, "max": 13}
    assert (found["words"]["min"], found["words"]["max"]) == (2, 4)
    assert review.quality([(STANCE, "文本称赞iPhone很好。")])["words"]["max"] == 7
    assert review.quality([(GERMAN, "The train.")])["answer_first"] is None


# --------------------------------------------------------------------------------------------------------- whole runs


def test_wrong_answers_never_enter_and_the_counts_are_right(server, tmp_path, capsys, monkeypatch, options):
    """The program is killed in the middle, and nothing is paid twice. Then RCL trains on the folder."""
    out, put, puts = tmp_path / "out", Cache.put, []

    def killed(self, *args):
        put(self, *args)
        puts.append(args)
        if len(puts) == 80:
            raise KeyboardInterrupt

    argv = ["--rows", 8, "--concurrency", 1]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(Cache, "put", killed)
        command(server, out, *argv)
    assert files(out) == {}, "nothing is written before all is asked"
    command(server, out, *argv)
    said = capsys.readouterr().out
    # Each task has 8 rows: 2 right at the first attempt, 2 at the second, 2 at the third, 2 never: 8 + 6 + 4 requests.
    assert f"{out}: 48 of 64 rows accepted (75.0 %), the others left out: 64 requests sent, 80 from the cache" in said
    assert len(server.bodies) == 144 and [b["seed"] for b in server.bodies].count(3) == 32
    official = demo.make_reasoning()
    for task, folder in data.FOLDERS.items():
        mine = numbers(out, task)
        assert (mine["rows"], mine["accepted"], mine["accepted_by_attempt"]) == (8, 6, [2, 2, 2])
        assert (mine["dropped"], mine["kept"], mine["failed_requests"]) == (2, 0, 0)
        assert (mine["prompt_tokens"], mine["completion_tokens"]) == (180, 54)
        assert mine["rejected_replies"] == {"wrong answer": 18 - 6}
        # The written rows are the demo's own reasoning rows, without those that the teacher got wrong.
        wanted = [row for i, row in enumerate(official[folder]["train"][:8]) if i % 4 < 3]
        assert data.read_split(out, folder, "train") == wanted
        for split in ("eval", "test"):
            assert data.read_split(out, folder, split) == official[folder][split]
    report = (out / "annotation.md").read_text(encoding="utf-8")
    assert "| trace_fomc | 8 | 6 (75.0 %) | 2 + 2 + 2 | 0 | 2 | 0 |" in report and "Demo data" in report
    before = files(out)
    command(server, out, *argv)
    assert files(out) == before and len(server.bodies) == 144, "a third time everything is in the cache"
    monkeypatch.setenv("TRACE_REASONING", str(out))
    run = train({**options, "tasks": ["trace_fomc"]}, RCLTrainer, RCLConfig)
    assert read_json(run.stages[1].train_file)["rows"] == 6


def test_different_settings_are_an_error_before_any_request(server, tmp_path):
    argv = [tmp_path / "out", "--model", "fake/teacher", "--base-url", server.url, "--tasks", "trace_fomc", "--rows", 4]
    main(["annotate", *map(str, argv)])
    asked = len(server.bodies)
    for option, line in (
        (["--rows", "5"], "rows: 4 -> 5"),
        (["--attempts", "2"], "attempts: 3 -> 2"),
        (["--rejected", "keep"], "rejected: 'drop' -> 'keep'"),
        (["--show-answers"], "show_answers: False -> True"),
        (["--model", "other"], "teacher: 'fake/teacher' -> 'other'"),
        (["--sampling", '{"temperature": 1}'], "sampling.temperature: 0.7 -> 1"),
        (["--tasks", "trace_fomc,trace_cstance"], "data.trace_cstance: 'absent' -> '"),
        (["--data", str(write_fomc(tmp_path / "other", [("x", "A")]))], "data.trace_fomc: '"),
    ):
        message = error(*argv, *option)
        assert line in message and message.count("->") == 1 + message.count("\n  ") and "delete" in message
    assert len(server.bodies) == asked
    with Server() as other:
        assert f"endpoint: '{server.url}' -> '{other.url}'" in error(*argv, "--base-url", other.url)
    # Do what the message says: without the file the folder is written again, and only new requests are sent.
    (tmp_path / "out/annotation.json").unlink()
    assert "Several models" not in (tmp_path / "out/annotation.md").read_text(encoding="utf-8")
    server.model = "newer"
    main(["annotate", *map(str, argv), "--rows", "5"])
    assert sorted(numbers(tmp_path / "out")["models"]) == ["fake", "newer"]
    assert "answered** as this teacher: fake, newer" in (tmp_path / "out/annotation.md").read_text(encoding="utf-8")
    assert read_json(tmp_path / "out/annotation.json")["settings"]["rows"] == 5
    assert 1 <= len(server.bodies) - asked <= 3


def test_rejected_rows_can_be_kept_with_only_their_answer(server, tmp_path):
    out, official = tmp_path / "out", demo.make_reasoning()
    command(server, out, "--rows", "4", "--attempts", "1", "--rejected", "keep")
    for task, folder in data.FOLDERS.items():
        rows, mine = data.read_split(out, folder, "train"), numbers(out, task)
        assert (len(rows), mine["accepted"], mine["kept"], mine["dropped"]) == (4, 1, 3, 0)
        for i, (row, wanted) in enumerate(zip(rows, official[folder]["train"], strict=False)):
            path, answer = split_answer(FRAMES[folder].form, row["answer"])
            assert answer == split_answer(FRAMES[folder].form, wanted["answer"])[1]
            assert bool(path.strip()) == (i % 4 == 0)


def test_failed_requests_are_counted_and_sent_again(tmp_path, caplog, capsys):
    """Some requests fail once, one always. The last rounds have only failures, which are no outage."""
    rows = [("good", "B"), ("FAULT:long*1 once", "B"), ("FAULT:long always", "B"), ("FAULT:refusal", "B")]
    ends = {"\ncut": {"finish_reason": "length"}, "\nthink": {"content": None, "reasoning": "x"}}

    def answer(text):
        end = next((end for word, end in ends.items() if word in task_of(text)), {})
        return {"content": f"It says {len(text)}.\nAnswer:B", **end}

    root = write_fomc(tmp_path / "data", [*rows, ("cut", "B"), ("think", "B")])
    with Server(answer) as server:
        command(server, tmp_path / "out", "--data", root, "--sampling", '{"max_tokens": 9}')
        assert len(server.bodies) == 1 + 2 + 3 + 3 + 3 + 3
    mine, report = numbers(tmp_path / "out"), (tmp_path / "out/annotation.md").read_text(encoding="utf-8")
    assert (mine["accepted"], mine["accepted_by_attempt"], mine["failed_requests"]) == (2, [1, 1, 0], 1 + 3)
    assert mine["rejected_replies"] == {"cut at the limit of tokens": 3, "refused": 3, "thinking not closed": 3}
    said = capsys.readouterr().out
    assert "2 of 6 rows accepted (33.3 %)" in said and "15 requests sent, 0 from the cache, 4 failed" in said
    assert "4 requests failed" in report
    note = """3 replies were cut at the limit of tokens and rejected: raise it with --sampling '{"max_tokens": 18}'"""
    assert note in caplog.text and note in report


def test_only_failures_make_no_annotation(tmp_path, right):
    root = write_fomc(tmp_path / "data", [("FAULT:long one", "B"), ("FAULT:long two", "B")])
    with Server(lambda text: right[task_of(text)]) as server:
        argv = ["--model", "m", "--base-url", server.url, "--rows", "2", "--tasks"]
        message = error(tmp_path / "out", *argv, "trace_fomc", "--data", root)
        assert (
            "failed every request (2), so there are no results. The first failure: " in message
            and "too long" in message
        )
        assert files(tmp_path / "out") == {}
        demo.write_demo(tmp_path / "both")
        write_fomc(tmp_path / "both", [("FAULT:long one", "B"), ("FAULT:long two", "B")])
        main(
            ["annotate", *map(str, [tmp_path / "two", *argv, "trace_cstance,trace_fomc", "--data", tmp_path / "both"])]
        )
    report = (tmp_path / "two/annotation.md").read_text(encoding="utf-8")
    assert "| trace_cstance | 2 | 2 (100.0 %) | 2 + 0 + 0 |" in report and "| trace_fomc | 2 | – | – |" in report


def test_annotated_rows_have_different_prompts_and_no_test_prompts(tmp_path, caplog):
    rows = [("one", "A"), ("one", "A"), ("seen", "C"), ("two", "A\nB"), ("three", "B"), ("four", "B"), ("five", "A")]
    root = write_fomc(tmp_path / "data", rows, test=[("seen", "C")])
    argv = ["--data", root, "--rows", "3", "--attempts", "1", "--concurrency", "1"]
    with Server(lambda text: f"It says {task_of(text)[-20:-10]}.\nAnswer:B") as server:
        command(server, tmp_path / "out", *argv)  # one at a time, so that they arrive in their order
        assert [task_of(text).split("\n")[2] for text in server.seen] == ["one", "three", "four"]
        assert numbers(tmp_path / "out")["left_out"] == {"repeated": 1, "test prompt": 1, "unreadable answer": 1}
        assert not (tmp_path / "out/C-STANCE").exists(), "the tasks are those that the data has"
        command(server, tmp_path / "none", *argv[:2], "--rows", "1")
        assert not (tmp_path / "none/FOMC").exists() and "no path was accepted" in caplog.text
        assert numbers(tmp_path / "none")["characters"] is None
        write_fomc(tmp_path / "none", rows)  # as another teacher left it, whose record is deleted to annotate again
        (tmp_path / "none/annotation.json").unlink()
        command(server, tmp_path / "none", *argv[:2], "--rows", "1")
        assert not (tmp_path / "none/FOMC").exists(), "else it would be trained as this teacher's"


def test_the_review_sheet_is_safe_for_spread_sheets(tmp_path):
    rows = [(f"{i} text" + "x" * 40_000 * (i % 5 == 0), "B") for i in range(30)]
    replies = ["=1+1 is two.", "+2 is more.", "-3 is less.", "@home it is.", '中文，"quoted"\nand more.']
    root = write_fomc(tmp_path / "data", rows)
    with Server(lambda text: f"{replies[len(task_of(text)) % 5]}\nAnswer:B") as server:
        command(server, tmp_path / "out", "--data", root, "--attempts", "1")
    content = (tmp_path / "out/review.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbftask,row,prompt,path,answer,ok,comment\r\n")
    table = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    indices = [int(line["row"]) for line in table]
    assert len(table) == review.REVIEWED and indices == sorted(set(indices)) != list(range(20))
    written = data.read_split(tmp_path / "out", "FOMC", "train")
    assert any("x [...] x" in line["prompt"] for line in table)
    for line in table:
        assert (line["task"], line["answer"], line["ok"], line["comment"]) == ("trace_fomc", "B", "", "")
        assert not line["path"].startswith(("=", "+", "-", "@")) and len(line["prompt"]) <= 32_767
        assert written[int(line["row"])]["answer"] == f"{line['path'].removeprefix(chr(39))}\nAnswer:B"


def test_foreign_folders_and_frames_are_errors_before_any_request(server, tmp_path):
    argv = ["--model", "m", "--base-url", server.url]
    root = write_fomc(tmp_path / "data", [("one", "A"), ("two", "A")])
    before = files(root)
    assert "did not write" in error(root, *argv) and files(root) == before
    (tmp_path / "file").touch()
    assert "is a file" in error(tmp_path / "file", *argv)
    for split, index in (("train", 1), ("eval", 0)):
        rows = read_json(root / f"FOMC/{split}.json")
        changed = [{**row, "prompt": row["prompt"] + " " * (i == index)} for i, row in enumerate(rows)]
        write_json(root / f"FOMC/{split}.json", changed)
        message = error(tmp_path / "out", *argv, "--data", root)
        assert f"FOMC/{split}.json, row {index}: the prompt ends in" in message and "Stance:" in message
        write_json(root / f"FOMC/{split}.json", rows)
    assert not server.bodies


# ------------------------------------------------------------------------------------------------------------ command


def test_a_dry_run_sends_and_writes_nothing_and_needs_no_key(server, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.delenv("OPENAI_API_KEY")
    argv = ["--dry-run", "--rows", "5", "--price-in", "1000000", "--price-out", "0"]
    command(server, tmp_path / "out", *argv)
    out = capsys.readouterr().out
    assert "first of at most 3 attempts" in out and "40 requests to send" in out and "cost" in out
    assert not server.bodies and not (tmp_path / "out").exists()
    assert "OPENAI_API_KEY is not set" in error(tmp_path / "out", "--model", "m")
    argv += ["--tasks", "trace_fomc", "--sampling", '{"temperature": 0}']
    command(server, tmp_path / "out", *argv, "--attempts", "1")
    assert not caplog.text and "attempts, if every" not in capsys.readouterr().out
    command(server, tmp_path / "out", *argv)
    assert "every attempt gives the same reply" in caplog.text


def test_a_dry_run_states_what_all_attempts_cost_at_most(server, tmp_path, capsys):
    """It also states the cost of the rest after a part is done: the path of the last of 4 rows is never accepted."""
    argv = ["--rows", "4", "--tasks", "trace_fomc", "--price-in", "0", "--price-out", "1000000", "--currency", "USD"]

    def most(*options):
        command(server, tmp_path / "out", *argv, "--dry-run", *options)
        return capsys.readouterr().out.splitlines()

    found = most()
    assert "worst case: 4,096 reply tokens" in found[3] and found[3].endswith(", cost 4096.00 USD")
    assert found[4].startswith("all 3 attempts, if every path is rejected: at most 12 requests, about ")
    assert found[4].endswith(" and 12,288 reply tokens, cost 12288.00 USD") and len(found) == 5
    assert most("--sampling", '{"temperature": 1}')[4].endswith("no token limit is sent, any number of reply tokens")
    command(server, tmp_path / "out", *argv, "--attempts", "1")
    assert capsys.readouterr().out.endswith(f", cost {3 * len(server.bodies)}.00 USD\n")
    (tmp_path / "out/annotation.json").unlink()
    assert len(server.bodies) == 4 and "at most 6 requests" in most()[4], "3 rows twice: the first is settled"
    command(server, tmp_path / "out", *argv)
    assert "at most 0 requests" in most()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--local", "--batch"], "--batch has no effect with --local"),
        (["--tasks", "trace_fomc,gsm8k"], "gsm8k: no official reasoning form"),
        (["--data", "nowhere"], "no such folder or archive"),
        (["--prompts", "."], "has the files none"),
        (["--prompts", "missing"], "missing is not a folder"),
        (["--prompts", "own"], "has the files formc.yaml"),
        (["--sampling", '{"seed": 1}'], "--sampling seed is set by this program"),
    ],
)
def test_unusable_options_are_errors(tmp_path, argv, message):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/formc.yaml").touch()
    assert message in error(tmp_path / "out", "--model", "m", *argv)
