"""In-context learning has the prompts, ends of answers, scores and draws of the official code, in lm-eval and runs."""

import json
import logging
import shutil
from collections import Counter

import jinja2
import lm_eval
import pytest
from conftest import CHAT_TEMPLATE, train
from lm_eval.api.model import LM
from lm_eval.models.utils import postprocess_generated_text

from trace_bench import evaluate, report
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import load_tasks, task_manager
from trace_tasks import scoring
from trace_tasks.data.files import write_json
from trainers.base import ConfigError
from trainers.icl import ICLConfig, ICLTrainer

ANNOUNCED = "We will give you several examples and you should follow them to accomplish the task.\n Examples:\n"
#: The instructions, which prompts contain once, from the official code.
INSTRUCTIONS = {
    "trace_cstance": "判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。\n",
    "trace_fomc": "What is the monetary policy stance for the following text? A. dovish, B. hawkish, C. neutral. "
    "Choose one from A, B and C.\n",
    "trace_meetingbank": "Write a summary of the following meeting transcripts.\n",
    "trace_py150": "Continue writing the code.\n",
    "trace_scienceqa": "Choose an answer for the following question and give your reasons.\n\n",
    "trace_numglue_cm": "Solve the following math problem.\n",
    "trace_numglue_ds": "Solve the following math problem.\n",
    "trace_20minuten": "Provide a simplified version of the following paragraph in German.\n\n",
}
#: The text of a model after a right answer, and the part of it that the official code keeps.
RUNS_ON = {
    "trace_cstance": ("", "\n\n文本：\n", ""),
    "trace_fomc": ("", ". dovish", ""),
    "trace_meetingbank": ("\n", "Meeting transcripts:\nNext, please.\nSummary:Meeting transcripts", "\n"),
    "trace_py150": ("", "<EOL> return 1 <EOL> ", ""),
    "trace_scienceqa": ("\n\n", "Question:\nWhich?\n\nAnswer:A\nQuestion:", "\n\n"),
    "trace_numglue_cm": ("", "\n\nQuestion:\n1 + 1?\nAnswer:2", ""),
    "trace_numglue_ds": ("", "\nAnswer:7", ""),
    "trace_20minuten": ("\n\n", "Paragraph:\nEs regnet.\n\nSimplification:Regen. Paragraph", "\n\n"),
}
SHORT = ("trace_cstance", "trace_fomc", "trace_numglue_cm", "trace_numglue_ds")
every_task = pytest.mark.parametrize("name", list(INSTRUCTIONS))


def load(name: str):
    task = load_tasks([name])[name]
    task.set_fewshot_seed(7)
    return task


def official_prompt(name: str, demonstrations: list[dict], question: str) -> str:
    """Makes the official prompt by hand from rows of the data."""
    instruction = INSTRUCTIONS[name]
    if name == "trace_meetingbank":
        return question
    assert name == "trace_py150" or all(d["prompt"].startswith(instruction) for d in demonstrations)
    start, cue = (0, "Code:\n") if name == "trace_py150" else (len(instruction), "")
    text = instruction + ANNOUNCED
    for row in demonstrations:
        text += cue + row["prompt"][start:] + row["answer"] + "\n\n"
    return text + cue + question[start:]


def demonstrations(task, n: int) -> list[dict]:
    """The rows that a task draws, with the prompts of the data."""
    if task.task_name == "trace_meetingbank":
        return []
    whole = {(r["prompt"].removeprefix(INSTRUCTIONS[task.task_name]), r["answer"]): r for r in task.training_docs()}
    drawn = [whole[d["prompt"], d["answer"]] for d in task.sampler.sample(n)]
    assert len(drawn) == n
    return drawn


