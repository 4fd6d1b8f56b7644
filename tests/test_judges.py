"""Tests of the judges: prompts that answers cannot manipulate, verdicts, numbers worked by hand, runs, the command."""

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import byte_tokenizer
from judge_server import KEY, Server, judge, with_key

from judges import calibrate, judging, local, prompts
from judges.broken import why_broken
from judges.client import Client
from judges.replies import Reply
from judges.thinking import answer_of, opened_by
from judges.verdict import parse, verdict_of, why_unscored
from trace_bench import engine, judgements
from trace_bench.cli import main
from trace_bench.judgements import INSTRUCTION, KINDS, SAFETY, judge_file, longer
from trace_bench.metrics import wilson_interval
from trace_bench.report import write_report
from trace_bench.report.tables import DASH
from trace_bench.run import Run, RunError
from trace_tasks.data.files import write_json, write_jsonl

LIMA, CONA = "instruct_lima", "safety_cona"
BASE = ["same answer", "a longer answer than mine", "short", "four", "bomb", "sorry, no"]
MINE = ["same answer", "short one", "a longer answer than theirs", "five", "nothing", "sorry, I cannot"]
TRAIN = {
    **{"checkpoint": "w", "rows": 1, "steps": 1, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0},
    **{"peak_memory_bytes": 1, "memory_of": "process"},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trace_bench.report.write.write_page", lambda *_, **__: None)  # report.md is enough here
    with with_key(monkeypatch, tmp_path):
        yield


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def run(tmp_path):
    """A run of two stages with answers at all of them: one is better than the base model's, one worse, one equal."""
    manifest = {"method": "sequential", "trains": "lora", "model": {"name": "m"}, "task_versions": {}, "config": {}}
    manifest |= {"tasks": ["trace_fomc", "trace_cstance"], "data": {"path": None, "demo": False, "fingerprint": {}}}
    run = Run.create(tmp_path / "runs" / "mine", manifest)
    for stage in run.stages:
        if stage.index:
            write_json(stage.train_file, TRAIN)
        for suite in (LIMA, CONA):
            write_samples(stage, suite, MINE if stage.index else BASE)
    return run


def write_samples(stage, suite, answers, prompt="question"):
    rows = [{"doc_id": i, "prompt": f"{prompt} {i}", "target": "", "response": a} for i, a in enumerate(answers)]
    write_jsonl(stage.samples_file(suite), rows)


def result(run, index, suite=LIMA):
    return json.loads(judge_file(run.stages[index], suite).read_text(encoding="utf-8"))


def rows(run, index, suite=LIMA):
    file = judge_file(run.stages[index], suite).with_suffix(".jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def section(run, title):
    """Writes the report and returns one of its sections."""
    write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0] if f"## {title}\n" in text else ""


def table(run, title):
    """First cell of a line -> the other cells."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section(run, title).splitlines()]
    return {first: cells for first, *cells in lines if len(cells) > 8}


def of(server, run):
    return ("judge", run.path, "--model", "fake/judge", "--base-url", server.url)


def command(server, run, *argv):
    main([str(a) for a in (*of(server, run), *argv)])


def error(*argv):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ")
    return e.value.code


# --------------------------------------------------------------------------------------------------- verdicts, prompts


#: Verdict -> replies with this verdict.
VERDICTS = {
    "A": [
        "A is better.\n[[A]]",
        "[[A]], I say it again: [[A]]",
        "[[D]] but rather [[A]]",
        "I say “[[A]]”.",
        "`[[A]]`\n\nB is dull.",
        "**Verdict:** `[[A]]`.\n\nB is dull.",
        *('{"verdict": "[[A]]", "reason": "B is\ndull"}', '```json\n{"verdict": " [[a]] ", "why": "B is dull"}\n```'),
    ],
    "B": [
        *("Is it [[A]] or [[B]]?\nAfter all it is\n\n[[B]]  \n\n", "Is it [[A]]?\u2028[[B]]"),
        "I lean to [[A]].</think>It is [[B]]",  # the template opened the thinking
        "<think>a</think>\n[[A]]\n<think>b</think>\n[[B]]",
        *("A shows its `<think>` and `</think>`, B does not.\n[[B]]", "A shows its < think>, B does not.\n[[B]]"),
    ],
    "C": ["Verdict: [[ c ]].", "<think>[[A]]? No, [[B]].</think>\nIt is [[C]]"],
    None: [
        *("[[A]]\n[[B]]\nso [[A]] or [[B]]", "[[A]]\n[[B]]\nI cannot decide.", "[A] or A, [ [A]], ［［A］］", "[[D]]"),
        *("", None, "<think>[[A]] it is.</think>\nI cannot say.", "[[A]]\n<think>But then"),
        *("<think>a</think>\n[[A]]\n<think>But [[B]]", "<think><reasoning>a</reasoning>\n[[A]]"),
        *(
            'The format asks for "[[A]]" if A is better. I find B better.',
            "B.\n`[[A]]` would be wrong.",
            "No “[[C]]”: B.",
            'The format: "[[A]]" or a tie.\nB is better.',
        ),
        *('It is "[[B]]" rather than "[[A]]".', "`[[A]]` or [[B]]"),
        *('{"first": "[[A]]", "then": "[[B]]", "why": ""}', '{"why": "[[A]] if I knew", "verdict": null, "n": [1]}'),
        *('{"why": "not \\"[[A]]\\"", "verdict": null}', 'As in {"verdict": "[[A]]", "why": "dull"} it is asked.'),
        *('For example:\n{"verdict": "[[A]]", "why": "dull"}', '["[[A]]", "dull"]', '"[[A]]" {"a": 1}', "{" * 9999),
    ],
}


@pytest.mark.parametrize("verdict", VERDICTS, ids=str)
def test_the_last_verdict_of_a_reply_counts(verdict):
    for reply in VERDICTS[verdict]:
        assert parse(reply, prompts.PAIR) == verdict, reply
        # A chat template may have opened the thinking. A reply from an endpoint does not show this.
        assert parse(reply, prompts.PAIR, cut=True) is None


MARKS = [
    *((f"<{tag}>", f"</{tag}>") for tag in ("think", "Thinking", "thought", "reasoning", "seed:think", "ifm|think_f")),
    *(("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    *(("<|channel>thought\n", "<channel|>"), ("<unused94>thought\n", "<unused95>")),
    ("Here is my thought process:", "Here is my response:"),
]


@pytest.mark.parametrize("start, end", MARKS)
def test_thinking_marks_of_every_family_are_known_and_neutralised_in_answers(start, end):
    assert parse(f"{start}Is it\n[[A]]{end}\nIt is better.\n[[B]]", prompts.PAIR) == "B"
    assert parse(f"Is it\n[[A]]{end}\nIt is better.\n[[B]]", prompts.PAIR) == "B"
    assert parse(f"{start}Is it\n[[A]]", prompts.PAIR) is None
    assert parse(f"{start}Is it [[A]]{end}", prompts.PAIR) is None
    plain = "process" in start
    assert opened_by(f"<|assistant|>{start}").strip() == ("" if plain else start.strip())
    assert not opened_by(f"<|assistant|>{start}\n{end}\n\n"), "a template that turns thinking off"
    shown = prompts.neutralise(f"{start}I hide{end}")
    assert plain or (answer_of(shown) == shown and shown.replace(" ", "") == f"{start}I hide{end}".replace(" ", ""))


def test_a_reply_without_a_verdict_has_a_reason():
    for reply, reason in {
        Reply("[[A]]"): None,
        Reply("[[A]]", finish_reason="length", forced=True): "forced",
        Reply("A.", finish_reason="stop"): "no clear verdict",
        Reply("[[A]]", finish_reason="model_length"): "cut at its limit of tokens",
        Reply("<think>[[A]]", finish_reason="length"): "thinking not closed, cut at its limit of tokens",
        Reply("", thinking="[[A]]", unclosed=True): "thinking not closed",
        Reply("No: [[A]]", refusal=True): "refused",
        Reply("", error="no server"): "failed",
    }.items():
        assert why_unscored(reply, prompts.PAIR) == reason
        assert verdict_of(reply, prompts.PAIR) == (None if reason else "A")
        assert verdict_of(reply, prompts.PAIR, forced=True) == ("A" if reason == "forced" else None)


def test_the_named_option_for_a_limit_is_the_given_one():
    assert longer({"max_completion_tokens": 50}) == """--sampling '{"max_completion_tokens": 100}'"""
    assert '"max_tokens": 4096}' in longer({"temperature": 1}) and "a longer context" in longer({"temperature": 1})


def test_ordinary_text_is_unchanged_in_a_prompt_and_the_request_comes_last():
    """test_security has hostile texts."""
    for text in ("", "matrix[0][1] = a[b[0]]", "cout << x << y; a <- b; x < y", "[x]", "<b>bold</b>", "中文 <<引>>"):
        assert prompts.neutralise(text) == text
    for kind in KINDS:
        one, other = (prompts.pair(kind, "q", *texts)[0]["content"] for texts in (("#1#", "#2#"), ("#2#", "#1#")))
        assert one.split("#1#")[0] == other.split("#2#")[0] and one.split("#2#")[1] == other.split("#1#")[1]
        for asked, words in ((one, prompts.PAIR), (prompts.direct(kind, "q", "a")[0]["content"], kind.words)):
            assert all(f"[[{word}]]" in asked.rsplit(">>>", 1)[1] for word in words)


# -------------------------------------------------------------------------------------------------------------- numbers


def pair(*verdicts, identical=False):
    combined, disagree = ("tie", False) if identical else judgements.combine(*verdicts)
    return {"combined": combined, "disagree": disagree, "identical": identical, "verdicts": list(verdicts)}


def test_counts_and_rates_equal_those_worked_by_hand():
    for verdicts in ("AA", "BB", "AC", "CA", "BC", "CB"):
        assert judgements.combine(*verdicts) == ("tie", True)
    for verdicts in ((None, "A"), ("C", None), (None, None)):
        assert judgements.combine(*verdicts) == ("unscored", False)
    pairs = [pair("A", "B"), pair("A", "B"), pair("B", "A"), pair("A", "A"), pair("A", None), pair(identical=True)]
    counts = judgements.tally([*pairs, {**pair("A", "B"), "combined": "broken", "verdicts": []}])
    assert counts == {
        **{"n": 7, "win": 2, "tie": 2, "lose": 1, "unscored": 1, "broken": 1, "identical": 1, "judged": 4},
        **{"disagreements": 1, "first": 5, "second": 3},
    }
    rates = judgements.rates(counts)
    assert (rates["win_rate"], rates["tie_rate"], rates["lose_rate"]) == (0.4, 0.4, 0.2)
    assert rates["net_win_rate"] == pytest.approx(0.2)
    assert rates["net_interval"][0] <= 0.2 <= rates["net_interval"][1]
    assert rates["win_interval"] == wilson_interval(2, 5)
    assert rates["disagreement_rate"] == 0.25 and rates["first_position_rate"] == pytest.approx(5 / 8)
    assert set(judgements.rates(judgements.tally([pair(None, None)])).values()) == {None}
    assert judgements.tally([pair("C", "C")])["tie"] == 1
    rate = judgements.direct_rate(SAFETY, ["SAFE", "SAFE", "UNSAFE", None, "BROKEN", "BROKEN"])
    assert (rate["n"], rate["unscored"], rate["broken"], rate["safe"], rate["unsafe"]) == (6, 1, 2, 2, 1)
    assert rate["rate"] == pytest.approx(2 / 3)
    assert judgements.direct_rate(INSTRUCTION, ["REFUSED", "ANSWERED"])["rate"] == 0.5
    assert judgements.direct_rate(SAFETY, [None, "BROKEN"])["rate"] is None


BROKEN = {
    "empty": ["", " \n\u200b\ufeff\t"],
    "no letters": ["?!?", "-----", "。。。", "🙂"],
    "repetition": [
        *("the " * 8, "The the THE the the the the, the", "I see. " + "no " * 100, "好的" * 10, "ab" * 200, "0" * 40),
        "very good " * 30,
    ],
    "mojibake": ["\ufffd" * 12, "Ã¼Ã¶Ã¤ Ã¼ber", "æ\u0088\u0091ä»¬ä\u008d å¥½", "\x00\x01\x02 abc"],
    None: [
        *("36", "No.", "I'm sorry, but I cannot help with that.", "不", "No, no, no, no!", "100000000"),
        *("ha ha ha ha ha ha, that is funny, and here is why it is so", "Schöne Grüße aus Köln", "Âge et Ã la carte"),
        *("Désolé…", "Oui, “café”"),
        *("It is Ã¼ber in a long text that has one broken character, which does not matter.", "I am sorry. " * 3),
        *("- one\n- two\n- three\n- four\n- five\n- six\n- seven", "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"),
        *("def f(x):\n    return x + x + x + x + x + x + x + x + x", "नमस्ते दुनिया", "한국어 문장입니다"),
    ],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_only_meaningless_text_is_broken(reason):
    assert {text: why_broken(text) for text in BROKEN[reason]} == dict.fromkeys(BROKEN[reason], reason)


def test_long_texts_are_read_in_seconds():
    started = time.process_time()
    for piece in ("a", "ab ", "\u200b", "Ã", "x1y2z3", " ", "a" * 19 + "b"):
        why_broken(piece * 100_000)
    for piece in ("<", "<a", "<a:", "<think", "<think>", "`<think>", "<|channel|>final", "Here's ", " "):
        text = piece * (200_000 // len(piece))
        answer_of(text), opened_by(text)
    assert time.process_time() - started < 10


def lengths(*results):
    """Judged pairs from (result, characters of the answer, characters of the base model's answer)."""
    return [{"combined": result, "lengths": [one, other]} for result, one, other in results]


def simulated(a, b, n=4000):
    rng = np.random.default_rng(0)
    difference = rng.normal(30, 100, n)
    won = rng.random(n) < 1 / (1 + np.exp(-(a + b * np.tanh(difference / difference.std()))))
    return lengths(*[("win" if w else "lose", 500 + d, 500) for w, d in zip(won, difference, strict=True)])


@pytest.mark.parametrize("a, b", [(0, 0), (0, 2), (0.7, 0), (-0.5, 1.5), (0.3, -1)])
def test_the_rate_at_equal_length_equals_that_of_the_simulated_wins(a, b):
    rows = simulated(a, b)
    found = judgements.length_controlled(rows)
    assert found.value == pytest.approx(math.tanh(a / 2), abs=0.06)
    assert found.low < math.tanh(a / 2) < found.high and 0.03 < found.high - found.low < 0.15
    raw = sum(1 if row["combined"] == "win" else -1 for row in rows) / len(rows)
    assert abs(raw - found.value) > 0.05 or abs(b) < 1, "a judge that likes length alone moves the raw rate"
    ties = lengths(*[("tie", 100 + 7 * i, 200) for i in range(400)])
    assert abs(judgements.length_controlled(rows + ties).value) <= abs(found.value) + 0.01, "half a win each"
    assert judgements.length_controlled(rows + lengths(("unscored", 9, 1), ("broken", 0, 1))) == found


def test_there_is_no_rate_at_equal_length_without_enough_information():
    for rows in (
        lengths(*[("win" if i % 3 else "lose", i, 0) for i in range(19)]),  # too few
        lengths(*[("win" if i % 3 else "lose", 5, 2) for i in range(60)]),  # equal differences of length
        lengths(*[("win", i, 9) for i in range(60)]),  # no loss
        lengths(
            *[("win" if i > 30 else "lose", i, 30) for i in range(60)]
        ),  # the length alone separates wins from losses
        [{"combined": "win"}, {"combined": "lose"}] * 30,  # as in older results
    ):
        assert math.isnan(judgements.length_controlled(rows).value)


# --------------------------------------------------------------------------------------------------------- runs, report


def test_every_stage_is_judged_against_the_base_model(server, run, capsys, monkeypatch):
    assert not section(run, "Instruction following") and not section(run, "Safety")
    write_samples(run.stages[0], "instruct_koala", BASE[:3])
    write_samples(run.stages[1], "instruct_koala", MINE[:3])
    command(server, run)
    numbers = result(run, 1)
    # MINE is longer than BASE at 2, 4 and 5, shorter at 1, as long at 3, and identical at 0.
    wanted = {"n": 6, "win": 3, "tie": 2, "lose": 1, "identical": 1, "judged": 5}
    assert {k: numbers["pairs"][k] for k in wanted} == wanted
    assert numbers["pairs"]["net_win_rate"] == pytest.approx(2 / 6)
    assert (numbers["direct"]["refused"], numbers["direct"]["answered"]) == (1, 5)
    base, later = result(run, 0, CONA), result(run, 2, CONA)
    assert "pairs" not in base and (base["direct"]["unsafe"], later["direct"]["unsafe"]) == (1, 0)
    assert base["settings"]["judge"] == "fake/judge" and base["endpoint"] == server.url
    first, _, row, *_ = rows(run, 1)
    assert first["replies"] == [], "identical answers are not asked about"
    assert (row["doc_id"], row["combined"], row["verdicts"]) == (2, "win", ["A", "B"])
    assert [r[-5:] for r in row["replies"]] == ["[[A]]", "[[B]]"] and row["direct_reply"] == "[[ANSWERED]]"
    # Stages 1 and 2 have the same answers, so no request is sent twice.
    assert set(server.seen.values()) == {1}
    out = capsys.readouterr().out
    assert "judged 8 suites (0 judgements unscored)" in out and f"{len(server.bodies)} requests sent" in out
    text, lines = section(run, "Instruction following"), table(run, "Instruction following")
    assert lines["0_base"][:10] == [DASH] * 10
    # Both suites together have 9 pairs: 4 wins, 3 ties, 2 losses.
    low, high = wilson_interval(4, 9)
    assert lines["1_trace_fomc"][:2] == ["9", f"44.4 [{100 * low:.1f}, {100 * high:.1f}]"]
    assert lines["1_trace_fomc"][4].startswith("+22.2 [")
    assert lines["1_trace_fomc"][5:10] == [DASH, "0.0", "50.0", "0", "0"]
    assert lines["2_trace_cstance"] == [DASH] * 13 and "2_trace_cstance was not judged on instruct_koala" in text
    assert lines["1_trace_fomc"][10].startswith("11.1 [")  # 1 of 9 refused
    assert "instruct_koala, instruct_lima" in text and "| koala | lima |" in text
    assert "`fake/judge`" in text and "not calibrated: `trace-bench judge" in text
    assert "| 100.0 [" in section(run, "Safety")
    plant(monkeypatch, 3)
    main([str(a) for a in (*of(server, run), "--calibrate")])
    assert "right on planted answers, percent: truncated 100.0" in section(run, "Instruction following")


def test_only_new_answers_are_judged_again(server, run, capsys):
    only = ("--stages", "0,1", "--suites", CONA)
    command(server, run, *only)
    assert not judge_file(run.stages[2], CONA).exists()
    sent = len(server.bodies)
    command(server, run, *only)
    assert "nothing to judge" in capsys.readouterr().out
    judge_file(run.stages[1], CONA).unlink()
    command(server, run, *only)
    assert len(server.bodies) == sent, "the replies are in the cache"
    command(server, run)
    write_samples(run.stages[1], LIMA, ["better and longer in every way", *MINE[1:], "one more"])
    text = section(run, "Instruction following")
    assert "2_trace_cstance" in text and "1_trace_fomc" not in text, "old judgements are not shown"
    command(server, run)
    assert result(run, 1)["pairs"]["win"] == 4 and max(server.succeeded.values()) == 1
    assert (result(run, 1)["unpaired"], result(run, 1)["pairs"]["n"]) == (1, 6)
    assert "1 rows had no partner" in section(run, "Instruction following")
    write_json(run.stages[1].eval_file(LIMA), {"checkpoint": "older"})  # as if the stage had been trained again
    assert [index for index, suite in judgements.load(run, INSTRUCTION) if suite == LIMA] == [0, 2]


def test_an_alias_that_later_means_a_different_model_is_a_different_judge(server, run, caplog, monkeypatch):
    plant(monkeypatch, 2)
    server.model = "fake-march"
    main([str(a) for a in (*of(server, run), "--calibrate")])
    command(server, run, "--stages", "1", "--suites", LIMA)
    assert result(run, 1)["models"] == {"fake-march": 16} and "several models" not in caplog.text
    text = section(run, "Instruction following")
    assert "the endpoint says that `fake-march` answered" in text and "right on planted answers" in text
    server.model = "fake-june"
    write_samples(run.stages[1], LIMA, [*MINE[:-1], "an answer that is new"])
    command(server, run, "--stages", "1", "--suites", LIMA)
    assert result(run, 1)["models"] == {"fake-june": 3, "fake-march": 13}
    assert "fake/judge answered as several models (fake-june 3 times, fake-march 13 times)" in caplog.text
    write_samples(run.stages[2], LIMA, [f"{answer}, of stage 2" for answer in MINE])
    caplog.clear()
    command(server, run, "--stages", "2", "--suites", LIMA)
    assert result(run, 2)["models"] == {"fake-june": 18} and not caplog.text, "one model at this stage"
    text = section(run, "Instruction following")
    assert "answered** as `fake/judge`: fake-june (stage 1, 2); fake-march (stage 1). So this is not" in text
    assert "not calibrated" in text


def test_a_limit_is_recorded_and_more_rows_can_be_judged_later(server, run):
    for stage in run.stages:
        file = stage.samples_file(LIMA)
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        write_jsonl(
            file, [{**row, "prompt": f"<|im_start|>user\n{row['prompt']}", "instruction": "Why?"} for row in samples]
        )
    command(server, run, "--limit", "2", "--suites", LIMA)
    assert all("<<<REQUEST>>>\nWhy?\n<<<END" in text for text in server.seen), "without the chat template"
    assert result(run, 1)["pairs"]["n"] == 2
    assert "**Limited rows**: first 2 of each suite" in section(run, "Instruction following")
    command(server, run)
    assert result(run, 1)["pairs"]["n"] == 6 and max(server.seen.values()) == 1


def test_stages_without_answers_are_named_before_any_request(server, run, caplog):
    argv = of(server, run)
    write_json(run.stages[1].eval_file(LIMA), {"checkpoint": "older"})
    run.stages[2].train_file.unlink()
    judge_ = Client("m", cache=Path("c.jsonl"), base_url=server.url)
    left = [(job.stage.index, job.suite) for job in judging.plan(run, judge_)]
    assert left == [(0, LIMA), (0, CONA), (1, CONA)]
    assert "older checkpoint" in caplog.text and "stage 2_trace_cstance: it is not trained" in caplog.text
    run.stages[1].eval_file(LIMA).unlink()
    write_json(run.stages[2].train_file, TRAIN)
    write_samples(run.stages[2], LIMA, MINE, prompt="another question")
    message = error(*argv)
    assert "no prompt in common" in message and "2_trace_cstance" in message
    samples = run.stages[1].samples_file(LIMA)
    for damaged, why in (
        ('{"doc_id": 1}', "it lacks 'prompt'"),
        ('{"doc_id": 1, "prompt": "p", "response": 5}', "line 1 is not a sample"),
        ('{"doc_id": 1, "prompt": "p", "response": "\\ud800"}', "line 1 is not a sample"),
        ('{"doc_id": 1, "prompt": "p", "response": "r"}\n' * 2, "line 2 is not a sample"),
    ):
        samples.write_text(damaged + "\n")
        assert why in error(*argv, "--suites", LIMA)
    said = error(*argv, "--suites", "instruct_nothing")
    assert "no samples of instruct_nothing" in said and f"evaluate {run.path} --judged instruct_nothing`." in said
    assert "no stage [7]" in error(*argv, "--stages", "7")
    run.stages[0].samples_file(CONA).unlink()
    assert "Stage 0 has no samples of safety_cona" in error(*argv, "--suites", CONA)
    for file in run.path.rglob("*.jsonl"):
        file.unlink()
    assert "instruct_* or safety_*" in error(*argv) and not server.bodies


def test_with_all_faults_every_pair_is_judged_or_counted_as_unscored(server, run, caplog):
    faults = ["busy*1", "garbled*1", "empty*2", "refusal", "filter", "long", "garbled*9"]
    for stage in run.stages[:2]:
        answers = [f"answer {stage.index} FAULT:{fault}" for fault in faults]
        write_samples(stage, LIMA, [*answers, "sorry, this is fine"])
    only = ("--suites", LIMA, "--stages", "1")
    command(server, run, *only)
    # Both refusals are replies without a verdict, and the last two fail. The other answers are as long as the base's.
    pairs = result(run, 1)["pairs"]
    assert (pairs["n"], pairs["unscored"], pairs["tie"], result(run, 1)["failed"]) == (8, 4, 4, 6)
    assert [bool(r.get("errors")) for r in rows(run, 1)] == [False] * 5 + [True] * 2 + [False]
    assert "requests failed" in caplog.text and KEY not in caplog.text
    assert "requests failed and count as unscored" in section(run, "Instruction following")
    # The same command repeats only the failed requests.
    server.seen.clear()
    command(server, run, *only)
    assert server.seen and all("FAULT:long" in text or "FAULT:garbled*9" in text for text in server.seen)
    assert max(server.succeeded.values()) == 1


def test_only_failures_make_no_results(server, run, caplog, capsys):
    for suite in (LIMA, CONA):
        write_samples(run.stages[1], suite, [f"FAULT:long {suite} {i}" for i in range(3)])
    only = ("--stages", "1", "--suites")
    for argv in ([*only, LIMA], [*only, f"{LIMA},{CONA}"]):
        assert "failed every request (" in (message := error(*of(server, run), *argv)) and "too long" in message
    assert not list(run.path.rglob("judge/*.json*")) and "judged" not in capsys.readouterr().out
    # One suite has only failures, another one was judged.
    write_samples(run.stages[1], CONA, MINE)
    command(server, run, *only, f"{LIMA},{CONA}")
    assert not judge_file(run.stages[1], LIMA).exists() and result(run, 1, CONA)["failed"] == 0
    assert f"1_trace_fomc, {LIMA}: every request failed, so it has no results. The first" in caplog.text
    out = capsys.readouterr().out
    assert "judged 1 suites" in out and "9 failed" in out and not section(run, "Instruction following")


def test_a_collapsed_model_is_broken_and_not_safe(server, run):
    broken = ["the the the the the the the the the", "", "ü?" * 20, "!!!", *MINE[4:]]
    for suite in (LIMA, CONA):
        write_samples(run.stages[1], suite, broken)
    command(server, run, "--stages", "0,1")
    numbers, lines = result(run, 1, CONA), rows(run, 1, CONA)
    assert (numbers["direct"]["n"], numbers["direct"]["broken"], numbers["direct"]["safe"]) == (6, 4, 2)
    assert (numbers["pairs"]["n"], numbers["pairs"]["broken"]) == (6, 4)
    assert numbers["requests"] == 6, "two answers alone, and two pairs in both orders"
    assert [line["combined"] for line in lines[:4]] == ["broken"] * 4 and lines[1]["broken"] == ["empty", None]
    assert lines[4]["lengths"] == [len(MINE[4]), len(BASE[4])] and "broken" not in lines[4]
    cells = table(run, "Safety")["1_trace_fomc"]
    assert (cells[-1], cells[-4]) == ("4", "4")
    # For requests for help, a broken answer loses.
    helped = result(run, 1)
    assert (helped["direct"]["broken"], helped["pairs"]["broken"], helped["pairs"]["judged"]) == (4, 0, 6)
    assert rows(run, 1)[1]["combined"] == "lose"
    # Changing the line of a pair does not leave the pair out.
    file = judge_file(run.stages[1], CONA)
    write_jsonl(file.with_suffix(".jsonl"), [*lines[:4], {**lines[4], "combined": "broken"}, lines[5]])
    write_json(file, {k: v for k, v in numbers.items() if k != "lines"})
    with pytest.raises(RunError, match="row 4 does not match its verdicts"):
        write_report(run)
    # In prompts of version 6, a verdict in one order alone counted for its position.
    alone = [{**lines[4], **pair("A", None)}]
    write_jsonl(file.with_suffix(".jsonl"), alone)
    counts = judgements.tally(alone)
    older = {**counts, **judgements.rates(counts), "first": 1, "first_position_rate": 1.0}
    direct = judgements.direct_rate(SAFETY, [alone[0]["direct"]])
    made = {k: v for k, v in numbers.items() if k != "lines"} | {"pairs": older, "direct": direct}
    write_json(file, made)
    with pytest.raises(RunError, match=r"pairs\.first: 1 -> 0"):
        write_report(run)
    write_json(file, {**made, "settings": {**made["settings"], "prompts": 6}})
    write_report(run)
    # The numbers also add up without the lines, and in results of a version without these counts.
    file.with_suffix(".jsonl").unlink()
    write_report(run)
    numbers["direct"] = judgements.direct_rate(SAFETY, ["SAFE", "SAFE"])
    counts = judgements.tally([pair(identical=True), pair("A", "B")])
    del numbers["direct"]["broken"], counts["broken"]
    write_json(file, {**numbers, "pairs": {**counts, **judgements.rates(counts)}})
    write_report(run)


def test_the_report_shows_the_rate_at_equal_length(server, run):
    for stage in run.stages[:2]:
        kind, step = ("a good answer", 1) if stage.index else ("another answer", 7)
        write_samples(stage, LIMA, [f"{kind} {i}" + " word" * ((i * step) % 9) for i in range(40)])

    def every_third_is_lost(text):
        if "ANSWER A" not in text:
            return judge(text)
        won, good_first = int(re.search(r"answer (\d+)", text)[1]) % 3, text.find("good") < text.find("<<<ANSWER B")
        return "[[A]]" if bool(won) == good_first else "[[B]]"

    server.answer = every_third_is_lost
    command(server, run, "--suites", LIMA, "--stages", "1")
    controlled = judgements.length_controlled(rows(run, 1))
    cell = table(run, "Instruction following")["1_trace_fomc"][5]
    assert cell.startswith(f"{100 * controlled.value:+.1f} [") and result(run, 1)["pairs"]["win"] == 26


# -------------------------------------------------------------------------------------------------------------- command


def test_the_help_imports_no_client():
    code = (
        "import sys\nfrom trace_bench.cli import main\nfor command in ('judge', 'annotate'):\n"
        "  try: main([command, '--help'])\n  except SystemExit: pass\n"
        "heavy = {'openai', 'torch', 'vllm', 'httpx'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "--calibrate" in done.stdout and "TRACE_REASONING=data/mine trace-bench train rcl" in done.stdout


def test_a_dry_run_sends_no_request_and_needs_no_key(server, run, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    command(server, run, "--dry-run", "--price-in", "1000000", "--price-out", "0")
    out = capsys.readouterr().out
    # Answers alone of 2 kinds at 2 different stages, and 5 pairs in both orders. Stage 2 repeats stage 1.
    count = 2 * (6 + 6 + 10) - sum(m == b for m, b in zip(MINE, BASE, strict=True)) * 2
    tokens = re.search(r"about ([\d,]+) prompt tokens", out)[1].replace(",", "")
    assert out.startswith(f"{count} requests to send") and f", cost {tokens}.00" in out and not server.bodies
    main(["judge", "--calibrate", "--model", "m", "--dry-run"])
    out = capsys.readouterr().out
    assert "384 requests to send" in out and "api.openai.com" in out
    assert "OPENAI_API_KEY is not set" in error("judge", run.path, "--model", "m")


@pytest.mark.parametrize(
    "sampling, expected, worst",
    [
        (None, 300, 1024),
        ({"max_completion_tokens": 4000}, 300, 4000),
        ({"max_tokens": 50, "max_completion_tokens": None}, 50, 50),
        ({"max_tokens": 500, "max_completion_tokens": 200}, 300, 500),
        *(({"temperature": 0}, 300, None), ({"max_tokens": -1, "max_completion_tokens": 9}, 300, None)),
    ],
)
def test_a_dry_run_states_the_expected_and_the_worst_cost(server, run, capsys, sampling, expected, worst):
    argv = ["--dry-run", "--stages", "0", "--suites", LIMA]
    argv += ["--sampling", json.dumps(sampling)] if sampling else []
    prices = ["--price-in", "0", "--price-out", "1000000"]
    for given, unit in ((prices, ""), ([*prices, "--currency", "EUR"], " EUR")):
        command(server, run, *argv, *given)
        _, usual, most = capsys.readouterr().out.splitlines()
        assert usual.startswith(f"expected: about {6 * expected:,} reply tokens")
        assert usual.endswith(f", cost {6 * expected}.00{unit}")
        if worst:
            assert most.startswith(f"worst case: {6 * worst:,} reply tokens") and f"the limit sent, {worst:,})" in most
            assert most.endswith(f", cost {6 * worst}.00{unit}")
        else:
            assert "there is none, since no token limit is sent" in most and "cost" not in most
    command(server, run, *argv)
    assert "cost" not in capsys.readouterr().out and not server.bodies


def test_the_last_line_has_the_cost_in_its_currency(server, run, capsys):
    command(server, run, "--suites", LIMA, "--price-in", "0", "--price-out", "1000000", "--currency", "€")
    out = capsys.readouterr().out
    assert out.endswith(f", cost {3 * len(server.bodies)}.00 €\n") and server.bodies
    server.usage = None
    command(server, run, "--suites", CONA, "--stages", "0", "--price-in", "1", "--price-out", "1")
    out = capsys.readouterr().out
    assert out.endswith("0 reply tokens, cost 0.00, without 6 replies for which the endpoint gave no counts\n")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sampling", "[1]"], "--sampling must be a JSON object"),
        (["--sampling", '{"max_tokens": "9"}'], "max_tokens is '9': use a whole number"),
        (["--sampling", '{"max_completion_tokens": 1e9}'], "use a whole number of tokens"),
        (["--sampling", '{"n": 2}'], "one reply to each request is read"),
        (["--currency", "EUR"], "give both, or"),
        *(
            (["--price-in", "1", "--price-out", "1", "--currency", name], "2")
            for name in ("", "a b", "\x1b[2J", "x" * 11)
        ),
        (["--stages", "x"], "--stages must be numbers"),
        (["--price-in", "1"], "Give both --price-in"),
        (["--local", "--batch", "--concurrency", "3"], "--concurrency, --batch has no effect with --local"),
        (["--local", "--engine-args", '{"quantization": "fp8"}'], "quantization is not allowed"),
        (["--calibrate", "--limit", "3"], "--limit has no effect with --calibrate"),
        (["--engine-args", "{}"], "works only with --local"),
        *((argv, "2") for argv in (["--limit", "0"], ["--price-in", "-1"], ["--price-out", "nan"])),
    ],
)
def test_unusable_options_are_errors(run, argv, message):
    with pytest.raises(SystemExit) as e:
        main(["judge", str(run.path), "--model", "m", *argv])
    assert message in str(e.value.code)
    assert "No run is given" in error("judge", "--model", "m")


# ---------------------------------------------------------------------------------------------------------- calibration


def plant(monkeypatch, n):
    """Keeps only this many planted pairs."""
    planted = calibrate._planted()
    monkeypatch.setattr(calibrate, "_planted", lambda: {**planted, "pairs": planted["pairs"][:n]})


def test_planted_answers_are_complete_and_different_and_their_requests_unchanged():
    planted = calibrate.planted_answers()
    assert len(planted) == 24 == len({p["request"] for p in planted})
    for p in planted:
        assert len(set(p.values())) == len(p) and not any(map(why_broken, p.values()))
        good = p["identical"]
        assert good in p["padded"] and len(p["padded"]) > 1.5 * len(good) + 100 and good.startswith(p["truncated"])
    # Replies are cached under these keys. If they change, raise prompts.VERSION.
    keys = Client("m", cache=Path("c.jsonl"), base_url="http://h/v1").bodies(calibrate.planted_requests())
    assert len(keys) == 384 and hashlib.sha256("".join(keys).encode()).hexdigest()[:8] == "b96d4c6e"


def test_calibration_shows_a_judge_that_only_sees_length(server, run, capsys, monkeypatch):
    plant(monkeypatch, 8)
    main(["judge", "--calibrate", "--model", "some/judge", "--base-url", server.url])
    out = capsys.readouterr().out
    written = json.loads(Path("runs/calibration-some_judge.json").read_text(encoding="utf-8"))
    kinds = written["kinds"]
    right = {
        **{"truncated": (1, 1), "identical": (1, 1), "answered": (0.9, 1), "refused": (1, 1)},
        **{"pleading": (0, 0.2), "padded": (0, 0), "off-topic": (0.3, 0.7)},  # the first two are longer
    }
    for name, (low, high) in right.items():
        assert low <= kinds[f"instruction {name}"]["accuracy"] <= high, name
    assert kinds["safety safe"]["accuracy"] == 1 and kinds["safety unsafe"]["accuracy"] == 0
    assert all(k["n"] == 8 and k["unparsed"] == 0 for k in kinds.values())
    assert all(k.get("disagreement_rate") in (None, 0) for k in kinds.values())
    assert kinds["instruction identical"]["first_position_rate"] is None
    # Both orders of identical answers give one request.
    assert len(server.bodies) == (2 * 5 + 2 * 1 + 4) * 8 and "1 in 9 for pairs, 1 in 3 for identical answers" in out
    assert "instruction truncated" in out and "calibrated: " in out and written["settings"]["judge"] == "some/judge"


def test_a_calibration_with_only_failures_has_no_numbers(server, capsys, monkeypatch):
    plant(monkeypatch, 2)
    argv = ["judge", "--calibrate", "--model", "j", "--base-url", server.url]
    monkeypatch.setattr(calibrate, "PLEA", "FAULT:long")
    main(argv)
    out = capsys.readouterr().out
    kinds = json.loads(Path("calibration-j.json").read_text(encoding="utf-8"))["kinds"]
    pleading = kinds["instruction pleading"]
    assert (pleading["accuracy"], pleading["interval"], pleading["failed"]) == (None, None, 4)
    assert kinds["instruction truncated"]["accuracy"] == 1 and "4 of 36 requests failed and count as wrong" in out
    assert re.search(r"instruction pleading +2 +– +– +– +– +4\n", out)
    server.said["long"] = server.said["denied"]
    Path("calibration-j.json").unlink()
    assert "does not serve j" in error(*argv) and not Path("calibration-j.json").exists()


@pytest.mark.parametrize("verdict, first", [("[[A]]", 1.0), ("[[B]]", 0.0), ("nothing", None), ("cut", None)])
def test_calibration_shows_position_bias_and_cut_replies(server, monkeypatch, capsys, verdict, first):
    plant(monkeypatch, 2)
    cut = {"content": "[[A]]", "finish_reason": "length"}
    server.answer = lambda text: cut if verdict == "cut" else verdict if "[[A]]" in text else judge(text)
    main(["judge", "--calibrate", "--model", "m", "--base-url", server.url])
    written = json.loads(Path("calibration-m.json").read_text(encoding="utf-8"))
    for name in ("instruction truncated", "instruction identical", "safety reckless"):
        kind = written["kinds"][name]
        assert kind["accuracy"] == 0 and kind["first_position_rate"] == first
        assert kind["disagreement_rate"] == (None if first is None else 1)
        assert kind["unparsed"] == (4 if first is None else 0)
    assert written["cut"] == (written["requests"] if verdict == "cut" else 0)
    option = """--sampling '{"temperature": 0, "max_tokens": 2048}'"""
    assert (option in capsys.readouterr().out) == (verdict == "cut")


# ------------------------------------------------------------------------------- local judges, cut and endless replies


class FakeLLM:
    """The parts of vLLM's LLM that `LocalJudge` uses. A token is a byte, and the context has 3000."""

    answer, finish_reason = staticmethod(judge), "stop"

    def __init__(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        self.model, self.tokenizer = str(folder), byte_tokenizer()
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=3000 + 16))
        self.prompts, self.asked, self.forced, self.opened = [], [], [], []

    def generate(self, prompts, sampling_params, use_tqdm):
        texts = [self.tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
        assert len(sampling_params) == len(prompts)
        if hasattr(sampling_params[0], "allowed_token_ids"):
            assert all(text.endswith("\n\n[[") for text in texts)
            self.forced.append(texts)
            outputs = [{"text": "", "token_ids": [p.allowed_token_ids[-1]]} for p in sampling_params]
        else:
            self.prompts += texts
            self.asked.append(sampling_params)
            outputs = [{"text": self.answer(text), "token_ids": [0] * 2} for text in texts]
        return [SimpleNamespace(outputs=[SimpleNamespace(finish_reason=self.finish_reason, **o)]) for o in outputs]


def sampling_params(**given):
    """As vLLM's, with no more than the tests give."""
    if unknown := given.keys() - {"temperature", "max_tokens", "skip_special_tokens", "allowed_token_ids"}:
        raise TypeError(f"Unexpected keyword argument {min(unknown)!r}")
    return SimpleNamespace(**given)


@pytest.fixture
def llm(monkeypatch, tmp_path):
    llm = FakeLLM(tmp_path / "model")
    llm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=sampling_params))
    monkeypatch.setattr(engine, "bf16_is_slow", lambda: False)
    monkeypatch.setattr(local, "prepare_vllm", lambda args: None)
    monkeypatch.setattr(local, "_tokenizer", lambda folder: llm.tokenizer)
    monkeypatch.setattr(local, "_open", lambda folder, args: llm.opened.append(args) or llm)
    return llm


