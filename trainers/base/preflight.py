"""Refuses what cannot work before the first stage: launches, trackers, settings, base models, adapters."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM
from transformers.integrations import get_reporting_integration_callbacks
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from trace_bench import packaged
from trace_bench.engine import bf16_is_slow, models
from trace_bench.engine.architecture import check_base, context_length, refuse_not_causal
from trace_bench.engine.checkpoints import lost_names
from trace_bench.engine.sharing import shared_layer, shared_weights
from trace_bench.evaluate import answer_tokens
from trace_tasks.errors import brief
from trace_tasks.limits import limited
from trace_tasks.tokens import Chat, example_ids
from trainers.base.config import ENGINE_CONTEXT, CLConfig, ConfigError
from trainers.base.trainer import CLTrainer

log = logging.getLogger(__name__)

#: The hooks of a method, as docs/methods.md lists them.
_HOOKS = (
    *("prepare", "stage_dataset", "stage_args", "stage_model", "begin_stage", "end_stage", "adjust_gradients"),
    *("before_step", "after_step", "compute_loss", "get_batch_samples", "save_checkpoint", "record"),
)


# ---------------------------------------------------------------------------------------------------------- the launch


def refuse_shards(config: CLConfig, why: str, instead: str) -> None:
    """Refuses DeepSpeed and FSDP, from the launch or an option. The message says `why`, and what to do `instead`."""
    sharded = {
        "DeepSpeed": config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
        "FSDP": config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
    }
    for name, used in sharded.items():
        if used:
            raise ConfigError(
                f"{why}, but {name} gives each process only a part of the weights. Launch without {name}, with one "
                f"process or several (DDP), {instead}."
            )


def check_devices(config: CLConfig, processes: int, method: str) -> None:
    """Refuses several GPUs in one process, where HF would use DataParallel; warns of a machine slow in bf16."""
    if config.bf16 and bf16_is_slow():
        log.warning("bf16=true is slower on this CPU or GPU than float32: leave it out, or set bf16: false.")
    gpus = 0 if config.use_cpu else torch.cuda.device_count()
    if gpus > 1 and processes == 1 and config.stages:
        raise ConfigError(
            f"One process sees {gpus} GPUs. Use one of them (CUDA_VISIBLE_DEVICES=0); or use all: accelerate launch "
            f"--num_processes {gpus} -m trainers.{method} ..., with gradient_accumulation_steps divided by {gpus} to "
            "keep the batch."
        )


def check_launch() -> None:
    """Refuses launches of accelerate that do not save a whole checkpoint."""

    def given(name: str) -> str:
        return os.environ.get(name, "not set").lower()

    if given("ACCELERATE_USE_FSDP") == "true":
        value = given("FSDP_STATE_DICT_TYPE").upper()
        setting, wanted, file = "fsdp_state_dict_type", "FULL_STATE_DICT", "fsdp"
    elif given("ACCELERATE_USE_DEEPSPEED") == "true" and given("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        value = given("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")
        setting, wanted, file = "zero3_save_16bit_model", "true", "zero3"
    else:
        return
    if value != wanted:
        raise ConfigError(
            f"{setting} is {value}, so the next stage could not start from the checkpoint. Set it to {wanted}, as "
            f"trainers/configs/accelerate/{file}.yaml does."
        )


def check_trackers(config: CLConfig) -> None:
    """Refuses trackers that are not installed; HF would notice only after the model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as e:
        raise ConfigError(f"report_to={config.report_to}: {e}") from e


