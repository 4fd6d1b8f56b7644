"""The architecture and tensors of a model, without its weights.

The model of a config.json is built on torch's "meta" device, which takes no memory. transformers then loads the names
and shapes from the headers of the weight files into it, as it would load the weights.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.ends import ends_of_model
from trace_bench.engine.hub import ModelError, model_folder
from trace_bench.engine.switches import refuse_other_in_vllm
from trace_bench.run import RunError, is_file_name, read_json
from trace_tasks.errors import brief
from trace_tasks.limits import LimitError, limited

log = logging.getLogger(__name__)

_OTHER_HEAD = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM)$")
#: Types that do not write from left to right: a token's state depends on later tokens.
_BOTH_WAYS = {"cpmant", "xlnet"}
#: Buffers that older files hold and that today's classes neither have nor name among what they ignore.
_OLD_BUFFERS = re.compile(r"\.(masked_bias|inv_freq|position_ids|causal_mask|cos_cached|sin_cached|_extra_state)$")
#: Entries of config.json that change no answer, or are handled elsewhere (EOS by the engine, the vocabulary by its
#: shapes, generation by greedy decoding).
_HARMLESS = {
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
#: The names that configurations use for a model's context length; sliding windows are no limit.
_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"),
    "max_seq_length",
)
#: Types for which vLLM adds the first part of tensor names, since their files on the hub lack it.
_COMPLETED = {"bloom", "gpt2", "opt"}


def architecture(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Builds the model of a config.json without weights.

    Raises:
        ModelError: if the architecture is not known, is no causal language model, or needs code that is not trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        config = models.load_config(model, revision, trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the modules are the same, and building quantised ones needs other packages
    try:
        with torch.device("meta"), quiet(), limited(*models.READING):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as e:  # values from elsewhere make libraries raise anything
        raise ModelError(f"transformers cannot build a causal language model from {model}: {models.why_not(e)}") from e


def refuse_not_causal(base: str, config: Any) -> None:
    """Refuses a base model that does not write text from left to right, by its configuration.

    Raises:
        ModelError: saying what it is.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    settings, kind = config.to_dict(), type(config)
    own_code = "AutoModelForCausalLM" in (settings.get("auto_map") or {})
    other_heads = [name for name in config.architectures or () if _OTHER_HEAD.search(name)]
    if settings.get("is_encoder_decoder") or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not settings.get("is_decoder"):
        what = "an encoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        what = "a different kind of model"
    elif _reads_both_ways(config):
        what = "one that reads text in both directions, so in training an answer would predict itself"
    elif other_heads:
        what = f"a {other_heads[0]} without a head for the next token"
    else:
        return
    raise ModelError(
        f"{base} ({config.model_type}) is not a causal model but {what}. Use a model such as Llama, Qwen or GPT-2."
    )


def context_length(model: dict[str, Any]) -> int | None:
    """The context length in a model's configuration; None if it has no limit."""
    return min((model[name] for name in _CONTEXT if isinstance(model.get(name), int)), default=None)


def _reads_both_ways(config: Any) -> bool:
    """Whether a token's states depend on those behind it: by its type, or as a model for embeddings made of another."""
    text = config.get_text_config(decoder=True).to_dict()
    by_entry = text.get("is_causal") is False or text.get("use_bidirectional_attention") in (True, "all")
    return config.model_type in _BOTH_WAYS or by_entry


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the reports and bars of transformers and PEFT about weights that are not loaded."""
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


# ------------------------------------------------------------------------------------------------------------- tensors


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that transformers and PEFT take the weights of a checkpoint from, by their names alone.

    Raises:
        RunError: if there are none, or there are two sets of them.
    """
    adapter = models.is_adapter(checkpoint)
    single = checkpoint / ("adapter_model.safetensors" if adapter else "model.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    indexed = index.exists() and not adapter
    parts = sorted({checkpoint / name for name in _weight_map(index).values()}) if indexed else []
    if single.exists():
        if parts and parts != [single]:
            raise RunError(
                f"{checkpoint} has two models: transformers would load {single.name}, but vLLM the files that "
                f"{index.name} names. Remove the older one."
            )
        return [single]
    if not parts:
        others = sorted(file.name for file in checkpoint.glob("*.safetensors"))
        there = f"; it has {', '.join(others[:3])}, which nobody would load" if others else ""
        raise RunError(
            f"{checkpoint} has no {single.name}{'' if adapter else f' and no {index.name}'}{there}. Copy the "
            "checkpoint again, or save it with save_pretrained."
        )
    return parts


def tensor_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """The names and shapes of a checkpoint's tensors. A header says how long its file is, so a cut file is found.

    Raises:
        RunError: if there are no weights, a file is missing or damaged, or was saved without values.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in weight_files(checkpoint):
        try:
            file.open("rb").close()  # safetensors reports an unreadable file as missing
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except PermissionError:
            raise
        except (OSError, SafetensorError) as e:
            raise RunError(f"{file} is missing or damaged ({e}). Copy the checkpoint again.") from e
    if empty := sorted(name for name, shape in shapes.items() if shape == [0]):
        raise RunError(
            f"{checkpoint} has no values for {len(empty)} tensors, such as {empty[0]}. ZeRO-3 saves such files if it "
            "does not gather the weights. Save it again with stage3_gather_16bit_weights_on_model_save, or combine the "
            "parts that the training saved: python zero_to_fp32.py . MODEL --safe_serialization."
        )
    return shapes


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says."""
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) and is_file_name(name) for name in found.values()):
        raise RunError(
            f"{index} is damaged: its weight_map must name a file in this folder for each tensor. Copy it again."
        )
    return found


