"""Bad input: any content of a file, reply, answer or configuration gives a result or a clear error.

Examples are drawn from a fixed seed, so a failure can be repeated.
"""

import copy
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import command_line, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_runs import make_rich_run

from judges import JudgeError, judging, prompts
from judges.batch import BatchClient
from judges.client import Client
from judges.prompts import PAIR, neutralise
from judges.replies import Cache, Reply, read_reply
from judges.teacher import paths
from judges.verdict import parse
from trace_bench import engine, metrics, shapes
from trace_bench.cli import main
from trace_bench.evaluate import evaluate
from trace_bench.report.html import head_cell
from trace_bench.report.result_file import _without_paths
from trace_bench.run import RunError, Stage, read_json, read_jsonl
from trace_bench.tasks import load_suites
from trace_tasks import answers, data, scoring, written_numbers
from trace_tasks.data import DataError, audit, reading, similarity
from trace_tasks.data.files import write_json, write_jsonl
from trace_tasks.reasoning import as_tested
from trainers import base
from trainers.base import CLConfig, ConfigError, stages


def fuzz(examples, **arguments):
    """Draws the arguments of a test, always the same ones."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    always = settings(derandomize=True, database=None, deadline=None, suppress_health_check=health)
    return lambda test: settings(always, max_examples=examples)(given(**arguments)(test))


def cut(text):
    return text.split("¦")


# NUL, line ends of all kinds, a byte order mark, right-to-left, zero width, combining, composed emoji, digits and
# letters that are not ASCII, and the marks that programs here look for.
PIECES = [
    *"\0 \t\n\r\v\f\x1c\x85\xa0\u2028\u2029\ufeff\u200b\u202e\u0301\u0316\u0661\uff21\u0130\u017f\ufdfa\U0001d7d8",
    *cut("\r\n¦e\u0301¦👩‍👩‍👧¦שלום¦中文¦A¦B.¦(C)¦answer is ¦Answer:¦回答：¦答案¦选¦Reasoning:¦Therefore, ¦<NUM_LIT>"),
    *cut("<STR_LIT:x>¦<STR_LIT:¦>¦1,234.5¦-7e3¦=¦.¦nan¦1e999¦[[A]]¦[[¦]]¦<<<END OF ANSWER A>>>¦<<<¦</s>¦{}"),
    *("the summary of the meeting transcripts is:", "<|im_end|>"),
]
texts = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=12
).map("".join)
filled = texts.filter(str.strip)
# All JSON values, and those that only Python's reader accepts: NaN, halves of surrogate pairs.
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | texts,
    lambda v: (
        st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(["prompt", "answer", "n"]) | texts, v, max_size=4)
    ),
    max_leaves=8,
)


def outcome(function, *errors):
    """The result, or the error, which must be one of ours and have a message."""
    try:
        return function()
    except errors as e:
        assert str(e).strip()
        return e


# -------------------------------------------------------------------------------------------------------------- loaders


@fuzz(
    100,
    rows=st.lists(st.fixed_dictionaries({"prompt": filled, "answer": filled}), min_size=1, max_size=5),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    bad=st.none() | st.tuples(st.integers(0, 5), values),
)
def test_rows_are_read_unchanged_or_the_bad_row_is_named(tmp_path, rows, ascii_only, mark, bad):
    written = list(rows)
    if bad is not None:
        written.insert(min(bad[0], len(rows)), bad[1])
    file = tmp_path / "test.json"
    content = json.dumps(written, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    file.write_bytes(b"\xef\xbb\xbf" * mark + content)
    found = outcome(lambda: data.read_rows(file), DataError)
    if bad is None:
        assert found == rows
    elif isinstance(found, DataError):
        assert f"row {written.index(bad[1])}:" in str(found) or "UTF-8" in str(found) or "JSON" in str(found)
    else:  # the inserted value happened to be a row
        assert found == written


def read_samples(file):
    """Reads a file as the samples of a stage."""
    stage = Stage(0, "0_base", None, file.parent)
    stage.samples_file("x").parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, stage.samples_file("x"))
    return judging._read_samples(stage, "x")


@fuzz(100, content=st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode("utf-8", "surrogatepass")))
def test_any_file_of_a_run_is_read_or_named_in_an_error(tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    for read in (read_json, read_jsonl, data.read_rows):
        found = outcome(lambda read=read: read(file), RunError, DataError)
        assert not isinstance(found, RunError | DataError) or "file.json" in str(found)
    assert isinstance(outcome(lambda: read_samples(file), RunError), dict | RunError)


def test_samples_with_an_odd_number_are_not_dropped(tmp_path):
    row = {"doc_id": 1, "prompt": "p", "response": "r"}
    write_jsonl(tmp_path / "x.jsonl", [row, row])
    with pytest.raises(RunError, match=r"line 2.*doc_id 1"):
        read_samples(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps({**row, "response": "\ud800"}))
    with pytest.raises(RunError, match="line 1"):
        read_samples(tmp_path / "x.jsonl")
    write_jsonl(tmp_path / "x.jsonl", [{**row, "instruction": 7}])
    with pytest.raises(RunError, match="must be text"):
        read_samples(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "suite, file, content",
    [
        ("bbh", "boolean_expressions.json", '{"examples": [1]}'),
        ("bbh", "boolean_expressions.json", '{"examples": [{"input": "\\ud800", "target": "x"}]}'),
        ("boolq", "train.jsonl val.jsonl", '{"question": "q"}'),
        ("tydiqa", "fewshot/english.json", '{"data": [{"paragraphs": 7}]}'),
        ("mmlu", "dev/abstract_algebra_dev.csv", f'"{"x" * 200_000}",b,c,d,e,A'),
    ],
)
def test_a_suite_with_the_wrong_shape_is_named_in_an_error(tmp_path, monkeypatch, suite, file, content):
    for path in (tmp_path / suite / name for name in file.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setenv("GENERAL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=rf"{suite}.* does not have the layout"):
        load_suites([f"general_{suite}"])


# ------------------------------------------------------------------------------------------------- replies and verdicts

messages = values | st.fixed_dictionaries({"content": values}, optional={"refusal": values})
choices = st.fixed_dictionaries({}, optional={"message": messages, "finish_reason": values})
usages = st.none() | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), values)


@fuzz(
    150,
    body=values
    | st.fixed_dictionaries({"choices": values | st.lists(choices, max_size=2)}, optional={"usage": usages | values}),
)
def test_any_body_is_a_reply_that_can_be_saved_or_an_error(tmp_path_factory, body):
    reply = outcome(lambda: read_reply(json.loads(json.dumps(body))), ValueError)
    if isinstance(reply, Reply):
        assert isinstance(reply.prompt_tokens + reply.completion_tokens, int) and reply.prompt_tokens >= 0
        assert reply.finish_reason is None or isinstance(reply.finish_reason, str)
        cache = Cache(tmp_path_factory.mktemp("c") / "cache.jsonl")
        cache.put("k", {}, reply)
        assert Cache(cache.path)["k"] == reply


def test_unreadable_lines_of_a_batch_lose_no_other_lines(tmp_path, caplog):
    client = BatchClient("m", cache=tmp_path / "c.jsonl", base_url="http://127.0.0.1:9/v1")
    body = {"choices": [{"message": {"content": "r"}, "finish_reason": 7}], "usage": {"prompt_tokens": "10"}}
    good = {"custom_id": "good", "response": {"status_code": 200, "body": body}}
    lines = [json.dumps({**good, "custom_id": "bad", "response": r}) for r in (None, 7, "x", {"status_code": 200})]
    unknown = ["7", "[]", "null", "{}", '{"custom_id": 7}', "{", "[" * 100_000, '"\\ud800"']
    content = "\n".join([*unknown, *lines, json.dumps(good)]).encode()
    errors = client._keep(content, ["good", "bad"], {"good": {}, "bad": {}})
    assert client.cache["good"] == Reply("r") and errors.keys() == {"bad"}
    assert f"{len(unknown)} lines of the batch, such as" in caplog.text


# --------------------------------------------------------------------------------------------------- answers and scores


@fuzz(150, prompt=filled, prediction=texts, answer=filled)
def test_every_text_has_scores_between_0_and_1(prompt, prediction, answer):
    from trace_tasks import utils

    functions = [getattr(utils, name) for name in dir(utils) if name.startswith("score_")]
    assert len(functions) == 12
    doc = {"prompt": prompt, "answer": answer}
    kept = dict(doc)
    for score in functions:
        scores = score(doc, [prediction])
        assert all(0 <= value <= 1 for value in scores.values()), (score.__name__, scores)
        if "accuracy_tolerant" in scores and score is not utils.score_scienceqa:
            assert scores["accuracy"] <= scores["accuracy_tolerant"]
    assert doc == kept
    assert scoring.similarity(answer, answer) == 1 or not scoring._undo_placeholders(answer)
    assert utils.score_choice(doc, [answer]) == {"accuracy": 1, "accuracy_tolerant": 1}


@fuzz(200, text=texts, form=st.sampled_from(["line", "text", "summary", "code"]))
def test_an_answer_is_a_part_of_the_text(text, form):
    found = answers.split_answer(form, text)
    if found is not None:
        path, answer = found
        assert answer.strip() and answer in text and path in text
        assert "\n" not in answer or form in ("text", "summary")


N = 100_000
SPACES, MARKS = " " * N, "\u0300\u0316" * (N // 2)
FOMC = paths.Row("trace_fomc", 0, "p", "B")
MEETING = "the summary of the meeting transcripts"
#: What a function searches for -> the function, and texts whose repetition makes its patterns try again and again.
LONG = {
    "choice": (lambda t: answers.choice_tolerant(t, "B", "Pick: A. dovish, B. hawkish, C. neutral."), [
        *cut("hawkish ¦not dovish ¦不dovish. ¦A. dovish\n¦the answer is dovish\n¦选¦答案选¦answer A. ¦answer A, "),
        *cut("(¦\n¦。¦answer B\n¦\ufdfa¦选:¦answer option ¦a\u0300\u0316¦answer: "), "答案" + "(" * N, "选" + ":" * N,
        *("answer" + SPACES, "a" + MARKS, "B" + SPACES + "x"),
    ]),
    "number": (lambda t: written_numbers.number_tolerant(t, "12"), [
        *cut("1,¦1¦1,111,¦answer ¦1e¦-¦=¦0.¦-$ ¦twenty-¦hundred ¦one point one ¦answer is 1\n¦so 1 2 ¦2M¦12:34 "),
        *("answer" + SPACES, "0." + "1" * N, "1e" + "9" * N, "12 and" + "\t\n" * (N // 2)),
    ]),
    "word": (lambda t: written_numbers.number_tolerant(t, "August"), ["!", "a!", "_", " ", "answer: "]),
    "letter named": (lambda t: answers.names_choice(t, "B"), ["B ", "B", "B.", "1"]),
    "number named": (lambda t: written_numbers.names_number(t, "12"), ["B ", "1,", "1", "12a"]),
    "line": (lambda t: answers.extract_answer("line", t), ["Answer:", "Answer :\n", "answer ", "回答"]),
    "summary": (lambda t: answers.extract_answer("summary", t), [
        *("therefore ", "the ", f"{MEETING} is ", "therefore" + SPACES, "the" + SPACES, MEETING + SPACES),
        "therefore" + SPACES[: N // 2] + "," + SPACES[: N // 2],
    ]),
    "code": (lambda t: answers.extract_answer("code", t), ["Reasoning:", "reasoning ", "\n", " \n"]),
    "similarity": (lambda t: scoring.similarity(t, "x = f(b)\n"), cut("<STR_LIT:¦<STR_LIT:a>¦<STR_LIT:<NUM_LIT:>¦ab")),
    "rouge_l": (lambda t: scoring.rouge_l(t, "the cat sat. on the mat."), ["a ", "a.", "the cat sat. "]),
    "bleu": (lambda t: scoring.bleu(t, "the cat", 4), ["a ", "a."]),
    "sari": (lambda t: scoring.sari(t, t[:1000], "the cat"), ["a ", ".", "1.,", "&amp;"]),
    "verdict": (lambda t: parse(t, PAIR), [*cut("[[¦[[a¦[[A ¦[[A]]\n"), "[[" + SPACES, "[[" + "a" * N, "[[A" + SPACES]),
    "neutralise": (neutralise, ["<", "[", "[\u200b", "<|", "<" + "\u200b" * N + "x", "[" + "\u200b" * N + "x"]),
    "as_tested": (lambda t: as_tested(t + "x"), ["Reasoning:"]),
    "paths": (lambda t: paths.read_path(FOMC, Reply(t + "\nAnswer: B")), [".", " ", "\n ", "A"]),
    "floats": (audit._FLOAT.search, ["1.", "0", "1." + "0" * N, "1." + "9" * N, "1." + "0000000" * (N // 7)]),
    "words": (similarity.words, ["\nAnswer:", "a ", "\nAnswer:" + "Reasoning:" * (N // 10) + "x", "\u0300\u0316"]),
    "paths of results": (lambda t: _without_paths({"model": f"/{t}\x1b"}), ["a", "/", "\\"]),
    "heads": (head_cell, ["a", "-", "a "]),
    "cues": (audit._DOUBLED_CUE.search, ["a", "a:", "a: ", "a:" + SPACES + "x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_read_in_seconds(name):
    """The texts have 100,000 characters that make a pattern try again and again: minutes, if it is quadratic."""
    function, patterns = LONG[name]
    for pattern in patterns:
        text = pattern if len(pattern) >= N else (pattern * (N // len(pattern) + 1))[:N]
        started = time.process_time()
        function(text)
        assert time.process_time() - started < 4, (name, pattern[:40])


def test_speeding_up_long_texts_changes_no_score():
    assert answers.read_choice("The answer is option choice option B") == "B"
    assert answers.read_choice(f"The answer is A{' ' * 300}. B. hawkish") is None  # the next option is on the line
    assert scoring.similarity("x" * 200, "y" * 3 + "x") == 0.01 and scoring.similarity("x" * 1000, "x") == 0.0
    assert scoring._undo_placeholders("<STR_LIT:a><NUM_LIT:b <STR_LIT:c>>d<STR_LIT:") == "ab <STR_LIT:c>d<STR_LIT:"
    assert answers.extract_answer("summary", "Therefore , the summary of the meeting transcript is: x") == "x"
    assert answers.split_answer("summary", "p therefore,  the summary of the meeting transcripts is: x") == ("p ", "x")
    assert as_tested("x\nReasoning:Reasoning:Reasoning:") == "x\nReasoning:" and as_tested("Reasoning:") == "Reasoning:"
    floats = ("1.4300000000000002", "1.4299999999999999", "1.000000000001", "1.123456789012", "3.0000000000000")
    assert [bool(audit._FLOAT.search(t)) for t in floats] == [True, False, True, False, False]
    assert answers.nfkc("Ａ①" * 3000) == "A1" * 3000


# -------------------------------------------------------------------------------------------------------------- metrics


@fuzz(300, n=st.integers(1, 500), a=st.integers(0, 500), b=st.integers(0, 500))
def test_intervals_of_counts_contain_the_rate_and_stay_in_range(n, a, b):
    if a > n:
        with pytest.raises(ValueError, match="count"):
            metrics.wilson_interval(a, n)
    else:
        low, high = metrics.wilson_interval(a, n)
        wider = metrics.wilson_interval(a, n, level=0.9999)
        assert 0 <= wider[0] <= low <= a / n <= high <= wider[1] <= 1
    if a + b <= n:
        low, high = metrics.net_interval(a, b, n)
        assert -1 <= low <= (a - b) / n <= high <= 1 and metrics.net_interval(b, a, n) == pytest.approx((-high, -low))


# ------------------------------------------------------------------------------------------------------- configurations

numbers = st.sampled_from(
    [0, -1, 1, 0.5, 2**31, 2**63, 10**30, -(10**30), math.nan, math.inf, "7", "many", True, None, [1], {}]
)
OWN = (
    *("train_rows", "test_rows", "max_prompt_length", "max_answer_length", "max_new_tokens", "general_rows"),
    *("seed", "judged_rows", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    "num_train_epochs",
)


@fuzz(
    150,
    changes=st.dictionaries(st.sampled_from(OWN), numbers, min_size=1, max_size=2)
    | st.dictionaries(
        st.sampled_from(["tasks", "epochs", "general", "judged", "engine_args"]), values | st.lists(numbers, max_size=2)
    ),
)
def test_a_configuration_is_usable_or_refused(tmp_path, changes):
    options = {"output_dir": str(tmp_path), "tasks": ["trace_fomc", "trace_cstance"], **changes}
    config = outcome(lambda: CLConfig(**copy.deepcopy(options)), ConfigError)
    if isinstance(config, ConfigError):
        return
    for name in OWN:
        value = getattr(config, name)
        assert value is None or (isinstance(value, int | float) and math.isfinite(value)), (name, value)
    assert all(isinstance(task, str) for task in config.tasks) and config.tasks
    assert config.epochs is None or all(0 < e < math.inf for e in config.epochs)


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "7", "lerning_rate: 1", "tasks: {a: b}", "epochs: x", "\0", "train_rows: [1]"]
)
def test_a_config_file_with_the_wrong_shape_is_an_error_without_a_traceback(tmp_path, text, capsys):
    file, output = tmp_path / "c.yaml", ["--output_dir", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match=r"error: There is no config .*c\.yaml"):
        base.main(base.CLTrainer, base.CLConfig, ["--config", str(file)])
    file.write_text(text)
    with pytest.raises(SystemExit) as e:
        base.main(base.CLTrainer, base.CLConfig, ["--config", str(file), *output])
    assert str(e.value.code).startswith("error: ") or "error: " in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--tuned", "none"]])
def test_a_repeated_key_in_a_config_is_refused(tmp_path, options):
    (tmp_path / "c.yaml").write_text("seed: 1\ntasks: [trace_fomc]\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed is given twice"):
        stages.parse(base.CLConfig, ["--config", str(tmp_path / "c.yaml"), *options], "sequential")


# ---------------------------------------------------------------------------------------------------- files of a run

ABSENT = object()
ODD_VALUES = [
    *(ABSENT, None, [], {}, "x", "\ud800", -1, 0, 10**400, 1e308, True, [None], {"a": None}, math.nan, math.inf)
]
RUN_FILES = [
    "manifest.json",
    "stages/1_trace_cstance/train.json",
    "stages/2_trace_meetingbank/eval/trace_cstance.json",
    "stages/2_trace_meetingbank/eval/general_piqa.json",
    "stages/2_trace_meetingbank/eval/instruct_lima.json",
    "stages/2_trace_meetingbank/eval/samples/trace_cstance.jsonl",
    "stages/0_base/eval/samples/instruct_lima.jsonl",
    "stages/2_trace_meetingbank/judge/instruct_lima.json",
    "stages/2_trace_meetingbank/judge/instruct_lima.jsonl",
]
#: Settings of a run and its cells under which nothing is left to evaluate.
CELL_SETTINGS = {
    **{"backend": "hf", "test_rows": None, "max_prompt_length": None, "max_new_tokens": None},
    **{"chat_template": False, "num_fewshot": None, "engine": {}},
}
RUN_CONFIG = {
    **{"backend": "hf", "test_rows": None, "train_rows": 5, "max_prompt_length": None, "num_fewshot": None, "seed": 1},
    **{"cells": "seen", "general": [], "judged": [], "engine_args": {}, "chat_template_args": None, "epochs": [1, 2]},
    **{"learning_rate": 1e-4, "lora_target_modules": ["a"], "dtype": "bfloat16", "trust_remote_code": False},
}


def places(value, at=()):
    """The places in a JSON value; for lists only the first entry."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


