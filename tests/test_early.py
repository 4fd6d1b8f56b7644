"""What cannot work is said before anything is trained, and the corrected command works."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import SHARED, stop_at, train
from transformers import AutoTokenizer

from trace_bench.cli import main
from trace_bench.evaluate import evaluate, external_run
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import check_stages, load_tasks, training_rows
from trace_tasks import data
from trace_tasks.data import DataError
from trace_tasks.data.files import write_json
from trace_tasks.reasoning import row_variant
from trainers.base import CLTrainer, ConfigError
from trainers.pp import PPConfig, PPTrainer

# ------------------------------------------------------------------------------------- rows of tasks from elsewhere


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """Makes the task `mine` of rows and a few lines of YAML; rows of test and train where they differ."""

    def make(rows, yaml="", test=None):
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        for split, content in {"train": rows, "test": test or rows}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")
        settings = {
            "task": "mine",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
            "training_split": "train",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "q",
            "doc_to_target": "a",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"max_gen_toks": 4, "until": []},
        }
        lines = [f"{k}: {json.dumps(v)}\n" for k, v in settings.items() if f"{k}:" not in yaml]
        (folder / "mine.yaml").write_text("".join(lines) + yaml, encoding="utf-8")
        monkeypatch.setenv("TRACE_TASKS", str(folder))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    return make


def rows_of(name="mine"):
    tasks = load_tasks([name])
    check_stages(tasks)
    return training_rows(tasks[name])


def questions(*answers):
    return [{"q": f"Question {i}?", "a": answer} for i, answer in enumerate(answers)]


TEMPLATE, CHOICES = "doc_to_target: '{{a}}'\n", "doc_to_choice: ['no', 'yes']\n"


@pytest.mark.parametrize(
    "answers, yaml, trained",
    [
        (["x", "y"], "", ["x", "y"]),
        ([["Paris", "paris"], ["Rome"]], "", ["Paris", "Rome"]),
        ([["", "Paris"], ["Rome"]], "", ["Paris", "Rome"]),
        ([4, 15], "", ["4", "15"]),
        ([0.5, 2.0], "", ["0.5", "2.0"]),
        ([0, 1], CHOICES, ["no", "yes"]),
        ([0, 1], TEMPLATE + CHOICES, ["no", "yes"]),
        (["[1, 2]", "[3]"], "", ["[1, 2]", "[3]"]),  # a column's text is what it is compared with
        (["['a', 'b']", "['c']"], TEMPLATE, ["a", "c"]),
    ],
)
def test_what_is_trained_is_the_text_that_lm_eval_compares_with_or_shows(own_task, answers, yaml, trained):
    own_task(questions(*answers), yaml)
    assert [answer for _, answer in rows_of()] == trained
    task = load_tasks(["mine"])["mine"]
    for doc, answer in zip(task.test_docs(), trained, strict=True):
        assert task.process_results(doc, [answer])["exact_match"] == 1, "the very text scores in full"


@pytest.mark.parametrize(
    "answers, yaml, message",
    [
        (["x", "[1, 2]"], TEMPLATE, r"mine, t\w+ row 1: .*\[1, 2\].*doc_to_target: answer"),
        (["[1, 2]", "[3]"], TEMPLATE, r"mine, training row 0: the target \[1, 2\] is a list without a text"),
        (["x", ""], "", "mine, training row 1: the answer is empty"),
        (["x", " \n"], "", "mine, training row 1: the answer is empty"),
        (["x", None], "", "mine, training row 1: the target None is NoneType"),
        ([0, 2], CHOICES, "mine, test row 1: the target 2 is no index of the 2 choices"),
        ([0, -1], CHOICES, "mine, test row 1: the target -1 is no index"),
        ([{"x": 1}], "", "mine, training row 0: the target {'x': 1} is dict"),
        (["x"], "doc_to_text: '{{nothing}}'\n", "mine cannot be made.*nothing"),
    ],
)
def test_a_target_that_is_no_text_is_refused_with_task_row_and_value(own_task, answers, yaml, message):
    own_task(questions(*answers), yaml)
    with pytest.raises(DataError, match=message):
        rows_of()


@pytest.mark.parametrize(
    "rows, test, yaml, message",
    [
        (questions("x"), None, "training_split: null\n", "mine has no training split, so it cannot be a stage"),
        (questions("x"), None, "training_split: nowhere\n", "mine cannot be made .*nowhere"),
        (questions("x"), None, "test_split: nowhere\n", "mine cannot be made .*nowhere"),
        ([{"q": " ", "a": "x"}], questions("x"), "", "mine, training row 0: the prompt is empty"),
        (questions("x"), None, "process_docs: !function empty.nothing\n", "mine cannot be made"),
        (questions("x"), None, "output_type: multiple_choice\n" + CHOICES, "has to be generated"),
    ],
)
def test_rows_that_are_not_there_are_named(own_task, tmp_path, rows, test, yaml, message):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/empty.py").write_text("def nothing(rows):\n    return rows.select([])\n")
    own_task(rows, yaml, test)
    with pytest.raises(DataError, match=message):
        rows_of()


def test_a_group_is_no_column(demo_data):
    with pytest.raises(DataError, match="trace: a group of tasks"):
        load_tasks(["trace"])


def test_the_last_task_s_bad_row_is_found_before_the_first_is_trained(own_task, options):
    own_task(questions("x", ""))
    options = {**options, "tasks": ["trace_fomc", "mine"], "max_steps": 1}
    with pytest.raises(DataError, match="mine, training row 1: the answer is empty"):
        train(options)
    assert not Path(options["output_dir"]).exists()
    run = train({**options, "train_rows": 1})  # without that row
    assert [read_json(s.train_file)["rows"] for s in run.stages[1:]] == [1, 1]


def test_rows_are_made_once(options, monkeypatch):
    made, make = [], training_rows
    for module in ("stages", "trainer"):
        monkeypatch.setattr(
            f"trainers.base.{module}.training_rows", lambda task, *a: made.append(task.task_name) or make(task, *a)
        )
    train({**options, "max_steps": 1})
    assert made == options["tasks"]


# ----------------------------------------------------------------------------------------------------------- the model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
BERT = {k: v for k, v in SMALL.items() if "key_value" not in k}
MIXTRAL = ("MixtralConfig", {**SMALL, "num_local_experts": 4})
MAMBA = ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300})
LLAMA = ("LlamaConfig", SMALL)


@pytest.fixture
def architecture(options, tmp_path, monkeypatch):
    """Tries a model of which there is only a configuration: what passes the checks ends at the missing weights."""

    def try_it(kind, settings, more=None, trainer=None, config=None):
        folder = tmp_path / "model"
        getattr(transformers, kind)(**settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(options["model_name_or_path"]).save_pretrained(folder)
        changes = {"model_name_or_path": str(folder), "tasks": ["trace_fomc"], **(more or {})}
        loads = pytest.MonkeyPatch()
        try:
            loads.setattr(CLTrainer, "load_model", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                train({**options, **changes}, trainer, config)
        finally:
            loads.undo()

    return try_it


def refused(architecture, *args, **kwargs):
    with pytest.raises(ConfigError) as e:
        architecture(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "kind, settings, what",
    [
        ("T5Config", {"d_model": 64, "num_layers": 2, "vocab_size": 300}, "t5.*but an encoder-decoder"),
        ("BartConfig", {"d_model": 64, "vocab_size": 300}, "bart.*but an encoder-decoder"),
        ("BertConfig", BERT, "bert.*not a causal model but an encoder"),
        ("ViTConfig", {}, "not a causal model but of another kind"),
        (
            "LlamaConfig",
            {**SMALL, "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification without a head for the next token",
        ),
    ],
)
def test_a_model_that_does_not_write_from_left_to_right_is_refused(architecture, options, kind, settings, what):
    assert re.search(what, refused(architecture, kind, settings))
    assert not Path(options["output_dir"]).exists()


def test_a_type_that_transformers_does_not_know_is_refused(options, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "new")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "llama9"})
    with pytest.raises(ConfigError, match=r"transformers cannot make the model .*llama9"):
        train({**options, "model_name_or_path": str(folder)})
    assert not Path(options["output_dir"]).exists()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("GPT2Config", {**GPT2, "n_positions": 64}),
        ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "max_seq_len": 64}),
        ("LlamaConfig", {**SMALL, "max_position_embeddings": 64}),
        ("Gemma3Config", {"text_config": {**SMALL, "head_dim": 16, "max_position_embeddings": 64}}),
    ],
)
def test_the_context_is_found_under_any_name(architecture, kind, settings):
    full = {"use_peft": False}
    assert "context of 64: use a max_prompt_length of at most 60" in refused(architecture, kind, settings, full)
    architecture(kind, settings, {**full, "max_prompt_length": 60})


def test_without_a_limit_there_is_none(architecture):
    architecture("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300})
    architecture("MistralConfig", {**SMALL, "sliding_window": 16})


def test_soft_prompts_take_their_part_of_the_context(architecture):
    more = {"prompt_tokens": 20, "max_prompt_length": 96}
    kind, settings = "LlamaConfig", {**SMALL, "max_position_embeddings": 119}
    message = refused(architecture, kind, settings, more, PPTrainer, PPConfig)
    assert "at most 95" in message
    architecture(kind, settings, {**more, "max_prompt_length": 95}, PPTrainer, PPConfig)


@pytest.mark.parametrize(
    "model, given, message, works",
    [
        (
            ("Phi3Config", {**SMALL, "pad_token_id": 0}),
            {},
            "Use --lora_target_modules all-linear.",
            {"lora_target_modules": ["all-linear"]},
        ),
        (
            MIXTRAL,
            {},
            "Use --lora_target_modules all-linear --lora_dropout 0.",
            {"lora_target_modules": ["all-linear"], "lora_dropout": 0.0},
        ),
        (
            MIXTRAL,
            {"lora_target_modules": ["all-linear"]},
            "Use --lora_dropout 0.",
            {"lora_target_modules": ["all-linear"], "lora_dropout": 0.0},
        ),
        (
            MAMBA,
            {},
            "Use --lora_target_modules dt_proj in_proj x_proj.",
            {"lora_target_modules": ["dt_proj", "in_proj", "x_proj"]},
        ),
        (
            ("Mamba2Config", {**MAMBA[1], "num_heads": 8, "head_dim": 16}),
            {},
            "Use --lora_target_modules in_proj.",
            {"lora_target_modules": ["in_proj"]},
        ),
        (LLAMA, {"lora_target_modules": ["c_attn"]}, "c_attn", {"lora_target_modules": ["q_proj"]}),
        (
            LLAMA,
            {"lora_target_modules": ["q_proj", "wv"]},
            "lora_target_modules names 'wv', which the model does not have. Use --lora_target_modules all-linear.",
            {"lora_target_modules": ["all-linear"]},
        ),
        (LLAMA, {"lora_modules_to_save": ["head"]}, "names 'head'", {"lora_modules_to_save": ["lm_head"]}),
    ],
)
def test_lora_that_does_not_fit_is_refused_with_what_does(architecture, options, model, given, message, works):
    assert message in refused(architecture, *model, given)
    assert not Path(options["output_dir"]).exists()
    architecture(*model, works)


def test_full_fine_tuning_needs_no_lora_target(architecture):
    architecture(*MAMBA, {"use_peft": False})


def test_a_tokenizer_larger_than_the_embeddings_is_refused(architecture, options, caplog, tiny_model, tmp_path):
    message = refused(architecture, "LlamaConfig", {**SMALL, "vocab_size": 250})
    assert "9 tokens without a row in the model's 250 embeddings" in message
    # A token that was only added occurs in no row: a warning is enough. The padding token is used.
    folder = shutil.copytree(tiny_model, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    train({**options, "model_name_or_path": str(folder), "tasks": ["trace_fomc"], "max_steps": 1})
    assert "no embeddings of <extra>" in caplog.text
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="2 tokens without a row in the model's 259 embeddings"):
        train({**options, "model_name_or_path": str(folder), "output_dir": options["output_dir"] + "2"})


# ------------------------------------------------------------------------------------------------------ begun once more


def test_a_run_of_which_nothing_is_done_may_be_begun_with_another_configuration(options, caplog):
    killed = {**options, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(killed, stop_at(1, CLTrainer))
    run = Run.open(options["output_dir"])
    assert list(run.stages[1].attempt.glob("checkpoint-*")), "of the old configuration"
    again = train({**options, "learning_rate": 1e-3, "tasks": ["trace_fomc"]})
    assert again.manifest["config"]["learning_rate"] == 1e-3 and again.stages[1].is_trained
    assert "config.learning_rate: 0.01 -> 0.001" in caplog.text and "removed." in caplog.text
    assert not list(run.path.rglob("checkpoint-*"))


@pytest.mark.parametrize("done", ["stages/1_trace_fomc/train.json", "stages/0_base/eval/trace_fomc.json"])
def test_finished_work_is_never_begun_again(options, tmp_path, done):
    with pytest.raises(KeyboardInterrupt):
        train(options, stop_at(1, CLTrainer))
    run = Run.open(options["output_dir"])
    write_json(run.path / done, {})
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(RunError, match=r"config\.learning_rate: 0\.01 -> 0\.001"):
        train({**options, "learning_rate": 1e-3})
    assert (run.path / "manifest.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------- variants of the data


def copy_demo(target, *folders, splits=data.SPLITS, reasoning=False):
    root = data.find_data("demo") / (data.REASONING_FOLDER if reasoning else "")
    for folder in folders or data.FOLDERS.values():
        (target / folder).mkdir(parents=True, exist_ok=True)
        for split in splits:
            shutil.copy(root / folder / f"{split}.json", target / folder)
    return target


def test_rows_of_the_other_variant_are_refused(options, tmp_path, monkeypatch):
    plain, reasoned = copy_demo(tmp_path / "plain"), copy_demo(tmp_path / "reasoned", reasoning=True)
    with pytest.raises(DataError, match=r"FOMC/train\.json, row 0 and 63 more: of the reasoning variant.*trace_\*"):
        train({**options, "data": str(reasoned)})
    assert not Path(options["output_dir"]).exists()
    monkeypatch.setenv("TRACE_DATA", str(reasoned))
    with pytest.raises(DataError, match="reasoning variant"):
        load_tasks(["trace_fomc"])  # as plain lm_eval does
    monkeypatch.setenv("TRACE_DATA", str(plain))
    monkeypatch.setenv("TRACE_REASONING", str(plain))
    with pytest.raises(DataError, match="of the plain variant"):
        data.Data.at(plain, ["reasoning_fomc"]).check()
    with pytest.raises(DataError, match="of the plain variant"):
        load_tasks(["reasoning_fomc"])
    monkeypatch.setenv("TRACE_REASONING", str(reasoned))
    assert data.Data.at(plain, [*data.FOLDERS, *data.REASONING]).check()
    rows = json.loads((plain / "FOMC/test.json").read_text())
    rows[5] = json.loads((reasoned / "FOMC/test.json").read_text())[5]
    write_json(plain / "FOMC/test.json", rows)
    with pytest.raises(DataError, match=r"FOMC/test\.json, row 5: of the reasoning variant"):
        data.Data.at(plain, data.FOLDERS).check()


def test_answers_with_reasoning_are_known_whatever_the_prompt_says():
    prompt = "What is 2 + 2?\nAnswer:"
    assert row_variant("NumGLUE-cm", {"prompt": prompt, "answer": "2 and 2 make 4.\nAnswer:4"}) == "reasoning"
    assert row_variant("NumGLUE-cm", {"prompt": prompt, "answer": "4"}) == "plain"
    assert row_variant("NumGLUE-cm", {"prompt": "What is 2 + 2?", "answer": "4"}) is None
    explained = {"prompt": prompt, "answer": "A\nIt is asked for.\nAnswer: what follows."}
    assert row_variant("ScienceQA", explained) == "plain"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the TRACE data (shared/data) is not beside the repository")
@pytest.mark.parametrize("name", ["trace", "trace_5000", "trace_reasoning"])
def test_real_rows_are_all_told_apart(name):
    files = sorted((SHARED / "data" / name).glob("*/*.json"))
    assert len(files) >= 8
    found = {row_variant(file.parent.name, row) for file in files for row in data.read_rows(file)}
    assert found == {"reasoning" if name == "trace_reasoning" else "plain"}


def test_the_command_names_the_reasoning_variant_as_what_it_is(tmp_path, capsys):
    root = copy_demo(tmp_path / data.REASONING_FOLDER, reasoning=True)
    main(["data", str(root)])
    out = capsys.readouterr().out
    assert f"export TRACE_REASONING={root}" in out and "Complete" not in out and "TRACE_DATA=" not in out
    assert out.count("reasoning_") == 9


def test_the_command_names_the_complete_tasks_of_a_part(tmp_path, capsys):
    root = copy_demo(tmp_path, "FOMC", "Py150")
    copy_demo(tmp_path, "C-STANCE", splits=["test"])
    main(["data", str(root)])
    out = capsys.readouterr().out
    assert "Complete: 2 of 8 tasks" in out and "--tasks trace_fomc trace_py150\n" in out
    assert "--tasks trace_cstance,trace_fomc,trace_py150\n" in out and "C-STANCE/train.json is missing" in out
    assert "Not there: trace_meetingbank" in out
    for folder in ("FOMC", "Py150"):
        shutil.rmtree(root / folder)
    with pytest.raises(SystemExit) as e:
        main(["data", str(root)])
    assert "Complete: 0 of 8" in str(e.value) and "--tasks trace_cstance" in str(e.value)


# ---------------------------------------------------------------------------------------------------- test rows alone


def test_a_run_is_evaluated_where_only_its_test_rows_are(options, tmp_path, monkeypatch):
    run = train({**options, "tasks": ["trace_fomc"], "max_steps": 1})
    there = copy_demo(tmp_path / "there", "FOMC", splits=["test"])
    monkeypatch.setenv("TRACE_DATA", str(there))
    with pytest.raises(DataError, match="lacks the split 'train'"):
        training_rows(load_tasks(["trace_fomc"])["trace_fomc"])
    assert evaluate(run, data_path=str(there)) == 2
    rows = json.loads((there / "FOMC/test.json").read_text())
    write_json(there / "FOMC/test.json", rows[:-1])
    run.stages[1].eval_file("trace_fomc").unlink()
    with pytest.raises(RunError, match="other data than the run began with, in: trace_fomc"):
        evaluate(run, data_path=str(there))
    with pytest.raises(DataError, match=r"FOMC/train\.json is missing"):
        train({**options, "tasks": ["trace_fomc"], "data": str(there), "output_dir": str(tmp_path / "other")})


def test_checkpoints_are_evaluated_on_test_rows_alone_and_their_data_may_be_completed(
    tiny_model, checkpoints, tmp_path
):
    there = copy_demo(tmp_path / "there", "FOMC", splits=["test"])
    run = external_run(
        tmp_path / "run",
        {"trace_fomc": str(checkpoints["adapter"])},
        model=str(tiny_model),
        tasks=["trace_fomc"],
        settings={"backend": "hf", "test_rows": 4, "max_prompt_length": 96, "max_new_tokens": 4},
        data_path=str(there),
    )
    assert evaluate(run, stages=[0]) == 1
    copy_demo(there, "FOMC")
    assert evaluate(run, stages=[1]) == 1


def test_complete_data_has_the_fingerprints_that_it_had(tmp_path):
    root = copy_demo(tmp_path)
    before = data.Data.at(root, data.FOLDERS).fingerprint
    assert data.Data.at(root, data.FOLDERS).changed({"fingerprint": before}) == [], "of a run that noted no test rows"
    (root / "FOMC/eval.json").write_text("[]")
    assert data.Data.at(root, data.FOLDERS).changed({"fingerprint": before}) == ["trace_fomc"]
