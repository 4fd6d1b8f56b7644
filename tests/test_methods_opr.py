"""Methods that train on texts written by the run's own models: on-policy replay, and rewritten answers."""

import json
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from conftest import train, write_task
from forks import forked
from method_runs import EXACT, as_method, same, weights
from transformers import AutoTokenizer

from trace_bench.engine import open_engine
from trace_bench.engine.swap import Answer
from trace_bench.run import read_json
from trace_bench.tasks import answer_scores, load_tasks, training_rows
from trace_tasks import utils
from trace_tasks.data import DataError
from trace_tasks.data.files import write_json
from trainers import base, opr, replay, rewrite
from trainers.base import answering, writing

TASKS = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]


@pytest.fixture
def said(monkeypatch, tiny_model):
    """Answers with the result of a function of the prompt's text, in place of a model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def saying(say):
        orders = []

        def answer(words):
            orders.append(read_json(Path(words[1])))
            for job in orders[-1]["jobs"]:
                rows = [[astuple(say(tokenizer.decode(ids)))] * job["samples"] for ids in job["prompts"]]
                write_json(Path(job["file"]), {"made_from": job["made_from"], "answers": rows})
            return 0

        monkeypatch.setattr(writing, "run_alone", answer)
        return orders

    return saying


def rows_of(trainer: type, config: type, options: dict) -> tuple:
    """Trains a run. Returns it and the rows of its last stage."""
    seen = {}

    class Spy(trainer):
        def begin_stage(self):
            super().begin_stage()
            seen[self.stage.index] = self.train_dataset.to_list(), self

    run = train(options, as_method(Spy), config)
    return run, *seen[len(run.stages) - 1]


def texts_of(rows: list[dict], tokenizer) -> list[tuple[str, str, bool]]:
    """Prompt, answer, and whether it ends with EOS."""
    found = []
    for row in rows:
        n = sum(label == -100 for label in row["labels"])
        ended = row["labels"][-1] == tokenizer.eos_token_id
        ids = row["input_ids"]
        found.append((tokenizer.decode(ids[:n]), tokenizer.decode(ids[n : len(ids) - ended]), ended))
    return found


# ---------------------------------------------------------------------------------------------------- what is written


def test_several_answers_to_a_prompt_are_seeded_and_have_their_own_log_probabilities(checkpoints, tiny_model):
    lm = open_engine("hf", str(tiny_model), engine_args={"batch_size": 3})
    lm.load(checkpoints["full model"])
    prompts = [lm.tokenizer(text).input_ids for text in ("One, ", "and a longer one: ", "x", "y = ")]

    def ask(sampling, seeds):
        drawn = [answering.sampling_args(sampling, seed) for seed in seeds]
        return lm.full_answers([lm.want(ids, 6, [], s, rated=True) for s in drawn for ids in prompts])

    hot = {"temperature": 2.0}
    first = ask(hot, (0, 1))
    assert ask(hot, (0, 1)) == first, "the same seeds"
    assert {a.text for a in first[:4]} != {a.text for a in first[4:]}
    assert answering.sampling_args({"temperature": 0.0}, 3) == answering.sampling_args(None, 3) == {}
    wanted = [lm.want(ids, 6, [], s, rated=True) for s in (answering.sampling_args(hot, 0), {}) for ids in prompts]
    for want, answer, ids in zip(wanted, lm.full_answers(wanted), lm._answers(wanted), strict=True):
        assert answer.finished == (ids[-1] in want.ends)
        assert answer.logprob == lm.ratings[want]
    # The log-probabilities are those of a plain pass, at temperature 1.
    for want, ids in zip(wanted, lm._answers(wanted), strict=True):
        with torch.no_grad():
            logits = lm._model(torch.tensor([[*want.ids, *ids]])).logits[0, len(want.ids) - 1 : -1]
        mean = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean()
        assert lm.ratings[want] == pytest.approx(float(mean), abs=1e-4)


def drawn_twice(base: Path) -> list:
    lm = open_engine("vllm", str(base), engine_args={"max_model_len": 256, "dtype": "float32"})
    ids = [lm.tokenizer(f"What is {n} plus {n}?").input_ids for n in range(40)]
    wanted = [lm.want(prompt, 4, [], {"top_k": 0, "temperature": 1.0, "seed": 42}) for prompt in ids]
    return [lm._answers(wanted), lm._answers(wanted[::-1])[::-1]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_draws_different_random_numbers_for_each_prompt(tiny_model):
    """For the untrained model all tokens are about equally likely, so equal random numbers would give equal answers."""
    first, again = forked(drawn_twice, tiny_model)
    assert again == first, "the seed decides, not the order"
    assert len({ids[0] for ids in first}) > 20


OWN = """
def errors(doc, results):
    return {"error": abs(float(results[0]) - float(doc["a"]))}
