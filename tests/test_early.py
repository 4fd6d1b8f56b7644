"""Anything that cannot work is an error before training, and the corrected command works."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import SHARED, stop_at, train, write_task
from transformers import AutoTokenizer

from trace_bench.cli import main
from trace_bench.engine import switches
from trace_bench.engine.architecture import check_base
from trace_bench.engine.models import ModelError
from trace_bench.evaluate import evaluate, external_run
from trace_bench.run import Run, RunError, read_json
from trace_bench.tasks import check_stages, load_tasks, training_rows
from trace_tasks import data
from trace_tasks.data import DataError
from trace_tasks.data.files import write_json
from trace_tasks.errors import TraceError
from trace_tasks.reasoning import row_variant
from trainers.base import CLTrainer, ConfigError
from trainers.pp import PPConfig, PPTrainer

# ------------------------------------------------------------------------------------- rows of tasks from elsewhere


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """Makes the task `mine` from rows and a few lines of YAML. Test and training rows may differ."""

    def make(rows, yaml="", test=None):
        monkeypatch.setenv("TRACE_TASKS", str(write_task(tmp_path / "own", "mine", rows, yaml, test)))
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
        (["[1, 2]", "[3]"], "", ["[1, 2]", "[3]"]),  # the answer is compared with the text of the column
        (["['a', 'b']", "['c']"], TEMPLATE, ["a", "c"]),
    ],
)
def test_the_trained_answer_is_the_text_that_lm_eval_compares_with_or_shows(own_task, answers, yaml, trained):
    own_task(questions(*answers), yaml)
    assert [answer for _, answer in rows_of()] == trained
    task = load_tasks(["mine"])["mine"]
    for doc, answer in zip(task.test_docs(), trained, strict=True):
        assert task.process_results(doc, [answer])["exact_match"] == 1, "the very text scores in full"


@pytest.mark.parametrize(
    "rows, yaml, message",
    [
        (questions("x", "[1, 2]"), TEMPLATE, r"mine, t\w+ row 1: .*\[1, 2\].*doc_to_target: answer"),
        (questions("['a']", "x"), TEMPLATE, r"mine, test row 1: the target 'x' is text, but that of row 0 is a list"),
        (questions(["x", "y"]), "metric_list: [{metric: chrf}]\n", "mine: some rows .*of chrf .* into 1"),
        (questions("[1, 2]", "[3]"), TEMPLATE, r"mine, training row 0: the target \[1, 2\] is a list without text"),
        (questions("x", ""), "", "mine, training row 1: the answer is empty"),
        (questions("x", " \n"), "", "mine, training row 1: the answer is empty"),
        (questions("x", None), "", "mine, training row 1: the target None is of type NoneType"),
        (questions(0, 2), CHOICES, "mine, test row 1: the target 2 is not an index of the 2 choices"),
        (questions(0, -1), CHOICES, "mine, test row 1: the target -1 is not an index"),
        (questions({"x": 1}), "", "mine, training row 0: the target {'x': 1} is of type dict"),
        (questions("x"), "doc_to_text: '{{nothing}}'\n", "mine cannot be loaded.*nothing"),
        (questions("x"), "training_split: null\n", "mine has no training split, so it cannot be a stage"),
        (questions("x"), "training_split: nowhere\n", "mine cannot be loaded .*nowhere"),
        (questions("x"), "test_split: nowhere\n", "mine cannot be loaded .*nowhere"),
        ([{"q": " ", "a": "x"}], "", "mine, training row 0: the prompt is empty"),
        (questions("x"), "process_docs: !function empty.nothing\n", "mine cannot be loaded"),
        (questions("x"), "output_type: multiple_choice\n" + CHOICES, "needs generated answers"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_with_task_row_and_value(own_task, tmp_path, rows, yaml, message):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/empty.py").write_text("def nothing(rows):\n    return rows.select([])\n")
    own_task(rows, yaml, test=[r for r in rows if r["q"].strip()] or questions("x"))
    with pytest.raises(DataError, match=message):
        rows_of()


def test_a_group_of_tasks_is_refused_as_a_column(demo_data):
    with pytest.raises(DataError, match="trace: a group of tasks"):
        load_tasks(["trace"])


def test_a_bad_row_of_the_last_task_is_found_before_training_and_rows_are_made_once(own_task, options, monkeypatch):
    own_task(questions("x", ""))
    options = {**options, "tasks": ["trace_fomc", "mine"], "max_steps": 1}
    with pytest.raises(DataError, match="mine, training row 1: the answer is empty"):
        train(options)
    assert not Path(options["output_dir"]).exists()
    made = []
    for module in ("stages", "trainer"):
        monkeypatch.setattr(
            f"trainers.base.{module}.training_rows",
            lambda task, *a: made.append(task.task_name) or training_rows(task, *a),
        )
    run = train({**options, "train_rows": 1})  # without the bad row
    assert made == options["tasks"]
    assert [read_json(s.train_file)["rows"] for s in run.stages[1:]] == [1, 1]


# ----------------------------------------------------------------------------------------------------------- the model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
SMALL = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA, MIXTRAL = ("LlamaConfig", SMALL), ("MixtralConfig", {**SMALL, "num_local_experts": 4})
LAGUNA = {**SMALL, "num_experts": 4, "head_dim": 16}
MAMBA = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "max_seq_len": 64}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
GRANITE = {**SMALL, "num_local_experts": 0, "layer_types": ["attention"] * 2}
ZAMBA = {**SMALL, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4}
OTHER = "LlamaForSequenceClassification"
#: Options, and their texts in messages.
FULL, SHORT = {"use_peft": False}, "context of 64. Use a max_prompt_length of at most 60"
ALL = {"lora_target_modules": ["all-linear"], "lora_dropout": 0.0}
TARGETS, DROPOUT = "Use --lora_target_modules", "--lora_dropout 0."


@pytest.fixture
def architecture(options, tmp_path):
    """Trains a model that has only a configuration. If it passes the checks, the error is about missing weights."""

    def try_it(model, changes):
        kind, settings = model
        folder = tmp_path / "model"
        getattr(transformers, kind)(**settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(options["model_name_or_path"]).save_pretrained(folder)
        changes = {"model_name_or_path": str(folder), "tasks": ["trace_fomc"], **changes}
        method = (PPTrainer, PPConfig) if "prompt_tokens" in changes else ()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("trainers.base.preflight.check_base", lambda *a: None)
            patch.setattr(CLTrainer, "load_model", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            train({**options, **changes}, *method)

    return try_it


@pytest.mark.parametrize(
    "model, given, message",
    [
        (("T5Config", {"d_model": 64, "num_layers": 2}), {}, r"\(t5\) is not a causal model but an encoder-decoder"),
        (("BartConfig", {"d_model": 64}), {}, r"\(bart\) is not a causal model but an encoder-decoder"),
        (("BertConfig", {**SIZES, "num_attention_heads": 4}), {}, "not a causal model but an encoder"),
        (("ViTConfig", {}), {}, "not a causal model but a different kind"),
        (("XLNetConfig", {"d_model": 64, "n_layer": 2, "n_head": 4}), {}, "one that reads text in both directions"),
        (("CpmAntConfig", {"hidden_size": 64, "num_hidden_layers": 2}), {}, "one that reads text in both directions"),
        (("LlamaConfig", {**SMALL, "is_causal": False}), {}, "one that reads text in both directions"),
        (("LlamaConfig", {**SMALL, "architectures": [OTHER]}), {}, f"{OTHER} without a head for the next token"),
        (("MllamaConfig", {"text_config": {**SMALL, "pad_token_id": 0}}), FULL, "saved as mllama_text_model, .* LoRA"),
        (("LlamaConfig", {**SMALL, "vocab_size": 250}), {}, "9 tokens without a row in the model's 250 embeddings"),
        (("Llama4TextConfig", {**SMALL, "num_local_experts": 4}), {}, r"\(llama4_text\) computes no router loss"),
        # Like the dense models of Granite 4: a type for mixtures, but no experts.
        (("GraniteMoeHybridConfig", GRANITE), {}, "computes no router loss. Use router_aux_loss_coef: 0"),
        # The context length is found under any of its names.
        (("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}), FULL, SHORT),
        (("MptConfig", MPT), FULL, SHORT),
        (("LlamaConfig", {**SMALL, "max_position_embeddings": 64}), FULL, SHORT),
        (("Gemma3Config", {"text_config": {**SMALL, "head_dim": 16, "max_position_embeddings": 64}}), FULL, SHORT),
        (("LlamaConfig", {**SMALL, "max_position_embeddings": 119}), {"prompt_tokens": 20}, "at most 95"),
        (("Phi3Config", {**SMALL, "pad_token_id": 0}), {}, f"{TARGETS} all-linear."),
        (MIXTRAL, {}, f"{TARGETS} all-linear {DROPOUT}"),
        (MIXTRAL, {"lora_target_modules": ["all-linear"]}, f"Use {DROPOUT}"),
        (("MambaConfig", MAMBA), {}, f"{TARGETS} dt_proj in_proj x_proj."),
        (("Mamba2Config", {**MAMBA, "num_heads": 8, "head_dim": 16}), {}, f"{TARGETS} in_proj."),
        (("PhimoeConfig", {**SMALL, "num_local_experts": 4}), ALL, f"is a PhimoeTopKRouter, .* {TARGETS} .*v_proj"),
        # transformers renames its shared experts when an adapter is loaded, so the saved tensors fit no module.
        (("LagunaConfig", LAGUNA), ALL, r"PEFT saves .*shared_experts\.down_proj.*cannot load"),
        (("ZambaConfig", ZAMBA), ALL | {"backend": "vllm"}, "_proj, but other layers share its weights"),
        (LLAMA, {"lora_target_modules": ["c_attn"]}, f"{TARGETS} all-linear."),
        (
            LLAMA,
            {"lora_target_modules": ["q_proj", "wv"]},
            f"names 'wv', but the model does not have it. {TARGETS} all",
        ),
        (LLAMA, {"lora_target_modules": ["lm_head"]}, f"The head cannot have an adapter.* {TARGETS} all-linear"),
        (LLAMA, {"lora_modules_to_save": ["head"]}, "names 'head', but the model does not have it. Its linear layers"),
    ],
)
def test_an_unusable_base_model_is_refused_in_one_line_and_the_advice_works(
    architecture, options, tmp_path, model, given, message
):
    with pytest.raises(TraceError, match=message) as e:
        architecture(model, given)
    said = str(e.value)
    assert "\n" not in said and not Path(options["output_dir"]).exists()
    words = [part.strip(" .").split() for part in said.rpartition("Use ")[2].split("--")[1:]]
    works = {name: 0.0 if name == "lora_dropout" else values for name, *values in words}
    works |= {name: int(n) for name, n in re.findall(r"a (max_prompt_length) of at most (\d+)", said)}
    if works:
        architecture(model, given | works)
    if "causal" in message:  # it cannot be evaluated either
        with pytest.raises(ModelError, match=message):
            check_base(str(tmp_path / "model"), "hf", False)


def test_models_without_a_context_limit_are_accepted(architecture):
    architecture(("BloomConfig", BLOOM), {})
    architecture(("MistralConfig", {**SMALL, "sliding_window": 16}), {})
    architecture(("MambaConfig", MAMBA), FULL)


_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
#: Positions for each type of layer.
NESTED = {
    "model_type": "gemma3_text",
    "rope_parameters": {"sliding_attention": _PLAIN, "full_attention": {**_PLAIN, "partial_rotary_factor": 0.5}},
}


@pytest.mark.parametrize(
    ("kind", "why", "on_gpus"),
    [
        ("Ernie4_5_MoeConfig", "chooses its experts without their correction bias", False),
        ("Gemma3nTextConfig", "leaves out the embeddings of its layers", True),
        ("HrmTextConfig", "reads its prompts in both directions", True),
        ({"model_type": "olmoe", "norm_topk_prob": True}, "computes as with norm_topk_prob=False", True),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "computes as with clip_qkv=None, but .* says 8.0", True),
        ({"model_type": "gpt_oss", "attention_bias": False}, "computes as with attention_bias=True", True),
        ({"model_type": "qwen3", "attention_bias": True}, "computes as with attention_bias=False", True),
        ({"model_type": "mamba2", "time_step_limit": [0.0, 1.0]}, "computes as with time_step_limit=", True),
        ({"model_type": "llama", "logit_scale": 0.5}, "obeys logit_scale=0.5", True),
        ({"model_type": "falcon_h1", "mamba_rms_norm": True}, "computes as with mamba_norm_before_gate=False", True),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "obeys partial_rotary_factor=0.5", True),
        (NESTED, "obeys partial_rotary_factor=0.5", True),
        ({"model_type": "llama", "sliding_window": 16}, "obeys sliding_window=16", True),
        ({"model_type": "llama", "sliding_window": "4096"}, "obeys sliding_window=4096", True),
        ({"model_type": "falcon_h1", "attn_rotary_emb": 16}, "obeys attn_rotary_emb=16", True),
        ({"model_type": "cohere2_moe", "norm_topk_prob": False}, "obeys norm_topk_prob=False", True),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "obeys scoring_func=sigmoid", True),
        ({"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 1}, "has no sliding", True),
        ({"model_type": "gpt_oss", "layer_types": ["full_attention"] * 36}, "gives every other layer", True),
    ],
)
def test_a_model_that_vllm_would_compute_differently_is_refused(kind, why, on_gpus, tmp_path, monkeypatch):
    config = getattr(transformers, kind)() if isinstance(kind, str) else transformers.AutoConfig.for_model(**kind)
    config.save_pretrained(tmp_path)
    whole = pytest.raises(RunError, match=r"has no model\.safetensors")
    refused = pytest.raises(ModelError, match=rf"vLLM {why}.* Use --backend hf")
    with refused:
        check_base(str(tmp_path), "vllm", False)
    monkeypatch.setattr("trace_bench.engine.gpu.has_gpu", lambda: True)
    with refused if on_gpus else whole:
        check_base(str(tmp_path), "vllm", False)
    with whole:
        check_base(str(tmp_path), "hf", False)


def test_vllm_serves_models_with_the_published_values(monkeypatch):
    monkeypatch.setattr("trace_bench.engine.gpu.has_gpu", lambda: True)
    for kind in switches._FIXED_IN_VLLM:
        switches.refuse_other_in_vllm(kind, transformers.AutoConfig.for_model(kind))
    obeyed = {"sliding_window": 16, "partial_rotary_factor": 0.5}
    switches.refuse_other_in_vllm("phi3", transformers.AutoConfig.for_model("phi3", **obeyed))
    switches.refuse_other_in_vllm("gemma4", transformers.AutoConfig.for_model("gemma4_text"))
    replaced = {"partial_rotary_factor": 0.5}  # by attn_rotary_emb
    switches.refuse_other_in_vllm("falcon_h1", transformers.AutoConfig.for_model("falcon_h1", **replaced))
    wide = transformers.LlamaConfig(sliding_window=4096, max_position_embeddings=4096)
    switches.refuse_other_in_vllm("llama", wide)


def test_a_model_type_unknown_to_transformers_is_refused(options, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "new")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "llama9"})
    with pytest.raises(ModelError, match=r"config.json of .* cannot be used: .*llama9"):
        train({**options, "model_name_or_path": str(folder)})


def test_tokens_without_embeddings_are_warned_about_and_refused_as_padding(options, caplog, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    train({**options, "model_name_or_path": str(folder), "tasks": ["trace_fomc"], "max_steps": 1})
    assert "no embeddings for <extra>" in caplog.text
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="2 tokens without a row in the model's 259 embeddings"):
        train({**options, "model_name_or_path": str(folder), "output_dir": options["output_dir"] + "2"})


# ------------------------------------------------------------------------------------------------------ begun once more


def test_a_run_without_results_may_begin_again_with_a_different_configuration(options, caplog):
    killed = {**options, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(killed, stop_at(1, CLTrainer))
    run = Run.open(options["output_dir"])
    assert list(run.stages[1].attempt.glob("checkpoint-*")), "of the old configuration"
    again = train({**options, "learning_rate": 1e-3, "tasks": ["trace_fomc"]})
    assert again.manifest["config"]["learning_rate"] == 1e-3 and again.stages[1].is_trained
    assert "config.learning_rate: 0.01 -> 0.001" in caplog.text and "removed 1 checkpoint" in caplog.text
    assert not list(run.path.rglob("checkpoint-*"))


@pytest.mark.parametrize("done", ["stages/1_trace_fomc/train.json", "stages/0_base/eval/trace_fomc.json"])
def test_a_run_with_results_never_begins_again(options, run, done, tmp_path):
    for stage in run.stages[1:]:
        stage.train_file.unlink()
    write_json(run.path / done, {})
    before = (run.path / "manifest.json").read_bytes()
    there = shutil.copytree(data.find_data("demo"), tmp_path / "data")
    write_json(there / "FOMC/test.json", read_json(there / "FOMC/test.json")[:-1])
    with pytest.raises(RunError) as e:
        train({**options, "learning_rate": 1e-3, "lora_r": 2, "data": str(there)})
    for difference in ("config.learning_rate: 0.01 -> 0.001", "config.lora_r: 4 -> 2", "data.fingerprint.trace_fomc"):
        assert difference in str(e.value) and "seed" not in str(e.value)
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
    with pytest.raises(
        DataError, match=r"FOMC/train\.json, row 0 and 63 more: this is the reasoning variant.*trace_\*"
    ):
        train({**options, "data": str(reasoned)})
    assert not Path(options["output_dir"]).exists()
    monkeypatch.setenv("TRACE_DATA", str(reasoned))
    with pytest.raises(DataError, match="reasoning variant"):
        load_tasks(["trace_fomc"])  # plain lm_eval loads it so
    monkeypatch.setenv("TRACE_DATA", str(plain))
    monkeypatch.setenv("TRACE_REASONING", str(plain))
    with pytest.raises(DataError, match="the plain variant"):
        data.Data.at(plain, ["reasoning_fomc"]).check()
    with pytest.raises(DataError, match="the plain variant"):
        load_tasks(["reasoning_fomc"])
    monkeypatch.setenv("TRACE_REASONING", str(reasoned))
    assert data.Data.at(plain, [*data.FOLDERS, *data.REASONING]).check()
    rows = json.loads((plain / "FOMC/test.json").read_text())
    rows[5] = json.loads((reasoned / "FOMC/test.json").read_text())[5]
    write_json(plain / "FOMC/test.json", rows)
    with pytest.raises(DataError, match=r"FOMC/test\.json, row 5: this is the reasoning variant"):
        data.Data.at(plain, data.FOLDERS).check()


def test_answers_with_reasoning_are_recognised_with_any_prompt():
    prompt = "What is 2 + 2?\nAnswer:"
    assert row_variant("NumGLUE-cm", {"prompt": prompt, "answer": "2 and 2 make 4.\nAnswer:4"}) == "reasoning"
    assert row_variant("NumGLUE-cm", {"prompt": prompt, "answer": "4"}) == "plain"
    assert row_variant("NumGLUE-cm", {"prompt": "What is 2 + 2?", "answer": "4"}) is None
    explained = {"prompt": prompt, "answer": "A\nIt is asked for.\nAnswer: what follows."}
    assert row_variant("ScienceQA", explained) == "plain"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the TRACE data (shared/data) is not beside the repository")
@pytest.mark.parametrize("name", ["trace", "trace_5000", "trace_reasoning"])
def test_the_variant_of_all_real_rows_is_recognised(name):
    files = sorted((SHARED / "data" / name).glob("*/*.json"))
    assert len(files) >= 8
    found = {row_variant(file.parent.name, row) for file in files for row in data.read_rows(file)}
    assert found == {"reasoning" if name == "trace_reasoning" else "plain"}


def test_data_names_the_reasoning_variant(tmp_path, capsys):
    root = copy_demo(tmp_path / data.REASONING_FOLDER, reasoning=True)
    main(["data", str(root)])
    out = capsys.readouterr().out
    assert f"export TRACE_REASONING={root}" in out and "Complete" not in out and "TRACE_DATA=" not in out
    assert out.replace(str(root), "").count("reasoning_") == 9


def test_data_names_the_complete_tasks_of_partial_data(tmp_path, capsys):
    root = copy_demo(tmp_path, "FOMC", "Py150")
    copy_demo(tmp_path, "C-STANCE", splits=["test"])
    main(["data", str(root)])
    out = capsys.readouterr().out
    assert "Complete: 2 of 8 tasks" in out and "--tasks trace_fomc trace_py150\n" in out
    assert "--tasks trace_cstance,trace_fomc,trace_py150\n" in out and "C-STANCE/train.json is missing" in out
    assert "Missing: trace_meetingbank" in out
    for folder in ("FOMC", "Py150"):
        shutil.rmtree(root / folder)
    with pytest.raises(SystemExit) as e:
        main(["data", str(root)])
    assert "Complete: 0 of 8" in str(e.value) and "--tasks trace_cstance" in str(e.value)


# ---------------------------------------------------------------------------------------------------- test rows alone


def test_a_run_can_be_evaluated_with_only_the_test_rows(options, run, tmp_path, monkeypatch):
    there = copy_demo(tmp_path / "there", "FOMC", "NumGLUE-ds", splits=["test"])
    monkeypatch.setenv("TRACE_DATA", str(there))
    with pytest.raises(DataError, match="has no split 'train'"):
        training_rows(load_tasks(["trace_fomc"])["trace_fomc"])
    assert evaluate(run, data_path=str(there)) == 2 + 1 + 2
    rows = json.loads((there / "FOMC/test.json").read_text())
    write_json(there / "FOMC/test.json", rows[:-1])
    run.stages[1].eval_file("trace_fomc").unlink()
    with pytest.raises(RunError, match="different data than the run began with, in: trace_fomc"):
        evaluate(run, data_path=str(there))
    with pytest.raises(DataError, match=r"FOMC/train\.json is missing"):
        train({**options, "tasks": ["trace_fomc"], "data": str(there), "output_dir": str(tmp_path / "other")})


def test_external_checkpoints_need_only_test_rows_and_the_data_may_be_completed_later(
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


def test_the_fingerprints_of_complete_data_are_unchanged(tmp_path):
    root = copy_demo(tmp_path)
    before = data.Data.at(root, data.FOLDERS).fingerprint
    assert data.Data.at(root, data.FOLDERS).changed({"fingerprint": before}) == [], "of a run that noted no test rows"
    (root / "FOMC/eval.json").write_text("[]")
    assert data.Data.at(root, data.FOLDERS).changed({"fingerprint": before}) == ["trace_fomc"]