class Scripted(LM):
    """A model that writes a given text for each request, one letter per token, and stops like lm-eval's models."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.asked = []

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for request in requests:
            prompt, settings = request.args
            self.asked.append((prompt, settings))
            text = self.write(request.doc)[: settings["max_gen_toks"]]
            texts.append(postprocess_generated_text(text, settings["until"], None))
        return texts

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def plain_lm_eval(names, write, **settings):
    """`lm_eval --tasks NAMES`, with a scripted model."""
    lm = Scripted(write)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=names, task_manager=task_manager(), bootstrap_iters=0, log_samples=True, **settings
    )
    return results, lm.asked


# ---------------------------------------------------------------------------------------------------------- prompts


@every_task
def test_a_prompt_with_demonstrations_equals_the_official_one_and_zero_shot_is_unchanged(name, demo_data):
    task = load(name)
    doc = task.test_docs()[0]
    prompt = task.fewshot_context(doc, 6)
    assert prompt == official_prompt(name, demonstrations(task, 6), doc["prompt"])
    assert prompt == task.fewshot_context(doc, 6), "one draw serves all rows"
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    settings = {"do_sample": False, "max_gen_toks": 64 if name in SHORT else 512, "until": []}
    assert task.instances[0].args == (doc["prompt"], settings) and task.fewshot_context(doc, 0) == doc["prompt"]
    assert (1.1 if name in (*SHORT, "trace_scienceqa") else 1.0) == task.VERSION


def test_the_reasoning_variant_has_whole_rows_as_demonstrations(demo_data):
    # The official ICL code does not have this variant.
    task = load("reasoning_fomc")
    doc = task.test_docs()[0]
    drawn = task.sampler.sample(3)
    shots = [d["prompt"] + d["answer"] + "\n\n" for d in drawn]
    assert len(drawn) == 3 and task.fewshot_context(doc, 3) == "".join([*shots, doc["prompt"]])


def test_in_a_chat_template_the_official_prompt_is_one_turn_of_the_user(demo_data):
    task = load("trace_fomc")
    doc = task.test_docs()[0]

    def render(messages, add_generation_prompt=True):
        return jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=add_generation_prompt)

    chat = {"apply_chat_template": True, "chat_template": render, "fewshot_as_multiturn": True}
    assert task.fewshot_context(doc, 6, **chat) == f"<s>user\n{task.fewshot_context(doc, 6)}</s>\n<s>assistant\n"


# ------------------------------------------------------------------------------------------------- answers and scores


def test_only_answers_with_demonstrations_end_like_the_official_codes(demo_data):
    def write(doc):
        gap, more, _ = RUNS_ON[written[doc["prompt"], doc["answer"]]]
        return doc["answer"] + gap + more

    written = {(d["prompt"], d["answer"]): n for n, t in load_tasks(list(RUNS_ON)).items() for d in t.test_docs()}
    shown, asked = plain_lm_eval(list(RUNS_ON), write, num_fewshot=6, limit=3)
    alone, _ = plain_lm_eval(list(RUNS_ON), write, num_fewshot=0, limit=3)
    for name, (_, _, left) in RUNS_ON.items():
        samples = shown["samples"][name]
        assert [s["filtered_resps"][0] for s in samples] == [s["doc"]["answer"] + left for s in samples], name
        limit = 64 if name in SHORT else 512
        samples = alone["samples"][name]
        assert [s["filtered_resps"][0] for s in samples] == [write(s["doc"])[:limit] for s in samples], name
        if name in SHORT:
            assert [r["results"][name]["accuracy,none"] for r in (shown, alone)] == [1, 0]
    # As in the official code, the source of SARI is the whole prompt.
    for sample in shown["samples"]["trace_20minuten"]:
        (prompt,) = [p for p, _ in asked if sample["doc"]["prompt"][-60:] in p[-60:] and "Simplification" in p]
        answer = sample["doc"]["answer"]
        assert prompt.count("Simplification:") == 7 and sample["sari"] == scoring.sari(prompt, answer + "\n\n", answer)


@pytest.mark.parametrize("until", [["###"], "###"])  # --gen_kwargs until=### is a text by itself
def test_a_stop_of_the_user_is_kept(demo_data, until):
    task = load("trace_scienceqa")
    task.set_config(key="generation_kwargs", value={"until": until}, update=True)
    task.set_config(key="num_fewshot", value=2)
    task.build_all_requests(limit=1)
    assert task.instances[0].args[1]["until"] == ["###", "Question:"]


def test_lm_evals_cached_requests_are_not_used_for_different_rows_or_settings(demo_data, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i} Stance:", "answer": "ABC"[i % 3]} for i in range(8)]
    (tmp_path / "FOMC").mkdir()
    for split in ("train", "eval", "test"):
        write_json(tmp_path / "FOMC" / f"{split}.json", rows)

    def asked(limit=None, seed=7, shots=0, samples=None, **settings):
        task = load_tasks(["trace_fomc"])["trace_fomc"]
        task.set_config(key="num_fewshot", value=shots)
        task.set_config(key="generation_kwargs", value=settings, update=True)
        task.set_fewshot_seed(seed)
        if seed is None:
            task.fewshot_context = None
        task.build_all_requests(limit=limit, samples=samples, cache_requests=True)
        return [instance.args for instance in task.instances]

    first = asked(4)
    assert len(first) == 4 and asked(4, seed=None) == first, "from the cache"
    assert asked(2, max_gen_toks=3)[0][1]["max_gen_toks"] == 3
    monkeypatch.setenv("TRACE_DATA", str(tmp_path))
    assert [prompt for prompt, _ in asked(4)] == [row["prompt"] for row in rows[:4]]
    assert [prompt for prompt, _ in asked(samples=[1, 5])] == [rows[1]["prompt"], rows[5]["prompt"]]
    monkeypatch.setenv("TRACE_DATA", "demo")
    assert len({asked(1, seed=seed, shots=3)[0][0] for seed in range(3)}) > 1


# -------------------------------------------------------------------------------------------------------------- draws


def test_too_long_demonstrations_are_not_drawn(demo_data, caplog):
    task = load("trace_numglue_ds")
    opening = len(INSTRUCTIONS["trace_numglue_ds"] + ANNOUNCED)
    sizes = sorted(len(d["prompt"]) + len(d["answer"]) for d in task.sampler.df)
    task.sampler.count_in(len, opening + 12 * sizes[len(sizes) // 2])
    drawn = task.sampler.sample(6)
    assert len(drawn) == 6 and max(len(d["prompt"] + d["answer"]) for d in drawn) <= sizes[len(sizes) // 2]
    assert "demonstrations" not in caplog.text
    task.sampler.count_in(len, opening + 12 * sizes[0])
    drawn = task.sampler.sample(6)
    assert 1 <= len(drawn) <= sizes.count(sizes[0]) < 6
    assert f"trace_numglue_ds has only {len(drawn)} of 6 demonstrations" in caplog.text
    task.sampler.count_in(len, opening)
    doc = task.test_docs()[0]
    assert task.fewshot_context(doc, 6) == official_prompt("trace_numglue_ds", [], doc["prompt"])


@pytest.mark.parametrize("n", [3, 4, 6])
def test_demonstrations_are_balanced_and_follow_the_seed(n, demo_data):
    task = load("trace_cstance")
    drawn = task.sampler.sample(n)
    counts = Counter(d["answer"] for d in drawn)
    assert len(drawn) == n and max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 3
    task.set_fewshot_seed(7)
    assert task.sampler.sample(n) == drawn
    task.set_fewshot_seed(8)
    assert task.sampler.sample(n) != drawn


# -------------------------------------------------------------------------------------------------------------- a run


def samples(run: Run, task: str) -> list[dict]:
    return [json.loads(line) for line in run.stages[0].samples_file(task).read_text(encoding="utf-8").splitlines()]


def test_an_icl_run_trains_nothing_and_asks_and_cuts_like_the_official_code(options, caplog):
    tasks = ["trace_fomc", "trace_numglue_ds", "trace_meetingbank"]
    options |= {"tasks": tasks, "num_fewshot": 3, "engine_args": {"max_length": 100}, "test_rows": 3}
    with caplog.at_level(logging.WARNING):
        run = train(options, ICLTrainer, ICLConfig)
    assert evaluate.evaluate(run) == 3 and [s.name for s in run.stages] == ["0_base"]
    # 1024 tokens of context, four of an answer.
    assert run.manifest["config"]["max_prompt_length"] == 1020
    assert "Prompts with demonstrations have at most 1020 tokens, not 3584" in caplog.text
    assert (
        "max_length=100 is raised to 1024" in caplog.text
        and run.manifest["config"]["engine_args"]["max_length"] == 1024
    )
    report.write_report(run)
    assert "prompts have at most 1020 tokens (official code: 3584)" in (run.path / "report.md").read_text()

    for name in tasks:
        task = load(name)
        task.set_fewshot_seed(42)  # the run's: HF's default
        task.sampler.count_in(lambda text: len(text.encode()), 1020)  # a token is a byte here
        shown = demonstrations(task, 3)
        for sample, row in zip(samples(run, name), task.test_docs(), strict=False):
            assert sample["prompt"] == official_prompt(name, shown, row["prompt"])
        cell = read_json(run.stages[0].eval_file(name))
        assert cell["settings"]["num_fewshot"] == 3 and cell["settings"]["max_prompt_length"] == 1020
        assert cell["settings"]["icl"] == {"version": 2, "seed": 42}
    cell = read_json(run.stages[0].eval_file("trace_fomc"))
    assert cell["n_unfinished"] == 0, "an answer of which the first token counts ends there"
    # One token of a byte-level tokenizer is a byte, one letter or a part of one.
    assert all(len(s["response"]) <= 1 for s in samples(run, "trace_fomc"))
    assert all("\n" not in s["response"] for s in samples(run, "trace_numglue_ds"))
    del cell["settings"]["icl"]  # as an earlier state of the program left it
    write_json(run.stages[0].eval_file("trace_fomc"), cell)
    with pytest.raises(RunError, match=r"icl\.version: 'absent' -> 2"):
        evaluate.evaluate(run)


def test_the_seed_of_a_run_decides_its_demonstrations(options, tmp_path):
    """This holds for every task with demonstrations. A comparison takes the runs as seeds of one method."""
    # No demonstration of 20Minuten fits 1,024 bytes.
    tasks = [t for t in INSTRUCTIONS if t not in ("trace_meetingbank", "trace_20minuten")]
    runs, prompts = [], []
    for name, seed in {"a": 1, "b": 2}.items():
        changes = {"seed": seed, "output_dir": str(tmp_path / name), "num_fewshot": 3, "tasks": tasks, "test_rows": 1}
        runs.append(train({**options, **changes}, ICLTrainer, ICLConfig))
        evaluate.evaluate(runs[-1])
        prompts.append({t: samples(runs[-1], t)[0]["prompt"] for t in tasks})
        assert {read_json(runs[-1].stages[0].eval_file(t))["settings"]["icl"]["seed"] for t in tasks} == {seed}
    assert all(prompts[0][task] != prompts[1][task] for task in tasks)
    assert "over 2 seeds" in str(report.compare(runs)), "they differ in nothing but the seed"


def test_icl_with_zero_demonstrations_is_the_base_model(options, caplog):
    engine = {"max_length": 512}
    with caplog.at_level(logging.WARNING):
        run = train({**options, "num_fewshot": 0, "engine_args": engine}, ICLTrainer, ICLConfig)
    evaluate.evaluate(run)
    config = run.manifest["config"]
    assert config["max_prompt_length"] == 96 and config["engine_args"] == engine and "icl" not in run.manifest
    assert "demonstrations" not in caplog.text
    settings = read_json(run.stages[0].eval_file("trace_fomc"))["settings"]
    assert "icl" not in settings and settings["num_fewshot"] == 0
    assert samples(run, "trace_fomc")[0]["prompt"].startswith(INSTRUCTIONS["trace_fomc"])
    assert ANNOUNCED not in samples(run, "trace_fomc")[0]["prompt"]


def test_icl_refuses_answers_that_fill_the_context(options, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "short")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"max_position_embeddings": 512})
    changes = {"model_name_or_path": str(folder), "tasks": ["trace_py150"], "max_new_tokens": None}
    with pytest.raises(ConfigError, match="An answer of 512 tokens fills the model's context of 512"):
        train(options | changes, ICLTrainer, ICLConfig)
