"""Runs of checkpoints that were trained elsewhere."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from trace_bench import checks
from trace_bench.engine import models
from trace_bench.engine.checkpoints import check_checkpoints
from trace_bench.keys import refuse_secrets
from trace_bench.manifest import identity
from trace_bench.run import FORMAT, WRITTEN, Run, RunError, is_file_name
from trace_bench.tasks import check_stages, data_record, load_tasks
from trace_bench.waiting import locked
from trace_tasks import data
from trace_tasks.data.files import refuse_links, remove, write_json
from trace_tasks.errors import suggestion
from trace_tasks.tokens import Chat

log = logging.getLogger(__name__)

#: What makes a folder a checkpoint.
_CONFIGS = {"adapter_config.json", "config.json"}
#: Files of other formats in a folder -> how to convert them.
_CONVERSIONS = {
    "zero_to_fp32.py": "Combine DeepSpeed's parts: python zero_to_fp32.py . MODEL --safe_serialization",
    **dict.fromkeys(
        ("*.nemo", "common.pt", "*/common.pt", "latest_checkpointed_iteration.txt"),
        "Export it with the tools of Megatron or NeMo in the format of transformers",
    ),
    **dict.fromkeys(
        ("*.distcp", "*/*.distcp"),
        "Combine FSDP's parts: accelerate merge-weights FOLDER_OF_THE_PARTS MODEL",
    ),
    "*.gguf": "Convert it: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE), then save_pretrained",
    "*.bin*": "If you trust these pickles, load the model and save it again with save_pretrained",
    "*.pt": "Export the model in the format of transformers or PEFT, with the program that trained it",
}
#: A name and the number at its end.
_NUMBERED = re.compile(r"(.*?)(\d{1,18})")


def refuse_answers_only(run: Run) -> None:
    """Refuses a run that has answers but no weights, such as an import.

    Raises:
        RunError: saying where its answers are from.
    """
    if origin := run.manifest.get("answers_only"):
        raise RunError(
            f"{run.path} has answers but no weights: {origin}. So its stages cannot be measured further, only "
            "reported (`trace-bench report`). To measure checkpoints, begin a run in a new folder: "
            "trace-bench evaluate RUN --model BASE --checkpoint NAME=PATH."
        )


def measured_run(path: str | Path) -> Run | None:
    """The run at a path, if any of its cells is measured; else None."""
    if not (Path(path) / "manifest.json").exists():
        return None
    run = Run.open(path)
    refuse_answers_only(run)
    return run if any(True for stage in run.stages for _ in stage.path.glob("eval/*.json")) else None


def external_run(
    path: str | Path,
    checkpoints: dict[str, str],
    *,
    model: str,
    tasks: list[str],
    settings: dict[str, Any],
    data_path: str | None = None,
    chain: bool = False,
    renamed_base: bool = False,
) -> Run:
    """Makes a run of checkpoints that were trained elsewhere, or adds checkpoints to one that has results.

    Args:
        path: The folder of the run.
        checkpoints: Name -> folder of a PEFT adapter or a full model, in the order of training. A name that is a task
            means the stage after that task; if all are tasks, in their order, OP and BWT are defined. Checkpoints that
            the run has need not be given again; new ones become its next stages.
        model: The base model.
        tasks: The columns of the matrix; may be empty.
        settings: The settings of the evaluation, as in the config of a run.
        data_path: Where the data is; None = TRACE_DATA.
        chain: Whether each adapter was trained on the base model with all adapters before it merged in.
        renamed_base: Whether `model` is a copy of the base model that the checkpoints name.

    Raises:
        RunError: if a folder holds no checkpoint, or one that does not fit the base model or its engine.
        data.DataError: if a suite, set or task is unknown, or its data is missing.
    """
    refuse_secrets({"model": model, "checkpoints": checkpoints, **settings}, "the run's")
    _check_folders(checkpoints)
    began = measured_run(path)
    _check_order(path, checkpoints, began.manifest.get("checkpoints", {}) if began else {}, chain)
    given = {name: str(Path(folder).absolute()) for name, folder in checkpoints.items()}
    manifest = _manifest(path, model, tasks, settings, data_path) | ({"chain": True} if chain else {})
    trusted = (settings.get("engine_args") or {}).get("trust_remote_code", False)
    if began is None:
        _check_template(settings, manifest["model"]["path"], trusted)
    renamed = {"renamed_base": True} if renamed_base else {}
    # Before anything is recorded. Earlier checkpoints may be gone, so only the given ones are checked.
    now = {**_begun(path, manifest, given).get("checkpoints", {}), **given}
    asked = Run(Path(path), {**manifest, "checkpoints": now, **renamed})
    new = [stage for name, stage in zip(now, asked.stages[1:], strict=True) if name in given]
    check_checkpoints(asked, new, settings["backend"], trusted)
    with locked(Path(path), "checkpoint", wait=True):  # another command may add its checkpoints at the same time
        return _record(path, manifest, given, renamed)


def _begun(path: str | Path, manifest: dict[str, Any], given: dict[str, str]) -> Mapping[str, Any]:
    """The manifest of the run to which checkpoints are added: a measured one, or one that was begun alike."""
    if (run := measured_run(path)) is not None:
        return run.manifest
    there = Run.open(path).manifest if (Path(path) / "manifest.json").exists() else {}
    # The same checkpoints in a different order, or a chain, begin again: the order was corrected.
    others = set() if there.get("chain") else there.get("checkpoints", {}).keys() - given
    return there if others and identity({**manifest, "format": FORMAT}) == identity(there) else {}


def _record(path: str | Path, manifest: dict[str, Any], given: dict[str, str], renamed: dict[str, Any]) -> Run:
    """Writes the manifest of a new run, or adds checkpoints to the one that is there."""
    began = _begun(path, manifest, given)
    there = began.get("checkpoints", {})
    now = {**there, **given}
    if "checkpoints" in began:  # compare with the run as it is; checkpoints are added or replaced below
        manifest |= {key: began[key] for key in ("checkpoints", "folders", "renamed_base") if key in began}
    else:
        manifest |= {"checkpoints": given} | renamed
        file = Path(path) / "manifest.json"
        if file.exists() and "checkpoints" in Run.open(path).manifest:
            file.unlink()
    run = Run.create(path, checks.with_recorded_base_name(path, manifest))
    _warn_of_choices(now, given)
    if "checkpoints" in began and (now != there or renamed.keys() - began.keys()):
        said = "The checkpoint %s is now %s. Its cells are kept if the files are the same."
        for name in given.keys() & there.keys():
            if given[name] != there[name]:
                log.warning(said, name, given[name])
        run = with_checkpoints(run, now, **renamed)
    return run


def _check_template(settings: dict[str, Any], base: str, trusted: bool) -> None:
    """Refuses arguments of the chat template that nothing would use."""
    if not (arguments := settings.get("chat_template_args")):
        return
    if not any(settings.get(name) for name in ("chat_template", "judged", "distance")):
        raise RunError(
            "chat_template_args has no effect without a chat template. Set chat_template (--chat-template), too."
        )
    Chat(models.load_tokenizer(base, trust_remote_code=trusted), arguments)


def with_checkpoints(run: Run, checkpoints: dict[str, str], **more: Any) -> Run:
    """Writes the run's manifest with these checkpoints (the run's own come first) and further entries."""
    there = run.manifest
    folders = {"folders": _numbered(there["folders"], checkpoints)} if "folders" in there else {}
    write_json(run.path / "manifest.json", {**there, "checkpoints": checkpoints, **folders, **more})
    return Run.open(run.path)


def drop(path: str | Path, names: Sequence[str]) -> Run:
    """Removes checkpoints and their results from a run. The other checkpoints keep their folders.

    Raises:
        RunError: if the run has no such checkpoint, or later adapters of a chain need it.
    """
    refuse_links(Run.open(path).path, *WRITTEN)
    with locked(Path(path), "checkpoint", wait=True):  # another command may add checkpoints at the same time
        _drop(Run.open(path), names)
    return Run.open(path)


def _drop(run: Run, names: Sequence[str]) -> None:
    there = run.manifest.get("checkpoints", {})
    for name in names:
        if name not in there:
            raise RunError(
                f"--drop {name}: no such checkpoint. {run.path} has {', '.join(there) or 'only stages of its own'}."
                + suggestion(name, there)
            )
    left = {name: folder for name, folder in there.items() if name not in names}
    if run.manifest.get("chain") and list(left) != list(there)[: len(left)]:
        raise RunError(
            f"--drop {' '.join(names)}: later adapters of the chain are stacked on it. Drop the last ones first."
        )
    stages = dict(zip(there, run.stages[1:], strict=True))
    dropped, folders = [stages[name] for name in dict.fromkeys(names)], {name: stages[name].path.name for name in left}
    with ExitStack() as locks:
        for stage in dropped:
            locks.enter_context(locked(stage.path, "evaluate"))
        write_json(run.path / "manifest.json", {**run.manifest, "checkpoints": left, "folders": folders})
        for stage in dropped:
            remove(stage.path)


def _numbered(folders: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Checkpoint -> its folder; new checkpoints get the next numbers."""
    numbers = count(max((int(folder.partition("_")[0]) for folder in folders.values()), default=0) + 1)
    return {name: folders.get(name) or f"{next(numbers)}_{name}" for name in names}


