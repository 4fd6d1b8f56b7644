"""Chat prompts: training, evaluation and judged answers share a renderer, whose arguments and date are recorded."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from conftest import pieces_tokenizer, train
from tokenizers import normalizers
from transformers import AutoTokenizer

from trace_bench import evaluate
from trace_bench.run import Run, RunError, read_json
from trace_tasks import tokens
from trace_tasks.data.files import write_json
from trace_tasks.tokens import Chat, PromptError, example_ids, prompt_ids
from trainers.base import ConfigError

#: Like Qwen3's template: thinking is on unless it is false. Setting it to none differs from not setting it.
SWITCH = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ strftime_now('%d.%m.%Y') }}\n"
    "{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OFF = {"enable_thinking": False}


@pytest.fixture
def switched(tiny_model, tmp_path, options):
    """Options of a run of a chat model whose template has a switch and asks for the date."""
    model = shutil.copytree(tiny_model, tmp_path / "switched")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = SWITCH
    tokenizer.save_pretrained(model)
    return {
        **options,
        "model_name_or_path": str(model),
        "chat_template": True,
        "max_prompt_length": 160,
        "tasks": ["trace_fomc"],
    }


def prompts(run: Run, index: int = 0, task: str = "trace_fomc") -> list[str]:
    lines = run.stages[index].samples_file(task).read_text(encoding="utf-8").splitlines()
    return [json.loads(line).get("given") or json.loads(line)["prompt"] for line in lines]


def test_training_and_evaluation_render_the_same_prompts(switched, monkeypatch):
    from trainers.base import CLTrainer

    monkeypatch.setenv("TRACE_DATA", "demo")
    trained = []

    class Look(CLTrainer):
        def task_dataset(self, task, limit=None):
            rows = super().task_dataset(task, limit)
            trained.append(self.tokenizer.decode(rows[0]["input_ids"]))
            return rows

    Look.__module__ = CLTrainer.__module__
    run = train({**switched, "chat_template_args": OFF, "max_steps": 1}, Look)
    date = run.manifest["date"]
    write_json(run.path / "manifest.json", {**run.manifest, "date": "2020-01-02"})  # as if it had begun then
    run = Run.open(run.path)
    evaluate.evaluate(run)
    end = "</s>\n<s>assistant\n<think>\n\n</think>\n\n"
    assert all(p.startswith("<s>user 02.01.2020\n") and p.endswith(end) for p in prompts(run))
    year, month, day = date.split("-")
    assert trained[0].startswith(f"<s>user {day}.{month}.{year}\n") and end in trained[0]
    assert read_json(run.stages[1].eval_file("trace_fomc"))["settings"]["chat_template_args"] == OFF

    run.manifest["config"]["chat_template_args"] = {"enable_thinking": True}
    with pytest.raises(RunError, match=r"chat_template_args\.enable_thinking: False -> True"):
        evaluate.evaluate(run)

    # Judged answers also get the arguments if the tasks have no template.
    run.manifest["config"].update(chat_template_args=OFF, chat_template=False)
    for stage in run.stages:
        stage.eval_file("trace_fomc").unlink()
    extra = {"judged": ["instruct_lima"], "judged_rows": 1, "judged_max_new_tokens": 2}
    evaluate.evaluate(run, stages=[0], extra=extra)
    (given,) = prompts(run, 0, "instruct_lima")
    assert given.startswith("<s>user") and given.endswith(end)
    settings = read_json(run.stages[0].eval_file("instruct_lima"))["settings"]
    assert settings["chat_template"] is True and settings["chat_template_args"] == OFF
    assert "chat_template_args" not in read_json(run.stages[0].eval_file("trace_fomc"))["settings"]

    run.manifest["config"].update(chat_template_args={"thinking": False})
    run.stages[0].eval_file("instruct_lima").unlink()
    monkeypatch.setattr("trace_bench.engine.open_engine", lambda *a, **k: pytest.fail("an engine was started"))
    with pytest.raises(PromptError, match="no variable thinking"):
        evaluate.evaluate(run, stages=[0], extra=extra)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"chat_template": False, "chat_template_args": OFF}, "no effect without a chat template"),
        (
            {"chat_template_args": {"add_generation_prompt": False}},
            "add_generation_prompt is not a variable of the template",
        ),
        ({"chat_template_args": "thinking"}, "chat_template_args='thinking' is not allowed: use a mapping"),
        ({"chat_template_args": {"thinking": False}}, "the chat template has no variable thinking\\. Leave it out"),
        (
            {"chat_template": False, "judged": ["instruct_lima"], "chat_template_args": {"thinking": False}},
            "the chat template has no variable thinking",
        ),
        (
            {"chat_template": False, "judged": ["instruct_lima"], "chat_template_args": OFF, "without": True},
            "chat_template_args is set, but the tokenizer has no chat template",
        ),
        ({"max_prompt_length": 20}, r"alone has \d+ tokens, but max_prompt_length is 20\. Raise it"),
    ],
)
def test_prompts_that_cannot_be_rendered_are_refused_before_training(switched, wrong, message, tmp_path):
    given = {**switched, **wrong}
    if given.pop("without", False):
        Path(given["model_name_or_path"], "chat_template.jinja").unlink()
    with pytest.raises((ConfigError, PromptError), match=message):
        train(given)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.fixture
def chat(switched):
    return Chat(AutoTokenizer.from_pretrained(switched["model_name_or_path"]), OFF, "2020-01-02")


def test_cutting_a_chat_drops_earlier_turns_first_and_keeps_the_template(chat):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "an example"},
        {"role": "assistant", "content": "its answer"},
        {"role": "user", "content": "the question, with a beginning and an end"},
    ]
    whole = chat(turns)
    head, end = "<s>system 02.01.2020\nBe short.</s>\n", "</s>\n<s>assistant\n<think>\n\n</think>\n\n"
    assert whole.startswith(head) and whole.endswith("an end" + end)
    (ids,) = prompt_ids(chat.tokenizer, [whole], None, chat)
    assert chat.tokenizer.decode(prompt_ids(chat.tokenizer, [whole], len(ids), chat)[0]) == whole
    (cut,) = prompt_ids(chat.tokenizer, [whole], len(ids) - 1, chat)
    question = "the question, with a beginning and an end"
    assert chat.tokenizer.decode(cut) == f"{head}<s>user 02.01.2020\n{question}{end}", "the example goes as a whole"
    (cut,) = prompt_ids(chat.tokenizer, [whole], len(ids) - 95, chat)
    text = chat.tokenizer.decode(cut)
    assert text.startswith(head + "<s>user 02.01.2020\n") and text.endswith("an end" + end)
    assert len(cut) <= len(ids) - 95 and "an example" not in text
    with pytest.raises(PromptError, match="longer than the limit of 30 tokens"):
        prompt_ids(chat.tokenizer, [whole], 30, chat)


def test_a_text_that_a_normaliser_makes_longer_is_cut_by_the_excess(chat):
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()  # "…" becomes three points
    text = chat([{"role": "user", "content": "Word " * 20 + "und … " * 9 + "end."}])
    (ids,) = prompt_ids(chat.tokenizer, [text], None, chat)
    for n in (1, 9):
        (cut,) = prompt_ids(chat.tokenizer, [text], len(ids) - n, chat)
        assert len(cut) <= len(ids) - n < len(cut) + 3


def test_a_chat_has_only_the_ids_of_its_template(chat):
    """This equals transformers' own way. A raw prompt keeps the tokens that the tokenizer adds in front."""
    turns = [{"role": "user", "content": "a question"}]
    own = chat.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, enable_thinking=False, strftime_now=chat.day.strftime, return_dict=False
    )
    assert prompt_ids(chat.tokenizer, [chat(turns)], None, chat) == [own]
    (example,) = example_ids(chat.tokenizer, [chat(turns)], ["yes"], chat=chat)
    assert Chat(chat.tokenizer, None, "2020-01-02")(turns).endswith("</s>\n<s>assistant\n"), (
        "nothing given: its default"
    )
    answer = [*chat.tokenizer("yes", add_special_tokens=False).input_ids, chat.tokenizer.eos_token_id]
    assert example["input_ids"] == own + answer and example["labels"] == [-100] * len(own) + answer


