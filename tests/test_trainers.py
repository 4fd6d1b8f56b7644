"""The stage loop and the trainer that methods are made of."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import command_line, stop_at, train
from safetensors.torch import load_file
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import ModelConfig

from trace_bench.run import Run, RunError, read_json
from trace_tasks import data
from trace_tasks.data.files import write_json
from trainers import base
from trainers.base import CLConfig, CLTrainer, ConfigError, LengthGrouped


def weights(run: Run, stage: int) -> dict[str, torch.Tensor]:
    (file,) = run.stages[stage].checkpoint.glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_stage_moves_the_weights_and_leaves_its_record(options):
    run = train(options)
    first, second = weights(run, 1), weights(run, 2)
    assert first.keys() == second.keys() and not same(first, second)
    record = read_json(run.stages[1].train_file)
    assert record["rows"] == 16 and record["steps"] == 3 and record["tokens"] > 0
    assert 0 < record["trainable_parameters"] < record["parameters"]
    assert not list(run.path.rglob("*.bin")) and not list(run.path.rglob("*.pt")), "safetensors only"
    assert not (run.stages[1].path / ".trainer").exists()


def test_a_stage_goes_on_from_the_one_before(options):
    class Still(CLTrainer):
        def adjust_gradients(self, model):
            if self.stage.index == 2:
                model.zero_grad()

    run = train(options, Still)
    assert same(weights(run, 1), weights(run, 2))


def test_full_fine_tuning_goes_on_too_and_evaluates_as_a_model(options):
    class Still(CLTrainer):
        def adjust_gradients(self, model):
            if self.stage.index == 2:
                model.zero_grad()

    run = train({**options, "use_peft": False}, Still)
    assert run.stages[1].checkpoint.name == "model"
    assert same(weights(run, 1), weights(run, 2))


def test_kept_checkpoints(options):
    run = train({**options, "use_peft": False, "keep": "last"})
    assert run.stages[2].checkpoint.is_dir() and run.stages[1].is_trained
    with pytest.raises(RunError, match="keep=all"):
        _ = run.stages[1].checkpoint


def test_evaluated_checkpoints_are_dropped_once_measured(options):
    run = train({**options, "use_peft": False, "keep": "evaluated"})
    assert [len(list((s.path / "eval").glob("*.json"))) for s in run.stages] == [2, 1, 2]
    assert [(s.path / "model").exists() for s in run.stages] == [False, False, True]
    # Nothing is left to do, though the checkpoint of stage 1 is gone.
    assert train({**options, "use_peft": False, "keep": "evaluated"}).stages[2].is_trained


def test_an_interrupted_run_ends_in_the_same_bytes(options, tmp_path):
    whole = train(options)
    again = {**options, "output_dir": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        train(again, stop_at(2, CLTrainer))
    assert not Run.open(again["output_dir"]).stages[2].is_trained
    before = Run.open(again["output_dir"]).stages[1].train_file.stat().st_mtime_ns
    resumed = train(again)
    assert resumed.stages[1].train_file.stat().st_mtime_ns == before, "a done stage is not done again"
    for stage in (1, 2):
        (a,), (b,) = (r.stages[stage].checkpoint.glob("*.safetensors") for r in (whole, resumed))
        assert a.read_bytes() == b.read_bytes()


def test_a_killed_process_loses_at_most_its_stage(options, tmp_path):
    options = {**options, "max_steps": 6}
    whole = train(options)
    killed = {**options, "output_dir": str(tmp_path / "killed")}
    command = [sys.executable, "-m", "trainers.sequential", *command_line(killed)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    second = Run(Path(killed["output_dir"]), {"tasks": killed["tasks"]}).stages[2]
    deadline = time.monotonic() + 120
    while not second.path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Run.open(killed["output_dir"]).stages[1].is_trained
    resumed = train(killed)
    assert same(weights(whole, 1), weights(resumed, 1)) and same(weights(whole, 2), weights(resumed, 2))


def test_resuming_with_another_configuration_lists_every_difference(options):
    train({**options, "tasks": ["trace_fomc"]})
    with pytest.raises(RunError) as e:
        train({**options, "tasks": ["trace_fomc"], "learning_rate": 0.5, "lora_r": 2})
    assert "config.learning_rate: 0.01 -> 0.5" in str(e.value) and "config.lora_r: 4 -> 2" in str(e.value)
    assert "seed" not in str(e.value)


def test_other_data_behind_the_same_path_is_refused(options, tmp_path):
    import json
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(data.find_data("demo"), copy)
    options = {**options, "tasks": ["trace_fomc"], "data": str(copy)}
    train(options)
    rows = json.loads((copy / "FOMC" / "test.json").read_text())
    (copy / "FOMC" / "test.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(RunError, match=r"data\.fingerprint\.trace_fomc"):
        train(options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": [1.0]}, "epochs has 1 values for 2 tasks"),
        ({"tasks": ["trace_fomc", "trace_fomc"]}, "one stage only"),
        ({"keep": "some"}, "keep='some'"),
        ({"backend": "gpt"}, "backend='gpt'"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"train_rows": -1}, "train_rows=-1"),
        ({"max_length": 64}, "would cut answers"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(options, change, words):
    with pytest.raises(ConfigError, match=words):
        train({**options, **change})
    assert not Path(options["output_dir"]).exists(), "before anything starts"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"eos_token": "</s>"}, "eos_token='</s>'"),
        ({"chat_template_path": "somewhere"}, "chat_template_path"),
        ({"padding_free": True}, "padding_free=true joins rows"),
        ({"packing": True}, "packing=true joins rows"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is a loss by tokens"),
        ({"max_prompt_length": 1021}, "context of 1024: use a max_prompt_length of at most 1020"),
    ],
)
def test_what_would_be_another_thing_in_evaluation_is_refused_before_training(options, change, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        train({**options, **change})
    assert not Path(options["output_dir"]).exists()


def test_a_base_model_into_which_no_adapter_can_be_merged_is_refused(options, tmp_path):
    base = tmp_path / "gptq"
    shutil.copytree(options["model_name_or_path"], base)
    config = read_json(base / "config.json")
    write_json(base / "config.json", {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(ConfigError, match="quantised with gptq"):
        train({**options, "model_name_or_path": str(base)})


def test_all_parameters_in_bf16_are_warned_about(options, caplog):
    train({**options, "use_peft": False, "dtype": "bfloat16", "tasks": options["tasks"][:1], "max_steps": 1})
    assert "smaller than its rounding" in caplog.text


def test_several_gpus_in_one_process_are_refused_with_both_ways_out(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = CLConfig(output_dir=options["output_dir"], tasks=options["tasks"], data="demo")
    config.use_cpu = False
    model = ModelConfig(model_name_or_path=options["model_name_or_path"])
    with pytest.raises(
        ConfigError, match=r"4 GPUs .*CUDA_VISIBLE_DEVICES=0.*--num_processes 4 -m trainers\.sequential"
    ):
        base.train(CLTrainer, config, model)


def test_a_loss_that_is_not_finite_ends_the_stage(options):
    class Diverging(CLTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 1 else 1)

    with pytest.raises(RunError, match=r"1_trace_fomc is nan at step 2: training has diverged"):
        train(options, Diverging)
    assert not Run.open(options["output_dir"]).stages[1].is_trained


def test_a_method_that_was_changed_within_a_run_is_warned_about(options, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(options, stop_at(2, CLTrainer))
    file = Run.open(options["output_dir"]).stages[1].train_file
    record = read_json(file)
    assert record["commit"] is None or len(record["commit"].rstrip("+")) == 40
    write_json(file, {**record, "method_source": "another"})
    train(options)
    assert "has changed since stage 1_trace_fomc" in caplog.text
    caplog.clear()
    run = train({**options, "output_dir": options["output_dir"] + "2"})
    assert read_json(run.stages[1].train_file)["method_source"] == read_json(run.stages[2].train_file)["method_source"]
    assert "has changed" not in caplog.text


def test_every_stage_under_deepspeed_begins_with_a_state_of_its_own(options, monkeypatch):
    """Accelerate refuses a plugin where there was one before; HF's loader looks at the one that was made last."""
    calls = []
    monkeypatch.setattr(base.AcceleratorState, "_reset_state", lambda: calls.append("reset"))
    config = SimpleNamespace(deepspeed_plugin=SimpleNamespace(set_deepspeed_weakref=lambda: calls.append("set")))
    state = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)

    def trainer(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        base._train_stage(trainer, config, None, None, None, None, state)
    assert calls == ["reset", "set"]


def test_an_unknown_key_in_a_config_is_an_error(tmp_path):
    from trainers import base

    config = tmp_path / "c.yaml"
    config.write_text("output_dir: x\nlerning_rate: 1\n")
    with pytest.raises((ValueError, SystemExit)):
        base.main(CLTrainer, CLConfig, ["--config", str(config)])


@pytest.mark.parametrize("config", sorted((Path(__file__).parents[1] / "trainers/configs").glob("*.yaml")))
def test_every_config_parses_and_says_how_to_launch_it(config):
    from trl import ModelConfig, TrlParser

    args, model_args = TrlParser([CLConfig, ModelConfig]).parse_args_and_config(["--config", str(config)])
    assert config.read_text().startswith("# ") and config.name in config.read_text().split("\n\n")[0] + config.name
    assert args.epochs is None or len(args.epochs) == len(args.tasks)
    assert model_args.model_name_or_path and args.output_dir


class Recorder(CLTrainer):
    """Keeps the gradient that `adjust_gradients` sees, and when."""

    seen: list

    def adjust_gradients(self, model):
        type(self).seen.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            | {"step": self.state.global_step}
        )


