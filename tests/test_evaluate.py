"""Evaluation with the transformers backend: which cells are measured, once each, and which must not be mixed."""

import json
import math
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from architectures import generate
from lm_eval.api.task import ConfigurableTask
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from trace_bench import cli, engine, evaluate, report
from trace_bench.engine import hub, models, swap
from trace_bench.engine.checkpoints import warn_of_tokenizers
from trace_bench.evaluate import cells as cells_module
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import load_tasks, task_manager, training_rows
from trace_bench.waiting import locked
from trace_tasks import data
from trace_tasks.data.files import write_json
from trace_tasks.tokens import example_ids, prompt_ids


def cells(run: Run) -> list[list[str]]:
    return [[t for t in run.tasks if s.eval_file(t).exists()] for s in run.stages]


def test_seen_tasks_then_the_full_matrix_are_measured_and_no_cell_twice(run, capsys, monkeypatch):
    first, second = run.tasks
    assert evaluate.evaluate(run) == 5
    (read, written) = map(int, re.search(r"(\d+) tokens read, (\d+) written", capsys.readouterr().out).groups())
    assert 5 * 6 * 10 < read < 5 * 6 * 96 and 0 < written <= 5 * 6 * 4, "prompts of at most 96 bytes, answers of 4"
    assert cells(run) == [[first, second], [first], [first, second]]
    assert evaluate.evaluate(run, cells="all") == 1
    assert cells(run)[1] == [first, second]
    assert not math.isnan(report.Results(run).R.sum())
    monkeypatch.setattr(engine, "open_engine", lambda *a, **k: pytest.fail("the engine was started"))
    assert evaluate.evaluate(run, cells="all") == 0
    for wrong in ({"cells": "sen"}, {"backend": "vlm"}, {"extra": {"generall": ["general"]}}):
        with pytest.raises(RunError, match=r"(sen'|vlm'|generall): use "):
            evaluate.evaluate(run, **wrong)
    run.stages[2].train_file.unlink()
    for start in (evaluate.evaluate, lambda run, **k: evaluate.evaluate_on(run.path, ["cpu"], [], **k)):
        with pytest.raises(RunError, match="--stages 2: not trained yet"):
            start(run, stages=[1, 2])


def test_a_cell_has_samples_the_mean_of_their_scores_and_counts_of_what_was_cut(run, tiny_model):
    evaluate.evaluate(run)
    stage = run.stages[1]
    cell = read_json(stage.eval_file("trace_fomc"))
    samples = [json.loads(line) for line in stage.samples_file("trace_fomc").read_text().splitlines()]
    assert cell["n"] == len(samples) == 6
    assert cell["metrics"]["accuracy"]["value"] == pytest.approx(sum(s["accuracy"] for s in samples) / 6)
    docs = load_tasks(["trace_fomc"])["trace_fomc"].test_docs()
    assert [s["prompt"] for s in samples] == [d["prompt"] for d in docs][:6]
    assert [s["target"] for s in samples] == [d["answer"] for d in docs][:6]
    counts = {}
    for name in run.tasks:
        cell = read_json(run.stages[0].eval_file(name))
        prompts = [doc["prompt"] for doc in load_tasks([name])[name].test_docs()][:6]
        assert cell["n_cut"] == sum(len(p.encode()) > 96 for p in prompts), "a token of the tiny model is a byte"
        counts[name] = cell["n_cut"], cell["n_unfinished"]
    assert counts["trace_fomc"][0] == 6 and sum(n for _, n in counts.values()) > 6, "it was never taught to end"
    report.write_report(run)
    text = (run.path / "report.md").read_text(encoding="utf-8").split("## Limits")[1]
    assert re.search(r"\| 0_base \| 100 / \d+ \|", text)

    lm = engine.open_engine("hf", str(tiny_model))
    (answer,) = generate(lm, ["Some words: "], 12)
    assert lm.unfinished == {answer}
    lm.unfinished.clear()
    assert generate(lm, ["Some words: "], 12, until=[answer[1]]) == [answer[: answer.index(answer[1])]]
    assert not lm.unfinished, "it ended at a stop string"


def test_an_interrupted_evaluation_goes_on_where_it_was(run, monkeypatch):
    monkeypatch.setattr(cells_module, "BATCH", 1)  # one task at a time
    done = []
    original = cells_module.evaluate_batch

    def interrupted(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells_module, "evaluate_batch", interrupted)
        evaluate.evaluate(run)
    assert len(done) == 3 and sum(map(len, cells(run))) == 3
    assert evaluate.evaluate(run) == 2
    assert sum(map(len, cells(run))) == 5


