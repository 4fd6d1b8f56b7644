"""Checks that everything is still what the run began with, before training or evaluation spends time.

The base model, the data, the tasks and the run's checkpoints are compared with the manifest. `records` checks the JSON
files of a run against each other.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trace_bench import records
from trace_bench.engine import models
from trace_bench.engine.checkpoints import check_own
from trace_bench.manifest import differences
from trace_bench.run import Run, RunError, Stage
from trace_bench.tasks import load_tasks, rows_fingerprint, use_own_tasks
from trace_bench.versions import code_digest, package_versions
from trace_tasks import data
from trace_tasks.data.files import digest, write_json

#: Fields of a task's config that decide prompts, answers and scores. Rows are compared by their fingerprint.
_DECIDING = (
    *("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_image", "doc_to_audio", "description", "gen_prefix"),
    *("target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "output_type", "generation_kwargs"),
    *("filter_list", "metric_list", "process_docs", "process_results", "repeats", "use_prompt", "custom_dataset"),
)
#: Packages that scores depend on; those of training are in the manifest.
_SCORE_PACKAGES = ("torch", "transformers", "peft", "lm-eval", "datasets", "vllm", "sacrebleu")


def verify(
    run: Run, stages: Sequence[Stage], data_path: str | Path | None = None, tasks: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Makes sure that a run, its base model, data and tasks are what they were when it began.

    Args:
        run: The run.
        stages: The stages that are about to be evaluated, or trained further.
        data_path: Where the data is; None = where the manifest says.
        tasks: The names of the tasks that are about to be used.

    Returns:
        The tasks by name, as lm-eval loads them, and their `definitions`.

    Raises:
        RunError: naming what differs, with both values, and what to do.
        data.DataError: if the data is not there.
    """
    records.check_stages(run, stages)
    use_data(run, None if data_path is None else str(data_path))
    check_base(run)
    for stage in stages:
        if stage.external is None and stage.is_trained:
            check_own(stage)
    use_own_tasks(run)
    loaded = load_tasks(tasks)
    return loaded, check_tasks(run, loaded)


def check_base(run: Run) -> None:
    """Makes sure that a base model in a local folder still has the files with which the run began."""
    base, expected = models.base_of_run(run.manifest["model"]), run.manifest["model"].get("revision")
    if expected and Path(base).is_dir() and models.pinned_revision(base) != expected:
        raise RunError(
            f"{base} is not the base model that the run began with (its fingerprint is not {expected}). Restore the "
            "old files, or begin a new run."
        )


def locate_data(run: Run, path: str | None = None) -> data.Data | None:
    """Points TRACE_DATA to the run's data without reading them; returns None for a run without TRACE tasks."""
    record = run.manifest["data"]
    if not data.needs_data(record["fingerprint"]):
        return None
    source = path or record["path"]
    if path is None and record["demo"] and not data.is_demo(Path(source)):
        source = "demo"  # the folder is on another machine; the same rows can be made here
    if path is None and "reasoning" in record and not record["demo"]:
        os.environ.setdefault("TRACE_REASONING", record["reasoning"])
    rows = data.open_data(record["fingerprint"], source)
    rows.use()
    return rows


def move_base(run: Run, folder: str) -> None:
    """Records where the base model of a run is now: another folder with the same files.

    Raises:
        RunError: if the files are not the same.
    """
    model = run.manifest["model"]
    if folder == model["name"]:
        return
    place = models.resolve_model(folder)
    if not Path(place).is_dir() or models.pinned_revision(place) != model.get("revision"):
        raise RunError(
            f"{folder} is not the base model that {run.path} began with, {model['name']} (revision "
            f"{model.get('revision')}): its files differ. Name the folder with the original files."
        )
    _note_base(run, place)


def _note_base(run: Run, place: str) -> None:
    write_json(run.path / "manifest.json", {**run.manifest, "model": {**run.manifest["model"], "path": place}})


