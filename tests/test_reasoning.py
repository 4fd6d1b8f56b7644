"""The tasks with reasoning (RCL): extraction of answers, their scores, and the method that trains on them."""

import re
from collections import Counter

import pytest
from conftest import SHARED, train

from trace_bench.run import read_json
from trace_bench.tasks import load_tasks
from trace_tasks import data, reasoning, scoring, utils
from trace_tasks.answers import extract_answer, split_answer
from trainers.base import ConfigError
from trainers.rcl import RCLConfig, RCLTrainer

FORMS = {"reasoning_meetingbank": "summary", "reasoning_py150": "code", "reasoning_20minuten": "text"}
real_data = pytest.mark.skipif(
    not (SHARED / "data" / "trace_reasoning").is_dir(),
    reason="the reasoning variant of TRACE (shared/data/trace_reasoning) is not beside the repository",
)
every_task = pytest.mark.parametrize("name", list(data.REASONING))


@pytest.fixture
def real_task(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACE_REASONING", str(SHARED / "data" / "trace_reasoning"))
    return load_tasks([name])[name]


# ---------------------------------------------------------------------------------------------------- reading answers


SUMMARY = "Therefore, the summary of the meeting transcripts is:"
#: form -> text, and its path and answer; None if there is no answer.
SPLIT = {
    "line": [
        ("6 * 6 = 36\nAnswer:36", ("6 * 6 = 36\n", "36")), ("Answer:B", ("", "B")),
        ("6 * 6 = 36.\n\nanswer :\n  36  \nThat is the sum.", ("6 * 6 = 36.\n\n", "36")),
        ("它表示不满。\n回答：B", ("它表示不满。\n", "B")), ("它表示不满。回答: B。", ("它表示不满。", "B。")),
        ("它表示不满。\n答案：\nB", ("它表示不满。\n", "B")),
        ("The answer: is it A? No.\nAnswer:B", ("The answer: is it A? No.\n", "B")),  # the last one decides
        ("Answer:A? No.\nAnswer:B\nAnswer:", ("Answer:A? No.\n", "B")),  # cut at the limit of tokens
        ("B", None), ("Answer:", None), ("Answer: \n ", None), ("The answer is B", None), ("Reanswer:B", None),
    ],
    "text": [("Kurz.\nAnswer: Eins.\nZwei.\n", ("Kurz.\n", "Eins.\nZwei.")), ("36", None)],
    "summary": [
        (f"It passed.{SUMMARY}\nCB 1\r\nCB 2\n", ("It passed.", "CB 1\r\nCB 2")),
        ("therefore the summary of the meeting transcript is : CB 1", ("", "CB 1")),
        (f"The answer: none. {SUMMARY}\nAnswer: CB 1", ("The answer: none. ", "Answer: CB 1")),
        ("It passed.\nAnswer:CB 1", ("It passed.\n", "CB 1")), ("A summary: CB 1", None), (SUMMARY + "\n", None),
    ],
    "code": [
        ("return x \nReasoning:It returns.\nReasoning:x", ("It returns.\nReasoning:x", "return x ")),  # not stripped
        ("\nreturn x\nreturn y\nReasoning: It returns.", (" It returns.", "return x")),
        ("return x Reasoning：It returns.", ("It returns.", "return x ")), ("\nreturn x\nThis is.", ("", "return x")),
        ("Reasoning:The function returns it.\nAnswer:return x", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("form", "text", "parts"), [(form, *row) for form, rows in SPLIT.items() for row in rows])
def test_a_text_is_split_into_path_and_answer(form, text, parts):
    assert split_answer(form, text) == parts
    assert extract_answer(form, text) == (parts and parts[1])


def test_an_unknown_form_or_variant_is_an_error(demo_data: None):
    with pytest.raises(ValueError, match="letter"):
        extract_answer("letter", "Answer:B")
    with pytest.raises(ValueError, match="thinking"):
        utils.load_dataset("FOMC", trace_variant="thinking")
    # lm-eval also passes the arguments of the model, and transformers has one named `variant`.
    assert "Give your reasoning" not in utils.load_dataset("FOMC", variant="fp16")["test"][0]["prompt"]


# ---------------------------------------------------------------------------------------------------- the official form


def test_the_forms_of_answers_match_the_tasks():
    assert {task: frame.form for task, frame in zip(data.REASONING, reasoning.FRAMES.values(), strict=True)} == {
        task: FORMS.get(task, "line") for task in data.REASONING
    }
    assert list(reasoning.FRAMES) == list(data.REASONING.values())


@pytest.mark.parametrize(
    ("folder", "prompt", "message"),
    [
        ("FOMC", "What is it?\nText:\nRates rose.\nStance:", r"no 'A, B and C.\\n' in the prompt"),
        ("FOMC", "Choose one from A, B and C.\nText:\nRates rose.\nAnswer:", "not in 'Stance:'"),
        ("Py150", "import os <EOL>", "no '<s> '"),
    ],
)
def test_a_prompt_in_a_different_frame_is_an_error(folder, prompt, message):
    with pytest.raises(ValueError, match=message):
        reasoning.reasoning_prompt(folder, prompt)


def test_an_instruction_within_a_text_stays_there():
    told = "Choose one from A, B and C.\n"
    asked = told.replace("C.\n", f"C. {reasoning._FIRST}\n")
    assert reasoning.reasoning_prompt("FOMC", f"{told}Text:\n{told}Stance:") == f"{asked}Text:\n{told}Reasoning:"


# ------------------------------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize(
    ("score", "reference", "other_form", "wrong"),
    [(utils.score_reasoned_choice, "B", "B. because", "C"), (utils.score_reasoned_number, "12", "12.0 apples", "13")],
)
def test_the_tolerant_accuracy_reads_only_the_extracted_answer(score, reference, other_form, wrong):
    doc = {"prompt": "", "answer": reference}
    right = {"accuracy": 0, "accuracy_tolerant": 1, "extracted": 1}
    assert score(doc, [f"So.\nAnswer:{other_form}\nNot 13, not C."]) == right
    assert score(doc, [f"{reference}\nAnswer:{wrong}"]) == {**right, "accuracy_tolerant": 0}


def test_the_source_of_sari_is_the_prompt_of_the_row():
    doc = {"prompt": "Something else.", "answer": "Es ist alt."}
    scores = utils.score_reasoned_simplification(doc, ["Answer:Es ist neu."])
    assert scores["sari"] == scoring.sari("Something else.", "Es ist neu.", doc["answer"])


@pytest.mark.parametrize(
    ("folder", "official"),
    [
        ("MeetingBank", lambda prompt: prompt + "Reasoning:"),
        ("20Minuten", lambda prompt: prompt.replace("\n\nParagraph:", "\nParagraph:")),
    ],
)
def test_training_prompts_get_the_form_of_the_test_prompts(folder, official, demo_data: None, monkeypatch):
    rows, read = list(utils.load_dataset(folder, trace_variant="reasoning")["train"]), data.read_split
    assert all(official(row["prompt"]) != row["prompt"] for row in rows)
    monkeypatch.setattr(
        data, "read_split", lambda *where: [{**row, "prompt": official(row["prompt"])} for row in read(*where)]
    )
    assert list(utils.load_dataset(folder, trace_variant="reasoning")["train"]) == rows


# -------------------------------------------------------------------------------------------------------- the real data


@real_data
@every_task
def test_extracted_real_training_answers_score_in_full_and_test_answers_have_no_reasoning(name, real_task):
    # The extracted answer is compared with itself. The score is 1, except SARI, which is a little less if the source
    # repeats words (here at least 0.984).
    docs = list(real_task.training_docs())
    assert len(docs) == (60 if name == "reasoning_meetingbank" else 200)
    for doc in docs:
        answer = extract_answer(FORMS.get(name, "line"), doc["answer"])
        assert answer is not None and answer.strip()
        scores = real_task.process_results({**doc, "answer": answer}, [doc["answer"]])
        headline = next(iter(scores))
        assert scores["extracted"] == 1
        full = scoring.sari(doc["prompt"], answer, answer) if headline == "sari" else 1
        assert scores[headline] == pytest.approx(full, abs=1e-6) and full > 0.98
    for doc in [*real_task.test_docs(), *real_task.validation_docs()]:  # bare
        assert "Reasoning:" not in doc["answer"]
        if name != "reasoning_py150":  # needs no marker
            assert extract_answer(FORMS.get(name, "line"), doc["answer"]) is None


#: Rows of the reasoning variant whose plain row is available, too.
IN_BOTH = {"C-STANCE": 143, "FOMC": 87, "MeetingBank": 62, "Py150": 30, "ScienceQA": 19}
IN_BOTH |= {"NumGLUE-cm": 280, "NumGLUE-ds": 126, "20Minuten": 89}


def _content(prompt: str, first: int, last: int | None) -> str:
    """The content of a row: its letters and digits without the lines of the frame."""
    return re.sub(r"\W+", "", "".join(prompt.split("\n")[first:last]))


@real_data
@pytest.mark.parametrize("folder", IN_BOTH)
def test_real_plain_rows_become_the_official_reasoning_rows(folder):
    code, form = folder == "Py150", reasoning.FRAMES[folder].form
    plain = {}
    for file in sorted((SHARED / "data").glob(f"trace*/{folder}/*.json")):
        if file.parts[-3] != "trace_reasoning":
            for row in data.read_rows(file):
                plain.setdefault(_content(row["prompt"], *((0, None) if code else (1, -1))), []).append(row)
    matched = 0
    for split in data.SPLITS:
        for row in data.read_split(SHARED / "data" / "trace_reasoning", folder, split):
            rows = plain.get(_content(row["prompt"], 1, None if code else -1), [])
            matched += bool(rows)
            prompts = {reasoning.reasoning_prompt(folder, r["prompt"]) for r in rows}
            assert prompts <= {reasoning.as_tested(row["prompt"])}
            answers = {reasoning.bare_answer(folder, r["answer"]) for r in rows}
            if split != "train":
                assert not rows or row["answer"] in answers
                continue
            path, answer = split_answer(form, row["answer"])
            # 20Minuten's official paths end in the teacher's text. Py150 repeats prompts with different answers.
            if rows and folder not in ("20Minuten", "Py150"):
                assert answer in {a.strip() for a in answers}
            assert reasoning.reasoning_answer(folder, path if code else path.rstrip("\n"), answer) == row["answer"]
    assert matched == IN_BOTH[folder]


def _frame(prompt: str) -> tuple[str, ...]:
    """The fixed parts of a prompt: its first line and the titles with the line breaks around them."""
    titles = r"\n+(?:Text|Meeting transcripts|Question|Choices|Paragraph|Reasoning|文本|对象|推理)[:：](?:\n|\Z|R)"
    return (prompt.partition("\n")[0], *re.findall(titles, prompt))


@real_data
@every_task
def test_real_training_and_test_prompts_have_one_frame(name, real_task):
    frames = Counter(_frame(doc["prompt"]) for doc in [*real_task.training_docs(), *real_task.test_docs()])
    assert len(frames) == 1, frames
    root, folder = data.find_reasoning(), data.REASONING[name]
    for split, docs in (("train", real_task.training_docs()), ("test", real_task.test_docs())):
        raw = [row["prompt"] for row in data.read_split(root, folder, split)]
        changed = sum(a != doc["prompt"] for a, doc in zip(raw, docs, strict=True))
        assert changed == (200 if (name, split) == ("reasoning_20minuten", "train") else 0)


# ----------------------------------------------------------------------------------------------------------- the method


def test_rcl_takes_the_reasoning_variant_of_every_task(tmp_path):
    config = RCLConfig(output_dir=str(tmp_path))
    assert config.tasks == data.ORDERS["reasoning_order1"] and config.train_rows == 500
    config = RCLConfig(output_dir=str(tmp_path), tasks=["trace_fomc", "reasoning_cstance"], train_rows=8, epochs=[1, 2])
    assert config.tasks == ["reasoning_fomc", "reasoning_cstance"] and config.train_rows == 8
    for order in (["order2"], "order2", ["trace_numglue_cm,", *data.ORDERS["order2"][1:]]):
        assert RCLConfig(output_dir=str(tmp_path), tasks=order).tasks == data.ORDERS["reasoning_order2"]
    assert config.manifest()["tasks"] == config.tasks


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["trace_fomc", "gsm8k"], "gsm8k.*no such task.*reasoning_cstance"),
        (["trace_fmoc"], r"trace_fmoc.*no such task.* Did you mean trace_fomc\?"),
        (["trace_fomc", "reasoning_fomc"], "a task appears twice"),
    ],
)
def test_rcl_refuses_tasks_that_it_cannot_train(tasks, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        RCLConfig(output_dir=str(tmp_path), tasks=tasks)


def test_rcl_trains_the_reasoning_and_scores_the_answer(options):
    run = train({**options, "tasks": ["trace_numglue_ds"]}, RCLTrainer, RCLConfig)
    assert run.manifest["method"] == "rcl" and run.tasks == ["reasoning_numglue_ds"]
    assert run.manifest["data"]["fingerprint"].keys() == {"reasoning_numglue_ds"}
    assert read_json(run.stages[1].train_file)["rows"] == 16
