"""Checkpoints from elsewhere: is this the model that was trained, and can an engine serve it?

Everything here is asked before an engine starts or anything is recorded. Only headers of weight files, config.json and
adapter_config.json are read. The names and shapes that a model has come from its architecture, built on torch's "meta"
device, which takes no memory: transformers and PEFT load the file's names and shapes into it as they would the weights.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trace_bench import models
from trace_bench.models import ModelError
from trace_bench.run import Run, RunError, Stage, is_file_name, one_line, read_json
from trace_tasks.data.files import fingerprint
from trace_tasks.limits import LimitError, limited

log = logging.getLogger(__name__)

#: Kinds of PEFT adapters that change weights and can be merged: both backends serve them. The tests compare each
#: merged model with the unmerged one.
MERGED = {
    *("LORA", "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3"),
    *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD"),
    *("SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
#: Kinds that PEFT cannot merge (or only on some models). transformers serves them as they are.
UNMERGED = {"BEFT", "LILY"}
#: The kind that is a prompt in front of the input: `models.soft_prompt`.
PROMPT = "PROMPT_TUNING"
#: Options of adapters that PEFT takes for regular expressions, as it does a text in target_modules.
PATTERNS = ("exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
#: Options of LoRA with which the adapter is more than a sum to weights: part of the input, other layers, a router.
NOT_A_SUM = ("alora_invocation_tokens", "layer_replication", "arrow_config")

#: Buffers that older files hold and that today's classes neither have nor name among what they ignore.
OLD_BUFFERS = re.compile(r"\.(masked_bias|inv_freq|position_ids|causal_mask|cos_cached|sin_cached|_extra_state)$")
#: Entries of config.json that change no answer, or are dealt with elsewhere (EOS by the engine, the vocabulary by its
#: shapes, generation by greedy decoding).
HARMLESS = {
    *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "architectures", "auto_map"),
    *("use_cache", "gradient_checkpointing", "initializer_range", "initializer_factor", "return_dict", "torchscript"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "chunk_size_feed_forward", "is_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "vocab_size"),
    *("problem_type", "id2label", "label2id", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "activation_dropout", "layerdrop"),
    *("embedding_dropout", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp", "pruned_heads"),
    *("unsloth_fixed", "unsloth_version", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p"),
    *("num_beams", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences", "length_penalty", "n_ctx"),
    *("_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "experts_implementation"),
}


# ----------------------------------------------------------------------------------------------------- before an engine


def check_checkpoints(run: Run, stages: Iterable[Stage], backend: str, trust_remote_code: bool = False) -> None:
    """Refuses what an engine would load wrongly, or fail on half-way.

    Args:
        run: The run.
        stages: The stages that are to be evaluated.
        backend: "vllm" or "hf": what serves them.
        trust_remote_code: As for transformers.

    Raises:
        RunError: naming the checkpoint, and what to do.
        models.ModelError: if weights are pickles, or a model brings code that is not trusted.
    """
    stages = list(stages)
    name, revision = run.manifest["model"]["name"], run.manifest["model"].get("revision")
    base = partial(architecture, models.resolve_model(name), revision, trust_remote_code)
    for stage in stages:
        own = stage.checkpoint if stage.external is None else None  # whose bytes `checks.verify` compares
        if own is not None and models.is_adapter(own):  # a run may come from elsewhere
            adapter = _adapter_config(own)
            _refuse_endless(own, adapter)
            if any(adapter.get(key) for key in PATTERNS) or isinstance(adapter.get("target_modules"), str):
                _check_adapter(own, adapter, base, name)
    chain = run.manifest.get("chain", False)
    folders = dict.fromkeys(path for s in stages if s.external for path in (*s.below, s.external))
    for folder in folders:
        if folder.is_dir():
            models.refuse_odd_files(folder)
        models.refuse_pickle(folder)
        if not models.is_adapter(folder):
            if chain:
                raise RunError(
                    f"{folder} is a full model, which holds all weights: it cannot lie on the adapters of a chain. "
                    "Evaluate it in a run without --chain."
                )
            _check_full(folder, base, backend, trust_remote_code)
            continue
        adapter = _adapter_config(folder)
        _check_kind(folder, adapter, backend, chain)
        _refuse_endless(folder, adapter)
        # In a chain the others were trained on merged models that need not be on the disk any more.
        if not run.manifest.get("renamed_base") and (not chain or folder == run.stages[1].external):
            reason = another_base(adapter, run.manifest["model"], trust_remote_code)
            if reason:
                raise RunError(
                    f"{folder} was trained from another base model than the run's: {reason}. Give --model the right "
                    "one; --renamed-base if it is a copy of that under another name; --chain if each adapter was "
                    "trained on the base with those before it merged in."
                )
        _check_adapter(folder, adapter, base, name)


def check_own(stage: Stage) -> None:
    """Refuses a checkpoint of the run that is not what its training wrote.

    Raises:
        RunError: naming it, and what to do.
    """
    path = stage.checkpoint
    if path is None:
        return
    models.refuse_pickle(path)
    if fingerprint(path) != checkpoint_fingerprint(stage):
        raise RunError(
            f"{path} is not what the training of the stage wrote (its fingerprint differs): it was changed or "
            f"damaged. Restore it, or delete {stage.train_file} to train the stage anew."
        )
    if models.is_adapter(path):
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = _adapter_config(path).get("peft_type")
        if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise RunError(
                f"{path} is an adapter of the kind {kind}, which the PEFT that is installed does not know. Install the "
                "version that the stage was trained with: manifest.json has it."
            )


def checkpoint_fingerprint(stage: Stage) -> str | None:
    """What identifies the weights of a stage; None for the base model, which the manifest identifies."""
    if stage.index == 0:
        return None
    if stage.external is None:
        return read_json(stage.train_file)["checkpoint"]
    if not stage.below:
        return fingerprint(stage.external)
    prints = [fingerprint(path) for path in (*stage.below, stage.external)]
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()[:16]


def warn_of_tokenizers(run: Run, stages: Iterable[Stage], trust_remote_code: bool = False) -> None:
    """Says where a checkpoint from elsewhere brings another tokenizer than the base model, whose is used for all."""
    model, base = run.manifest["model"], None
    for stage in stages:
        if stage.external is None or not (stage.external / "tokenizer_config.json").exists():
            continue
        try:
            if base is None:
                path = models.resolve_model(model["name"])
                base = models.load_tokenizer(path, model.get("revision"), trust_remote_code)
            own = models.load_tokenizer(stage.external, None, trust_remote_code)
        except Exception as e:  # nothing is measured with it, whatever is wrong with it
            log.warning("The tokenizer of %s could not be compared with that of the base model: %s", stage.name, e)
            continue
        differs = ["vocabulary"] if own.get_vocab() != base.get_vocab() else []
        differs += ["chat template"] if own.chat_template != base.chat_template else []
        if differs:
            log.warning(
                "%s brings another %s than the base model has. It is measured with the base model's, as all are.",
                stage.name,
                " and another ".join(differs),
            )


# -------------------------------------------------------------------------------------------------------- architectures


def architecture(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model of a config.json without weights: on torch's "meta" device, whatever its size.

    Args:
        model: What `models.resolve_model` returned, or the folder of a full checkpoint.
        revision: Revision on the hub.
        trust_remote_code: As for transformers; without it no code of a model is run.

    Raises:
        models.ModelError: if the architecture is not known, is no causal language model, or needs code that is not
            trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(model, revision, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the modules are the same, and building quantised ones needs other packages
    try:
        with torch.device("meta"), _quiet(), limited(*models.READING):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as e:  # whatever a class of a library says of values from elsewhere
        raise ModelError(f"{model} is no causal language model that transformers can build: {models.why_not(e)}") from e


def _config(model: str | Path, revision: str | None, trust_remote_code: bool) -> Any:
    """The config of a model, with the defaults of its class filled in."""
    from transformers import AutoConfig

    on_hub = "main" if revision is None or Path(model).is_dir() else revision
    try:
        with _quiet(), models.reading(model):
            return AutoConfig.from_pretrained(model, revision=on_hub, trust_remote_code=trust_remote_code)
    except Exception as e:  # whatever a class of a library says of values from elsewhere
        raise ModelError(f"The config.json of {model} cannot be used: {models.why_not(e)}") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the reports and bars of transformers and PEFT back, which are about weights that are not loaded."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def tensor_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """The names and shapes of a checkpoint's tensors, from the headers of its files.

    A header also says how long its file has to be, so that a file which was cut is found.

    Raises:
        RunError: if there are no weights, or a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(checkpoint.glob("*.safetensors"))
    index = checkpoint / "model.safetensors.index.json"
    if models.is_adapter(checkpoint):
        files = [file for file in files if file.name == "adapter_model.safetensors"]  # PEFT looks for this name alone
    elif index.exists():
        names = set(_weight_map(index).values())
        files = sorted(checkpoint / name for name in names)
    if not files:
        raise RunError(f"{checkpoint} has no .safetensors file: its weights are gone. Copy the checkpoint anew.")
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise RunError(f"{file} is missing or damaged ({e}). Copy the checkpoint anew.") from e
    return shapes