def replaced(value, at, new):
    if not at:
        return new
    value = inside = copy.deepcopy(value)
    for part in at[:-1]:
        inside = inside[part]
    if new is ABSENT:
        del inside[at[-1]]
    else:
        inside[at[-1]] = new
    return value


def odd_files(folder):
    """Files of a run with one value replaced: name, place, content."""
    for name in RUN_FILES:
        text = (folder / name).read_text()
        first, *others = text.splitlines() if name.endswith("l") else [text]
        for at in places(json.loads(first)):
            for new in ODD_VALUES[0 if at else 1 :]:
                changed = json.dumps(replaced(json.loads(first), at, new))
                yield name, at, "\n".join([changed, *others]) + "\n"


@pytest.fixture
def read_only_commands(make, monkeypatch):
    """A run with all kinds of files, one that serves as its bound, and the commands that read them."""
    import made_runs

    monkeypatch.setattr(Client, "send", lambda *a: (_ for _ in ()).throw(JudgeError("asked")))
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("an engine was started"))
    monkeypatch.setattr(made_runs, "SETTINGS", CELL_SETTINGS)
    tasks = ["trace_cstance", "trace_meetingbank"]
    run = make_rich_run(make, tasks=tasks, n=3, config=RUN_CONFIG, date="2026-01-01")
    other = make_rich_run(make, tasks=tasks, n=3, name="other", config=RUN_CONFIG, date="2026-01-01")
    for file in run.path.glob("stages/*/judge/*.json"):
        content = read_json(file)
        write_json(file, {**content, "settings": {**content["settings"], "date": None, "prompts": prompts.VERSION}})
    judge = ["--model", "a/judge", "--base-url", "http://127.0.0.1:1/v1", "--sampling", '{"temperature": 0}']
    path = str(run.path)
    commands = [[name, path] for name in ("status", "evaluate", "report")]
    return run, [*commands, ["judge", path, *judge], ["report", path, str(other.path)]]


