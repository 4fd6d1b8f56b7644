"""The loop over the stages, and the trainer that methods build on."""

import random
import re
import runpy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from architectures import PROMPTS, by_transformers, make_base
from conftest import command_line, train
from method_runs import LINEAR, as_method, method, same, weights
from peft.tuners.lora.dora import DoraLinearLayer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig
from trl import ModelConfig, SFTTrainer, TrlParser

from trace_bench import cli, ending
from trace_bench.run import Run, RunError, read_json
from trace_tasks.data.files import write_json
from trainers import base
from trainers.base import CLConfig, CLTrainer, ConfigError, LengthGrouped, preflight
from trainers.base.options import check_model_args, check_optimizer
from trainers.base.stages import Loop

ROOT = Path(__file__).parents[1]


def test_every_stage_moves_the_weights_and_leaves_its_record(options):
    run = train({**options, "epochs": [1.0, 2.0], "max_steps": -1, "lora_target_modules": LINEAR})
    assert not same(weights(run, 1), weights(run, 2))
    records = [read_json(stage.train_file) for stage in run.stages[1:]]
    assert [(r["rows"], r["steps"]) for r in records] == [(16, 2), (16, 4)] and records[0]["tokens"] > 0
    assert 0 < records[0]["trainable_parameters"] < records[0]["parameters"]
    assert records[0]["method_code"] == records[1]["method_code"]
    # PEFT keeps the names in a set, whose order differs between processes.
    assert read_json(run.stages[1].checkpoint / "adapter_config.json")["target_modules"] == sorted(LINEAR)
    assert not list(run.path.rglob("*.bin")) and not list(run.path.rglob("*.pt")), "safetensors only"
    assert not (run.stages[1].path / ".trainer").exists()


@pytest.mark.parametrize("lora", [True, False])
def test_a_stage_continues_from_the_previous_one_which_may_be_dropped(options, lora):
    class Still(CLTrainer):
        def adjust_gradients(self, model):
            if self.stage.index == 2:
                model.zero_grad()

    options = {**options, "use_peft": lora, "max_steps": 1}
    run = train(options, Still)
    assert run.stages[1].checkpoint.name == ("adapter" if lora else "model")
    assert same(weights(run, 1), weights(run, 2))
    train({**options, "keep": "last"}, Still)
    assert run.stages[2].checkpoint.is_dir() and not (run.stages[1].path / run.stages[2].checkpoint.name).exists()


def test_evaluated_checkpoints_are_dropped_once_measured(options, monkeypatch):
    def run_child(words: list[str], environment: dict[str, str]) -> None:
        assert words[:3] == [sys.executable, "-m", "trace_bench"] and "HOME" in environment
        assert not environment.keys() & {"RANK", "MASTER_PORT"}, "it is none of the processes launched together"
        cli.main(words[3:])
        AcceleratorState._reset_state()  # the engine would have run in its own process

    monkeypatch.setattr(ending, "run_child", run_child)
    monkeypatch.setenv("MASTER_PORT", "29500")
    options = {**options, "use_peft": False, "keep": "evaluated", "max_steps": 1, "test_rows": 1}
    run = train(options)
    assert [len(list((s.path / "eval").glob("*.json"))) for s in run.stages] == [2, 1, 2]
    assert [(s.path / "model").exists() for s in run.stages] == [False, False, True]
    before = run.stages[1].train_file.stat().st_mtime_ns
    train(options)  # nothing is left to do, though the checkpoint of stage 1 is gone
    assert run.stages[1].train_file.stat().st_mtime_ns == before


