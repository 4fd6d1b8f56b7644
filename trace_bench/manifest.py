"""Compares manifests: how two of them differ, and the identity of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_tasks.data.files import digest

#: Setting of the evaluation -> its allowed values.
ALLOWED = {"backend": ["vllm", "hf"], "cells": ["seen", "all", "own"], "general_stages": ["last", "all"]}
#: Manifest entries about the circumstances of a run. They may differ when it is resumed.
_OF_DATA = ("data.path.", "data.reasoning.", "data.test.", "data.own_tasks.", "data.cl_benchmark.")
CIRCUMSTANCES = ("packages.", "commit.", "date.", "tuned.", *_OF_DATA, "model.path.")
#: These, and entries that may be added later.
_NOT_IDENTITY = (*CIRCUMSTANCES, "checkpoints.", "folders.", "renamed_base.")
#: Entries of a manifest that older programs did not write.
_LATER = ("task_definitions",)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, sub in value.items() for k, v in _flat(sub, f"{prefix}.{key}".strip(".")).items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two manifests (or settings) differ, one line each with both values."""
    known = [{k: v for k, v in m.items() if k not in _LATER or (k in old and k in new)} for m in (old, new)]
    a, b = map(_flat, known)
    apart = set(old.get("tasks", ())) ^ set(new.get("tasks", ()))  # the line about the tasks is enough for these
    return [
        f"  {key}: {a.get(key, 'absent')!r} -> {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent")
        and not f"{key}.".startswith(CIRCUMSTANCES)
        and not apart.intersection(key.split("."))
    ]


def of_tasks(manifest: Mapping[str, Any], tasks: list[str]) -> dict[str, Any]:
    """The manifest as it would be with only `tasks`, the first of its tasks."""

    def kept(by_task: Mapping[str, Any]) -> dict[str, Any]:
        left_out = set(manifest["tasks"]) - set(tasks)
        return {name: value for name, value in by_task.items() if name not in left_out}

    shorter = {**manifest, "tasks": tasks}
    shorter |= {key: kept(manifest[key]) for key in ("task_versions", "task_definitions") if key in manifest}
    shorter["data"] = {**manifest["data"]}
    shorter["data"] |= {key: kept(manifest["data"][key]) for key in ("fingerprint", "test") if key in manifest["data"]}
    config = dict(manifest["config"])
    if "tasks" in config:
        config["tasks"] = tasks
    if isinstance(config.get("epochs"), list):
        config["epochs"] = config["epochs"][: len(tasks)]
    return {**shorter, "config": config}


def identity(manifest: Mapping[str, Any]) -> str:
    """Identifies a run, independent of circumstances and added checkpoints: SHA-256, 16 digits."""
    return digest({k: v for k, v in _flat(manifest).items() if not f"{k}.".startswith(_NOT_IDENTITY)})