def test_odd_values_in_files_of_a_run_are_a_one_line_error_or_make_no_difference(read_only_commands, capsys, fast_bf16):
    run, commands = read_only_commands
    for command in commands:
        main(command)
    out = capsys.readouterr().out
    assert "nothing to evaluate" in out and "nothing to judge" in out
    for name, at, content in list(odd_files(run.path))[::193]:
        file = run.path / name
        whole = file.read_bytes()
        file.write_text(content)
        for command in commands:
            try:
                main(command)
            except SystemExit as e:
                assert isinstance(e.code, str) and e.code.startswith("error: "), (name, at, content, e.code)
                if "is damaged" in e.code:
                    assert Path(name).name in e.code and "\n" not in e.code, e.code
        file.write_bytes(whole)


CELL = "stages/2_trace_meetingbank/eval/trace_cstance.json"
NAMED = [
    ("manifest.json", ("config", "test_rows"), "many", "'config.test_rows' is 'many', not a valid integer"),
    ("manifest.json", ("config", "backend"), "tgi", "'config.backend' is 'tgi', not 'vllm' or 'hf'"),
    ("manifest.json", ("model", "name"), ABSENT, "lacks 'model.name'"),
    ("stages/1_trace_cstance/train.json", (), [], "holds a list"),
    ("stages/1_trace_cstance/train.json", ("checkpoint",), ABSENT, "lacks checkpoint|lacks 'checkpoint'"),
    (CELL, ("n",), 10**400, "401 digits"),
    (CELL, ("seconds",), ABSENT, "lacks 'seconds'"),
    (CELL, ("metrics", "accuracy", "value"), math.nan, "NaN"),
    ("stages/2_trace_meetingbank/judge/instruct_lima.json", ("direct",), {}, "lacks 'direct.n'"),
]


