"""Checks whether an engine can serve a checkpoint, as the model that was trained.

This is asked before an engine starts or anything is recorded, from headers of weight files and configurations alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.architecture import (
    architecture,
    check_base,
    check_full_model,
    config_differences,
    empty_tensors,
    quiet,
    tensor_shapes,
)
from trace_bench.engine.ends import eos_number, eos_text
from trace_bench.engine.models import PROMPT, ModelError
from trace_bench.engine.sharing import shared_layer, shared_weights
from trace_bench.run import Run, RunError, Stage, fingerprint
from trace_tasks.errors import brief
from trace_tasks.limits import LimitError, limited
from trace_tasks.tokens import leading_ids

log = logging.getLogger(__name__)

#: Kinds of PEFT adapters that change weights and can be merged: both backends serve them. The tests compare each
#: merged model with the unmerged one.
MERGED = {
    *("LORA", "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3"),
    *("LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD"),
    *("SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
#: Kinds that PEFT cannot merge. transformers serves them as they are. Lily is not served at all: its router takes the
#: mean of all tokens in a batch, so an answer depends on the other prompts, and on the cache.
UNMERGED = {"BEFT"}
#: Options that PEFT reads as regular expressions, as it does a text in target_modules.
_PATTERNS = ("exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
#: Options of LoRA with which an adapter does more than add to weights: a part of the input, other layers, a router.
_NOT_A_SUM = ("alora_invocation_tokens", "layer_replication", "arrow_config")
#: Values of `init_lora_weights` that do not change the base model's weights: the adapter holds everything.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
#: Others that are the same at each load, though they may take a part of the base into the adapter. The rest is random,
#: or needs the data of the training: PEFT would put other weights below the adapter, or fail.
_SAME_STARTS = ("mica", "olora", "pissa")
#: Options of LoRA that PEFT gets wrong where it joins the adapters of the single experts of older transformers.
_NOT_FOR_JOINED_EXPERTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
#: The entries of a LoRA config that may have any value in a plain sum of products B A; all others must be empty.
_OF_PRODUCTS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "eva_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "loftq_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying"),
}
#: The most steps of an iteration that an adapter_config.json may ask for, such as of an approximate inverse.
MOST_STEPS = 1000


def check_checkpoints(run: Run, stages: Iterable[Stage], backend: str, trust_remote_code: bool = False) -> None:
    """Refuses checkpoints that the engine of a backend would load wrongly, or fail on half-way.

    Raises:
        RunError: naming the checkpoint, and what to do.
        models.ModelError: if weights are pickles, or a model brings code that is not trusted.
    """
    stages, chain = list(stages), run.manifest.get("chain", False)
    name, revision = run.manifest["model"]["name"], run.manifest["model"].get("revision")
    place = models.base_of_run(run.manifest["model"])
    check_base(place, backend, trust_remote_code, revision)
    base = partial(architecture, place, revision, trust_remote_code)
    for stage in stages:
        own = stage.checkpoint if stage.external is None else None  # `check_own` compares its bytes
        if own is not None and models.is_adapter(own):  # a run may come from elsewhere
            adapter = models.adapter_config(own)
            _refuse_endless(own, adapter)
            if any(adapter.get(key) for key in _PATTERNS) or isinstance(adapter.get("target_modules"), str):
                _check_fit(own, adapter, base, name, backend)
    for folder in dict.fromkeys(path for s in stages if s.external for path in (*s.below, s.external)):
        if folder.is_dir():
            models.refuse_odd_files(folder)
        models.refuse_pickle(folder)
        eos_number(folder, eos_text(folder))  # which ends its answers
        if models.is_adapter(folder):
            adapter = models.adapter_config(folder)
            _check_kind(folder, adapter, backend, chain)
            _check_known(folder, adapter)
            _refuse_endless(folder, adapter)
            # In a chain only the first adapter was trained on the base model itself.
            named = not run.manifest.get("renamed_base") and (not chain or folder == run.stages[1].external)
            if named and (why := another_base(adapter, run.manifest["model"], trust_remote_code)):
                raise RunError(
                    f"{folder} was not trained from the base model of the run: {why}. Name the right one with --model; "
                    "use --renamed-base if it is a copy under a different name, or with weights of a different "
                    "precision (a quantised model and its original); use --chain if each adapter was trained on the "
                    "base with all earlier ones merged in."
                )
            _check_fit(folder, adapter, base, name, backend)
        elif chain:
            raise RunError(
                f"{folder} is a full model, so it cannot be stacked on the adapters of a chain. Evaluate it in a "
                "run without --chain."
            )
        else:
            check_full_model(folder, base, backend, trust_remote_code)
            _check_vocabulary(folder, place, revision, trust_remote_code)


def check_own(stage: Stage) -> None:
    """Refuses a checkpoint of the run that has changed since its training wrote it.

    Raises:
        RunError: naming it, and what to do.
    """
    path = stage.checkpoint
    if path is None:
        return
    models.refuse_pickle(path)
    if fingerprint(path) != stage.fingerprint():
        raise RunError(
            f"{path} has changed since the training of the stage (its fingerprint differs). Restore it, or delete "
            f"{stage.train_file} to train the stage again."
        )
    if models.is_adapter(path):
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        kind = models.adapter_config(path).get("peft_type")
        if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise RunError(
                f"{path} is an adapter of the kind {kind}, which the installed PEFT does not know. Install the PEFT "
                "version that trained the stage: manifest.json names it."
            )


def warn_of_tokenizers(run: Run, stages: Iterable[Stage], trust_remote_code: bool = False) -> None:
    """Warns if a checkpoint from elsewhere has a different tokenizer: the base model's is used for all."""
    model = run.manifest["model"]
    for stage in stages:
        if stage.external is None or not (stage.external / "tokenizer_config.json").exists():
            continue
        try:
            base = models.load_tokenizer(models.base_of_run(model), model.get("revision"), trust_remote_code)
            own = models.load_tokenizer(stage.external, None, trust_remote_code)
        except Exception as e:  # only a warning: this tokenizer is not used
            log.warning("Cannot compare the tokenizer of %s with that of the base model: %s", stage.name, e)
            continue
        differs = ["vocabulary"] if own.get_vocab() != base.get_vocab() else []
        differs += ["chat template"] if own.chat_template != base.chat_template else []
        differs += ["EOS"] if own.eos_token != base.eos_token else []
        differs += ["way to begin a text"] if leading_ids(own) != leading_ids(base) else []
        if differs:
            log.warning(
                "%s has a different %s from the base model. It is measured with that of the base model, as all are.",
                stage.name,
                " and a different ".join(differs),
            )


