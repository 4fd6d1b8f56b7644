"""The callback measures what the model learns and forgets, and does not change the training."""

import copy
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import generate, reference
from conftest import SHARED, freeze_imports
from datasets import Dataset
from forks import forked_twice
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from trace_bench import ForgettingCallback, evaluate
from trace_bench.callback import CallbackError
from trace_bench.engine.live import LiveHF
from trace_bench.evaluate import external_run
from trace_bench.report import write_report
from trace_bench.run import Run, RunError, read_json, read_jsonl
from trace_bench.waiting import InUse, locked
from trace_tasks.data.files import write_json

TASKS = ["trace_fomc", "trace_numglue_ds"]
MEASURED = {"tasks": TASKS, "rows": 4, "max_prompt_length": 96, "max_new_tokens": 4}
ROWS = Dataset.from_list([{"prompt": f"{i} and {i} is ", "completion": f"{2 * i}."} for i in range(24)])


@pytest.fixture
def base(checkpoints):
    """A model that writes varied texts, so equal answers mean equal weights."""
    return checkpoints["full model"]


@pytest.fixture
def trainer(base, tmp_path, demo_data):
    """Makes a TRL trainer: three steps of LoRA with dropout."""
    freeze_imports()

    def make(name="out", **options):
        settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
        settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False}
        torch.manual_seed(0)
        return SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=SFTConfig(str(tmp_path / name), **settings | options),
            train_dataset=ROWS,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def metrics_of(trainer):
    return [entry["mean_token_accuracy"] for entry in trainer.state.log_history if "loss" in entry]


def numbers():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