def test_an_error_on_a_file_names_the_file_and_the_entry(read_only_commands):
    run, _ = read_only_commands
    for name, at, new, words in NAMED:
        file = run.path / name
        whole = file.read_text()
        file.write_text(json.dumps(replaced(json.loads(whole), at, new)))
        with pytest.raises(SystemExit, match=rf"error: {re.escape(str(file))} is damaged.*({words})"):
            main(["report", str(run.path)])
        file.write_text(whole)


@pytest.mark.parametrize("changes", [[], {"counters": []}, {"seconds": []}, {"losses": "x"}, {"files": {"a": None}}])
def test_a_checkpoint_within_a_stage_with_odd_values_is_not_complete(changes):  # what is done then: test_faults.py
    whole = {"of": {}, "step": 1, "seconds": 1.0, "losses": 0.5, "counters": {"a": 1}, "files": {"a": 2}}
    reading.check(shapes.Within, whole)
    with pytest.raises(ValueError, match="not"):
        reading.check(shapes.Within, {**whole, **changes} if changes else changes)


# -------------------------------------------------------------------------------------------- models from elsewhere


def evaluated(folder, model, checkpoint):
    options = ["--tasks", "trace_fomc", "--backend", "hf", "--data", "demo", "--test-rows", "1", "--renamed-base"]
    given = ["--model", str(model), "--checkpoint", f"trace_fomc={checkpoint}"]
    main(["evaluate", str(folder / "run"), *given, *options])


