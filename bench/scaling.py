"""Computes memory and time of two large runs from first principles: the tables of docs/scaling.md.

    python -m bench.scaling

The configs are loaded as a training loads them. The models are built without weights (meta device). accelerate's own
code divides them among the number of processes in the launch file; these processes do not exist (torch's fake process
group). This gives the parameters and their share on each GPU; the rest is arithmetic with the constants below.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trace_bench.report import Table, markdown

CONFIGS = Path(__file__).parents[1] / "trainers" / "configs"

#: One H100 SXM: dense bf16 FLOP/s and bytes of memory.
PEAK, MEMORY = 989e12, 80e9
#: The share of the peak that training reaches. The forward pass that checkpointing repeats does not count.
MFU = 0.4
#: Bytes per second that a GPU receives in a collective: within a machine (NVLink 4, peak 450e9) and between machines
#: (one 400 Gbit/s adapter for each GPU, peak 50e9).
NVLINK, NETWORK = 300e9, 40e9
#: GPUs of a machine.
MACHINE = 8
#: Training rows of each task, and the median tokens of prompt and answer of the real data (SmolLM2's tokenizer).
ROWS = 5000
TOKENS = {
    "trace_cstance": (278, 1),
    "trace_fomc": (77, 1),
    "trace_meetingbank": (776, 72),
    "trace_py150": (222, 11),
    "trace_scienceqa": (73, 172),
    "trace_numglue_cm": (46, 2),
    "trace_numglue_ds": (39, 2),
    "trace_20minuten": (871, 96),
}
#: Bytes per second that a machine reads from or writes to the shared storage.
STORAGE = 2e9
#: vLLM's memory in addition to weights and cache.
ENGINE_OVERHEAD = 3e9
LAYER_GRADIENTS = "gradients of a layer's activations, bf16"

SHAPES = {
    "Llama-2-7b-chat-hf": {},  # transformers' defaults
    "Llama-2-70b-chat-hf": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


@dataclass
class Plan:
    """A run and how it is launched."""

    title: str
    config: str
    launch: str


PLANS = [
    Plan("7B, all parameters, 8 GPUs", "llama2_7b_full.yaml", "fsdp.yaml"),
    Plan("70B, LoRA, 2 x 8 GPUs", "llama2_70b_lora.yaml", "hsdp.yaml"),
]


def load_config(name: str) -> tuple[Any, Any]:
    """A run's configuration as the trainers read it."""
    from trl import ModelConfig, TrlParser

    from trainers.base import CLConfig

    return TrlParser((CLConfig, ModelConfig)).parse_args_and_config(["--config", str(CONFIGS / name)])


def shape(model_args: Any) -> Any:
    """The configuration of the model, made without the hub."""
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[model_args.model_name_or_path.rpartition("/")[2]])


