"""Merges several checkpoints into one: checks that they fit together, and writes the folder with its origin.

What does not fit is refused before any weights are read, from configurations and headers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_bench.engine import models
from trace_bench.engine.architecture import config_differences, tensor_shapes
from trace_bench.engine.averaging import OF_VECTORS, Merge, merge_adapters, merge_models
from trace_bench.engine.checkpoints import PLAIN_STARTS, another_base, beyond_products
from trace_bench.engine.hub import model_folder
from trace_bench.engine.models import ModelError
from trace_bench.run import RunError, read_json
from trace_bench.versions import package_versions
from trace_tasks.data.files import fingerprint, fresh_dir, write_json

#: The file in a merged checkpoint that records what it was made from.
RECORD = "merged_from.json"


def combine(
    checkpoints: Sequence[Path], output: Path, how: Merge, *, model: str | None = None, rank: int | None = None
) -> dict[str, Any]:
    """Writes the merge of checkpoints as an ordinary checkpoint: the complete folder or nothing.

    Args:
        checkpoints: Adapters of one base, or full models.
        output: A folder that is not there yet.
        how: The method and its settings.
        model: The base model. Full models need it for the methods of OF_VECTORS, and for wise of one checkpoint.
        rank: Of a merged adapter, at most; None = the sum of the ranks.

    Returns:
        What is also written to RECORD.

    Raises:
        RunError: if something does not fit; nothing is written.
    """
    if output.exists():
        raise RunError(f"{output} already exists. Name a new folder with --output.")
    lora = check(checkpoints, how, model, rank)
    base = None if lora or model is None else model_folder(models.resolve_model(model))
    if base is not None:
        _check_same(base, checkpoints)
    record = how.settings() | {
        "kind": "adapter" if lora else "model",
        "checkpoints": [{"name": _name(path), "fingerprint": fingerprint(path)} for path in checkpoints],
    }
    if base is not None:
        record["model"] = {"name": Path(str(model)).name, "fingerprint": fingerprint(base)}
    with fresh_dir(output) as folder:
        if lora:
            record |= merge_adapters(checkpoints, folder, how, rank)
        else:
            record |= merge_models(checkpoints, folder, how, base)
        record["versions"] = package_versions(["trace-bench", "peft", "torch"])
        write_json(folder / RECORD, record)
    return record


def check(checkpoints: Sequence[Path], how: Merge, model: str | None = None, rank: int | None = None) -> bool:
    """Refuses checkpoints that are not of one kind, one base and the same tensors.

    Returns:
        Whether they are adapters.
    """
    least = 1 if how.method == "wise" else 2
    if len(checkpoints) < least or (how.method == "wise" and len(checkpoints) > 2):
        wanted = "one checkpoint (and its base) or two" if how.method == "wise" else "two checkpoints or more"
        raise RunError(f"{len(checkpoints)} checkpoints given, but {how.method} merges {wanted}.")
    for folder in checkpoints:
        if not (models.is_adapter(folder) or (folder / "config.json").is_file()):
            raise RunError(f"{folder} is not a checkpoint: it has neither an adapter_config.json nor a config.json.")
        models.refuse_odd_files(folder)
        models.refuse_pickle(folder)
    adapters = [folder for folder in checkpoints if models.is_adapter(folder)]
    if adapters and len(adapters) < len(checkpoints):
        other = next(folder for folder in checkpoints if folder not in adapters)
        raise RunError(
            f"{adapters[0]} is an adapter, but {other} is a full model: all checkpoints must be of one kind. Merge the "
            "adapter into its base first (merge_and_unload, save_pretrained)."
        )
    if adapters:
        _check_adapters(adapters, model)
        return True
    if rank is not None:
        raise RunError(f"--rank {rank}: full models have no rank. Leave it out.")
    if model is None and (how.method in OF_VECTORS or len(checkpoints) == 1):
        raise RunError(f"{how.method} of full models needs their base model: give it with --model.")
    if model is not None and how.method not in OF_VECTORS and len(checkpoints) > 1:
        raise RunError(f"--model {model}: {how.method} of {len(checkpoints)} full models needs no base. Leave it out.")
    _check_same(checkpoints[0], checkpoints[1:])
    return False


def _check_adapters(adapters: Sequence[Path], model: str | None) -> None:
    """Refuses adapters that are no plain LoRA, have different bases, or other modules."""
    first = models.adapter_config(adapters[0])
    for folder in adapters:
        config = models.adapter_config(folder)
        # Layers that hold their weights transposed have the same products.
        kind, odd = config.get("peft_type"), [name for name in beyond_products(config) if name != "fan_in_fan_out"]
        if kind != "LORA" or odd:
            what = f"of the kind {kind}" if kind != "LORA" else f"with {odd[0]}"
            raise RunError(
                f"{folder} is an adapter {what}, but only plain LoRA adapters can be merged with each other. Merge "
                "each into its base (merge_and_unload, save_pretrained), and then merge the full models."
            )
        if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
            raise RunError(f"{folder}/adapter_config.json has no number for r or lora_alpha. Copy it again.")
        if config.get("init_lora_weights", True) not in PLAIN_STARTS:
            raise RunError(
                f"{folder} has init_lora_weights={config['init_lora_weights']}: its training changed the base's "
                "weights. Save it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
            )
        base = {"name": model or first.get("base_model_name_or_path") or ""}
        if not model and first.get("revision"):
            base["revision"] = first["revision"]
        if why := _another(config, base):
            raise RunError(
                f"{folder} and {model or adapters[0]} have different base models, so they cannot be merged: {why}. "
                "Give checkpoints of one base model."
            )
    _compare({folder: _products(folder) for folder in adapters})


def _another(config: dict[str, Any], base: dict[str, Any]) -> str | None:
    """Why an adapter has a different base model; a base model that is not here is compared by name."""
    said = config.get("base_model_name_or_path") or ""
    if said == base["name"] and config.get("revision") == base.get("revision", config.get("revision")):
        return None
    try:
        return another_base(config, base)
    except ModelError:
        same = Path(said).name.casefold() == Path(base["name"]).name.casefold()
        return None if same else f"adapter_config.json names {said}, not {base['name']}"


def _products(folder: Path) -> dict[str, list[int]]:
    """The shapes of the products B A of an adapter, by the names of the A."""
    shapes, rank, found = tensor_shapes(folder), models.adapter_config(folder)["r"], {}
    for name, shape in shapes.items():
        a, b = (".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")
        partner = name.replace(a, b)
        other = shapes.get(partner, [])
        if partner == name or len(shape) != 2 or len(other) != 2:
            raise RunError(
                f"{folder} has {name}, which is not the A or B of a linear layer and cannot be merged. Merge each "
                "adapter into its base (merge_and_unload, save_pretrained), and then merge the full models."
            )
        if ".lora_A." in name:
            if [shape[0], other[1]] != [rank, rank]:
                raise RunError(f"{folder}: {name} has rank {shape[0]}, but its adapter_config.json says r={rank}.")
            found[name] = [other[0], shape[1]]
    return found


def _check_same(first: Path, others: Sequence[Path]) -> None:
    """Refuses full models whose configs or tensors differ."""
    for folder in (first, *others):
        if read_json(folder / "config.json").get("quantization_config"):
            raise RunError(f"{folder} is quantised: its packed weights have no mean. Give the original model.")
    for folder in others:
        if differences := config_differences(first, folder):
            raise RunError(f"{folder} and {first} are different models: {'; '.join(differences[:3])}.")
    _compare({folder: tensor_shapes(folder) for folder in (first, *others)})


def _compare(shapes: dict[Path, dict[str, list[int]]]) -> None:
    """Refuses checkpoints whose tensors have other names or shapes than the first one's."""
    (first, wanted), *others = shapes.items()
    for folder, found in others:
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                said = [f"has shape {s[name]}" if name in s else "is missing" for s in (wanted, found)]
                raise RunError(
                    f"{folder} does not fit {first}: {name} {said[1]}, but in the first it {said[0]}. Give checkpoints "
                    "of one base with the same layers; save full models with the same version of transformers."
                )


def _name(path: Path) -> str:
    """A checkpoint's name without its path; within a run with its stage."""
    path = path.absolute()
    return f"{path.parent.name}/{path.name}" if path.name in ("adapter", "model") else path.name