def test_accumulation_and_batch_size_give_the_same_gradient_to_a_method(options, tmp_path):
    gradients = []
    for i, (batch, accumulation) in enumerate(((8, 1), (2, 4))):
        Recorder.seen = []
        train(
            {
                **options,
                "tasks": ["trace_meetingbank"],
                "output_dir": str(tmp_path / str(i)),
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "train_rows": 8,
                "max_steps": 1,
                "bf16": False,
                "lora_dropout": 0.0,
            },
            Recorder,
        )
        assert len(Recorder.seen) == 1, "once per optimizer step"
        gradients.append(Recorder.seen[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        if name != "step":
            torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6)


def test_gradients_are_adjusted_before_clipping(options):
    class Huge(CLTrainer):
        def adjust_gradients(self, model):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(1e6)

    run = train({**options, "tasks": ["trace_fomc"], "optim": "sgd", "learning_rate": 1e-3, "max_steps": 1}, Huge)
    # With clipping to norm 1 after the hook, a step of SGD is no longer than the learning rate.
    moved = sum(w.square().sum() for k, w in weights(run, 1).items() if "lora_B" in k).sqrt()
    assert 0 < moved <= 1.001e-3


def test_the_cpu_loss_is_trl_s_loss(options):
    from trl import SFTTrainer

    losses = []

    class Both(CLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ours = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            theirs = SFTTrainer.compute_loss(self, model, dict(inputs), return_outputs, num_items_in_batch)
            losses.append((ours.item(), theirs.item()))
            return ours

    changes = {"bf16": False, "lora_dropout": 0.0, "tasks": ["trace_scienceqa"], "loss_weights": "tokens"}
    train({**options, **changes}, Both)
    assert len(losses) == 3
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_mixture_of_experts_has_trl_s_router_loss_with_rows_too(options, tmp_path):
    from architectures import make_base
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    losses = []

    class Both(CLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ours = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
            rows = len(inputs["labels"])
            tokens = num_items_in_batch * int((inputs["labels"] != -100).sum()) // rows
            theirs = SFTTrainer.compute_loss(self, model, dict(inputs), return_outputs, tokens)
            losses.append((ours.item(), theirs.item(), self.router_loss.item()))
            return ours

    base = make_base("mixtral", tmp_path / "moe", AutoTokenizer.from_pretrained(options["model_name_or_path"]))
    changes = {"model_name_or_path": str(base), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    changes |= {"bf16": False, "lora_dropout": 0.0, "tasks": ["trace_fomc"], "max_steps": 2}
    changes |= {"lora_target_modules": ["q_proj", "v_proj"]}
    train({**options, **changes}, Both)
    assert len(losses) == 4, "of FOMC, whose answers are equally long: rows and tokens come to the same"
    for ours, theirs, router in losses:
        assert ours == pytest.approx(theirs, rel=1e-4) and router > 0.001


def test_frozen_weights_kept_in_bf16_give_the_same_bits_as_autocast_alone(options, tmp_path):
    class Autocast(CLTrainer):
        def stage_model(self, stage):
            model = super().stage_model(stage)
            layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.bfloat16]
            assert len(layers) == 14, "all frozen linear layers of two blocks, and not the tied head"
            fresh = self.load_model(None)
            theirs = {name.replace(".base_layer", ""): m for name, m in model.get_base_model().named_modules()}
            for name, module in fresh.named_modules():
                if isinstance(module, torch.nn.Linear) and theirs[name].weight.dtype == torch.bfloat16:
                    theirs[name].weight.data = module.weight.data
            return model

    options = {**options, "tasks": ["trace_fomc"], "dtype": "float32", "lora_target_modules": ["q_proj", "down_proj"]}
    assert CLConfig(output_dir="x").bf16, "TRL's default"
    runs = [train({**options, "output_dir": str(tmp_path / t.__name__)}, t) for t in (CLTrainer, Autocast)]
    assert same(*(weights(run, 1) for run in runs))


def test_batches_of_similar_length_in_an_order_of_their_own_each_epoch():
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

    theirs = get_length_grouped_indices(lengths, 8, generator=torch.Generator().manual_seed(0))
    assert padded(epochs[0]) < 1.2 < padded(theirs), "of so few rows HF sorts 16 at a time"
    longest = [max(lengths[i] for i in epochs[0][j : j + 8]) for j in range(0, 64, 8)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_rows_are_grouped_in_training(options):
    seen = []

    class Look(CLTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["attention_mask"].float().mean().item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {**options, "tasks": ["trace_py150"], "train_rows": 64, "max_steps": 8, "max_prompt_length": 512}
    train({**options, "train_sampling_strategy": "group_by_length"}, Look)
    assert sum(seen) / 8 > 0.9, "little padding"


def test_epochs_of_each_task(options):
    run = train({**options, "epochs": [1.0, 2.0], "max_steps": -1})
    assert [read_json(s.train_file)["steps"] for s in run.stages[1:]] == [2, 4]


def test_the_chat_template_reaches_training(options):
    class Look(CLTrainer):
        def stage_dataset(self, stage):
            dataset = super().stage_dataset(stage)
            type(self).text = self.tokenizer.decode(dataset[0]["input_ids"])
            return dataset

    train({**options, "tasks": ["trace_fomc"], "chat_template": True, "max_prompt_length": 1000}, Look)
    assert Look.text.startswith("<s>user\nWhat is the monetary") and Look.text.count("<s>") == 2
    assert Look.text.rstrip().endswith("</s>")


def test_the_example_of_the_documentation_is_a_method(options, tmp_path):
    root = Path(__file__).parents[1]
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/methods.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "shrink.py").write_text(code)
    arguments = [*command_line(options), "--shrink", "0.0"]
    subprocess.run([sys.executable, str(tmp_path / "shrink.py"), *arguments], cwd=root, check=True)
    run = Run.open(options["output_dir"])
    assert run.manifest["method"] == "shrink" and run.manifest["config"]["shrink"] == 0.0
    assert same(weights(run, 1), weights(run, 2)), "the gradient of stage 2 is shrunk to nothing"


def test_names_that_peft_keeps_in_sets_are_saved_in_order(tmp_path):
    """The order of a set of texts is another one in each process."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    names = [f"layer{i}" for i in range(30)]
    for kind in (LoraConfig, AdaLoraConfig, IA3Config):
        more = (
            {"total_step": 9} if kind is AdaLoraConfig else {"feedforward_modules": names} if kind is IA3Config else {}
        )
        for order in (names, names[::-1]):
            config = kind(target_modules=set(order), exclude_modules=order, modules_to_save=["b", "a"], **more)
            config.save_pretrained(str(tmp_path))
            base.sort_names(tmp_path, config)
            saved = read_json(tmp_path / "adapter_config.json")
            assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)
            assert saved["modules_to_save"] == ["b", "a"], "a list has the order that it was given"
            assert kind.from_pretrained(str(tmp_path)).target_modules == set(names)


SAVE = """
import sys
sys.path.insert(0, "tests")
from conftest import train
from trainers import olora
train(eval(sys.argv[1]))
train({**eval(sys.argv[1]), "output_dir": sys.argv[2]}, olora.OLoRATrainer, olora.OLoRAConfig)
"""


def test_adapters_are_the_same_bytes_whatever_the_order_of_sets(options, tmp_path):
    options |= {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    options |= {"max_steps": 1, "train_rows": 8}
    found = []
    for seed in ("1", "2"):
        options["output_dir"] = str(tmp_path / seed)
        command = [sys.executable, "-c", SAVE, repr(options), str(tmp_path / f"olora{seed}")]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment)
        runs = [tmp_path / seed, tmp_path / f"olora{seed}"]
        found.append([{p.relative_to(run): p.read_bytes() for p in run.glob("stages/*/adapter/*")} for run in runs])
    assert found[0] == found[1] and all(len(files) >= 4 for files in found[0])