def _weight_map(index: Path) -> dict[str, str]:
    """The files in which an index says that the tensors are."""
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) and is_file_name(name) for name in found.values()):
        raise RunError(f"{index} is damaged: its weight_map names a file of this folder for each tensor. Copy it anew.")
    return found


def _empty(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Tensors of these shapes that take no memory."""
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------- full models


def _check_full(folder: Path, base: Callable[[], Any], backend: str, trust_remote_code: bool) -> None:
    """Refuses a full model that is a part of one, or whose tensors are not those of its architecture."""
    shapes = tensor_shapes(folder)
    own = architecture(folder, None, trust_remote_code)
    if read_json(folder / "config.json").get("quantization_config"):
        return  # its tensors are packed: names and shapes are those of the quantisation
    _compare(folder, own, shapes, "the model that its config.json describes")
    if backend == "vllm":  # weights are put into an engine that was started on the base model
        _compare(folder, base(), shapes, "the base model")


def _compare(folder: Path, model: Any, shapes: dict[str, list[int]], name: str) -> None:
    """Loads names and shapes into an architecture, as transformers does with weights.

    So buffers that older files hold (rotary_emb.inv_freq, attention.bias) count for nothing, as do names that
    transformers has changed since.
    """
    try:
        with _quiet(), limited(*models.READING):
            _, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=_empty(shapes),
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, LimitError) as e:
        raise RunError(f"{folder} does not hold the tensors of {name}: {one_line(e)}. Give the whole model.") from e
    lacking, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if lacking:
        instead = f"; it holds {unknown[0]}, which fits nothing" if unknown else ""
        raise RunError(
            f"{folder} lacks {len(lacking)} tensors of {name}, such as {lacking[0]}{instead}. In an engine they "
            "would be those of another model. Give the whole model, with the names that save_pretrained gives."
        )
    if found["mismatched_keys"]:
        tensor, shape, wanted = min(found["mismatched_keys"], key=str)
        raise RunError(
            f"{folder}: {tensor} has shape {list(shape)}, that of {name} {list(wanted)}. It was not trained from the "
            "base model, its vocabulary was changed, or tensors are missing. Give the model that it was trained from, "
            "its own config.json, or take --backend hf."
        )
    unknown = [name for name in unknown if not OLD_BUFFERS.search(name)]
    if unknown:
        parts = {name.split(".")[0] for name in model.state_dict()}
        inside = [name for name in unknown if name.split(".")[0] in parts]
        if inside:
            raise RunError(
                f"{folder} holds {len(inside)} tensors that {name} has no place for, such as {inside[0]}: they would "
                "be left out. Give the config.json that belongs to these weights."
            )
        log.warning("%s holds tensors beside the language model, such as %s. They are not used.", folder, unknown[0])


def config_differences(
    base: str | Path, checkpoint: Path, revision: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """What changes answers in the config.json of a full checkpoint, against that of its base model.

    Both are read by transformers' classes, so that defaults count as if they were written, and older names as the
    newer ones (rope_theta and rope_scaling are rope_parameters). The vocabulary is compared by its shapes.

    Args:
        base: What `models.resolve_model` returned for the base model.
        checkpoint: The folder of the full checkpoint.
        revision: Revision of the base model on the hub.
        trust_remote_code: As for transformers.

    Returns:
        A line for each entry: its name, the base's value and the checkpoint's. None = an engine that was started on
        the base model serves the checkpoint's weights as they were trained.
    """
    a = _flat(_config(base, revision, trust_remote_code).to_dict())
    b = _flat(_config(checkpoint, None, trust_remote_code).to_dict())
    if b.get("tie_word_embeddings") and _head_of_its_own(checkpoint, trust_remote_code):
        b["tie_word_embeddings"] = False
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        # What only one side has and its class does not know is absent on the other side, not a default.
        if a.get(key) != b.get(key) and (a.get(key) or b.get(key) or (key in a and key in b))
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a config, nested ones with dots, without those that change no answer."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if key in HARMLESS or (key == "type" and "rope_type" in value):  # the older name of rope_type
            continue
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {prefix + key: entry}
    return flat


def _heads(model: Any) -> set[str]:
    """The names of a model's embedding and of its head."""
    heads = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return {name for name, module in model.named_modules() if any(module is head for head in heads)}


def _head_of_its_own(checkpoint: Path, trust_remote_code: bool) -> bool:
    """Whether a model that its config ties holds another head than its embeddings: transformers unties it then."""
    import torch
    from safetensors import safe_open

    model = architecture(checkpoint, None, trust_remote_code)
    names = {f"{name}.weight" for name in _heads(model)}
    where: dict[str, Path] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            where |= dict.fromkeys(names & set(tensors.keys()), file)
    if len(where) < 2:
        return False
    values = []
    for name, file in where.items():
        with safe_open(file, framework="pt") as tensors:
            values.append(tensors.get_tensor(name))
    return not torch.equal(*values)


# ------------------------------------------------------------------------------------------------------------- adapters


def _adapter_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise RunError(f"{folder}/adapter_config.json is damaged: it holds {type(config).__name__}, not an object.")
    return config


def _check_kind(folder: Path, adapter: dict[str, Any], backend: str, chain: bool) -> None:
    """Refuses kinds of adapters that the backend has no way to serve."""
    kind = adapter.get("peft_type")
    whole = "Merge it where it was trained (merge_and_unload, save_pretrained), and give the full model"
    if not isinstance(kind, str) or kind not in MERGED | UNMERGED | {PROMPT}:
        raise RunError(
            f"{folder} is an adapter of the kind {kind}, which cannot be served: it neither changes weights that are "
            f"known to be right, nor is it a plain soft prompt. Served are {', '.join(sorted(MERGED))} and {PROMPT}, "
            f"with --backend hf also {', '.join(sorted(UNMERGED))}. {whole}, if the kind can be merged."
        )
    if adapter.get("task_type") not in (None, "CAUSAL_LM"):
        raise RunError(
            f"{folder} was trained for the task type {adapter['task_type']}: its model has another head or other "
            "inputs than a causal language model. Only CAUSAL_LM is served."
        )
    if chain and kind == PROMPT:
        raise RunError(f"{folder} is a soft prompt, on which no adapter can be stacked. Evaluate it without --chain.")
    if backend == "vllm" and (kind in UNMERGED or adapter.get("lora_bias")):
        what = "with lora_bias, which can be merged" if adapter.get("lora_bias") else f"of the kind {kind}, merged"
        raise RunError(
            f"{folder} is an adapter {what} into few models only, and vLLM serves merged weights. Take --backend hf."
        )
    for name in NOT_A_SUM if kind == "LORA" else ():
        if adapter.get(name):
            raise RunError(f"{folder} uses {name}, which no engine here serves as it was trained. {whole}.")


#: The most steps of an iteration that an adapter_config.json may ask for, such as of an approximate inverse.
MOST_STEPS = 1000


def _refuse_endless(folder: Path, config: dict[str, Any]) -> None:
    """Refuses an adapter whose loading would take for ever on real weights alone, where nothing limits it."""
    said = re.search(r"_niter_(\d+)$", str(config.get("init_lora_weights")))
    steps: dict[str, Any] = {"init_lora_weights": int(said[1][:9])} if said else {}
    for entries in (config, *(value for value in config.values() if isinstance(value, dict))):
        steps |= {k: n for k, n in entries.items() if re.search("iter|terms", k) and isinstance(n, int | float)}
    for key, number in steps.items():
        if number > MOST_STEPS:
            raise RunError(
                f"{folder}/adapter_config.json: {key} asks for {number} steps, which would take for ever. At most "
                f"{MOST_STEPS} are allowed; no real adapter has so many."
            )


def _check_adapter(folder: Path, adapter: dict[str, Any], base: Callable[[], Any], name: str) -> None:
    """Refuses an adapter whose tensors are not those that PEFT looks for in the base model, by name and shape."""
    import torch
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict

    shapes = tensor_shapes(folder)
    model = base()
    if adapter["peft_type"] == PROMPT:
        wanted = [adapter.get("num_virtual_tokens"), model.get_input_embeddings().weight.shape[1]]
        if shapes.get("prompt_embeddings") != wanted:
            raise RunError(
                f"{folder} does not fit {name}: its prompt_embeddings have shape {shapes.get('prompt_embeddings')}, "
                f"with its num_virtual_tokens and the width of the model they have {wanted}. Give the model that it "
                "was trained from."
            )
        return
    modules = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    example = f"Its tensors are called such as {min(shapes, default='(none)')}, the modules of {name} such as "
    example += f"{modules[0]}." if modules else "(no linear layer)."
    fix = "Give the model that it was trained from, or save it again from there with save_pretrained."
    try:
        with _quiet(), limited(*models.READING):
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            if adapter["peft_type"] == "LORA":
                config.init_lora_weights = True  # what the weights began with needs the weights of the base
            kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
            adapted = kind(model, config, low_cpu_mem_usage=True).to("meta")
            loaded: Any = set_peft_model_state_dict(adapted, _empty(shapes))
            state = adapted.state_dict()
            own = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    except LimitError as e:
        raise RunError(
            f"{folder} cannot be used: {e} to put it on {name}. Its adapter_config.json has sizes or patterns that no "
            "real adapter has."
        ) from None
    except KeyError as e:  # a module that was trained as a whole, or its tokens
        raise RunError(f"{folder} does not fit {name}: it holds no tensor {e}. {example} {fix}") from e
    except Exception as e:  # whatever PEFT says of values from elsewhere
        lines = [line.strip() for line in str(e).splitlines() if "size mismatch" in line]
        reason = lines[0] if lines else one_line(e)
        raise RunError(f"{folder} does not fit {name}: {reason} {example if not lines else ''} {fix}") from e
    saved = {id(tensor) for tensor in own.values()}
    lacking = sorted(key for key in loaded.missing_keys if id(state[key]) in saved)
    unknown = sorted(loaded.unexpected_keys)
    if lacking or unknown:
        facts = []
        if unknown:
            facts.append(f"{len(unknown)} of its tensors fit no module, such as {_plain(unknown[0])}")
        if lacking:
            facts.append(f"modules that it names get no tensor, such as {_plain(lacking[0])}")
        raise RunError(
            f"{folder} does not fit {name}: {'; '.join(facts)}. PEFT would only warn, and the base model be measured. "
            f"{example} {fix}"
        )


def _plain(name: str) -> str:
    """The name of a tensor as files have it: without that of the adapter."""
    return name.replace(".default", "")


def plain_lora_rank(checkpoint: Path) -> int | None:
    """The rank of an adapter that vLLM's LoRA requests serve as it is, plain LoRA or rsLoRA; None for any other.

    Not for those that train more than two factors of linear layers, or scale layers differently: vLLM would leave that
    out.
    """
    if not models.is_adapter(checkpoint):
        return None
    config = _adapter_config(checkpoint)
    more = (
        *("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"),
        *("use_dora", "lora_bias", "layer_replication", "fan_in_fan_out", "megatron_config"),
        "alora_invocation_tokens",
    )
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or any(config.get(k) for k in more):
        return None
    # PiSSA and the like take a part of the base's weights into the adapter, which PEFT does again when it loads one.
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
        return None
    if any(name in key for key in tensor_shapes(checkpoint) for name in ("lora_embedding_", "lm_head", "embed_out")):
        return None
    return config["r"] if config["r"] <= 512 else None


def another_base(adapter: dict[str, Any], model: dict[str, Any], trust_remote_code: bool = False) -> str | None:
    """What says that an adapter was not trained from a run's base model; None where nothing does.

    The same folder by another path, a folder of the same files, and a hub id whose last part is the folder's name
    count as the same model.

    Args:
        adapter: Its adapter_config.json.
        model: The entry of the manifest: name and revision.
        trust_remote_code: As for transformers.
    """
    said = adapter.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return None
    base = models.resolve_model(model["name"])
    theirs, ours = Path(said), Path(base)
    if ours.is_dir() and os.path.isfile(theirs / "config.json") and any(theirs.glob("*.safetensors")):
        if theirs.resolve() == ours.resolve() or _same_model(theirs, ours, trust_remote_code):
            return None
        return f"adapter_config.json names {said}, whose files are others than those of {base}"
    (said_name, said_commit), (name, commit) = _hub_name(said), _hub_name(base)
    of_hub = [n.count("/") == 1 and not n.startswith((".", "~")) for n in (said_name, name)]
    both = (said_name, name) if all(of_hub) else (Path(said_name).name, Path(name).name)
    if both[0].casefold() != both[1].casefold():
        return f"adapter_config.json names {said}, the run's is {model['name']}"
    said_commit = said_commit or adapter.get("revision") or "main"
    commit = commit or (None if ours.is_dir() else model.get("revision"))
    if commit is None or said_commit in ("main", commit):
        return None
    try:
        if models.pinned_revision(name, said_commit) == commit:
            return None
    except ModelError:
        pass  # what cannot be looked up is not known to be the run's
    return f"adapter_config.json names the revision {said_commit} of {said}, the run's is {commit}"


def _hub_name(model: str) -> tuple[str, str | None]:
    """The hub id and commit of a folder in the hub's cache; the name itself and None of all others."""
    found = re.search(r"models--([^/]+)/snapshots/([^/]+)", model)
    return (found[1].replace("--", "/"), found[2]) if found else (model.rstrip("/"), None)


def _same_model(a: Path, b: Path, trust_remote_code: bool) -> bool:
    """Whether two folders hold the same model, whatever else is in them."""
    files = [sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors")) for folder in (a, b)]
    if files[0] != files[1] or config_differences(a, b, None, trust_remote_code):
        return False
    names = [name for name, _ in files[0]]
    return fingerprint(a, names) == fingerprint(b, names)