def test_an_answer_to_a_chat_is_encoded_with_it_and_without_bos():
    tokenizer = pieces_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    chat = Chat(tokenizer)
    text = chat([{"role": "user", "content": "a question"}])
    (example,) = example_ids(tokenizer, [text], ["yes"], chat=chat)
    ids = tokenizer(f"{text}yes", add_special_tokens=False).input_ids
    assert example["input_ids"] == [*ids, tokenizer.eos_token_id] and tokenizer("x").input_ids[0] not in ids


def test_a_template_that_refuses_the_turns_is_an_error(chat):
    chat.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(PromptError, match=r"turns system, user: System role not supported\..*`description`"):
        chat([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    with pytest.raises(PromptError, match=r"turns user: System role not supported\. Put a different template"):
        Chat(chat.tokenizer)


#: Like the templates of MiniMax and SmolVLM, which look for parts and find none in a plain text.
PARTS = "{% for m in messages %}{{ m['content'][0]['text'] + '!' }}{% endfor %}"
IMAGES = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}Answer:"


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the tokenizer has no chat template"),
        ("", "the tokenizer has no chat template"),
        (PARTS, r"turns user: 'str object' has no attribute 'text'\. Put a different template"),
        (IMAGES, "leaves out the question: perhaps it is for images"),
        ({"rag": SWITCH, "chat": SWITCH}, r"without a default: chat, rag\..*'{\"chat_template\": \"chat\"}'"),
    ],
)
def test_a_template_that_leaves_out_the_question_is_refused(template, message, chat):
    chat.tokenizer.chat_template = template
    with pytest.raises(PromptError, match=message):
        Chat(chat.tokenizer)