class Watch(TrainerCallback):
    """Records the state of a model and of the random numbers at each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        inner = model.get_base_model()
        self.seen.append(
            {
                "modes": {name: module.training for name, module in model.named_modules()},
                "checkpointing": inner.is_gradient_checkpointing,
                "config": copy.deepcopy(inner.config.to_dict()),
                "generation": (id(inner.generation_config), inner.generation_config.to_dict()),
                "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
                "random": numbers(),
            }
        )


class Killed(TrainerCallback):
    """Ends a training after its first step, as a kill does."""

    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True, "bf16": True}, {"logging_steps": 2}])
def test_training_is_equal_to_the_last_bit_with_and_without_the_callback(trainer, tmp_path, options):
    plain, watched = trainer("plain", **options), trainer("watched", **options)
    # Generation must ignore this setting, which would change a greedy answer.
    for one in (plain, watched):
        one.model.get_base_model().generation_config.repetition_penalty = 9.0
    before = numbers()
    callback = ForgettingCallback(watched, **MEASURED, every=1, data_path="demo")
    assert numbers() == before and os.environ["TRACE_DATA"] == "demo", "not the folder that it is in"
    watches = [Watch(), Watch()]
    for one, watch in zip((plain, watched), watches, strict=True):
        one.add_callback(watch)
    watched.add_callback(callback)
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    watched.train()
    assert losses(plain) == losses(watched) and len(losses(plain)) == len(losses(watched)) > 0
    assert metrics_of(plain) == metrics_of(watched), "TRL's own means are not emptied"
    cell = read_json(Run.open(tmp_path / "watched/forgetting").stages[1].eval_file("trace_fomc"))
    assert cell["settings"]["engine"] == ({"mixed_precision_dtype": "bfloat16"} if "bf16" in options else {})
    for before, after in zip(watches[0].seen, watches[1].seen, strict=True):
        ids = before.pop("generation")[1], after.pop("generation")[1]
        assert before == after and ids[0] == ids[1]
    for (name, one), two in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_callback_writes_a_run_with_the_scores_of_evaluate(trainer, base, tmp_path, monkeypatch):
    monkeypatch.setenv("GENERAL_DATA", str(SHARED / "data/general"))
    suites = ["boolq"] if (SHARED / "data/general").is_dir() else []
    one = trainer(save_strategy="steps", save_steps=2)
    one.add_callback(ForgettingCallback(one, **MEASURED, suites=suites, every="save"))
    one.train()
    run = Run.open(tmp_path / "out/forgetting")
    assert [s.name for s in run.stages] == ["0_base", "1_step_2", "2_step_3"]
    settings = {"backend": "hf", "test_rows": 4, "max_prompt_length": 96, "max_new_tokens": 4, "chat_template": False}
    general = [f"general_{suite}" for suite in suites]
    settings |= {"general": general, "general_rows": 4, "general_stages": "all"}
    saved = {"two": str(tmp_path / "out/checkpoint-2"), "three": str(tmp_path / "out/checkpoint-3")}
    again = external_run(tmp_path / "again", saved, model=str(base), tasks=TASKS, settings=settings)
    evaluate.evaluate(again, engine_args={"dtype": "float32"})
    answers = set()
    for mine, theirs in zip(run.stages, again.stages, strict=True):
        for task in [*TASKS, *general]:
            cells = [read_json(stage.eval_file(task)) for stage in (mine, theirs)]
            if task in TASKS:  # read in other batches, which moves the last bits
                likely = [cell["metrics"].pop("log_likelihood") for cell in cells]
                assert likely[0] == pytest.approx(likely[1], rel=1e-5)
            for key in ("metrics", "n", "n_cut", "n_unfinished", "definition", "headline"):
                assert cells[0].get(key) == cells[1].get(key)
            if task in general:
                continue  # likelihoods of other batches differ in their last bits
            rows = [[{**r, "log_likelihood": 0} for r in read_jsonl(s.samples_file(task))] for s in (mine, theirs)]
            assert rows[0] == rows[1]
            answers |= {row["response"] for row in read_jsonl(mine.samples_file(task))}
    assert len(answers) > 6, "the weights differ, and so do the answers"
    write_report(run)
    text = (run.path / "report.md").read_text()
    assert "Changes since the base model" in text and "2_step_3" in text
    with pytest.raises(RunError, match="has answers but no weights"):
        evaluate.evaluate(run)


def test_changes_are_logged_in_points_and_the_log_of_the_step_is_kept(trainer, tmp_path):
    one = trainer()
    one.add_callback(ForgettingCallback(one, **{**MEASURED, "tasks": ", ".join(TASKS)}, every=2))
    one.train()
    run = Run.open(tmp_path / "out/forgetting")
    metrics = [read_json(s.eval_file("trace_fomc"))["metrics"] for s in run.stages]
    scores = [m["accuracy"]["value"] for m in metrics]
    tolerant = [m["accuracy_tolerant"]["value"] for m in metrics]
    logged = [e for e in one.state.log_history if "score/trace_fomc" in e]
    assert [e["step"] for e in logged] == [0, 2, 3]
    assert [e["score/trace_fomc"] for e in logged] == [100 * scores[i] for i in range(3)]
    assert [e["score/trace_fomc_tolerant"] for e in logged] == [100 * value for value in tolerant]
    assert "change/trace_fomc" not in logged[0]
    assert [e["change/trace_fomc"] for e in logged[1:]] == [100 * (scores[i] - scores[0]) for i in (1, 2)]
    assert [e["step"] for e in one.state.log_history if "loss" in e] == [1, 2, 3]


def test_a_resumed_training_keeps_the_start_and_measures_repeated_steps_again(trainer, tmp_path):
    def train(checkpoint=None, killed=False, **options):
        one = trainer(save_strategy="steps", save_steps=2, max_steps=4)
        one.processing_class.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + one.processing_class.chat_template
        one.add_callback(ForgettingCallback(one, **{**MEASURED, "every": 1, "chat_template": True, **options}))
        if killed:
            one.add_callback(Killed())
        one.train(resume_from_checkpoint=checkpoint)

    train()
    run, saved = Run.open(tmp_path / "out/forgetting"), str(tmp_path / "out/checkpoint-2")
    start, third = run.stages[0].eval_file("trace_fomc"), run.stages[3].eval_file("trace_fomc")
    made = [file.stat().st_mtime_ns for file in (start, third)]
    with pytest.raises(RunError, match="test_rows: 4 -> 3"):
        train(saved, rows=3)
    assert third.stat().st_mtime_ns == made[1], "what is refused removes nothing"
    prompts = [row["prompt"] for row in read_jsonl(run.stages[3].samples_file("trace_fomc"))]
    write_json(run.path / "manifest.json", {**run.manifest, "date": "2020-01-01"})
    train(saved)
    assert [s.name for s in Run.open(run.path).stages] == ["0_base", "1_step_1", "2_step_2", "3_step_3", "4_step_4"]
    assert start.stat().st_mtime_ns == made[0] and third.stat().st_mtime_ns > made[1]
    again = [row["prompt"] for row in read_jsonl(run.stages[3].samples_file("trace_fomc"))]
    assert again == [prompt.replace(run.manifest["date"], "2020-01-01") for prompt in prompts], "the day of the run"
    with pytest.raises(KeyboardInterrupt):
        train(killed=True)  # a new one, before its first checkpoint
    train()
    assert sorted(p.name for p in (tmp_path / "out").glob("forg*")) == ["forgetting", "forgetting-1", "forgetting-2"]
    steps = [len(Run.open(tmp_path / f"out/forgetting{n}").stages) - 1 for n in ("-1", "-2", "")]
    assert steps == [4, 1, 4], "no measurement is lost"
    with locked(tmp_path / "out", "forgetting"), pytest.raises(InUse, match="out is in use"):
        train()


def test_a_saved_but_unmeasured_step_is_measured_when_training_resumes(trainer, tmp_path, monkeypatch):
    def train(checkpoint=None):
        one = trainer(save_strategy="steps", save_steps=1, max_steps=2)
        one.add_callback(ForgettingCallback(one, **{**MEASURED, "rows": 2}, every="save"))
        one.train(resume_from_checkpoint=checkpoint)

    def killed(self, model, state, control):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ForgettingCallback, "_measure_step", killed)
        train()
    train(str(tmp_path / "out/checkpoint-1"))
    stages = Run.open(tmp_path / "out/forgetting").stages
    files = [s.eval_file("trace_fomc") for s in stages]
    assert [s.name for s, file in zip(stages, files, strict=True) if file.exists()] == [
        "0_base",
        "1_step_1",
        "2_step_2",
    ]
    made = [file.stat().st_mtime_ns for file in files]
    train(str(tmp_path / "out/checkpoint-1"))
    again = [file.stat().st_mtime_ns for file in files]
    assert again[:2] == made[:2] and again[2] > made[2], "the step that is there is not measured once more"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": []}, "There is nothing to measure"),
        ({"tasks": ["trace_fmoc"]}, "Unknown task.*trace_fomc"),
        ({"suites": ["boolk"]}, "Unknown name general_boolk.*general_boolq"),
        ({"every": "steps"}, "every='steps'.*epoch or save or no"),
        ({"every": 0}, "every=0"),
        ({"rows": 0}, "rows=0"),
        ({"chat_template_args": {"a": 1}}, "chat_template_args has no effect without chat_template=True"),
        ({"max_prompt_length": 2000}, r"context of 1024,.* than the run says\. This is the model's limit: begin"),
    ],
)
def test_unmeasurable_settings_of_the_callback_are_refused_before_training(trainer, options, message):
    with pytest.raises(Exception, match=message) as e:
        ForgettingCallback(trainer(), **{**MEASURED, **options})
    assert type(e.value).__module__.startswith("trace_")


def prefix_tuned(one):
    one.model = get_peft_model(one.model.unload(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


SIZES = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}

T5 = {"vocab_size": 9, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda one: setattr(one, "is_fsdp_enabled", True), r"FSDP gives each process only a part.*DDP or ZeRO-2"),
        (lambda one: setattr(one.model, "_tp_size", 2), r"Tensor, context or sequence parallelism.*DDP or ZeRO-2"),
        (
            lambda one: setattr(one, "model", LlamaForSequenceClassification(LlamaConfig(**SIZES))),
            "model is LlamaForSequenceClassification.*causal language model",
        ),
        (lambda one: setattr(one, "model", T5ForConditionalGeneration(T5Config(**T5))), "is T5For"),
        (prefix_tuned, "kind PREFIX_TUNING.*only PROMPT_TUNING"),
    ],
    ids=["FSDP", "tensor parallel", "reward model", "encoder and decoder", "prefix"],
)
def test_a_divided_model_is_refused_by_the_callback(trainer, change, message):
    one = trainer()
    change(one)
    with pytest.raises(CallbackError, match=message):
        ForgettingCallback(one, **MEASURED)


def test_padding_does_not_separate_a_soft_prompt_from_its_text(base):
    """PEFT alone puts padding between the two, so a prompt got a different answer in a batch than alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=0.3)
    lm = LiveHF(model, tokenizer, 4)
    assert lm.max_length == model.config.max_position_embeddings - 4, "it takes some of the context"
    prompts = ["Which?", "Which of these is it, and why is it the one that it is? Answer:", "Name the third of them."]
    with lm.left_as_it_was():
        assert generate(lm, prompts, 8) == reference(model, tokenizer, prompts, 8)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.neg_()
    lm.take(model)
    with lm.left_as_it_was():
        assert generate(lm, prompts, 8) == reference(model, tokenizer, prompts, 8), "as it is by now"


