"""Helpers for the tests of methods: a method's classes, options of a tiny run, spies, and comparisons of two runs."""

import importlib
from functools import cache

import torch
from architectures import make_base
from conftest import train
from safetensors.torch import load_file

from trace_bench.run import Run
from trainers.base import CLConfig, CLTrainer

THREE = ["trace_fomc", "trace_numglue_ds", "trace_numglue_cm"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = {"bf16": False, "lora_dropout": 0.0, "dtype": "float32"}
#: Changes of the options. The second one stands for a launch that divides the model.
FULL, FSDP = {"use_peft": False}, {"FSDP": True}
SIDE_BY_SIDE = ["inclora", "olora", "nlora", "milora", "inflora"]


def method(name: str) -> tuple[type[CLTrainer], type[CLConfig]]:
    """The trainer and the config of a method's file."""
    module = importlib.import_module(f"trainers.{name}")
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    trainers = [v for v in own if issubclass(v, CLTrainer)]
    configs = [v for v in own if issubclass(v, CLConfig)]
    if not configs:
        configs = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, CLConfig)][-1:]
    return (trainers or [CLTrainer])[0], configs[0]


def as_method(spy: type[CLTrainer]) -> type[CLTrainer]:
    """Gives a spy the module of its trainer, so that the manifest has the same method."""
    spy.__module__ = spy.__base__.__module__
    return spy


def small(options: dict, name: str, many: int = 2, **changes) -> dict:
    """Options for a method on a few tasks, with epochs instead of steps for methods that need them."""
    own = {
        "freeze": {"freeze_layers": 1},
        "hft": {"use_peft": False, "learning_rate": 1e-3},
        "joint": {"max_steps": -1, "num_train_epochs": 1.0},
        "replay": {"max_steps": -1, "num_train_epochs": 1.0, "alignment_rows": 5},
        "ogd": {"ogd_rows": 4, "ogd_size": 6},
        "osf": {"use_peft": False, "learning_rate": 1e-4},
        "pp": {"prompt_tokens": 4},
        "lfpt5": {"prompt_tokens": 4, "max_answer_length": 24},
        "seekr": {"attn_implementation": "eager", "replay_ratio": 0.25, "seekr_heads": 3, "seekr_queries": 20},
        "opr": {"replay_ratio": 0.5},
        "sdft": {"sdft_tokens": 6},
    }
    return {**options, "tasks": THREE[:many], "max_steps": 2, **own.get(name, {}), **changes}


def weights(run: Run, stage: int) -> dict[str, torch.Tensor]:
    (file,) = run.stages[stage].checkpoint.glob("*.safetensors")
    return load_file(file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def probe(options, name: str, stage: int, look, **changes):
    """Trains up to a stage and returns the result of `look` at its first step, before the gradient is adjusted."""
    trainer, config = method(name)
    seen = []

    class Probe(trainer):
        def adjust_gradients(self, model):
            if self.stage.index == stage and not seen:
                seen.append(look(self, super().adjust_gradients))
            else:
                super().adjust_gradients(model)

    train(small(options, name, stage, **changes), as_method(Probe), config)
    return seen[0]


def same_step(name: str, options, tmp_path, splits, base=None, many=2, atol=2e-6, first=(), **changes):
    """Takes one step in the last stage with each of two splits of its rows, and checks that the gradients are equal.

    Args:
        name: The method.
        options: The options of the run.
        tmp_path: The folder of the runs.
        splits: Pairs of (batch size, accumulation).
        base: A spy on the trainer.
        many: The number of stages. In earlier stages all rows are one batch in the first split; the steps are the same.
        atol: The tolerance for `assert_close`.
        first: Changed options of the first run only.
        **changes: Changed options of both runs.

    Returns:
        The second run, and the gradients of the first one.
    """
    trainer, config = method(name)
    gradients = []
    for batch, accumulation in splits:

        class Spy(as_method(base) if base else trainer):
            def adjust_gradients(self, model):
                super().adjust_gradients(model)
                if self.stage.index == many:
                    gradients.append({n: p.grad.clone() for n, p in self.trained().items() if p.grad is not None})

        step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": accumulation}
        step |= {"per_device_train_batch_size": batch, "output_dir": str(tmp_path / f"{batch}")}
        run = train(
            small(options, name, many, **step | changes | dict(() if gradients else first)), as_method(Spy), config
        )
    assert len(gradients) == 2 and gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=5e-3, atol=atol)
    return run, gradients[0]


@cache
def made(config: type[CLConfig], **changes) -> CLConfig:
    return config(output_dir="x", **changes)


def unbuilt(name: str, **changes) -> CLTrainer:
    """A method's trainer that has only its configuration."""
    trainer, config = method(name)
    instance = object.__new__(trainer)
    instance.config = made(config, **changes)
    return instance


def flattened(architecture, layers, options, tmp_path):
    """Options of a model in which the named layers get the positions of a batch as one list."""
    base = make_base(architecture, tmp_path / architecture)
    return {**options, **EXACT, "model_name_or_path": str(base), "lora_target_modules": layers}