def _check_vocabulary(folder: Path, base: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuses a full model that lost embeddings which the base model has, of tokens that its tokenizer writes."""
    configs = models.load_config(base, revision, trust_remote_code), models.load_config(folder, None, trust_remote_code)
    sizes = [config.get_text_config(decoder=True).to_dict().get("vocab_size") for config in configs]
    if None in sizes or sizes[1] >= sizes[0]:
        return
    tokenizer = models.load_tokenizer(base, revision, trust_remote_code)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= sizes[1]}
    if {*beyond.values()} - (tokenizer.get_added_vocab().keys() - {tokenizer.bos_token, tokenizer.eos_token}):
        raise RunError(
            f"{folder} has {sizes[1]} embeddings and the base model {sizes[0]}: {len(beyond)} tokens of the base "
            f"model's tokenizer, with which all are measured, have none, such as {beyond[min(beyond)]!r}. "
            "Measure it as a base model: --model, in a run of its own."
        )


# ------------------------------------------------------------------------------------------------------------ adapters


def _check_kind(folder: Path, adapter: dict[str, Any], backend: str, chain: bool) -> None:
    """Refuses kinds of adapters that the backend cannot serve."""
    kind = adapter.get("peft_type")
    whole = "Merge it in the program that trained it (merge_and_unload, save_pretrained), and give the full model"
    if not isinstance(kind, str) or kind not in MERGED | UNMERGED | {PROMPT}:
        raise RunError(
            f"{folder} is an adapter of the kind {kind}, which is not supported: its merged weights were not checked, "
            f"and it is not a plain soft prompt. Use {', '.join(sorted(MERGED))} or {PROMPT}, or with --backend hf "
            f"also {', '.join(sorted(UNMERGED))}. {whole}, if the kind can be merged."
        )
    if adapter.get("task_type") not in (None, "CAUSAL_LM"):
        raise RunError(
            f"{folder} was trained for the task type {adapter['task_type']}: its model has a different head or "
            "different inputs than a causal language model. Only CAUSAL_LM is supported."
        )
    if chain and kind == PROMPT:
        raise RunError(
            f"{folder} is a soft prompt, and a chain cannot stack adapters on it. Evaluate it without --chain."
        )
    # What PEFT's merge of LN_TUNING leaves of whole modules would be found in no file of a model.
    option = "modules_to_save" if kind == "LN_TUNING" else "lora_bias"
    if backend == "vllm" and (kind in UNMERGED or adapter.get(option)):
        what = f" with {option}" if adapter.get(option) else ""
        raise RunError(
            f"{folder} is an adapter of the kind {kind}{what}. vLLM needs merged weights, and PEFT can merge it into "
            "few models only, or into none. Use --backend hf."
        )
    if adapter.get("sample_at_inference"):
        raise RunError(
            f"{folder} has sample_at_inference, so its weights are sampled again for each token. Set it to false in "
            "its adapter_config.json to measure their means."
        )
    for name in _NOT_A_SUM if kind == "LORA" else ():
        if adapter.get(name):
            raise RunError(f"{folder} uses {name}, and no engine here computes that as in training. {whole}.")
    start = adapter.get("init_lora_weights", True)
    if kind == "LORA" and start not in (*PLAIN_STARTS, *_SAME_STARTS):
        raise RunError(
            f"{folder} has init_lora_weights={start!r}: its training changed the weights of the base model, and "
            f"loading the adapter does not repeat that. {whole}; or save it as a plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def _check_known(folder: Path, adapter: dict[str, Any]) -> None:
    """Refuses options that only a newer PEFT knows, and two models in one folder."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    known = PEFT_TYPE_TO_CONFIG_MAPPING[adapter["peft_type"]].__dataclass_fields__
    if unknown := [f"{name}={value!r:.60}" for name, value in adapter.items() if value and name not in known]:
        raise RunError(
            f"{folder}/adapter_config.json has {', '.join(unknown[:3])}, which the installed PEFT does not know and "
            f"would ignore. Install the PEFT that wrote it ({adapter.get('peft_version') or 'a newer one'}); or remove "
            "the entry if it has no effect."
        )
    full = [name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).exists()]
    if full:
        raise RunError(
            f"{folder} has both an adapter and a full model ({full[0]}), so it is not clear which one to use. Move one "
            "of them to its own folder."
        )