def test_answers_of_a_compiled_model_compile_nothing(trainer):
    """Otherwise each length would be compiled, up to a limit beyond which the training's own lengths are not."""
    one, graphs = trainer(), []
    one.model.get_base_model().compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    one.model = torch.compile(one.model, backend="eager")
    lm = ForgettingCallback(one, **MEASURED).lm
    with lm.left_as_it_was():
        generate(lm, ["Which?", "Which of these is it?"], 2)
        lm.log_likelihoods(["Which?"], ["This."])
    assert not graphs


def test_the_example_of_the_callback_in_the_documentation_works(base, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/elsewhere.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    few = {"MODEL": str(base), "max_steps=40": "max_steps=2, use_cpu=True", "rows=50, every=20": "rows=2, every=1"}
    few['data_path="demo"'] = 'data_path="demo", max_prompt_length=96'
    for long, short in few.items():
        assert code.count(long) == 1
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACE_DATA", "")  # what the callback sets is undone
    exec(code, {})
    write_report(Run.open("out/forgetting"))
    assert "2_step_2" in Path("out/forgetting/report.md").read_text()


def train_as_one_of_two(base: Path, out: Path, asked: dict) -> tuple[list[float], int]:
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=SFTConfig(str(out), **options, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True),
        train_dataset=ROWS,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    if asked:
        trainer.add_callback(ForgettingCallback(trainer, **asked))
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    return losses(trainer), sum("score/trace_fomc" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
def test_only_one_of_two_processes_measures_and_training_is_unchanged(base, tmp_path, demo_data):
    (plain, _), _ = forked_twice(train_as_one_of_two, base, tmp_path / "plain", {})
    watched = forked_twice(train_as_one_of_two, base, tmp_path / "watched", {**MEASURED, "every": 1})
    assert watched == [(plain, 3), (plain, 0)]
    run = Run.open(tmp_path / "watched/forgetting")
    assert [stage.name for stage in run.stages] == ["0_base", "1_step_1", "2_step_2"]
