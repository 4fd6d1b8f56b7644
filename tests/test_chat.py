"""Chat prompts: one renderer for training, evaluation and judged answers; its arguments and its date are on record."""

import json
import shutil
import threading
import time

import pytest
from conftest import train
from transformers import AutoTokenizer

from trace_bench import engine, evaluate
from trace_bench.run import Run, RunError, read_json
from trace_tasks import tokens
from trace_tasks.data.files import write_json
from trace_tasks.tokens import Chat, PromptError, example_ids, prompt_ids
from trainers.base import ConfigError

#: As Qwen3's: thinking is on unless it is turned off by false; none that is given is not the same as nothing given.
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


@pytest.mark.parametrize("arguments", [None, OFF], ids=["default", "off"])
def test_training_and_evaluation_render_the_same_prompts(switched, arguments):
    from trainers.base import CLTrainer

    trained = []

    class Look(CLTrainer):
        def task_dataset(self, task, limit=None):
            rows = super().task_dataset(task, limit)
            trained.append(self.tokenizer.decode(rows[0]["input_ids"]))
            return rows

    Look.__module__ = CLTrainer.__module__
    run = train({**switched, "chat_template_args": arguments}, Look)
    date = run.manifest["date"]
    write_json(run.path / "manifest.json", {**run.manifest, "date": "2020-01-02"})  # as if it had begun then
    run = Run.open(run.path)
    evaluate.evaluate(run)
    end = "<s>assistant\n" + ("<think>\n\n</think>\n\n" if arguments else "")
    assert all(p.startswith("<s>user 02.01.2020\n") and p.endswith("</s>\n" + end) for p in prompts(run))
    year, month, day = date.split("-")
    assert trained[0].startswith(f"<s>user {day}.{month}.{year}\n") and ("</s>\n" + end) in trained[0]
    settings = read_json(run.stages[1].eval_file("trace_fomc"))["settings"]
    assert settings.get("chat_template_args") == arguments


def test_other_arguments_of_the_template_are_another_setting(switched):
    run = train({**switched, "chat_template_args": OFF})
    evaluate.evaluate(run, stages=[0])
    run.manifest["config"]["chat_template_args"] = {"enable_thinking": True}
    with pytest.raises(RunError, match=r"chat_template_args\.enable_thinking: False -> True"):
        evaluate.evaluate(run)


def test_judged_answers_have_the_arguments_too(switched, monkeypatch):
    monkeypatch.setenv("TRACE_DATA", "demo")
    more = {"judged": ["instruct_lima"], "judged_rows": 1, "judged_max_new_tokens": 2}
    run = train({**switched, **more, "chat_template": False, "chat_template_args": OFF})
    evaluate.evaluate(run, stages=[0])
    (given,) = prompts(run, 0, "instruct_lima")
    assert given.endswith("<s>assistant\n<think>\n\n</think>\n\n")
    settings = read_json(run.stages[0].eval_file("instruct_lima"))["settings"]
    assert settings["chat_template"] is True and settings["chat_template_args"] == OFF
    assert "chat_template_args" not in read_json(run.stages[0].eval_file("trace_fomc"))["settings"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"chat_template": False, "chat_template_args": OFF}, "no effect without chat_template=true"),
        ({"chat_template_args": "thinking"}, "chat_template_args='thinking' is not allowed: use a mapping"),
        ({"max_prompt_length": 20}, r"takes \d+ tokens by itself and max_prompt_length is 20: raise it"),
    ],
)
def test_what_cannot_be_rendered_is_refused_before_anything_is_trained(switched, wrong, message, tmp_path):
    with pytest.raises((ConfigError, PromptError), match=message):
        train({**switched, **wrong})
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["enable_thinking", "chat_template_args", "add_bos_token", "tokenizer"])
def test_an_engine_takes_no_argument_that_would_change_its_prompts_alone(name, tiny_model):
    with pytest.raises(engine.EngineError, match=rf"engine_args: {name} would"):
        engine.open_engine("hf", str(tiny_model), engine_args={name: False})