def test_one_engine_serves_all_stages_and_makes_the_prompts_once(run, monkeypatch):
    """A further stage costs only its swap and its tokens. They are counted, because times vary."""
    starts, swaps, built, encoded = [], [], [], []
    original, build = engine.open_engine, ConfigurableTask.fewshot_context

    def counted(*args, **kwargs):
        lm = original(*args, **kwargs)
        starts.append(lm.base)
        load = lm.load
        lm.load = lambda checkpoint, *rest: (swaps.append(checkpoint), load(checkpoint, *rest))
        return lm

    def encode(tokenizer, texts, limit, chat):
        encoded.extend((text, limit) for text in texts)
        return prompt_ids(tokenizer, texts, limit, chat)

    monkeypatch.setattr(engine, "open_engine", counted)
    monkeypatch.setattr(ConfigurableTask, "fewshot_context", lambda *a, **k: built.append(1) or build(*a, **k))
    monkeypatch.setattr(swap, "prompt_ids", encode)
    assert evaluate.evaluate(run, cells="all") == 6
    assert len(starts) == 1 and swaps == [s.checkpoint for s in run.stages[1:]], "the base model is there already"
    assert len(built) == 2 * 6, "two tasks of six rows, three stages"
    assert len(encoded) == len(set(encoded)), "and of those that are cut once more, to say that they are"
    assert len([text for text, limit in encoded if limit]) <= 2 * 6