def with_entries(source, target, file, entries):
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(content | entries))
    return target


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *(("peft_type", kind, " is an adapter of the kind .*which is not supported") for kind in ("lora", 5, [])),
        *(("r", "x", ""), ("target_modules", "[", ""), ("target_modules", 5, ""), ("rank_pattern", 5, "")),
    ],
)
def test_odd_values_of_an_adapter_are_a_one_line_error(checkpoints, tiny_model, tmp_path, key, value, words):
    adapter = with_entries(checkpoints["adapter"], tmp_path / "odd", "adapter_config.json", {key: value})
    with pytest.raises(SystemExit, match=rf"error: .*odd{words}"):
        evaluated(tmp_path, tiny_model, adapter)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["code.T", None]}, 5], ids=repr)
def test_code_of_a_tokenizer_is_not_run_but_named(checkpoints, tiny_model, tmp_path, options, auto_map):
    entries = {"auto_map": auto_map, "tokenizer_class": "Mine"}
    model = with_entries(tiny_model, tmp_path / "odd", "tokenizer_config.json", entries)
    (model / "code.py").write_text("raise SystemExit('the code was run')")
    argv = command_line({**options, "model_name_or_path": str(model)})
    for command in (
        lambda: evaluated(tmp_path, model, checkpoints["adapter"]),
        lambda: base.main(base.CLTrainer, base.CLConfig, argv),
        lambda: main(["data", "audit", "demo", "--tokenizer", str(model)]),
    ):
        with pytest.raises(SystemExit, match=r"error: The tokenizer of .*odd cannot be loaded") as e:
            command()
        assert "\n" not in e.value.code