def check_method(trainer: type[CLTrainer], config: CLConfig, name: str) -> None:
    """Refuses a method that hides one of ours or overwrites the trainer, and settings that it cannot work with."""
    ours = packaged.methods().get(name)
    file = getattr(sys.modules[trainer.__module__], "__file__", None)  # a notebook has none
    if ours and file and trainer.__module__ != CLTrainer.__module__ and not ours.samefile(file):
        raise ConfigError(
            f"{file} has the name of the package's method {name}. The file name gives the name of the method, its "
            f"tuned settings and its published numbers, so rename your file, for example to my_{name}.py."
        )
    for kind in type(config).__mro__[: type(config).__mro__.index(CLConfig)]:
        typed = vars(kind).get("__annotations__", {})
        for untyped in sorted({f.name for f in fields(config)} & vars(kind).keys() - typed.keys()):
            said = f"Write {untyped}: TYPE = {vars(kind)[untyped]!r}."
            raise ConfigError(f"{kind.__name__} sets {untyped} without a type, so it would not be read. {said}")
        if typed and issubclass(kind, CLConfig) and "__dataclass_fields__" not in vars(kind):
            raise ConfigError(f"The options of {kind.__name__} would not be read: put @dataclass above the class.")
    for kind in trainer.__mro__[: trainer.__mro__.index(CLTrainer)]:
        for own_name in vars(kind):
            near = difflib.get_close_matches(own_name, _HOOKS, 1, cutoff=0.85)
            if near and not hasattr(CLTrainer, own_name):
                log.warning("%s.%s is not a hook: nothing calls it. Did you mean %s?", kind.__name__, own_name, near[0])
        if taken := sorted(_assigned_names(kind) & _reserved_names()):
            raise ConfigError(
                f"{kind.__name__} sets self.{taken[0]}, which the trainer already uses, so a stage could fail at its "
                f"end. Use a different name, such as {name}_{taken[0]}."
            )
    if config.packing:
        raise ConfigError("packing=true cuts rows to max_length, which a stage does not have. Use padding_free: true.")
    hooks = ("adjust_gradients", "compute_loss", "begin_stage")
    own = {hook for hook in hooks if getattr(trainer, hook) is not getattr(CLTrainer, hook)}
    if config.padding_free and (config.use_cpu or own):
        raise ConfigError(
            "padding_free=true joins rows. That needs flash attention on a GPU, and a method that does not change "
            "gradients, the loss or the start of a stage (sequential, single, joint, replay, rcl). Leave it out."
        )
    if config.padding_free and config.loss_weights == "rows":
        raise ConfigError("padding_free=true joins rows, so they cannot have equal weight. Set loss_weights: tokens.")
    of_all = {f.name: f.default for f in fields(config)}["replay_ratio"] is None  # the method `replay` has its own
    if trainer.own_memory and config.replay_ratio and of_all:
        raise ConfigError(
            f"replay_ratio={config.replay_ratio} is not allowed: {name} itself chooses which rows to train on. Leave "
            "it out."
        )
    if "adjust_gradients" in own:
        refuse_shards(config, f"{name} needs whole gradients", "with LoRA if memory is short")
        if config.fp16:
            raise ConfigError(f"fp16=true scales gradients, but {name} needs unscaled ones. Use bf16 or float32.")


def _assigned_names(kind: type) -> set[str]:
    """The names that a class assigns on `self`; empty if its source cannot be read."""
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return set()  # `getsource` would return another class of that name
    try:
        source = inspect.getsource(kind)
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):  # of a notebook, before Python 3.13
        return set()
    for inner in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)][1:]:
        inner.body = []  # its `self` is not the trainer
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == "self"}


def _reserved_names() -> set[str]:
    """The names that no method may assign: functions and properties of the trainer, and what a stage is made with."""
    functions = {n for n in dir(CLTrainer) if isinstance(x := getattr(CLTrainer, n), property) or callable(x)}
    return functions | {"run", "stage", "config", "tokenizer", "chat", "state"}


# ------------------------------------------------------------------------------------------------------ the base model