def test_the_named_one_of_several_templates_is_used(chat):
    turns = [{"role": "user", "content": "a question"}]
    wanted, chat.tokenizer.chat_template = chat(turns), {"default": "{{ messages }}", "chat": SWITCH}
    assert Chat(chat.tokenizer, {"chat_template": "chat", **OFF}, "2020-01-02")(turns) == wanted
    with pytest.raises(PromptError, match="no variable enable_thinking"):
        Chat(chat.tokenizer, OFF)


@pytest.mark.parametrize(
    "behind, end", [("</s>\n", "</s>"), (" <|end|>\n</s>", "<|end|>"), ("<|end|>er", "<|end|>er"), ("\n\n", None)]
)
def test_the_end_of_an_answer_is_the_token_after_it_in_the_template(behind, end):
    tokenizer = pieces_tokenizer(additional_special_tokens=["<|end|>", "<|end|>er"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}" + behind + "{% endfor %}"
    assert Chat(tokenizer).end == end


def test_a_text_with_special_tokens_is_cut_no_more_than_needed(chat):
    """Py150's "<s>" is one of LLaMA's."""
    text = chat([{"role": "user", "content": "<s> = 1 </s> " * 40 + "end"}])
    (ids,) = prompt_ids(chat.tokenizer, [text], None, chat)
    assert len(prompt_ids(chat.tokenizer, [text], len(ids) - 100, chat)[0]) > len(ids) - 110


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ 'x' | center(10**10) }}",
        "{{ 9 ** (9**9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'x' * 2000000 }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=lambda t: t[:50],
)
def test_a_template_that_takes_too_much_time_or_memory_is_refused(template, tiny_model, monkeypatch):
    monkeypatch.setattr(tokens, "RENDERING", (0.5, 2**29))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="chat template") as e:
        Chat(tokenizer)([{"role": "user", "content": "what"}])
    assert len(str(e.value)) < 1000
    tokenizer.chat_template = SWITCH
    assert "what" in Chat(tokenizer)([{"role": "user", "content": "what"}]), "the limits end with it"


def test_memory_is_limited_outside_the_main_thread_too(tiny_model, monkeypatch):
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_model), []
    tokenizer.chat_template = "{{ 'x' * 10**10 }}"

    def ask() -> None:
        try:
            Chat(tokenizer)([{"role": "user", "content": "what"}])
        except PromptError as e:
            found.append(str(e))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "1 GiB of memory" in found[0]


def test_long_chats_are_rendered(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    loop = "{% for i in range(m['content'] | length) %}{% if loop.last %}{{ i }}{% endif %}{% endfor %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{loop}{{{{ m['content'] }}}}{{{{ '-' * 80 }}}}{{% endfor %}}"
    asked = "é" * 90_000
    assert asked in Chat(tokenizer)([{"role": "user", "content": "a" * 9}, {"role": "user", "content": asked}])