def _refuse_endless(folder: Path, config: dict[str, Any]) -> None:
    """Refuses an adapter whose computation on real weights, which has no time limit, would never end."""
    said = re.search(r"_niter_(\d+)$", str(config.get("init_lora_weights")))
    steps: dict[str, Any] = {"init_lora_weights": int(said[1][:9])} if said else {}
    for entries in (config, *(value for value in config.values() if isinstance(value, dict))):
        steps |= {k: n for k, n in entries.items() if re.search("iter|terms", k) and isinstance(n, int | float)}
    for key, number in steps.items():
        if number > MOST_STEPS:
            raise RunError(
                f"{folder}/adapter_config.json: {key} needs {number} steps, which would never end. At most "
                f"{MOST_STEPS} are allowed; no real adapter has more."
            )


def _check_fit(folder: Path, adapter: dict[str, Any], base: Callable[[], Any], name: str, backend: str) -> None:
    """Refuses an adapter whose tensors are not those that PEFT looks for in the base model, by name and shape."""
    import torch

    # MonteCLoRA's sampler is of its training alone.
    shapes = {key: shape for key, shape in tensor_shapes(folder).items() if ".lora_monteclora_sampler." not in key}
    model = base()
    if adapter["peft_type"] == PROMPT:
        wanted = [adapter.get("num_virtual_tokens"), model.get_input_embeddings().weight.shape[1]]
        if shapes.get("prompt_embeddings") != wanted:
            raise RunError(
                f"{folder} does not fit {name}: its prompt_embeddings have shape {shapes.get('prompt_embeddings')}, "
                f"but its num_virtual_tokens and the model's width give {wanted}. Give the model that it was trained "
                "from."
            )
        return
    modules = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expert = next((key for key in shapes if re.search(r"\.experts\.\d+\.", key)), None)
    used = [key for key in _NOT_FOR_JOINED_EXPERTS if adapter.get(key)]
    if expert and used and not any(".experts.0." in key for key in modules):
        raise RunError(
            f"{folder} has an adapter for each expert, such as {expert}, with {used[0]}. Here the experts of a layer "
            "are one tensor, for which PEFT would use a different scale. Merge it in the program that trained it "
            "(merge_and_unload, save_pretrained), and give the full model."
        )
    example = f"It has tensors such as {min(shapes, default='(none)')}, and {name} has modules such as "
    example += f"{modules[0]}." if modules else "(no linear layer)."
    fix = "Give the model that it was trained from, or save it again with save_pretrained of the PEFT model."
    try:
        lacking, unknown = _put_on(folder, adapter, model, shapes)
    except LimitError as e:
        raise RunError(
            f"{folder} cannot be put on {name}: {e} for it. Its adapter_config.json has sizes or patterns that no "
            "real adapter has."
        ) from None
    except KeyError as e:  # a module that was trained as a whole, or its tokens
        raise RunError(f"{folder} does not fit {name}: it has no tensor {e}. {example} {fix}") from e
    except Exception as e:  # values from elsewhere make PEFT raise anything
        lines = [line.strip() for line in str(e).splitlines() if "size mismatch" in line]
        reason = lines[0] if lines else f"{brief(e)} {example}"
        if lines and re.search("embed|lm_head|wte", lines[0]):
            fix += " If its training added tokens: merge it there, and give the full model, with --backend hf."
        raise RunError(f"{folder} does not fit {name}: {reason} {fix}") from e
    if backend == "vllm" and (shared := shared_weights(model)):
        raise shared_layer(folder, shared)
    facts = [f"{len(unknown)} of its tensors fit no module, such as {unknown[0]}"] if unknown else []
    facts += [f"it has no tensor for modules that it names, such as {lacking[0]}"] if lacking else []
    if facts:
        raise RunError(
            f"{folder} does not fit {name}: {'; '.join(facts)}. PEFT would only warn and use the base model. "
            f"{example} {fix}"
        )