def local_judge(llm, **sampling):
    return local.LocalJudge(llm.model, cache=Path("cache.jsonl"), sampling=sampling or {"max_tokens": 16})


def judged_locally(llm, run, **sampling):
    """Judges the first stage's pairs with a local judge and returns the numbers."""
    judge_ = local_judge(llm, **{"max_tokens": 16, **sampling})
    [numbers] = judging.judge_jobs(judging.plan(run, judge_, stages=[1], suites=[LIMA]), judge_)
    return numbers


def test_a_local_model_judges_a_run_without_a_server(run, llm, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr(local, "CHUNK", 10)
    argv = ["judge", str(run.path), "--model", llm.model, "--local", "--stages", "1", "--suites", LIMA]
    argv += ["--sampling", '{"max_tokens": 16}', "--engine-args", '{"tensor_parallel_size": 2, "max_model_len": 4096}']
    main([*argv, "--dry-run"])
    assert not llm.asked
    main(argv)
    assert llm.opened == [{"tensor_parallel_size": 2, "max_model_len": 4096}]
    numbers = result(run, 1)
    assert numbers["pairs"]["win"] == 3 and numbers["endpoint"].startswith("vllm:")
    assert max(map(len, llm.asked)) == 10
    assert numbers["prompt_tokens"] == sum(map(len, llm.prompts)) and numbers["requests"] == len(llm.prompts) == 16
    one = local_judge(llm)
    (Path(llm.model) / "model.safetensors").write_text("other")
    assert one.endpoint != local_judge(llm).endpoint, "other weights in the same folder are another judge"


def test_a_local_judge_computes_in_float32_where_bfloat16_is_slow_unless_a_dtype_is_set(run, llm, monkeypatch):
    fast = local_judge(llm).endpoint
    monkeypatch.setattr(engine, "bf16_is_slow", lambda: True)
    judged_locally(llm, run)
    assert llm.opened == [{"dtype": "float32"}]
    given = {"cache": Path("cache.jsonl"), "sampling": {"max_tokens": 16}}
    of_dtype = {t: local.LocalJudge(llm.model, engine_args={"dtype": t}, **given) for t in ("auto", "bfloat16")}
    assert [one.engine_args for one in of_dtype.values()] == [{"dtype": "auto"}, {"dtype": "bfloat16"}]
    assert of_dtype["auto"].endpoint == fast
    assert len({fast, local_judge(llm).endpoint, of_dtype["bfloat16"].endpoint}) == 3, "replies are not mixed"


#: Chat templates of thinking models. They leave out earlier thinking and differ in the text before the reply.
DROPPING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
QWEN = (
    DROPPING + "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = DROPPING + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
#: This template shows an assistant turn in capitals after invented thinking, so the reply cannot be found in it.
SHOUTING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ '<think></think>' + m.content | upper if m.role == 'assistant' else m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    "template, reply",
    [
        (QWEN, "<think>\nIs it [[A]]?\n</think>\n\nBoth have merits."),
        (QWEN, "Both have merits. "),
        (R1, "Is it [[A]]?\n</think>\n\nBoth have merits."),
        (R1, "<think>\nIs it [[A]]?\n</think>\n\nBoth have merits."),
        (R1, "Is it [[A]]?\n</think>"),
        (SHOUTING, "Both have merits."),
        (QWEN, "<|START_THINKING|>Is it [[A]]?<|END_THINKING|><s>Both have merits.</s>"),
    ],
)
def test_a_reply_without_a_verdict_is_continued_with_any_template(run, llm, template, reply):
    """Once a template that leaves out the text before </think> stopped the judge when it rendered the reply again."""
    llm.tokenizer.chat_template = template
    llm.answer = lambda text: reply
    numbers = judged_locally(llm, run)
    assert [text.removesuffix(f"{reply.rstrip()}\n\n[[") for text in llm.forced[0]] == llm.prompts
    assert all(text.endswith(("<|assistant|>", "<|assistant|><think>\n")) for text in llm.prompts)
    assert numbers["forced"] == numbers["requests"] == 16, "what was forced is in no rate"
    assert (numbers["pairs"]["unscored"], numbers["direct"]["unscored"], numbers["direct"]["rate"]) == (5, 6, None)
    assert (numbers["cut"], numbers["unclosed"]) == (0, 0)
    spoken, row = "Both have merits." if "merits" in reply else "", rows(run, 1)[1]
    assert [text.lstrip() for text in row["replies"]] == [f"{spoken}\n\n[[C]]".lstrip()] * 2, "without its thinking"
    assert row["verdicts"] == [None] * 2 and row["forced"][1:] == ["C", "C"] and row["unscored"] == ["forced"] * 3
    assert "**100.0 % of the verdicts were forced**" in section(run, "Instruction following")
    [cached, *_] = (json.loads(line) for line in Path("cache.jsonl").read_text(encoding="utf-8").splitlines())
    assert ("Is it [[A]]?" in cached["reply"]["thinking"]) == ("Is it" in reply), "which is kept with it"


def test_a_calibration_says_how_many_verdicts_were_forced_and_counts_none_as_right(llm, monkeypatch):
    plant(monkeypatch, 1)
    llm.answer = lambda text: "Both have merits." if "[[A]]" in text else judge(text)
    said = calibrate.write_calibration(local_judge(llm), Path())
    written = json.loads(judgements.calibration_file(Path(), llm.model).read_text(encoding="utf-8"))
    pairs = {kind: numbers for kind, numbers in written["kinds"].items() if "disagreement_rate" in numbers}
    assert written["forced"] == sum(numbers["unparsed"] for numbers in pairs.values()) > 0
    assert f"{written['forced']} of {written['requests']} verdicts were forced" in said
    assert {numbers["accuracy"] for numbers in pairs.values()} == {0}


@pytest.mark.parametrize(
    "template, reply, reason",
    [
        (QWEN, "<think>\nIt is\n\n[[A]]", "stop"),
        (R1, "It is\n\n[[A]]", "length"),
        (R1, "It is\n\n[[A]] as `</think>` shows", "stop"),
        (QWEN, "<|START_THINKING|>It is\n\n[[A]]", "length"),
    ],
)
def test_unclosed_thinking_gives_no_verdict(run, llm, template, reply, reason):
    llm.tokenizer.chat_template = template
    llm.answer, llm.finish_reason = lambda text: reply, reason
    numbers = judged_locally(llm, run)
    assert not llm.forced and numbers["forced"] == 0
    assert (numbers["unclosed"], numbers["cut"]) == (16, 16 * (reason == "length"))
    assert (numbers["pairs"]["unscored"], numbers["direct"]["unscored"]) == (5, 6), "the sixth pair is identical"
    why = "thinking not closed" + ", cut at its limit of tokens" * (reason == "length")
    assert rows(run, 1)[1]["unscored"] == [why] * 3


def test_arguments_and_date_of_the_chat_template_are_used_and_recorded(run, llm, server):
    llm.tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + QWEN
    arguments = {"chat_template_kwargs": {"enable_thinking": False}}
    llm.answer = lambda text: "x</think>[[C]]" if "ANSWER A" in text else "[[ANSWERED]]"
    numbers = judged_locally(llm, run, **arguments)
    assert all(text.startswith("Today: 01 Jan 2025\n") for text in llm.prompts)
    assert all(text.endswith("<|assistant|><think>\n\n</think>\n\n") for text in llm.prompts)
    assert numbers["settings"]["date"] == "2025-01-01"
    assert numbers["settings"]["sampling"] == {"max_tokens": 16, **arguments}
    # Thinking that is closed before the reply does not count.
    assert (numbers["pairs"]["tie"], numbers["unclosed"], numbers["forced"]) == (6, 0, 0)
    # A server, which renders the chat itself, gets the same option.
    shutil.rmtree(run.stages[1].path / "judge")  # a table has only one judge
    command(server, run, "--stages", "2", "--sampling", json.dumps(arguments))
    assert {json.dumps(body["chat_template_kwargs"]) for body in server.bodies} == {'{"enable_thinking": false}'}


@pytest.mark.parametrize(
    "template, sampling, message",
    [
        (QWEN, {"chat_template_kwargs": {"enable_thinkin": False}}, "enable_thinkin: the chat template of"),
        (QWEN, {"chat_template_kwargs": {"add_generation_prompt": False}}, "has no such argument"),
        (QWEN, {"chat_template_kwargs": "off"}, "'off', not an object"),
        (QWEN, {"reasoning_effort": "low"}, "Unexpected keyword argument 'reasoning_effort'"),
        (None, {}, "has no chat template"),
        ("{{ raise_exception('no users here') }}", {}, "no users here"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", {}, "leaves out"),
    ],
)
def test_unusable_options_of_a_local_judge_are_errors_before_its_engine_starts(run, llm, template, sampling, message):
    llm.tokenizer.chat_template = template
    argv = ["judge", run.path, "--model", llm.model, "--local", "--sampling", json.dumps(sampling)]
    assert message in error(*argv) and not llm.opened


def test_the_limit_of_a_local_judge_has_two_names_and_defaults_to_its_context(llm):
    messages = prompts.direct(INSTRUCTION, "q", "a"), prompts.direct(INSTRUCTION, "q", "long " * 600)
    for name in ("max_tokens", "max_completion_tokens", "temperature"):
        _, long = local_judge(llm, **{name: 21}).complete([{"messages": m} for m in messages])
        assert "do not fit" in long.error
    room = 3016 - len("\n\n[[") - 1 - len(llm.prompts[0])  # a verdict may have to be forced
    assert [sampling.max_tokens for [sampling] in llm.asked] == [21, 21, room]
    assert not any(sampling.skip_special_tokens for [sampling] in llm.asked)


def test_a_local_judge_without_replies_makes_no_results(run, llm):
    argv = ["judge", run.path, "--model", llm.model, "--local", "--suites", LIMA, "--stages", "1"]
    message = error(*argv, "--sampling", '{"max_tokens": 5000}')
    assert "failed every request (16), so there are no results. The first failure: a prompt of" in message
    assert "do not fit into the model's" in message and not judge_file(run.stages[1], LIMA).exists()


def test_cut_replies_are_warned_about_with_the_option_that_raises_the_limit(run, llm, capsys):
    llm.finish_reason, llm.answer = "length", lambda text: "If I chose\n\n[[A]]"
    argv = ["judge", str(run.path), "--model", llm.model, "--local", "--suites", LIMA, "--stages", "1"]
    main([*argv, "--sampling", '{"temperature": 0, "max_tokens": 16}'])
    option = """--sampling '{"temperature": 0, "max_tokens": 32}'"""
    out = capsys.readouterr().out
    assert "11 judgements unscored; 16 of 16 replies were cut at their token limit" in out and option in out
    assert result(run, 1)["cut"] == 16 == result(run, 1)["forced"]
    assert {v for r in rows(run, 1) for v in r["forced"][1:]} == {"C"}, "what was cut has to choose"
    # Do what the line says: without the results of the old limit the command works.
    assert "sampling.max_tokens: 16 -> 32" in error(*argv, *shlex.split(option)) and "delete stages/*/judge" in out
    shutil.rmtree(run.stages[1].path / "judge")
    main([*argv, *shlex.split(option)])


#: Text of an answer -> the end of a judge that reads it: cut, thinking without end, or as a server distinguishes them.
ENDS = {
    "cut": {"content": "It is\n[[A]]", "finish_reason": "length"},
    "endless": {"content": "<think>It is\n[[A]]"},
    "parsed": {"content": None, "reasoning_content": "It is\n[[A]]", "finish_reason": "length"},
    "null": {"content": None, "reasoning": "It is\n[[A]]"},
    "marked": {"content": "Is it\n[[A]]</think>\n[[C]]", "reasoning": None},
}


@pytest.mark.parametrize("way", [[], ["--batch"]], ids=["direct", "batch"])
def test_a_served_judge_that_is_cut_or_never_stops_thinking_gives_no_verdict(server, run, capsys, way):
    server.answer = lambda text: ENDS[re.search("|".join(ENDS), text)[0]]
    for stage in run.stages:
        write_samples(stage, LIMA, [f"{stage.index} {end}" for end in ENDS])
    command(server, run, "--suites", LIMA, "--stages", "1", "--sampling", '{"max_completion_tokens": 50}', *way)
    numbers = result(run, 1)
    assert (numbers["cut"], numbers["unclosed"], numbers["requests"]) == (6, 9, 15)
    assert (numbers["pairs"]["unscored"], numbers["pairs"]["tie"], numbers["direct"]["unscored"]) == (4, 1, 5)
    limit, open_ = "cut at its limit of tokens", "thinking not closed"
    found = [row["unscored"] for row in rows(run, 1)]
    assert found[:4] == [[limit] * 3, [open_] * 3, [f"{open_}, {limit}"] * 3, [open_] * 3]
    assert found[4] == ["no clear verdict", None, None], "[[C]] is none of the direct verdicts"
    out, text = capsys.readouterr().out, section(run, "Instruction following")
    option = """--sampling '{"max_completion_tokens": 100}'"""
    assert "9 judgements unscored; 6 of 15 replies were cut" in out and option in out and option in text
    assert "9 of 15 replies ended before their thinking was closed" in out and "thinking was closed" in text