"""


def test_written_answers_have_the_scores_of_the_evaluation(demo_data, tmp_path, monkeypatch):
    for name, score in (("trace_fomc", utils.score_choice), ("trace_20minuten", utils.score_simplification)):
        task = load_tasks([name])[name]
        docs = list(task.training_docs())[:4]
        answers = [(i, text) for i in (3, 0, 1) for text in (docs[i]["answer"], docs[2]["answer"] + "?")]
        wanted = [next(iter(score(docs[i], [text]).values())) for i, text in answers]
        assert answer_scores(task, answers) == wanted and len(set(wanted)) > 1
        assert [row[1] for row in training_rows(task, 4)] == [doc["answer"] for doc in docs], "numbered as the rows"
    (tmp_path / "own.py").write_text(OWN)
    rows = [{"q": f"row {i}: ", "a": str(i)} for i in range(3)]
    numbers = (
        'filter_list: [{name: last, filter: [{function: regex, regex_pattern: "(\\\\d+)$"}, {function: take_first}]}]'
    )
    more = {
        "t_filter": f"{numbers}\nmetric_list: [{{metric: exact_match}}]",
        "t_error": "process_results: !function own.errors\n"
        "metric_list: [{metric: error, aggregation: mean, higher_is_better: false}]",
        "t_corpus": "metric_list: [{metric: bleu}]",
    }
    for name, text in more.items():
        write_task(tmp_path, name, rows, text)
    monkeypatch.setenv("TRACE_TASKS", str(tmp_path))
    tasks = load_tasks(list(more))
    assert answer_scores(tasks["t_filter"], [(2, "it is 2"), (1, "it is 2"), (1, "1")]) == [1, 0, 1]
    assert answer_scores(tasks["t_error"], [(1, "3"), (2, "2")]) == [-2, 0], "less is better"
    with pytest.raises(DataError, match="t_corpus: bleu scores all rows together"):
        answer_scores(tasks["t_corpus"], [(0, "0")])
    assert answer_scores(tasks["t_error"], []) == []
    for trainer, config, words in (
        (opr.OPRTrainer, opr.OPRConfig, "opr_score=metric: .* Use opr_score: confidence"),
        (rewrite.RewriteTrainer, rewrite.RewriteConfig, "rewrite_accept=0.5: .* Use rewrite_accept: 0"),
    ):
        with pytest.raises(base.ConfigError, match=words):
            trainer.prepare(config(output_dir="x", tasks=["t_corpus"]), None)


# --------------------------------------------------------------------------------------------------- on-policy replay


def test_opr_on_a_model_with_only_right_answers_is_mixed_replay(options, written_here, tmp_path):
    """A model that learned its 8 rows by heart writes the gold answers, so the bytes equal those of `replay`."""
    options |= {**EXACT, "tasks": TASKS[:2], "max_steps": 20, "use_peft": False, "learning_rate": 2e-3}
    options |= {"replay_ratio": 0.5, "train_rows": 8}
    own = {"opr_temperature": 0.0, "output_dir": str(tmp_path / "opr")}
    run, rows, trainer = rows_of(opr.OPRTrainer, opr.OPRConfig, {**options, **own})
    record = read_json(run.stages[2].train_file)
    assert record["replayed"] == {TASKS[0]: 4} and record["answered"] == {
        TASKS[0]: {"rows": 4, "answers": 8, "score": 1, "score_of_all": 1, "gold": 1, "unfinished": 0}
    }
    assert record["own_rows"] == 8 and read_json(run.stages[1].train_file)["replayed"] == {}
    mixed = {"replay": "mixed", "alignment_data": "none", "output_dir": str(tmp_path / "replay")}
    other, wanted, _ = rows_of(replay.ReplayTrainer, replay.ReplayConfig, {**options, **mixed})
    assert rows == wanted and len(rows) == 12
    assert same(weights(run, 2), weights(other, 2))
    assert len(written_here) == 1 and trainer.own_memory


def test_opr_keeps_the_best_answers_with_their_scores(options, written_here, tmp_path):
    options |= {"tasks": TASKS, "max_steps": 5, "replay_ratio": 0.25, "opr_samples": 3, "opr_temperature": 1.0}
    run, rows, trainer = rows_of(opr.OPRTrainer, opr.OPRConfig, options)
    assert [len(job["prompts"]) for order in written_here for job in order["jobs"]] == [16] * 3
    assert [Path(order["checkpoint"]).parent.name for order in written_here] == ["1_trace_fomc", "2_trace_numglue_ds"]
    kept, record = texts_of(rows[16:], trainer.tokenizer), read_json(run.stages[3].train_file)["answered"]
    for task, part in ((TASKS[0], kept[:4]), (TASKS[1], kept[4:])):
        gold = training_rows(load_tasks([task])[task], 16)
        written = read_json(run.stages[3].path / "written" / f"replay_{task}.json")["answers"]
        order = base.ranked_rows(trainer.task_dataset(task), "random", trainer.config.seed)
        number = {gold[i][0][-90:]: i for i in order}
        assert len(number) == 16
        chosen = [number[prompt[-90:]] for prompt, _, _ in part]
        assert chosen == sorted(chosen), "in the order of the data"
        score = {"trace_fomc": utils.score_choice, "trace_numglue_ds": utils.score_number}[task]
        scores = [
            score({"answer": gold[i][1], "prompt": gold[i][0]}, [a])["accuracy"]
            for i, (_, a, _) in zip(chosen, part, strict=True)
        ]
        best = {
            i: max(score({"answer": gold[i][1], "prompt": gold[i][0]}, [text])["accuracy"] for text, *_ in answers)
            for i, answers in zip(order, written, strict=True)
        }
        assert sorted(scores) == sorted(best.values())[-4:], "no row with a better answer is left out"
        assert record[task]["score"] == sum(scores) / 4 and record[task]["answers"] == 48
        assert record[task]["gold"] == sum(gold[i][1] == a for i, (_, a, _) in zip(chosen, part, strict=True)) / 4
        for i, (_, text, ended) in zip(chosen, part, strict=True):
            same_text = [finished for t, finished, _ in written[order.index(i)] if t == text]
            assert ended in same_text or not text, "an answer that was cut is trained without an end"


def test_opr_by_confidence_needs_no_gold_answer(options, said, tmp_path):
    """The most likely answers are kept, right or wrong. Fewer prompts are asked, and tasks share the budget."""
    marks = {}

    def say(prompt):
        marks.setdefault(prompt, -float(len(marks)))
        return Answer("zz", finished=len(marks) % 2 == 0, logprob=marks[prompt])

    orders = said(say)
    options |= {"tasks": TASKS, "max_steps": 1, "opr_score": "confidence", "opr_prompts": 6, "replay_ratio": 0.5}
    run, rows, trainer = rows_of(opr.OPRTrainer, opr.OPRConfig, {**options, "opr_budget": "shared"})
    assert len(rows) == 16 + 4 + 4, "half of 16, shared by two tasks"
    record = read_json(run.stages[3].train_file)["answered"][TASKS[1]]
    assert record["rows"] == 4 and record["answers"] == 6 and record["gold"] == 0
    best = sorted(marks.values())[-4:]
    assert read_json(run.stages[2].train_file)["answered"][TASKS[0]]["rows"] == 6, "no more than were asked"
    assert all(job["rated"] and job["sampling"] == {"temperature": 0.1} for order in orders for job in order["jobs"])
    kept = texts_of(rows[16:20], trainer.tokenizer)
    assert sorted(marks[prompt] for prompt, *_ in kept) == best and {text for _, text, _ in kept} == {"zz"}


def test_an_answer_cut_by_its_limit_is_trained_without_eos(options, said):
    said(lambda prompt: Answer("zz", finished="A" < prompt[-40] < "i"))
    options |= {"tasks": TASKS[:2], "max_steps": 1, "replay_ratio": 1.0}
    run, rows, trainer = rows_of(opr.OPRTrainer, opr.OPRConfig, options)
    kept = texts_of(rows[16:], trainer.tokenizer)
    assert [ended for *_, ended in kept] == ["A" < prompt[-40] < "i" for prompt, *_ in kept]
    share = read_json(run.stages[2].train_file)["answered"][TASKS[0]]["unfinished"]
    assert share == sum(not ended for *_, ended in kept) / 16 and 0 < share < 1
    assert {text for _, text, _ in kept} == {"zz"}


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_for_answers_have_the_trained_tokens(chat, options, said):
    """Prompts of earlier tasks have exactly the same tokens. Rewriting shows the whole task, in the chat template."""
    orders = said(lambda prompt: Answer("zz"))
    options |= {"tasks": TASKS[:2], "max_steps": 1, "chat_template": chat}
    _, _, trainer = rows_of(opr.OPRTrainer, opr.OPRConfig, {**options, "replay_choice": "first"})
    rows = trainer.task_dataset(TASKS[0]).to_list()
    prompts = [[t for t, label in zip(*row.values(), strict=True) if label == -100] for row in rows]
    assert orders[0]["jobs"][0]["prompts"] == prompts and max(map(len, prompts)) == 96
    assert ("</s>" in orders[0]["jobs"][0]["stops"]) == chat, "where the template ends a turn"
    shutil.rmtree(options["output_dir"])
    rows_of(rewrite.RewriteTrainer, rewrite.RewriteConfig, options)
    for ids in orders[1]["jobs"][0]["prompts"]:
        text = trainer.tokenizer.decode(ids)
        assert text.startswith("<s>user\nBelow are" if chat else "Below are") and "Stance:" in text and len(ids) > 300


def test_prompts_leave_room_for_the_answer_in_the_context(options, said):
    """They are cut as in the evaluation, to the context that `engine_args` allow."""
    orders = said(lambda prompt: Answer("zz"))
    options |= {"tasks": TASKS[:2], "max_steps": 1, "max_new_tokens": 4}
    both = {"max_model_len": 99, "max_length": 54}  # the engine takes its own
    for context in ({"max_model_len": 44}, {"max_length": 44}, {"max_model_len": 999}, both):
        shutil.rmtree(options["output_dir"], ignore_errors=True)
        rows_of(opr.OPRTrainer, opr.OPRConfig, {**options, "engine_args": context})
    assert [max(map(len, order["jobs"][0]["prompts"])) for order in orders] == [40, 40, 96, 50]


# ---------------------------------------------------------------------------------------------------------- rewriting


def test_a_rewrite_is_kept_if_the_metric_still_accepts_it(options, said):
    """The base model writes once for each task. Otherwise the gold answer is used. Replay also has the rewrites."""
    options |= {"tasks": [TASKS[0], "trace_20minuten"], "max_steps": 1, "replay_ratio": 0.5, "max_prompt_length": 500}
    golds, asked = {}, []

    def say(prompt):
        question, gold = prompt.partition("Task:\n")[2].rsplit("\n\nReference answer:\n", 1)
        gold = gold.removesuffix("\n\nYour answer:\n")
        golds[question[-400:]] = gold
        asked.append(prompt)
        kind = len(asked) % 4
        words = [f" {gold} ", f"Your answer: {gold}", gold, "something else that is wrong"][kind]
        return Answer(words, finished=kind != 2)

    orders = said(say)
    run, rows, trainer = rows_of(rewrite.RewriteTrainer, rewrite.RewriteConfig, options)
    assert [order["checkpoint"] for order in orders] == [None, None], "the base model, once for each task"
    assert len(asked) == 32 and all(job["sampling"]["top_p"] == 0.7 for order in orders for job in order["jobs"])
    for prompt, answer, ended in texts_of(rows, trainer.tokenizer):
        assert ended and answer == golds[prompt[-400:]], "gold, or accepted as it"
    record = read_json(run.stages[2].train_file)["rewritten"]
    assert {name: r["kept"] for name, r in record.items()} == {TASKS[0]: 0.25, "trace_20minuten": 0.25}


def test_accept_1_is_plain_training_and_accept_0_keeps_every_answer(options, said, tmp_path):
    """Without usable answers it is plain training to the byte. 0 keeps any answer; near misses depend on the share."""
    options |= {**EXACT, "tasks": ["trace_20minuten"], "max_steps": 2, "max_answer_length": 60, "train_rows": 8}
    made = rewrite.RewriteTrainer, rewrite.RewriteConfig
    said(lambda prompt: Answer("Nein."))
    runs = {}
    for accept in (1.0, 0.0):
        folder = {"output_dir": str(tmp_path / str(accept)), "rewrite_accept": accept}
        runs[accept], rows, trainer = rows_of(*made, {**options, **folder})
        record = read_json(runs[accept].stages[1].train_file)["rewritten"]["trace_20minuten"]
        assert record == {"rows": 8, "kept": 1 - accept, "changed": 1 - accept}
    assert {answer for _, answer, _ in texts_of(rows, trainer.tokenizer)} == {"Nein.\n"}, "ends as the gold answers"
    plain = train({**options, "output_dir": str(tmp_path / "plain")})
    assert same(weights(plain, 1), weights(runs[1.0], 1)) and not same(weights(plain, 1), weights(runs[0.0], 1))


def test_a_rewrite_gets_the_white_space_of_the_gold_answer():
    assert rewrite.as_gold(Answer(" B.\n"), " B") == " B."
    assert rewrite.as_gold(Answer("x = 1"), "x = 1\n") == "x = 1\n"
    for text in ("", "  ", "My answer is B", "as the Reference Answer says"):
        assert rewrite.as_gold(Answer(text), "B") is None
    assert rewrite.as_gold(replace(Answer("B"), finished=False), "B") is None


def test_a_prompt_longer_than_the_context_gets_no_answer(tiny_model, tmp_path):
    """Rewriting shows the whole task. A row that does not fit into the context keeps its gold answer."""
    order = {"backend": "hf", "base": str(tiny_model), "revision": None, "engine_args": {"max_length": 40}}
    job = {"stops": [], "most": 8, "seed": 0, "samples": 2, "sampling": None, "rated": False, "made_from": "x"}
    jobs = [{**job, "prompts": [[5] * 33, [5] * 32], "file": str(tmp_path / "answers.json")}]
    (tmp_path / "order.json").write_text(json.dumps({**order, "checkpoint": None, "jobs": jobs}))
    answering.answer(tmp_path / "order.json")
    long, short = read_json(tmp_path / "answers.json")["answers"]
    assert long == [["", False, None]] * 2 and short[0] == short[1] and short[0][0]


@pytest.mark.parametrize(
    ("gpu", "temperature", "kept"), [(False, 0.7, False), (False, 0.0, True), (True, 0.7, True)], ids=str
)
def test_prompts_are_read_in_parts_unless_sampling_on_a_cpu(gpu, temperature, kept, tmp_path, monkeypatch):
    given = {"max_num_batched_tokens": 64}
    order = {"backend": "vllm", "base": "none", "revision": None, "checkpoint": None, "engine_args": given}
    jobs = [{"sampling": {"temperature": temperature}, "seed": 0}]
    (tmp_path / "order.json").write_text(json.dumps({**order, "jobs": jobs}))
    asked = {}

    def opened(*args, **kwargs):
        asked.update(kwargs["engine_args"])
        raise InterruptedError

    monkeypatch.setattr("trace_bench.engine.gpu.has_gpu", lambda: gpu)
    monkeypatch.setattr("trace_bench.engine.open_engine", opened)
    with pytest.raises(InterruptedError):
        answering.answer(tmp_path / "order.json")
    assert asked == (given if kept else {"enable_chunked_prefill": False})