def with_recorded_base_name(path: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest; if the base model was moved, with the name that it has in the existing run at `path`."""
    if not (Path(path) / "manifest.json").is_file():
        return manifest
    run, asked = Run.open(path), manifest["model"]
    there = run.manifest["model"]
    if asked["name"] == there["name"] or not Path(asked["path"]).is_dir() or asked["revision"] != there.get("revision"):
        return manifest
    _note_base(run, asked["path"])  # the files are the same, since the revision is
    named = {key: there["name"] for key in ("model_name_or_path",) if key in manifest["config"]}
    return {**manifest, "model": {**asked, "name": there["name"]}, "config": {**manifest["config"], **named}}


def use_data(run: Run, path: str | None = None) -> None:
    """Points TRACE_DATA to the run's data, and makes sure that they have not changed."""
    rows = locate_data(run, path)
    if rows is None:
        return
    rows.check(data.SPLITS if run.manifest["config"].get("num_fewshot") else ["test"])
    if changed := rows.changed(run.manifest["data"]):
        unknown = not run.manifest["data"].get("test") and len(rows.check(["test"])[changed[0]]) < 3
        raise RunError(
            f"{rows.root} has different data than the run began with, in: {', '.join(changed)}."
            + " Files are missing there, and an older program began the run, which did not record the test rows: add "
            "train.json and eval.json." * unknown
        )


def check_tasks(run: Run, tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Makes sure that tasks have the same rows, prompts and scoring as when the run began.

    Returns:
        The present definitions of the tasks.

    Raises:
        RunError: naming the task and what differs.
    """
    expected = run.manifest["data"]["fingerprint"]
    changed = [name for name, digest in rows_fingerprint(tasks).items() if digest != expected.get(name, digest)]
    if changed:
        raise RunError(
            f"The rows of {', '.join(changed)} are not those that the run began with. Restore them, or begin a new run."
        )
    for name, task in tasks.items():
        version = run.manifest["task_versions"].get(name, task.VERSION)
        if version != task.VERSION:
            raise RunError(
                f"{name} has version {task.VERSION} now, but the run began with version {version}: their scores cannot "
                "be compared. Use the older version of this program, or begin a new run."
            )
    now = definitions(tasks, run.path)
    began = {name: d for name, d in run.manifest.get("task_definitions", {}).items() if name in tasks}
    if lines := differences(began, {name: now[name] for name in began}):
        raise RunError(
            "A task has changed since the run began (then -> now):\n"
            + "\n".join(lines)
            + "\nRestore its YAML and its functions, or begin a new run."
        )
    return now


def definitions(tasks: dict[str, Any], path: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The definition of each task, before the run's limits: how it asks, generates and scores, with its functions.

    For the run at `path`, it is in the form of the older program that began it, if nothing else differs.
    """
    began: dict[str, Any] = {}
    if path is not None and (Path(path) / "manifest.json").is_file():
        began = Run.open(path).manifest.get("task_definitions", {})
    found = {name: _definition(task, code_digest) for name, task in tasks.items()}
    for name in [name for name in tasks if began.get(name, found[name]) != found[name]]:
        if (older := _definition(tasks[name], _older_digest)) == began[name]:
            found[name] = older
    return found


def _definition(task: Any, of_code: Callable[[list[Path]], str]) -> dict[str, Any]:
    from lm_eval.api.task import ConfigurableTask

    config = task.config.to_dict(keep_callable=True)
    found = {key: _plain(config[key], of_code) for key in _DECIDING if config.get(key) is not None}
    found["icl"] = _plain((config.get("metadata") or {}).get("icl"), of_code)
    found["class"] = None if type(task) is ConfigurableTask else _plain(type(task), of_code)
    # The texts of the first rows reveal changes in files that functions and templates read.
    docs = task.eval_docs
    rows = [docs[i] for i in range(min(8, len(docs)))]
    found["examples"] = digest([[str(task.doc_to_text(row)), str(task.doc_to_target(row))] for row in rows])
    return json.loads(json.dumps({key: value for key, value in found.items() if value is not None}))


def _plain(value: Any, of_code: Callable[[list[Path]], str]) -> Any:
    """Converts a part of a config to JSON, without None; functions become their name and a digest of their code."""
    if isinstance(value, dict):
        return {str(k): _plain(v, of_code) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v, of_code) for v in value]
    if callable(value):
        return _function(value, of_code)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _function(function: Any, of_code: Callable[[list[Path]], str]) -> str:
    """The name of a function or class, with a digest of its code unless it is ours.

    Our tasks have versions, and each cell records the digest of our scoring code (`made_with`).
    """
    inner = inspect.unwrap(getattr(function, "func", function))  # a partial
    name = getattr(inner, "__qualname__", type(inner).__qualname__).rpartition(".")[2]
    code = next((c for f in (inner, *vars(inner).values()) if (c := getattr(f, "__code__", None))), None)
    if code is None:
        return name
    file = Path(code.co_filename)
    if file.resolve().parent == data.TASKS_PATH.resolve():
        return f"trace_tasks.{file.stem}.{name}"
    return f"{file.stem}.{name} {of_code(_imported(file, []))}"


def _imported(file: Path, found: list[Path]) -> list[Path]:
    """Adds a file to those that were found, and the files in the same folder that it imports."""
    if not file.is_file():  # as in a notebook
        return found
    found.append(file)
    for node in ast.walk(_tree(file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else names
        for name in names:
            beside = file.parent / f"{str(name).partition('.')[0]}.py"
            if beside not in found:
                _imported(beside, found)
    return found


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _older_digest(files: list[Path]) -> str:
    """What older programs noted instead of `code_digest`. It depends on the version of Python."""
    return digest("\n".join(ast.unparse(_tree(file)) for file in files))


@cache
def made_with() -> dict[str, str]:
    """The versions of scoring code and libraries, for the record of a cell."""
    packages = package_versions(_SCORE_PACKAGES)
    files = sorted(file for file in data.TASKS_PATH.glob("*.py") if file.name != "errors.py")  # no effect on scores
    return {"code of the scoring": code_digest(files), "python": platform.python_version(), **packages}