def _check_folders(checkpoints: dict[str, str]) -> None:
    for name, folder in checkpoints.items():
        said, place = f"--checkpoint {name}={folder}", Path(folder)
        if not place.is_dir():
            of_hub = f" If it is on the hub: hf download {folder} --local-dir FOLDER." * (folder.count("/") == 1)
            raise RunError(f"{said}: there is no such folder." + of_hub)
        files = {p.name for p in place.glob("*")}
        how = next((f" {how}." for what, how in _CONVERSIONS.items() if any(place.glob(what))), "")
        if not files & _CONFIGS:
            below = sorted({file.parent.name for config in _CONFIGS for file in place.glob(f"*/{config}")})
            raise RunError(
                f"{said}: the folder has no adapter (adapter_config.json) or model (config.json)"
                + (f"; its folders {', '.join(below)} do." if below else f".{how}")
            )
        if not any(f.endswith(".safetensors") for f in files):
            beside = " Put the model's *.json files into the folder of the weights." * bool(how)
            raise RunError(f"{said}: the folder has no .safetensors file; other formats are not loaded.{how}{beside}")
        if not is_file_name(name):
            raise RunError(
                f"--checkpoint {name}=...: the name becomes a folder, so it cannot contain '/' or control characters, "
                "or begin with '.'."
            )