def _put_on(
    folder: Path, adapter: dict[str, Any], model: Any, shapes: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """Loads an adapter's names and shapes into PEFT's model; returns the missing and the unknown tensors."""
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM

    with quiet(), limited(*models.READING):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if adapter["peft_type"] == "LORA":
            config.init_lora_weights = True  # others need the weights of the base
        if getattr(config, "rank_pattern", None) and adapter["peft_type"] == "ADALORA":
            shapes, config.rank_pattern = _unpruned(config.rank_pattern, shapes), None
        kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
        adapted = kind(model, config, low_cpu_mem_usage=True).to("meta")
        return _loaded(adapted, empty_tensors(shapes))


def _unpruned(pattern: dict[str, list[bool]], shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """The shapes of AdaLoRA's tensors before training pruned some ranks: PEFT needs values to do that itself."""
    whole = {name: list(shape) for name, shape in shapes.items()}
    for name, kept in pattern.items():
        stem = f"base_model.model.{name.removesuffix('.lora_E')}"
        for part, side in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
            shape = whole.get(f"{stem}.{part}", [])
            if len(shape) == 2 and shape[side] == sum(kept):
                shape[side] = len(kept)
    return whole


def _loaded(adapted: Any, tensors: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Loads an adapter's tensors into PEFT's model; returns the missing and the unknown names."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    loaded: Any = set_peft_model_state_dict(adapted, tensors)
    state = adapted.state_dict()
    own = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    saved = {id(tensor) for tensor in own.values()}
    lacking = sorted(key for key in loaded.missing_keys if id(state[key]) in saved)

    def as_in_files(keys: list[str]) -> list[str]:  # without the name of the adapter
        return [key.replace(".default", "") for key in keys]

    return as_in_files(lacking), as_in_files(sorted(loaded.unexpected_keys))


def lost_names(adapted: Any) -> list[str]:
    """The tensors that PEFT saves but does not find when it loads: transformers renames them for some types."""
    from peft import get_peft_model_state_dict

    return _loaded(adapted, get_peft_model_state_dict(adapted, save_embedding_layers=False))[0]


def beyond_products(adapter: dict[str, Any]) -> list[str]:
    """The entries with which a LoRA adapter is more than its products B A, or these have factors of their own."""
    odd = [name for name, value in adapter.items() if value and name not in _OF_PRODUCTS]
    return odd + ["bias"] * (adapter.get("bias", "none") != "none")


def plain_lora_rank(checkpoint: Path) -> int | None:
    """The rank of an adapter that vLLM's LoRA requests serve as it was trained (LoRA, rsLoRA); None for any other."""
    if not models.is_adapter(checkpoint):
        return None
    config = models.adapter_config(checkpoint)
    plain_start = config.get("init_lora_weights", True) in PLAIN_STARTS
    if config.get("peft_type") != "LORA" or beyond_products(config) or not plain_start:
        return None
    pairs = re.compile(r"(?!.*(lm_head|embed_out|\.experts\.)).*\.lora_[AB]\.weight")
    if not all(pairs.fullmatch(key) for key in tensor_shapes(checkpoint)):
        return None
    return config["r"] if config["r"] <= 512 else None


# ---------------------------------------------------------------------------------------------------- their base model


def another_base(adapter: dict[str, Any], model: dict[str, Any], trust_remote_code: bool = False) -> str | None:
    """How an adapter_config.json names a different base model than a manifest (name, revision); None if it does not.

    The same folder by another path, a folder of the same files, and a hub id whose last part is the folder's name
    count as the same model.
    """
    said = adapter.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        return None
    base = models.base_of_run(model)
    theirs, ours = Path(said), Path(base)
    if ours.is_dir() and os.path.isfile(theirs / "config.json") and any(theirs.glob("*.safetensors")):
        if theirs.resolve() == ours.resolve() or _same_model(theirs, ours, trust_remote_code):
            return None
        return f"adapter_config.json names {said}, and its files differ from those of {base}"
    (said_name, said_commit), (name, commit) = _hub_name(said), _hub_name(base)
    of_hub = [n.count("/") == 1 and not n.startswith((".", "~")) for n in (said_name, name)]
    both = (said_name, name) if all(of_hub) else (Path(said_name).name, Path(name).name)
    if both[0].casefold() != both[1].casefold():
        return f"adapter_config.json names {said}, but the run has {model['name']}"
    said_commit = said_commit or adapter.get("revision") or "main"
    commit = commit or (None if ours.is_dir() else model.get("revision"))
    if commit is None or said_commit in ("main", commit):
        return None
    try:
        if models.pinned_revision(name, said_commit) == commit:
            return None
    except ModelError:
        pass  # what cannot be looked up is not known to be the run's
    return f"adapter_config.json names the revision {said_commit} of {said}, but the run has {commit}"


def _hub_name(model: str) -> tuple[str, str | None]:
    """The hub id and commit of a folder in the hub's cache; for any other name the name itself and None."""
    found = re.search(r"models--([^/]+)/snapshots/([^/]+)", model)
    return (found[1].replace("--", "/"), found[2]) if found else (model.rstrip("/"), None)


def _same_model(a: Path, b: Path, trust_remote_code: bool) -> bool:
    """Whether two folders hold the same model; their other files do not matter."""
    files = [sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors")) for folder in (a, b)]
    if files[0] != files[1] or config_differences(a, b, None, trust_remote_code):
        return False
    names = [name for name, _ in files[0]]
    return fingerprint(a, names) == fingerprint(b, names)