def meta_model(model_args: Any) -> Any:
    """The model as a stage trains it, with its adapter, without memory for its weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import get_peft_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(model_args), dtype=getattr(torch, model_args.dtype))
    return get_peft_model(model, get_peft_config(model_args), low_cpu_mem_usage=True) if model_args.use_peft else model


def read_launch(name: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """A launch file as `accelerate launch` reads it, and the variables that it sets for the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", str(CONFIGS / "accelerate" / name), "--module", "trainers.sequential"]
    args = _validate_launch_command(launch_command_parser().parse_args(command))[0]
    args.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` sets it after reading the file
    with mock.patch.dict(os.environ, clear=True):
        return args, prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def divided(model: Any, launch: str) -> tuple[int, int, int]:
    """Divides a meta model as FSDP would under a launch file.

    Args:
        model: The model on the meta device; it is changed.
        launch: The name of the launch file.

    Returns:
        The number of processes, how many of them share one copy of the weights, and the bytes of parameters on each.
    """
    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    args, environment = read_launch(launch)
    assert args.use_fsdp and args.fsdp_version == 2
    replicas = args.parallelism_config_dp_replicate_size if args.use_parallelism_config else 1
    shards = args.num_processes // replicas
    dist.init_process_group("fake", rank=0, world_size=args.num_processes, store=FakeStore())
    try:
        with mock.patch.dict(os.environ, {k: v for k, v in environment.items() if k.startswith("FSDP_")}):
            # There are no weights to load, so none are sent to other processes.
            plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
        plugin.set_mixed_precision("bf16")
        names = ("dp_replicate", "dp_shard")
        fsdp2_prepare_model(
            SimpleNamespace(  # type: ignore[arg-type]
                state=SimpleNamespace(fsdp_plugin=plugin),
                torch_device_mesh=init_device_mesh("cpu", (replicas, shards), mesh_dim_names=names),
                parallelism_config=SimpleNamespace(fsdp_dim_names=names if replicas > 1 else names[1:]),
                mixed_precision="bf16",
                is_main_process=False,
                device=torch.device("cpu"),
            ),
            model,
        )
        local = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    finally:
        dist.destroy_process_group()
    return args.num_processes, shards, local


def kept_by_layer(config: Any, adapter: Any = None, scale: int = 8) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass, without its parameters and its input.

    They are counted in a layer whose widths are divided by `scale`, since all kept tensors grow with the widths. On the
    CPU attention keeps the same tensors as flash attention on a GPU.

    Args:
        config: The configuration of the model.
        adapter: PEFT's configuration of the adapter that is trained; None = all weights are trained.
        scale: The widths and the adapter's rank are divided by this.
    """
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    scale = min(scale, config.num_key_value_heads)
    small = copy.deepcopy(config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(small, name, getattr(config, name) // scale)
    small.num_hidden_layers, small.vocab_size = 1, 8
    model: Any = LlamaForCausalLM(small).to(torch.bfloat16)
    decoder = model.model
    if adapter is not None:
        adapter = copy.deepcopy(adapter)
        adapter.r = max(1, adapter.r // scale)
        for module in get_peft_model(model, adapter).modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # our trainer does the same
        dropout_of_a_gpu(model)
    layer, tokens = decoder.layers[0], 256
    states = torch.randn(1, tokens, small.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = decoder.rotary_emb(states, torch.arange(tokens)[None])
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), states, *rotary)}
    kept: dict[int, int] = {}
    tensors = []  # kept alive, so that no two have the same address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=adapter is not None)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(states, position_embeddings=rotary, attention_mask=None)
    return int(sum(kept.values()) / tokens * scale)


def dropout_of_a_gpu(model: Any) -> None:
    """Lets the dropout of a model on the CPU keep one byte for each value, as on a GPU, instead of two."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):

            def dropped(states: torch.Tensor, p: float = module.p) -> torch.Tensor:
                return torch.native_dropout(states, p, True)[0]

            module.forward = dropped  # type: ignore[method-assign]


def layer_gradients(config: Any, tokens: int) -> int:
    """Bytes of the gradients that exist at once in the backward pass of a layer: its states and three of its MLP."""
    return int(2 * tokens * (config.hidden_size + 3 * config.intermediate_size))


def one_gpu(config: Any, adapter: Any, tokens: int, answers: int, checkpointing: bool) -> dict[str, float]:
    """Bytes by purpose on a single GPU that trains a LoRA adapter, with the arithmetic of `memory`.

    Args:
        config: The configuration of the model, whose weights are in bf16.
        adapter: PEFT's configuration of the adapter.
        tokens: The tokens of the largest batch, with padding.
        answers: Those of them that have a loss.
        checkpointing: Whether the forward pass of a layer is repeated for its backward pass.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
        model = get_peft_model(base, copy.deepcopy(adapter), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    kept, layers = kept_by_layer(config, adapter), config.num_hidden_layers
    return {
        "weights": 2 * frozen + 4 * trained,
        "gradients, float32": 4 * trained,
        "AdamW's two moments, float32": 8 * trained,
        "checkpointed states: one a layer, bf16": 2 * tokens * config.hidden_size * layers if checkpointing else 0,
        "activations": tokens * kept * (1 if checkpointing else layers),
        LAYER_GRADIENTS: layer_gradients(config, tokens),
        "logits of answers and their gradient, bf16 and twice float32": 10 * answers * config.vocab_size,
    }


def memory(plan: Plan) -> tuple[dict[str, float], dict[str, Any]]:
    """Bytes by purpose on each GPU at the moment of a step that needs most, and the counts that they follow from."""
    args, model_args = load_config(plan.config)
    config, model = shape(model_args), meta_model(model_args)
    assert args.gradient_checkpointing and args.bf16
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder = next(m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer")
    layer = sum(p.numel() for p in decoder.parameters())
    head = config.vocab_size * config.hidden_size
    world, shards, local = divided(model, plan.launch)
    rows = args.per_device_train_batch_size
    tokens = rows * (args.max_prompt_length + args.max_answer_length)
    kept = kept_by_layer(config)
    parts = {
        "weights": local,
        "gradients, float32": 4 * trained / shards,
        "AdamW's two moments, float32": 8 * trained / shards,
        "weights put together: two layers, embeddings, head, bf16": 2 * (2 * layer + 2 * head),
        "gradients of a layer before they are divided, bf16": 2 * layer if trained == total else 0,
        "checkpointed states: one a layer, bf16": 2 * tokens * config.hidden_size * config.num_hidden_layers,
        "one layer's activations, repeated": tokens * kept,
        LAYER_GRADIENTS: layer_gradients(config, tokens),
        "logits of answers and their gradient, bf16 and twice float32": 10
        * rows
        * args.max_answer_length
        * config.vocab_size,
    }
    counts = {
        "parameters": total,
        "trained parameters": trained,
        "GPUs": world,
        "GPUs sharing a copy of the weights": shards,
        "rows of an optimizer step": rows * args.gradient_accumulation_steps * world,
        "tokens on a GPU at once, at the most": tokens,
        "bytes that a layer keeps of a token": kept,
    }
    return parts, counts


def times(
    plan: Plan, counts: dict[str, Any], shards: int | None = None
) -> list[tuple[str, float, float, float, float]]:
    """The cost of each task.

    Args:
        plan: The run.
        counts: The counts that `memory` returns.
        shards: The number of GPUs that share a copy of the weights, if different from the plan.

    Returns:
        For each task: its name, tokens, FLOPs, seconds of computing, and seconds of communication.
    """
    args, model_args = load_config(plan.config)
    config = shape(model_args)
    full = counts["trained parameters"] == counts["parameters"]
    shards = shards or counts["GPUs sharing a copy of the weights"]
    world = counts["GPUs"]
    # The weights are gathered in bf16 for the forward and again for the backward pass. Gradients have the same size.
    sent = (3 if full else 2) * 2 * counts["parameters"] * (shards - 1) / shards
    result = []
    for task, epochs in zip(args.tasks, args.epochs, strict=True):
        length = sum(TOKENS[task])
        rows = ROWS * epochs
        # 2 N forward, 2 N to pass the gradient back, 2 N for the gradient of the weights, which LoRA leaves out; causal
        # attention 2 s^2 h a layer forward, and twice that backward.
        flops = rows * (
            (6 if full else 4) * counts["parameters"] * length
            + 6 * config.num_hidden_layers * config.hidden_size * length**2
        )
        micro_batches = rows / (args.per_device_train_batch_size * world)
        bandwidth = NVLINK if shards <= MACHINE else NETWORK
        result.append(
            (task, rows * length, flops, flops / (world * PEAK * MFU), micro_batches * sent / bandwidth),
        )
    return result


def cache(plan: Plan, parameters: int) -> tuple[float, float, int]:
    """Evaluation in vLLM: bytes of weights on a GPU, bytes of cache per token, and how many tokens the cache holds."""
    args, model_args = load_config(plan.config)
    config = shape(model_args)
    gpus = args.engine_args.get("tensor_parallel_size", 1)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    weights = 2 * parameters / gpus
    room = args.engine_args["gpu_memory_utilization"] * MEMORY - weights - ENGINE_OVERHEAD
    return weights, token, int(room * gpus / token)


def tables(plan: Plan) -> str:
    """All tables of a plan, in the form of docs/scaling.md."""
    parts, counts = memory(plan)
    lines = [f"### {plan.title}", "", markdown(Table(["count", ""], [[k, f"{v:,}"] for k, v in counts.items()])), ""]
    rows = [[name, f"{size / 1e9:.2f}"] for name, size in [*parts.items(), ("**sum**", sum(parts.values()))]]
    lines += [markdown(Table(["on each GPU", "GB"], rows)), ""]
    cost = times(plan, counts)
    rows = [
        [name.removeprefix("trace_"), f"{tokens / 1e6:.1f}", f"{flops / 1e15:.0f}", f"{busy:.0f}", f"{sending:.0f}"]
        for name, tokens, flops, busy, sending in cost
    ]
    sums = [sum(row[i] for row in cost) for i in range(1, 5)]
    rows.append(["**all**", f"{sums[0] / 1e6:.1f}", f"{sums[1] / 1e15:.0f}", f"{sums[2]:.0f}", f"{sums[3]:.0f}"])
    lines += [markdown(Table(["task", "tokens, millions", "PFLOP", "computing, s", "sending, s"], rows)), ""]
    lines += [f"Computing and sending overlap, so a task takes the longer of both: {_minutes(cost)} min for all tasks."]
    if counts["GPUs"] > counts["GPUs sharing a copy of the weights"]:
        spread = _minutes(times(plan, counts, shards=counts["GPUs"]))
        lines += [f"With the weights in {counts['GPUs']} parts, sent between the machines: {spread} min."]
    total, trained = counts["parameters"], counts["trained parameters"]
    read, written = (4 * total if total == trained else 2 * total), 4 * trained
    lines += [
        "",
        f"Each of {len(cost)} stages reads {read / 1e9:.1f} GB into the main memory of each machine and writes "
        f"{written / 1e9:.2f} GB: {len(cost) * (read + written) / STORAGE / 60:.0f} min more.",
    ]
    weights, token, room = cache(plan, counts["parameters"])
    lines += [
        "",
        f"Evaluation: weights {weights / 1e9:.1f} GB on a GPU, {token:,} bytes of cache a token, room for {room:,} "
        "tokens.",
    ]
    return "\n".join(lines)


def _minutes(cost: list[tuple[Any, ...]]) -> str:
    return f"{sum(max(busy, sending) for *_, busy, sending in cost) / 60:.0f}"


if __name__ == "__main__":
    print("\n\n".join(tables(plan) for plan in PLANS))