def empty_tensors(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Tensors of these shapes that take no memory."""
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_full_model(folder: Path, base: Callable[[], Any] | None, backend: str, trust_remote_code: bool) -> None:
    """Refuses a full model that is incomplete, or whose tensors do not fit its architecture.

    `base` makes the architecture of the base model: vLLM puts the weights into an engine that was started on it. None =
    the model is the base model.
    """
    shapes = tensor_shapes(folder)
    own = architecture(folder, None, trust_remote_code)
    if _reads_both_ways(own.config):
        raise ModelError(
            f"{folder} reads a text in both directions by its config.json (is_causal, use_bidirectional_attention), as "
            "models for embeddings do: it writes no text. Give a model that was trained to write."
        )
    ends_of_model(folder)
    if backend == "vllm":
        refuse_other_in_vllm(folder, own.config)
        _refuse_more_weights(folder)
        _refuse_other_names(folder, own, shapes)
    packed = read_json(folder / "config.json").get("quantization_config")
    if packed is not None and (backend == "hf" or base is None):
        _check_quantised(folder, packed)
    if packed:
        return  # its tensors are packed, so names and shapes are those of the quantisation
    _compare(folder, own, shapes, "the model that its config.json describes")
    if backend == "vllm" and base is not None:
        _compare(folder, base(), shapes, "the base model")


def check_base(base: str, backend: str, trust_remote_code: bool, revision: str | None = None) -> None:
    """Refuses a base model that writes no text from left to right, or whose files are not what its config.json says.

    Of the hub's models no file is read but a head that vLLM would not load.

    Raises:
        RunError: naming a tensor, or the files.
        ModelError: if it is no causal language model, or the head is another one than its config.json says.
    """
    config = models.load_config(base, revision, trust_remote_code)
    refuse_not_causal(base, config)
    if backend == "vllm":
        refuse_other_in_vllm(base, config)
    folder = Path(base)
    if not folder.is_dir():
        tied = config.get_text_config(decoder=True).to_dict().get("tie_word_embeddings")
        if backend == "vllm" and tied and _has_own_head(model_folder(base, revision), trust_remote_code):
            raise models.own_head(base)
        return
    check_full_model(folder, None, backend, trust_remote_code)
    if _has_own_head(folder, trust_remote_code):
        raise models.own_head(base)


def _refuse_more_weights(folder: Path) -> None:
    """Refuses further weight files next to those of the model: without an index vLLM loads all files."""
    if (folder / "model.safetensors.index.json").exists():
        return
    if more := sorted(file.name for file in {*folder.glob("*.safetensors")} - {*weight_files(folder)}):
        raise RunError(
            f"{folder} has {', '.join(more[:3])} next to the model, and vLLM would load it too. Move it elsewhere, or "
            "use --backend hf."
        )


def _refuse_other_names(folder: Path, model: Any, shapes: dict[str, list[int]]) -> None:
    """Refuses tensor names that lack their first part, or have it twice: transformers maps them, vLLM does not.

    Both know the names that save_pretrained gives: it keeps the older ones of a Gemma 3 with images.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if shapes.keys() <= revert_weight_conversion(model, model.state_dict()).keys():
        return
    prefix, names = f"{model.base_model_prefix}.", model.state_dict().keys()
    other = [n for n in shapes if n not in names and (prefix + n in names or n.removeprefix(prefix) in names)]
    if other and model.config.model_type not in _COMPLETED:
        raise RunError(
            f"{folder} has tensor names such as {other[0]}, but vLLM looks for names such as {min(names)}: the prefix "
            f"{prefix!r} is missing or too much. Load it with AutoModelForCausalLM and save it again, or use --backend "
            "hf."
        )


def _check_quantised(folder: Path, packed: Any) -> None:
    """Refuses quantised weights for which a package or a device is missing; loading would fail later."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(packed, pre_quantized=True).validate_environment(device_map=None)
    except Exception as e:  # each kind of quantisation raises its own errors
        raise RunError(f"{folder} has quantised weights that transformers cannot load here: {brief(e)}") from e


def _compare(folder: Path, model: Any, shapes: dict[str, list[int]], name: str) -> None:
    """Loads names and shapes into an architecture; older names and buffers count as transformers counts them."""
    try:
        with quiet(), limited(*models.READING):
            _, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=empty_tensors(shapes),
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, LimitError) as e:
        raise RunError(f"{folder} does not have the tensors of {name}: {brief(e)}. Give the whole model.") from e
    lacking, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if lacking:
        instead = f"; it has {unknown[0]}, which does not fit" if unknown else ""
        raise RunError(
            f"{folder} lacks {len(lacking)} tensors of {name}, such as {lacking[0]}{instead}. An engine would use "
            "those of a different model. Give the whole model, with the names that save_pretrained gives."
        )
    if found["mismatched_keys"]:
        tensor, shape, wanted = min(found["mismatched_keys"], key=str)
        raise RunError(
            f"{folder}: {tensor} has shape {list(shape)}, but {name} has {list(wanted)}. It was trained from a "
            "different model, its vocabulary was changed, or tensors are missing. Give the model that it was trained "
            "from, or its own config.json, or use --backend hf."
        )
    unknown = [name for name in unknown if not _OLD_BUFFERS.search(name)]
    if unknown:
        parts = {name.split(".")[0] for name in model.state_dict()}
        inside = [name for name in unknown if name.split(".")[0] in parts]
        if inside:
            raise RunError(
                f"{folder} has {len(inside)} tensors that do not belong to {name}, such as {inside[0]}: they would "
                "be left out. Give the config.json that belongs to these weights."
            )
        log.warning("%s has tensors outside the language model, such as %s. They are not used.", folder, unknown[0])


# --------------------------------------------------------------------------------------------------------- config.json


def config_differences(
    base: str | Path, checkpoint: Path, revision: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """The entries of a full checkpoint's config.json that change answers, with the base model's value and its own.

    Without any, an engine that was started on the base model serves the checkpoint's weights as they were trained.
    transformers' classes read both, so that defaults count as if they were written, and older names as the newer ones
    (rope_theta and rope_scaling are rope_parameters). The vocabulary is compared by its shapes.
    """
    with quiet():
        a = _flat(models.load_config(base, revision, trust_remote_code).to_dict())
        b = _flat(models.load_config(checkpoint, None, trust_remote_code).to_dict())
    if b.get("tie_word_embeddings") and _has_own_head(checkpoint, trust_remote_code):
        b["tie_word_embeddings"] = False
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        # An empty entry that one side alone has is no difference.
        if a.get(key) != b.get(key) and (a.get(key) or b.get(key) or (key in a and key in b))
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a config that may change answers, nested ones with dots."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if key in _HARMLESS or (key == "type" and "rope_type" in value):  # the older name of rope_type
            continue
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, dict) else {prefix + key: entry}
    return flat


def _has_own_head(model: Path, trust_remote_code: bool) -> bool:
    """Whether the files of a tied model hold a different head than its embeddings: transformers then unties it."""
    import torch
    from safetensors import safe_open

    made = architecture(model, None, trust_remote_code)
    if not made.get_expanded_tied_weights_keys(all_submodels=True):
        return False
    ends = [m for m in (made.get_input_embeddings(), made.get_output_embeddings()) if m is not None]
    names = {f"{name}.weight" for name, module in made.named_modules() if any(module is end for end in ends)}
    values: dict[str, Any] = {}
    for file in weight_files(model) if any(model.glob("*.safetensors")) else ():
        with safe_open(file, framework="pt") as tensors:
            values |= {name: tensors.get_tensor(name) for name in names & set(tensors.keys())}
    return len(values) == 2 and not torch.equal(*values.values())