# --------------------------------------------------------------------------------------------- token ids, the whole way


ODD = [
    *("\0", "a\u2028b\r\nc\rd\x85", "שלום \u202e abc", "👩‍👩‍👧 e\u0301", "x" * 20_000, "\ufeff" * 3, "</s><s>"),
    "<|im_end|>[[A]]",
]


def test_odd_prompts_are_trained_and_evaluated(options, tmp_path, monkeypatch):
    rows = [{"prompt": f"{text} {i}", "answer": "A" if i % 2 else text[:3000] + "x"} for i, text in enumerate(ODD)]
    for split in data.SPLITS:
        write_json(tmp_path / "odd" / "FOMC" / f"{split}.json", rows)
    monkeypatch.delenv("TRACE_DATA", raising=False)
    options |= {"data": str(tmp_path / "odd"), "tasks": ["trace_fomc"], "train_rows": None, "test_rows": None}
    # Answers longer than the limit are cut, and prompts are cut to leave room for an answer in the context.
    run = train({**options, "max_answer_length": 64, "max_steps": 1, "max_prompt_length": 1020})
    evaluate(run)
    for stage in run.stages:
        cell, samples = read_json(stage.eval_file("trace_fomc")), read_jsonl(stage.samples_file("trace_fomc"))
        assert cell["n"] == len(samples) == len(ODD)
        assert [s["prompt"] for s in samples] == [row["prompt"] for row in rows]
        assert [s["target"] for s in samples] == [row["answer"] for row in rows]
    with pytest.raises(RunError, match=r"1020 tokens of a prompt and 4 of an answer do not fit"):
        run.stages[0].eval_file("trace_fomc").unlink()
        evaluate(run, stages=[0], engine_args={"max_length": 64})