def _warn_of_choices(names: Iterable[str], given: dict[str, str]) -> None:
    """Warns of an order that is probably not that of training (a shell's `checkpoint-*`), and of further adapters."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbers.setdefault(match[1], []).append(int(match[2]))
    for start, found in numbers.items():
        later = next((pair for pair in pairwise(found) if pair[0] > pair[1]), None)
        if later:
            log.warning(
                "%s%d comes before %s%d. Give checkpoints in the order of their training: reports and checks are about "
                "the last one. If the order is wrong, begin again in a new folder.",
                *(start, later[0], start, later[1]),
            )
    for folder in given.values():
        others = sorted(file.parent.name for file in Path(folder).glob("*/adapter_config.json"))
        if others and models.is_adapter(Path(folder)):
            log.warning(
                "%s has more adapters in its folders (%s); the one in the folder itself is measured. To measure a "
                "different one, give its folder.",
                *(folder, ", ".join(others)),
            )


def _check_order(path: str | Path, checkpoints: dict[str, str], there: dict[str, str], chain: bool) -> None:
    """Refuses to change the order of a chain's adapters, since each was trained on top of those before it."""
    in_order = sorted(checkpoints, key=lambda name: list(there).index(name) if name in there else len(there))
    if chain and list(checkpoints) != in_order:
        raise RunError(
            f"--checkpoint {', '.join(checkpoints)}: the adapters of a chain are stacked in a fixed order, which is "
            f"{', '.join(there)} in {path}. Give only new ones, or these in the same order and new ones after them."
        )


def _manifest(
    path: str | Path, model: str, tasks: list[str], settings: dict[str, Any], data_path: str | None
) -> dict[str, Any]:
    """The manifest without checkpoints. Checks the data and the tasks."""
    rows = data.open_data(tasks, data_path)
    rows.use()
    rows.check(["test"])
    for kind, known in (("general", data.SUITES), ("judged", data.JUDGED)):
        for name in data.expand(settings.get(kind, ()), known):
            data.source_fingerprint(name)  # an error if its data is missing
    base = models.resolve_model(model)
    loaded = load_tasks(tasks)
    return {
        "method": "external",
        "model": {"name": model, "path": base, "revision": models.pinned_revision(base)},
        **tasks_record(path, loaded, rows),
        "config": settings,
    }


def tasks_record(path: str | Path, loaded: dict[str, Any], rows: data.Data) -> dict[str, Any]:
    """The entries of a manifest about the tasks of the run at `path`. Checks the tasks."""
    check_stages(loaded)
    return {
        "tasks": list(loaded),
        "task_versions": {name: task.VERSION for name, task in loaded.items()},
        "task_definitions": checks.definitions(loaded, path),
        "date": time.strftime("%Y-%m-%d"),
        "data": data_record(rows, loaded),
    }