COSINE = {"lr_scheduler_type": "cosine_with_min_lr"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"epochs": [1.0]}, "epochs has 1 values for 2 tasks"),
        ({"epochs": [1.0, 0.0]}, "epochs=0.0"),
        ({"epochs": 3}, "use a list"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"tasks": []}, "tasks is empty"),
        ({"bf16": True, "fp16": True}, "bf16"),
        ({"lr_scheduler_type": "nonsense"}, "nonsense"),
        ({"tasks": ["trace_fomc", "trace_fomc"]}, "appears twice"),
        ({"keep": "some"}, "keep='some' is not allowed: use all or last or evaluated"),
        ({"backend": "gpt"}, "backend='gpt'"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 is not allowed: use a whole number of at least 1"),
        ({"engine_args": {"max_model_len": -1}}, "max_model_len=-1 is not allowed: use a whole number of at least 1"),
        ({"train_rows": 2.5}, "train_rows=2.5 is not allowed: use a whole number of at least 1"),
        ({"max_answer_length": None}, "max_answer_length=None"),
        ({"max_length": 64}, "would cut answers"),
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"eos_token": "<s>"}, "eos_token='<s>'"),
        ({"chat_template_path": "somewhere"}, "chat_template_path"),
        ({"padding_free": True}, "padding_free=true joins rows"),
        ({"packing": True}, "packing=true cuts rows"),
        ({"loss_weights": "answers"}, "loss_weights='answers' is not allowed: use rows or tokens"),
        ({"loss_type": "dft"}, "Set loss_weights: tokens, or use loss_type: nll"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 gives each token the same"),
        ({"auto_find_batch_size": True}, "Lower per_device_train_batch_size"),
        ({"activation_offloading": True}, "without a GPU"),
        ({"max_prompt_length": 1021}, "context of 1024. Use a max_prompt_length of at most 1020"),
        # Options that HF, TRL and PEFT accept, but ignore always or after a kill.
        ({"warmup_steps": 0.1}, "constant has no warmup. Use lr_scheduler_type: constant_with_warmup"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "constant takes none"),
        ({**COSINE, "lr_scheduler_kwargs": {"min_lr_rate": "1e-1"}}, "'1e-1' is a text"),
        (COSINE, "lr_scheduler_kwargs=None does not fit cosine_with_min_lr"),
        ({"optim_args": "beta1=0.5"}, "adamw_torch_fused ignores beta1=0.5"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nestrov=true"}, "sgd ignores nestrov=true"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "Use weight_decay"),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9}}, "use text"),
        ({"optim": "adamw_8bit"}, "optim=adamw_8bit: You need to install"),
        ({"optim": "schedule_free_adamw"}, "without the average"),
        ({"optim": "galore_adamw_layerwise"}, "so a method or max_grad_norm cannot change them"),
        ({"max_steps": 0}, "use -1 to train whole epochs"),
        ({"max_steps": 2.5}, "max_steps=2.5 is not allowed: use a whole number"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps=0 is not allowed"),
        ({"save_strategy": "steps", "save_only_model": True}, "save_only_model"),
        ({"save_total_limit": 0}, "save_total_limit=0"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "Use no, steps or epoch"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch': training has no rows"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True: training has no rows"),
        ({"enable_jit_checkpoint": True}, "would count as trained. Use save_strategy: steps"),
        ({"resume_from_checkpoint": "a"}, "Run the same command with the same output_dir"),
        ({"ignore_data_skip": True}, "would see different rows"),
        ({"dataloader_in_order": False}, "depend on the speed of the workers"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "save_strategy": "epoch"}, "dropout"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "in a different order. Use true"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "only to the first stage"),
        ({"model_init_kwargs": {"attn_implementation": "eager"}}, "Use dtype and attn_implementation"),
        ({"completion_only_loss": False}, "the loss covers only the answers"),
        ({"push_to_hub": True}, "Upload the checkpoints afterwards"),
        ({"train_sampling_strategy": "grouped"}, "use random or sequential or group_by_length"),
        ({"dtype": "half"}, "dtype='half' is not allowed: use auto or bfloat16"),
        ({"lora_alpha": 0}, "lora_alpha=0 is not allowed"),
        ({"lora_modules_to_save": "lm_head"}, "use a list of names, [lm_head]"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(options, change, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        train({**options, **change})
    assert not Path(options["output_dir"]).exists(), "before anything starts"


def test_settings_that_take_effect_are_accepted(caplog):
    """No refusal and no warning for correct settings; a warning for LoRA settings without LoRA."""
    yaml_no = CLConfig(output_dir="x", save_strategy=False, optim="sgd", optim_args="momentum=0.9, nesterov=true")
    assert yaml_no.save_strategy == "no"
    check_optimizer(yaml_no)
    for kind in ("linear", "cosine", "constant_with_warmup"):
        check_optimizer(CLConfig(output_dir="x", lr_scheduler_type=kind, warmup_steps=0.1))
    check_model_args(ModelConfig(use_peft=True, lora_r=4))
    check_model_args(ModelConfig())
    assert not caplog.messages
    check_model_args(ModelConfig(lora_r=4))
    assert "lora_r has no effect, because all parameters are trained" in caplog.text


def test_a_method_that_changes_a_default_keeps_its_limits():
    @dataclass
    class Few(CLConfig):
        train_rows: int | None = field(default=5, metadata={"help": "Rows."})

    assert Few(output_dir="x").train_rows == 5
    with pytest.raises(ConfigError, match="train_rows=0 is not allowed: use a whole number of at least 1"):
        Few(output_dir="x", train_rows=0)
    with pytest.raises(TypeError, match="lowest: the limits of an option are least"):
        base.option(5, "Rows.", lowest=1)


@pytest.mark.parametrize("quantised", ["gptq", "bitsandbytes"])
def test_a_quantised_base_model_is_refused(options, tmp_path, quantised):
    packed = shutil.copytree(options["model_name_or_path"], tmp_path / "packed")
    settings = {"quantization_config": {"quant_method": quantised, "load_in_4bit": True, "bits": 4}}
    write_json(packed / "config.json", read_json(packed / "config.json") | settings)
    with pytest.raises(ConfigError, match=f"quantised with {quantised}"):
        train({**options, "model_name_or_path": str(packed)})


def test_rows_longer_than_a_table_of_positions_are_refused_before_the_first_stage(options, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(options["model_name_or_path"])
    shape = {"n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    tasks = [
        "trace_fomc",
        "trace_py150",
    ]  # answers: letters, and code with some hundred characters (tokens)
    options |= {"model_name_or_path": str(tmp_path / "gpt2"), "tasks": tasks, "max_new_tokens": 4}
    options |= {"max_prompt_length": 120, "lora_target_modules": ["c_attn"]}
    with pytest.raises(ConfigError, match=r"row of trace_py150 has \d+ tokens, .* max_answer_length of at most 8,"):
        train({**options, "max_answer_length": 64})
    assert not Path(options["output_dir"]).exists()
    assert train({**options, "max_answer_length": 8, "max_steps": 1}).stages[-1].is_trained


@pytest.mark.parametrize("steps", [-1, 3])
def test_a_stage_with_fewer_rows_than_a_dropped_batch_is_refused_before_the_first_stage(options, steps):
    change = {"dataloader_drop_last": True, "train_rows": 7, "max_steps": steps}
    with pytest.raises(ConfigError, match="trace_fomc has 7 training rows, less than a batch of 8"):
        train({**options, **change})
    assert not Path(options["output_dir"]).exists()
    run = train({**options, **change, "train_rows": 9, "num_train_epochs": 1.0})
    assert read_json(run.stages[2].train_file)["steps"] == (1 if steps == -1 else 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_peft": False, "dtype": "bfloat16"}, "All parameters are trained in bfloat16"),
        ({"use_peft": False, "dtype": "auto"}, "All parameters are trained in bfloat16"),
        ({"lora_modules_to_save": ["embed_tokens"], "dtype": "bfloat16"}, "of embed_tokens .* are trained in bfl"),
        ({"dtype": "bfloat16"}, None),
        ({"lora_modules_to_save": ["embed_tokens"]}, None),
        ({"use_peft": False}, None),
    ],
)
def test_training_parameters_in_bf16_is_warned_about(options, change, words, caplog):
    """The warning depends on the optimizer's parameters: whether any trained one is not float32."""
    args = ModelConfig(**{"model_name_or_path": options["model_name_or_path"], "use_peft": True, **change})
    model = LlamaConfig(dtype=torch.bfloat16)
    preflight._check_weights(model, args)
    said = [record.getMessage() for record in caplog.records if "larger than a step of AdamW" in record.getMessage()]
    assert len(said) == (words is not None) and re.search(words or "", "".join(said))
    if args.use_peft:

        class Spy(CLTrainer):
            def begin_stage(self):
                types = {p.dtype for p in self.trained().values()}
                assert (torch.bfloat16 in types) == (words is not None)

        train({**options, **change, "tasks": options["tasks"][:1], "max_steps": 1}, Spy)


def test_an_adapter_that_the_model_bypasses_is_warned_about(options, caplog):
    """A fused kernel that reads the weight of the layer would ignore the adapter in this way."""

    class Fused(CLTrainer):
        def begin_stage(self):
            layer = self.model.get_base_model().model.layers[1].self_attn.q_proj
            if self.stage.index == 1:
                layer.forward = layer.base_layer.forward

    train({**options, "max_steps": 2}, Fused)
    said = [record.getMessage() for record in caplog.records if "had no gradient" in record.getMessage()]
    assert len(said) == 1 and re.match(
        r"2 of the adapter's .* in stage 1_trace_fomc, such as .*1\.self_attn\.q_proj", *said
    )


def test_several_gpus_in_one_process_are_refused_with_both_ways_out(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = CLConfig(output_dir=options["output_dir"], tasks=options["tasks"], data="demo", use_cpu=True)
    config.use_cpu = False
    with pytest.raises(ConfigError, match=r"4 GPUs\. .*CUDA_VISIBLE_DEVICES=0.*--num_processes 4 -m trainers\.seq"):
        base.train(CLTrainer, config, ModelConfig(model_name_or_path=options["model_name_or_path"]))


def test_a_loss_that_is_not_finite_ends_the_stage(options):
    class Diverging(CLTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 1 else 1)

    with pytest.raises(RunError, match=r"1_trace_fomc is nan at step 2: training has diverged"):
        train(options, Diverging)
    assert not Run.open(options["output_dir"]).stages[1].is_trained


def test_weights_that_the_last_step_made_nan_are_not_saved_as_a_stage(options):
    class Diverging(CLTrainer):
        def end_stage(self):
            next(iter(self.trained().values())).data.fill_(float("nan"))

    with pytest.raises(RunError, match=r"The model of 1_trace_fomc gives NaN .* lower learning_rate"):
        train(options, Diverging)
    stage = Run.open(options["output_dir"]).stages[1]
    assert not stage.is_trained and not (stage.path / "adapter").exists()


def test_a_method_that_changed_during_a_run_is_warned_about(options, run, caplog):
    file = run.stages[1].train_file
    record = read_json(file)
    assert record["commit"] is None or len(record["commit"].rstrip("+")) == 40
    older = {key: value for key, value in record.items() if key != "method_code"}
    # An older program noted the file with its comments: it says nothing about this code.
    for noted, changed in (({"method_source": "another"}, False), ({"method_code": "another"}, True)):
        write_json(file, {**older, **noted})
        run.stages[2].train_file.unlink()
        train(options)
        assert ("has changed since stage 1_trace_fomc" in caplog.text) == changed


def test_every_stage_under_deepspeed_begins_with_a_new_state(monkeypatch):
    """Accelerate refuses a second plugin, and HF's loader reads the plugin that was made last."""
    calls = []
    monkeypatch.setattr(AcceleratorState, "_reset_state", lambda: calls.append("reset"))
    config = SimpleNamespace(deepspeed_plugin=SimpleNamespace(set_deepspeed_weakref=lambda: calls.append("set")))
    state = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)

    def trainer(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Loop(trainer, config, None, None, None, None, state)._train_stage(None)
    assert calls == ["reset", "set"]


@pytest.mark.parametrize("config", sorted((ROOT / "trainers/configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_config_parses_and_says_how_to_launch_it(config):
    args, model_args = TrlParser([CLConfig, ModelConfig]).parse_args_and_config(["--config", str(config)])
    assert config.read_text().startswith("# ") and config.name in config.read_text().split("\n\n")[0] + config.name
    assert args.epochs is None or len(args.epochs) == len(args.tasks)
    assert model_args.model_name_or_path and args.output_dir


def test_gradients_are_adjusted_before_clipping(options):
    class Huge(CLTrainer):
        def adjust_gradients(self, model):
            for p in self.trained().values():
                p.grad.mul_(1e6)

    run = train({**options, "tasks": ["trace_fomc"], "optim": "sgd", "learning_rate": 1e-3, "max_steps": 1}, Huge)
    # If clipping to norm 1 comes after the hook, a step of SGD is at most the learning rate.
    moved = sum(w.square().sum() for k, w in weights(run, 1).items() if "lora_B" in k).sqrt()
    assert 0 < moved <= 1.001e-3


def test_the_loss_of_a_mixture_of_experts_equals_trls_with_the_router_loss(options, tmp_path):
    losses = []

    class Both(CLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ours = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            # Ours counts rows, TRL tokens. Here all rows have the same number of tokens.
            items = num_items_in_batch * int((inputs["labels"] != -100).sum()) // len(inputs["labels"])
            trl = SFTTrainer.compute_loss(self, model, dict(inputs), return_outputs, items)
            losses.append((ours.item(), trl.item(), self.router_loss.item()))
            return ours

    base = make_base("mixtral", tmp_path / "moe")
    changes = {"model_name_or_path": str(base), "tasks": ["trace_fomc"], "lora_target_modules": ["q_proj", "v_proj"]}
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    train({**options, **changes, "bf16": False, "lora_dropout": 0.0}, Both)
    assert len(losses) == 4
    for ours, trl, router in losses:
        assert ours == pytest.approx(trl, rel=1e-4) and router > 0.001


def test_label_smoothing_without_the_router_loss_is_refused(options, tmp_path):
    """TRL leaves the router's loss out if labels are smoothed."""
    base = make_base("mixtral", tmp_path / "moe")
    smooth = {"loss_weights": "tokens", "label_smoothing_factor": 0.1, "lora_target_modules": ["q_proj"]}
    options |= {"model_name_or_path": str(base), "tasks": ["trace_fomc"], "max_steps": 1, "bf16": False, **smooth}
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1: .*TRL would .* or router_aux_loss_coef: 0"):
        train(options)
    train({**options, "router_aux_loss_coef": 0.0})


@pytest.mark.parametrize(
    ("name", "order"), [("sequential", "group_by_length"), ("replay", "group_by_length"), ("replay", "random")]
)
def test_the_order_of_rows_depends_only_on_the_data_seed_if_set(name, order, options, tmp_path):
    seen = []

    class Spy(method(name)[0]):
        def end_stage(self):
            super().end_stage()
            seen.append(list(self._get_train_sampler()))

    for i, seeds in enumerate(({"seed": 1, "data_seed": 5}, {"seed": 2, "data_seed": 5}, {"seed": 1, "data_seed": 6})):
        changes = {"tasks": ["trace_fomc"], "max_steps": 1, "train_sampling_strategy": order, **seeds}
        changes |= {"output_dir": str(tmp_path / str(i))} | ({"alignment_data": "none"} if name == "replay" else {})
        if name == "replay":
            changes |= {"max_steps": -1, "num_train_epochs": 1.0}
        train({**options, **changes}, as_method(Spy), method(name)[1])
    assert seen[0] == seen[1] != seen[2]


def test_row_gradients_include_experts_and_a_full_checkpoint_answers_without_router_logits(options, tmp_path):
    class Look(CLTrainer):
        def end_stage(self):
            if self.model_args.use_peft:
                found = self.row_gradients(self.train_dataset, lambda logits, target, lengths: logits.logsumexp(-1))
                names = {name for name, gradient in found if gradient.abs().max() > 0}
                assert names == self.trained().keys() and any("experts" in name for name in names)

    base = make_base("mixtral", tmp_path / "moe")
    changes = {"model_name_or_path": str(base), "tasks": ["trace_fomc"], "train_rows": 4, "max_steps": 2, "bf16": False}
    train({**options, **changes, "lora_target_modules": "all-linear", "lora_dropout": 0.0}, Look)
    run = train({**options, **changes, "use_peft": False, "output_dir": str(tmp_path / "full")}, Look)
    checkpoint = run.stages[1].checkpoint
    config = read_json(checkpoint / "config.json")
    assert config["output_router_logits"] is False
    answers = by_transformers(base, [checkpoint], PROMPTS)
    write_json(checkpoint / "config.json", {**config, "output_router_logits": True})  # TRL would leave it so
    assert by_transformers(base, [checkpoint], PROMPTS) == answers


def test_frozen_weights_in_bf16_give_the_same_bits_as_autocast(options, tmp_path):
    class Autocast(CLTrainer):
        def stage_model(self, stage):
            model = super().stage_model(stage)
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.bfloat16]
            assert len(layers) == 14, "all frozen linear layers of two blocks, and not the tied head"
            fresh = self.load_model(None)
            adapted = {name.replace(".base_layer", ""): m for name, m in model.get_base_model().named_modules()}
            for name, module in fresh.named_modules():
                if isinstance(module, torch.nn.Linear) and adapted[name].weight.dtype == torch.bfloat16:
                    adapted[name].weight.data = module.weight.data
            return model

    options |= {"tasks": ["trace_fomc"], "bf16": True, "dtype": "float32"}
    options |= {"lora_target_modules": ["q_proj", "down_proj"]}
    runs = [train({**options, "output_dir": str(tmp_path / t.__name__)}, t) for t in (CLTrainer, Autocast)]
    assert same(*(weights(run, 1) for run in runs))


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_the_default_except_on_cpus_that_are_slow_with_it(fast, options, monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert CLConfig(output_dir="x").bf16 == fast
    assert CLConfig(output_dir="x").manifest()["bf16"] == fast, "on record: a run continues with the same"
    config = CLConfig(output_dir="x", bf16=True)
    preflight.check_devices(config, 1, "sequential")
    assert config.bf16, "what is asked for is done"
    assert ("bf16=true is slower on this CPU or GPU" in caplog.text) != fast


def test_dora_computes_norms_in_float32_like_the_evaluation(options, monkeypatch):
    found, norm = [], DoraLinearLayer.get_weight_norm

    def get_weight_norm(self, *args, **kwargs):
        found.append(norm(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", get_weight_norm)
    train({**options, "use_dora": True, "tasks": ["trace_fomc"], "max_steps": 1, "lora_target_modules": LINEAR})
    assert len(found) > 2 * len(LINEAR) and {values.dtype for values in found} == {torch.float32}


@pytest.mark.parametrize("stage_3", [False, True])
def test_adapters_have_the_type_of_their_base_under_zero3_in_every_stage(options, stage_3, trained, monkeypatch):
    config, model_args = CLConfig(**{k: v for k, v in options.items() if k in CLConfig.__dataclass_fields__}), None
    model_args = ModelConfig(model_name_or_path=options["model_name_or_path"], use_peft=True, dtype="bfloat16")
    trainer = SimpleNamespace(config=config, model_args=model_args)
    trainer.load_model = lambda checkpoint: CLTrainer.load_model(trainer, checkpoint)
    config.deepspeed_plugin, config.bf16 = SimpleNamespace(zero_stage=3 if stage_3 else 2), False
    for checkpoint in (None, Run.open(trained).stages[1].checkpoint):
        model = CLTrainer.trainable_model(trainer, checkpoint)
        kinds = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert kinds == {torch.bfloat16 if stage_3 else torch.float32}


def test_batches_have_similar_lengths_and_a_different_order_in_each_epoch():
    lengths = [random.Random(i).randrange(20, 1000) for i in range(67)]
    sampler = LengthGrouped(lengths, 8, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(67)) and len(sampler) == 67
    assert epochs[0] == epochs[2] != epochs[1]

    def padded(order):
        batches = [[lengths[i] for i in order[j : j + 8]] for j in range(0, 64, 8)]
        return sum(8 * max(batch) for batch in batches) / sum(map(sum, batches))

    assert padded(epochs[0]) < 1.2 < padded(range(67)), "in the order of the data much is padding"
    longest = [max(lengths[i] for i in epochs[0][j : j + 8]) for j in range(0, 64, 8)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_group_by_length_leaves_little_padding_in_training(options):
    seen = []

    class Look(CLTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["attention_mask"].float().mean().item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {**options, "tasks": ["trace_py150"], "train_rows": 64, "max_steps": 8, "max_prompt_length": 512}
    train({**options, "train_sampling_strategy": "group_by_length"}, Look)
    assert sum(seen) / 8 > 0.9, "little padding"


def test_the_method_in_the_documentation_trains(options, tmp_path, monkeypatch):
    """The example uses `field` of dataclasses instead of `option`, as older methods do."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30 and "field(default=0.5" in code
    file = tmp_path / "shrink.py"
    file.write_text(code)
    monkeypatch.setattr(sys, "argv", [str(file), *command_line({**options, "max_steps": 1}), "--shrink", "0.0"])
    runpy.run_path(str(file), run_name="__main__")
    run = Run.open(options["output_dir"])
    assert run.manifest["method"] == "shrink" and run.manifest["config"]["shrink"] == 0.0
    assert same(weights(run, 1), weights(run, 2)), "the gradient of stage 2 is shrunk to nothing"


def test_names_in_sets_of_peft_are_saved_in_sorted_order(tmp_path):
    """Each process has a different order of a set of texts."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    names = [f"layer{i}" for i in range(30)]
    more = {LoraConfig: {}, AdaLoraConfig: {"total_step": 9}, IA3Config: {"feedforward_modules": names}}
    for kind, settings in more.items():
        config = kind(target_modules=set(names), exclude_modules=names, modules_to_save=["b", "a"], **settings)
        config.save_pretrained(str(tmp_path))
        base.sort_names(tmp_path, config)
        saved = read_json(tmp_path / "adapter_config.json")
        assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)
        assert saved["modules_to_save"] == ["b", "a"], "a list has the order that it was given"
        assert kind.from_pretrained(str(tmp_path)).target_modules == set(names)