def test_data_that_differs_from_the_runs_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data.find_data("demo"), copy)
    assert evaluate.evaluate(run, stages=[0], data_path=str(copy)) == 2, "the same data may have moved"
    rows = json.loads((copy / "FOMC" / "test.json").read_text())
    (copy / "FOMC" / "test.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(RunError, match=r"different data.*trace_fomc"):
        evaluate.evaluate(run, data_path=str(copy))


@pytest.mark.parametrize(
    "names, chat", [(list(data.FOLDERS), False), (["trace_fomc", "trace_20minuten"], True)], ids=["raw", "chat"]
)
def test_prompts_have_the_same_token_ids_in_training_and_evaluation(names, chat, tiny_model, demo_data, monkeypatch):
    """Compares the prompt in a training example with the ids that the model gets in evaluation, also truncated."""
    import lm_eval

    limit = 60  # shorter than every demo prompt in bytes
    lm = engine.open_engine("hf", str(tiny_model), max_prompt_length=limit, engine_args={"batch_size": 2})
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it takes seconds
    tested: list[list[int]] = []
    original = lm._generated
    monkeypatch.setattr(
        lm, "_generated", lambda batch: tested.extend(list(want.ids) for want in batch) or original(batch)
    )
    settings = {"limit": 3, "apply_chat_template": chat, "bootstrap_iters": 0, "task_manager": task_manager()}
    for name, task in load_tasks(names).items():
        task.config.generation_kwargs["max_gen_toks"] = 2
        tested.clear()
        lm_eval.simple_evaluate(model=lm, tasks=[task], **settings)
        # The same rows as if they were training rows.
        monkeypatch.setattr(task, "training_docs", task.test_docs)
        rows = training_rows(task, 3, lm.apply_chat_template if chat else None)
        examples = example_ids(lm.tokenizer, *zip(*rows, strict=True), max_prompt=limit, max_answer=32, chat=lm.chat)
        trained = [[i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label == -100] for e in examples]
        assert sorted(tested) == sorted(trained), name
        assert all(limit - 3 * chat <= len(ids) <= limit for ids in trained), "of a chat no half of a character is kept"
        if chat:  # the content is cut, not the template
            texts = lm.tokenizer.batch_decode(trained)
            assert all(t.startswith("<s>user\n") and t.endswith("</s>\n<s>assistant\n") for t in texts)


@pytest.fixture
def external(run, tiny_model, tmp_path):
    """Makes a run of external checkpoints: copies of the stages of `run` as v1, v2, and others by name."""
    settings = {"backend": "hf", "test_rows": 6, "max_prompt_length": 96, "max_new_tokens": 4, "chat_template": False}

    def make(*stages: int, **names: Path) -> Run:
        folders = {f"v{stage}": tmp_path / f"v{stage}" for stage in stages}
        for stage, folder in zip(stages, folders.values(), strict=True):
            shutil.copytree(run.stages[stage].checkpoint, folder, dirs_exist_ok=True)
        given = {name: str(folder) for name, folder in {**folders, **names}.items()}
        options = {"model": str(tiny_model), "tasks": run.tasks, "settings": settings, "data_path": "demo"}
        return evaluate.external_run(tmp_path / "external", given, **options)

    return make


def test_external_checkpoints_named_like_tasks_are_a_sequence(run, external):
    sequence = external(**{s.task: s.checkpoint for s in run.stages[1:]})
    assert sequence.is_sequence() and evaluate.evaluate(sequence, stages=[2]) == 2
    evaluate.evaluate(run, stages=[2])
    assert (report.Results(sequence).R[2] == report.Results(run).R[2]).all()


def test_an_added_checkpoint_becomes_the_next_stage_and_finished_cells_stay(external, tmp_path):
    assert not external(1).is_sequence() and evaluate.evaluate(external(1)) == 4, "names that are no task: all tasks"
    more = external(2)  # given alone
    assert [s.name for s in more.stages] == ["0_base", "1_v1", "2_v2"] and evaluate.evaluate(more) == 2
    assert [s.name for s in external(1, 2).stages] == ["0_base", "1_v1", "2_v2"], "or with the others"
    assert [s.name for s in Run.open(more.path).stages] == ["0_base", "1_v1", "2_v2"]


def test_a_checkpoint_whose_weights_are_nan_is_not_scored_and_can_be_taken_out(external, tmp_path):
    run, file = external(1, 2), tmp_path / "v1/adapter_model.safetensors"
    save_file({k: v * torch.nan for k, v in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(engine.EngineError, match=r"1_v1 gives NaN instead of probabilities.*--drop NAME"):
        evaluate.evaluate(run)
    assert not any(run.stages[1].path.glob("eval/*"))
    assert evaluate.evaluate(evaluate.drop(run.path, ["v1"])) == 2


def test_a_drop_waits_for_a_command_that_adds_a_checkpoint_and_keeps_it(external, run, caplog):
    file = external(1, kept=run.stages[2].checkpoint).path / "manifest.json"
    before = file.read_bytes()
    external(2)
    after = file.read_bytes()
    file.write_bytes(before)
    with locked(file.parent, "checkpoint"):
        dropping = threading.Thread(target=evaluate.drop, args=[file.parent, ["v1"]])
        dropping.start()
        while dropping.is_alive() and "Waiting for" not in caplog.text:
            time.sleep(0.01)
        file.write_bytes(after)  # by the other command
    dropping.join()
    assert list(Run.open(file.parent).manifest["checkpoints"]) == ["kept", "v2"]


def test_cells_of_two_states_of_a_checkpoint_are_not_reported_together(external, run, tmp_path):
    mixed = external(1)
    evaluate.evaluate(mixed)
    shutil.copytree(run.stages[2].checkpoint, tmp_path / "v1", dirs_exist_ok=True)  # its training went on
    mixed.stages[1].eval_file(run.tasks[0]).unlink()
    written = mixed.stages[1].eval_file(run.tasks[1]).read_bytes()
    evaluate.evaluate(mixed)
    report.write_report(mixed)  # both cells were measured again
    mixed.stages[1].eval_file(run.tasks[1]).write_bytes(written)  # as if the program had been killed between them
    with pytest.raises(RunError, match=r"v1 changed between.*1_v1 are from 2 different states"):
        report.write_report(mixed)


def test_a_suspicious_order_of_checkpoints_and_unmeasured_adapters_are_warned_about(external, tmp_path, caplog):
    """A shell lists checkpoint-1000 before checkpoint-200. PEFT saves a second adapter into a folder with its name."""
    external(1, 2)
    assert "comes before" not in caplog.text and "further adapters" not in caplog.text
    shutil.copytree(tmp_path / "v1", tmp_path / "v2/reference")
    external(2, 1)
    assert "v2 comes before v1" in caplog.text and "v2 has more adapters in its folders (reference)" in caplog.text


def test_a_different_tokenizer_of_a_checkpoint_is_ignored_with_a_warning(external, tiny_model, tmp_path, caplog):
    tokenizer, run = AutoTokenizer.from_pretrained(tiny_model), external(1)

    def said() -> str:
        caplog.clear()
        tokenizer.save_pretrained(tmp_path / "v1")
        warn_of_tokenizers(run, run.stages)
        return caplog.text

    assert said() == "", "most training programs save the one that they had"
    tokenizer.add_tokens("<new>")
    assert "1_v1 has a different vocabulary from the base model" in said()
    tokenizer.chat_template = "{{ messages }}"
    assert "1_v1 has a different vocabulary and a different chat template from" in said()
    tokenizer.eos_token = "a"
    assert "1_v1 has a different vocabulary and a different chat template and a different EOS from" in said()
    whole = (tmp_path / "v1" / "tokenizer_config.json").read_text()
    (tmp_path / "v1" / "tokenizer_config.json").write_text('{"tokenizer_class": "Unknown"}')
    (tmp_path / "v1" / "tokenizer.json").write_text("{")
    assert evaluate.evaluate(run, stages=[1]) == 2, "nothing is encoded with it"
    assert "Cannot compare the tokenizer of 1_v1" in caplog.text
    # These files define where its answers end.
    for file, text in {"tokenizer.json": whole, "tokenizer_config.json": "{"}.items():
        (tmp_path / "v1" / "tokenizer_config.json").write_text(text)
        with pytest.raises(models.ModelError, match=rf"{file} is damaged"):
            evaluate.evaluate(run, stages=[1])


# ---------------------------------------------------------------------------------------------- arguments of engines


def test_engine_arguments_that_change_answers_are_settings_and_others_are_not(run, fast_bf16):
    _ = run.identity  # the change below must not change the identity
    run.manifest["config"]["engine_args"] = {"dtype": "float32", "batch_size": 2}
    assert evaluate.evaluate(run, stages=[0], engine_args={"batch_size": 3}) == 2, "in addition to the run's own"
    assert read_json(run.stages[0].eval_file("trace_fomc"))["engine_args"] == {"dtype": "float32", "batch_size": 3}
    for other, message in (
        ({"engine_args": {"dtype": "bfloat16"}}, r"engine\.dtype: 'float32' -> 'bfloat16'"),
        ({"engine_args": {"dtype": None}}, r"engine\.dtype: 'float32' -> 'absent'"),
        ({"backend": "vllm"}, r"backend: 'hf' -> 'vllm'"),
    ):
        with pytest.raises(RunError, match=message):
            evaluate.evaluate(run, **other)
    assert evaluate.evaluate(run, engine_args={"batch_size": 2, "max_length": 512}) == 3


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_that_is_slow_with_bf16_evaluates_in_float32_unless_told_otherwise(fast, run, monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    evaluate.evaluate(run, stages=[0])
    files = [run.stages[0].eval_file(task) for task in run.tasks]
    assert read_json(files[0])["settings"]["engine"] == ({} if fast else {"dtype": "float32"})
    assert "many times slower" not in caplog.text
    if not fast:
        with pytest.raises(RunError, match=r"engine\.dtype: 'float32' -> 'absent'"):
            evaluate.evaluate(run, engine_args={"dtype": "auto"})
    for file in files:  # as a machine that is fast with bf16 makes them
        cell = read_json(file)
        write_json(file, {**cell, "settings": {**cell["settings"], "engine": {}}})
    if not fast:
        with pytest.raises(
            RunError, match=r"engine\.dtype: 'absent' -> 'float32'\n.*\(dtype auto for an absent dtype\)"
        ):
            evaluate.evaluate(run)
    assert evaluate.evaluate(run, stages=[0], engine_args={"dtype": "auto"}) == 0, "goes on in the model's own type"


def test_the_hf_backend_translates_or_ignores_vllm_arguments(tiny_model):
    args = {"max_model_len": 256, "gpu_memory_utilization": 0.9, "tensor_parallel_size": 2, "batch_size": 4}
    assert engine.open_engine("hf", str(tiny_model), engine_args=args).max_length == 256


def test_a_context_shorter_than_the_runs_prompt_and_answer_is_refused(run):
    with pytest.raises(RunError, match=r"96 tokens of a prompt and 4 of an answer .* context of 99"):
        evaluate.evaluate(run, engine_args={"max_length": 99})
    with pytest.raises(RunError, match=r"a context of -1 is not allowed.* leave max_model_len"):  # vLLM's "what fits"
        evaluate.evaluate(run, backend="vllm", engine_args={"max_model_len": -1})
    assert evaluate.evaluate(run, engine_args={"max_length": 100}) == 5


@pytest.mark.parametrize(
    "more, message",
    [
        (["--backend", "hf"], r"context of 99, .* config\.json says so for 1_m\. In --engine-args"),
        (["--backend", "vllm"], r"context of 99, .* config\.json says so for 1_m\. Correct .*m/config\.json if"),
        # vLLM refused that when the base model had been measured.
        (["--engine-args", '{"max_model_len": 128}'], "max_model_len=128: 1_m reads 99 .* use at most 99"),
        (["--longrope"], r"context of 99, .* config\.json says so for 1_m\. Correct"),
        (["--longrope", "base"], "max_model_len=128: 1_m reads 101 .* use at most 101"),
    ],
)
def test_a_checkpoint_whose_config_has_a_shorter_context_is_refused_before_an_engine_starts(
    more, message, tiny_model, tmp_path, monkeypatch
):
    """Transformers' engine takes the context of each model, and cut prompts of one stage alone."""
    monkeypatch.setattr("trace_bench.engine.open_engine", lambda *_, **__: pytest.fail("an engine starts"))
    config = json.loads((shutil.copytree(tiny_model, tmp_path / "m") / "config.json").read_text())
    shorter = {"max_position_embeddings": 99}
    base = tiny_model
    if "--longrope" in more:  # above it vLLM takes the factors of long texts for all
        factors = {name: [1.0] * (config["head_dim"] // 2) for name in ("short_factor", "long_factor")}
        longrope = {"rope_type": "longrope", "original_max_position_embeddings": 99, **factors}
        shorter = {"rope_parameters": longrope}
        if "base" in more:  # vLLM's engine keeps this limit, which is above that of the checkpoint
            base, shorter = shutil.copytree(tiny_model, tmp_path / "base"), {"max_position_embeddings": 101}
            longrope["original_max_position_embeddings"] = 128
            write_json(base / "config.json", {**config, "rope_parameters": longrope})
        more = []
    write_json(tmp_path / "m" / "config.json", {**config, **shorter})
    words = ["evaluate", str(tmp_path / "run"), "--model", str(base), "--checkpoint", f"m={tmp_path / 'm'}"]
    words += ["--tasks", "trace_fomc", "--data", "demo", "--test-rows", "2", *more]
    with pytest.raises(SystemExit, match=message):
        cli.main([*words, "--max-prompt-length", "96", "--max-new-tokens", "4"])
    if "hf" in more:  # what only the last stage is asked does not count
        words += ["--max-prompt-length", "95", "--max-new-tokens", "4", "--checkpoint", f"last={tiny_model}"]
        with pytest.raises(pytest.fail.Exception, match="an engine starts"):
            cli.main([*words, "--judged", "safety"])


@pytest.mark.parametrize(
    "args, message",
    [
        ({"load_in_4bit": True, "batch_size": 2}, r"load_in_4bit: not allowed with --backend hf"),
        ({"pretrained": "other"}, r"pretrained is not allowed"),
        *(
            ({name: False}, f"engine_args: {name} would change the prompts")
            for name in ("enable_thinking", "chat_template_args")
        ),
        *(({name: False}, f"engine_args: {name} would encode prompts") for name in ("add_bos_token", "tokenizer")),
    ],
)
def test_engine_arguments_that_would_not_apply_to_every_stage_or_to_training_are_refused(tiny_model, args, message):
    with pytest.raises(engine.EngineError, match=message):
        engine.open_engine("hf", str(tiny_model), engine_args=args)


def test_an_untrained_stage_is_skipped_with_a_warning(run, caplog):
    run.stages[2].train_file.unlink()
    assert evaluate.evaluate(run) == 3
    assert "stage 2_trace_numglue_ds: it is not trained" in caplog.text


def test_a_missing_vllm_is_refused_with_both_ways_out(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(engine.EngineError, match=r"make setup.*--backend hf"):
        engine.open_engine("vllm", str(tiny_model))


@pytest.mark.parametrize("bad", ["NOWHERE", "./x", "a/b/c", "EMPTY", "FILE"])
def test_names_that_are_no_model_are_refused(tiny_model, tmp_path, bad):
    assert models.resolve_model(str(tiny_model)) == str(tiny_model.absolute())
    assert models.resolve_model("org/name") == "org/name"
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").touch()
    with pytest.raises(models.ModelError, match=r"neither a folder nor|no config\.json|is a file"):
        models.resolve_model(str(tmp_path / bad) if bad.isupper() else bad)


def test_a_missing_model_without_a_connection_is_refused_without_retries(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the hub is asked again"))
    hub.is_out_of_reach.cache_clear()
    try:
        for ask in (models.pinned_revision, models.load_tokenizer):
            with pytest.raises(models.ModelError, match=r"cannot be (reached|loaded)"):
                ask("missing/one")
    finally:
        hub.is_out_of_reach.cache_clear()