@pytest.fixture
def chat(switched):
    return Chat(AutoTokenizer.from_pretrained(switched["model_name_or_path"]), OFF, "2020-01-02")


def test_what_is_cut_is_the_content_and_earlier_turns_go_first(chat):
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
    for less, kept in ((0, None), (1, "the question, with a beginning and an end"), (95, "inning and an end")):
        (cut,) = prompt_ids(chat.tokenizer, [whole], len(ids) - less, chat)
        text = chat.tokenizer.decode(cut)
        if kept is None:
            assert text == whole
        elif less == 1:
            assert text == f"{head}<s>user 02.01.2020\n{kept}{end}", "the example goes as a whole"
        else:
            assert text.startswith(head + "<s>user 02.01.2020\n") and text.endswith("an end" + end)
            assert len(cut) <= len(ids) - less and "an example" not in text
    with pytest.raises(PromptError, match="take more than the limit of 30 tokens"):
        prompt_ids(chat.tokenizer, [whole], 30, chat)


def test_a_chat_has_the_templates_ids_and_no_others(chat):
    """As transformers' own way; a raw prompt keeps what the tokenizer puts in front."""
    turns = [{"role": "user", "content": "a question"}]
    own = chat.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, enable_thinking=False, strftime_now=chat.day.strftime, return_dict=False
    )
    assert prompt_ids(chat.tokenizer, [chat(turns)], None, chat) == [own]
    (example,) = example_ids(chat.tokenizer, [chat(turns)], ["yes"], chat=chat)
    answer = [*chat.tokenizer("yes", add_special_tokens=False).input_ids, chat.tokenizer.eos_token_id]
    assert example["input_ids"] == own + answer and example["labels"] == [-100] * len(own) + answer


def test_a_template_that_refuses_the_turns_says_so(chat):
    chat.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(PromptError, match=r"turns system, user: System role not supported\..*`description`"):
        chat([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    chat.tokenizer.chat_template = None
    with pytest.raises(PromptError, match="has none"):
        Chat(chat.tokenizer)


@pytest.mark.slow
def test_both_engines_render_with_it():
    from trace_bench.engine.hf import SwapHF
    from trace_bench.engine.swap import SwapLM
    from trace_bench.engine.vllm import SwapVLLM

    for engine_class in (SwapHF, SwapVLLM):
        for name in ("apply_chat_template", "tok_encode", "generate_until", "_spoken"):
            assert getattr(engine_class, name) is getattr(SwapLM, name)


@pytest.mark.timeout(120)
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
def test_a_template_that_would_take_for_ever_or_all_memory_is_refused(template, tiny_model, monkeypatch):
    monkeypatch.setattr(tokens, "RENDERING", (2.0, 2**29))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(PromptError, match="chat template") as e:
        Chat(tokenizer)([{"role": "user", "content": "what"}])
    assert time.monotonic() - began < 20 and len(str(e.value)) < 1000
    tokenizer.chat_template = SWITCH
    assert "what" in Chat(tokenizer)([{"role": "user", "content": "what"}]), "the limits end with it"


def test_memory_is_limited_beside_the_main_thread_too(tiny_model, monkeypatch):
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_model), []
    tokenizer.chat_template = "{{ 'x' * 10**10 }}"

    def ask() -> None:
        try:
            Chat(tokenizer)([{"role": "user", "content": "what"}])
        except PromptError as e:
            found.append(str(e))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert "1 GiB of memory" in found[0]


def test_long_chats_and_templates_are_rendered(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for i in range(m['content'] | length) %}{% if loop.last %}{{ i }}{% endif %}"
        "{% endfor %}{{ m['content'] }}{{ '-' * 80 }}{% endfor %}"
    )
    asked = "é" * 90_000
    assert asked in Chat(tokenizer)([{"role": "user", "content": "a" * 9}, {"role": "user", "content": asked}])