def check_model(config: CLConfig, model_args: ModelConfig, tokenizer: Any, tasks: dict[str, Any], trains: str) -> Any:
    """Refuses a base model that cannot be trained as configured, or whose checkpoints could not be evaluated.

    Returns:
        The configuration of the base model.
    """
    base, code = str(model_args.model_name_or_path), config.trust_remote_code
    if tokenizer.eos_token is None:
        raise ConfigError(f"The tokenizer of {base} has no EOS token, so answers never end. Use a model with one.")
    model = causal_config(base, model_args, code)
    _check_weights(model, model_args)
    coefficient = _router_coefficient(model, config, base)
    _check_context(model, config, tasks)
    check_base(base, config.backend, code, model_args.model_revision)
    if config.deepspeed_plugin is not None:  # DeepSpeed would shard the empty model
        return model
    kwargs = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}

    def make() -> Any:
        with torch.device("meta"):  # without weights: a second, whatever the size
            return AutoModelForCausalLM.from_config(copy.deepcopy(model), trust_remote_code=code, **kwargs)

    try:
        with limited(*models.READING):
            empty = make()
    except Exception as e:  # whatever the model's code raises: loading the model would fail the same way
        raise ConfigError(f"transformers cannot build the model {base}: {brief(e)}") from e
    _check_vocabulary(empty, tokenizer, base)
    if coefficient and not _has_router_loss(empty):
        raise ConfigError(
            f"router_aux_loss_coef={coefficient} (from the configuration or config.json): {base} ({model.model_type}) "
            "computes no router loss. Use router_aux_loss_coef: 0."
        )
    saved_whole = trains == "full" or (trains == "lora" and config.backend == "vllm")  # vLLM may need it merged
    if saved_whole and type(empty.config) is not type(model):
        _check_saved(base, empty.config)
    if trains != "lora":
        return model
    if problem := _lora_problem(empty, model_args):
        raise ConfigError(f"LoRA does not fit {base} ({model.model_type}): {problem} {_lora_remedy(make, model_args)}")
    if config.backend == "vllm" and (shared := shared_weights(empty)):
        raise shared_layer(f"LoRA on {base}", shared)
    return model


def _router_coefficient(model: Any, config: CLConfig, base: str) -> float:
    """The weight of the router's loss, as TRL chooses it. Refuses label smoothing, which makes TRL drop this loss."""
    text, coefficient = model.get_text_config(), config.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    if not (coefficient and hasattr(text, "output_router_logits")):
        return 0.0
    if config.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={config.label_smoothing_factor}: {base} is a mixture of experts, and TRL would "
            "leave out its router loss. Use label_smoothing_factor: 0, or router_aux_loss_coef: 0."
        )
    return coefficient


def _has_router_loss(empty: Any) -> bool:
    """Whether a model computes a router's loss. Some mixtures do not, and a model without experts does not."""
    code = sys.modules[type(empty).__module__]
    if not code.__name__.startswith("transformers."):
        return True  # remote code: assume it does
    router = (empty._can_record_outputs or {}).get("router_logits")
    kind, name = getattr(router, "target_class", ()), getattr(router, "layer_name", None) or ""
    routers = [n for n, module in empty.named_modules() if isinstance(module, kind) and name in n]
    return hasattr(code, "load_balancing_loss_func") and bool(routers)


def _check_saved(base: str, config: Any) -> None:
    """Refuses an image model whose language model would be saved as a type that transformers cannot load."""
    try:
        refuse_not_causal(base, config)
    except models.ModelError as e:
        raise ConfigError(
            f"Trained or merged weights of {base} would be saved as {config.model_type}, the language model only, and "
            "transformers cannot load that. Use LoRA (use_peft: true) and backend: hf."
        ) from e


def causal_config(base: str, model_args: ModelConfig, trust_remote_code: bool) -> Any:
    """Loads the configuration of a base model; refuses one that is not a causal language model."""
    model = models.load_config(base, model_args.model_revision, trust_remote_code)
    try:
        model.get_text_config(decoder=True).to_dict()
    except Exception as e:  # values that the class refuses
        raise ConfigError(f"transformers cannot build the model {base}: {models.why_not(e)}") from e
    refuse_not_causal(base, model)
    return model


def empty_adapted(config: CLConfig, model_args: ModelConfig) -> Any:
    """The model with the run's adapter and without weights, for `prepare`.

    None if the adapter does not fit, since `check_model` raises the error; and with DeepSpeed, which would shard it.
    """
    if config.deepspeed_plugin is not None:
        return None
    model = causal_config(str(model_args.model_name_or_path), model_args, config.trust_remote_code)
    try:
        with torch.device("meta"), limited(*models.READING):
            empty = AutoModelForCausalLM.from_config(model, trust_remote_code=config.trust_remote_code)
        return get_peft_model(empty, get_peft_config(model_args), low_cpu_mem_usage=True)  # type: ignore[arg-type]
    except Exception:  # `check_model` raises the error
        return None


def _check_weights(model: Any, model_args: ModelConfig) -> None:
    """Refuses quantised weights, which evaluation cannot merge with; warns of training in half precision."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ConfigError(
            "load_in_4bit and load_in_8bit are not supported: training would use quantised weights, but evaluation "
            "merges adapters into the original ones. Use dtype=bfloat16 and LoRA."
        )
    # PEFT trains adapters in float32, but copies of whole modules (modules_to_save) in the model's dtype.
    saved = ", ".join(model_args.lora_modules_to_save or [])
    dtype = str(model.dtype).removeprefix("torch.") if model_args.dtype == "auto" else model_args.dtype
    if (saved or not model_args.use_peft) and dtype in ("bfloat16", "float16"):
        log.warning(
            "%s are trained in %s: its rounding is often larger than a step of AdamW, so the model learns and forgets "
            "too little. Use dtype=float32 with bf16=true (autocast).",
            f"All parameters of {saved} (lora_modules_to_save)" if model_args.use_peft else "All parameters",
            dtype,
        )
    method = (model.to_dict().get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(
            f"{model_args.model_name_or_path} is quantised with {method}: its weights cannot be trained, and adapters "
            "cannot be merged into them exactly. Use the model in bf16."
        )


def require_context(config: CLConfig, model_args: ModelConfig, tokens: int, what: str, *, engine: bool = False) -> None:
    """Refuses a base model with a context of less than `tokens`; for `prepare`.

    `what` names the tokens in the message. With `engine` the engine of the evaluation needs that context, too.
    """
    for name in ENGINE_CONTEXT:
        given = config.engine_args.get(name) if engine and isinstance(config.engine_args, dict) else None
        if given and tokens > given:
            raise ConfigError(f"{what} are {tokens} tokens, but engine_args has {name}={given}. Raise it.")
    model = causal_config(str(model_args.model_name_or_path), model_args, config.trust_remote_code)
    context = context_length(model.get_text_config(decoder=True).to_dict())
    if context and tokens > context:
        raise ConfigError(f"{what} are {tokens} tokens, more than the model's context of {context}. Lower one of them.")


def _check_context(model: Any, config: CLConfig, tasks: dict[str, Any]) -> None:
    """Refuses a max_prompt_length that leaves no room for the answer in the model's context."""
    context = context_length(model.get_text_config(decoder=True).to_dict())
    for name, task in tasks.items():
        answer = min(answer_tokens(task), config.max_new_tokens or 10**9) + config.virtual_tokens
        if context and config.max_prompt_length + answer > context:
            raise ConfigError(
                f"max_prompt_length={config.max_prompt_length} and {answer} tokens of an answer of {name} do not fit "
                f"into the model's context of {context}. Use a max_prompt_length of at most {context - answer}, or "
                "lower max_new_tokens."
            )


def check_rows(
    config: CLConfig, model: Any, tokenizer: Any, rows: dict[str, list[tuple[str, str]]], chat: Chat | None
) -> None:
    """Refuses tasks smaller than a batch if incomplete ones are dropped, and rows longer than a table of positions."""
    batch = config.train_batch_size * config.world_size
    for name, pairs in rows.items():
        if config.dataloader_drop_last and len(pairs) < batch:
            raise ConfigError(
                f"dataloader_drop_last=true: {name} has {len(pairs)} training rows, less than a batch of {batch}, so "
                "its stage would have no step. Leave it out."
            )
    settings = model.get_text_config(decoder=True).to_dict()
    context, limits = context_length(settings), (config.max_prompt_length, config.max_answer_length)
    # Rotary positions need no table.
    if context is None or "rope_parameters" in settings or sum(limits) + config.virtual_tokens <= context:
        return
    for name, pairs in rows.items():
        prompts, answers = zip(*pairs, strict=True)
        made = example_ids(tokenizer, prompts, answers, *limits, chat)
        longest = max(len(row["input_ids"]) for row in made) + config.virtual_tokens
        if longest > context:
            raise ConfigError(
                f"A training row of {name} has {longest} tokens, but the context of {model.name_or_path} is {context}. "
                f"Use a max_answer_length of at most {context - limits[0] - config.virtual_tokens}, or a lower "
                "max_prompt_length."
            )


def _check_vocabulary(empty: Any, tokenizer: Any, base: str) -> None:
    """Refuses a tokenizer with tokens for which the model has no embedding."""
    size = empty.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= size}
    never_seen = tokenizer.get_added_vocab().keys() - {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    if beyond.keys() - never_seen:
        raise ConfigError(
            f"The tokenizer of {base} has {len(beyond)} tokens without a row in the model's {size} embeddings, such as "
            f"{min(beyond, key=beyond.__getitem__)!r}. Use the model's own tokenizer, or resize the model's "
            "embeddings and save it."
        )
    if beyond:
        log.warning("The model has no embeddings for %s: a row with this text would stop it.", ", ".join(beyond))


def _lora_problem(empty: Any, model_args: ModelConfig) -> str | None:
    """Why the run's LoRA does not fit a model; None if it fits."""
    names = [name for name, _ in empty.named_modules()]
    adapter: Any = get_peft_config(model_args)
    try:
        whole: Any = get_peft_model(empty, adapter, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        return f"{brief(e).rstrip('.')}."
    adapted = whole.base_model
    if isinstance(empty.get_output_embeddings(), BaseTunerLayer):
        return "The head cannot have an adapter, because TRL's loss does not call the head."
    for name, module in adapted.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if isinstance(layer, torch.nn.Linear) and not _is_linear(layer):
            return f"{name.removeprefix('model.')} is a {type(layer).__name__}, which PEFT treats as a linear layer."
    if lost := lost_names(whole):
        return f"PEFT saves {lost[0]}, but cannot load it."
    # PEFT accepts a list if one of its names fits.
    found = {
        "lora_target_modules": adapted.targeted_module_names,
        "lora_target_parameters": adapted.targeted_parameter_names,
        "lora_modules_to_save": names,
    }
    for option, there in found.items():
        given = getattr(model_args, option)
        for name in given if isinstance(given, list) else ():
            if not any(f".{full}".endswith(f".{name}") for full in there):
                return f"{option} names {name!r}, but the model does not have it."
    return None


def _is_linear(layer: Any) -> bool:
    """Whether a layer on the meta device computes as a linear layer: some routers are subclasses of one."""
    if type(layer) in (torch.nn.Linear, Conv1D):
        return True
    try:
        made = layer(torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device="meta"))
    except Exception:  # it takes other inputs
        return False
    return isinstance(made, torch.Tensor) and made.shape == (1, layer.out_features)


def _lora_remedy(make: Callable[[], Any], model_args: ModelConfig) -> str:
    """Finds, by trying, options with which LoRA fits."""
    layers = [(n, m) for n, m in make().named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    linear = {n.rpartition(".")[2] for n, m in layers if _is_linear(m)}
    # Without out_proj: PEFT refuses it in state-space models, whose kernels use its weights without calling the layer.
    listed = sorted(linear - {"lm_head", "out_proj"})
    choices: list[tuple[Any, float | None]] = [(None, 0.0), ("all-linear", None), ("all-linear", 0.0), (listed, None)]
    for targets, dropout in choices:
        tried = copy.copy(model_args)
        words = []
        if targets is not None:
            tried.lora_target_modules = targets
            words.append(f"--lora_target_modules {targets if isinstance(targets, str) else ' '.join(targets)}")
        if dropout is not None:
            tried.lora_dropout = dropout
            words.append("--lora_dropout 0")
        if tried != model_args and _lora_problem(make(), tried) is None:
            return f"Use {' '.join(words)}."
    return f"Its linear layers are {', '.join(sorted(linear))}."
