"""Checks the JSON files of a run against each other and against the place where they are.

A stage belongs to a configuration and to the stage that it was trained from, a cell to its stage, task and weights,
samples to their score. Only JSON is read here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_bench.run import Run, RunError, Stage, read_json
from trace_tasks.data import JUDGED
from trace_tasks.data.files import fingerprint

_REDO = "Delete it and evaluate again."
#: The name of the set of prompts that belong to no task, for distances from the base model.
NEUTRAL = "neutral"

# -------------------------------------------------------------------------------------------------------------- stages


def check_stages(run: Run, used: Iterable[Stage] = ()) -> None:
    """Makes sure that all stages belong to the run, and that the used ones were trained from the present ones.

    Raises:
        RunError: naming the file, what it says, and what to do.
    """
    for stage in run.stages:
        check_origin(run, stage)
    why = stale(run)
    for stage in used:
        if stage.index in why:
            raise RunError(f"Stage {stage.name} is stale: {why[stage.index]}")


def origin(run: Run, stage: Stage) -> dict[str, Any]:
    """What a stage is trained from, for its train.json: configuration, base model and the stage before."""
    return {
        "run": run.identity,
        "date": run.manifest.get("date"),
        "model": run.manifest["model"].get("revision"),
        "parent": _parent(run, stage),
    }


def _parent(run: Run, stage: Stage) -> dict[str, Any] | None:
    """The present fingerprints of the stage that a stage is trained from; None = the base model."""
    if stage.index < 2 or run.manifest["method"] in ("single", "relearn"):
        return None
    before = run.stages[stage.index - 1]
    trained = read_json(before.train_file) if before.train_file.exists() else {}
    return {key: trained.get(key) for key in ("checkpoint", "method_state")}


def check_origin(run: Run, stage: Stage) -> None:
    """Makes sure that the train.json in a stage's folder was written for this stage and configuration."""
    if stage.external is not None or not stage.train_file.exists():
        return
    trained = read_json(stage.train_file)
    here = {"stage": stage.index, "task": stage.task}
    if wrong := differing(trained, here):
        raise RunError(
            f"{stage.train_file} was written for {wrong}, but is at stage {stage.index} ({stage.task}): it was moved "
            "or copied. Put each stage back to where it was trained, or delete this file to train the stage again."
        )
    if trained.get("run", run.identity) not in run.identities:
        raise RunError(
            f"{stage.train_file} was made with a different configuration than that of {run.path}/manifest.json "
            f"(fingerprint {trained['run']}, now {run.identity}). Restore the manifest, or begin a new run in a new "
            "folder."
        )


def differing(content: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The entries of `content` that differ from those in `here`; missing entries do not count."""
    return {key: content[key] for key in here if content.get(key, here[key]) != here[key]}


def stale(run: Run) -> dict[int, str]:
    """Stages that were trained from another stage than the present one before them: index -> why and what to do."""
    found: dict[int, str] = {}
    trained = [s for s in run.stages if s.external is None and s.train_file.exists()]
    for stage in trained:
        recorded = read_json(stage.train_file)
        before = run.stages[stage.index - 1]
        if recorded.get("parent") is None or not before.train_file.exists():
            continue
        if recorded["parent"] != _parent(run, stage) or before.index in found:
            later = " ".join(str(s.train_file) for s in trained if s.index >= stage.index)
            found[stage.index] = (
                f"stage {before.name}, which it continues, was trained again or replaced since. To train from there "
                f"again, delete {later}; or restore the older {before.path}."
            )
    return found


# --------------------------------------------------------------------------------------------------------------- cells


def given_cell(task: str, tokens: int) -> str:
    """The name of a task's cell in which answers begin with `tokens` given tokens of the reference."""
    return f"{task}.given{tokens}"


def read_cell(stage: Stage, name: str) -> dict[str, Any]:
    """Reads the score file of a cell, and makes sure that it is of this stage and task and has possible numbers."""
    file = stage.eval_file(name)
    cell = read_json(file)
    if wrong := differing(cell, {"stage": stage.name, "task": name}):
        raise RunError(
            f"{file} was written for {wrong}, but is at {stage.name}: it was moved or copied, or the stages were "
            f"renamed. {_REDO}"
        )
    if problem := _cell_problem(cell, name in JUDGED):
        raise RunError(f"{file} is damaged: {problem}. {_REDO}")
    return cell


def _cell_problem(cell: dict[str, Any], judged: bool) -> str | None:
    """Which number of a cell is impossible; None if all are possible. The types were checked when it was read."""
    metrics, scale, n = cell["metrics"], cell.get("scale", {}), cell["n"]
    if cell["headline"] not in metrics:
        return "it has no headline score"
    if n < 1 and not cell["settings"].get("given"):  # with given tokens all rows may be too short
        return f"n={n!r} is not a number of rows"
    for key in ("n_cut", "n_unfinished"):
        if cell.get(key, 0) > n:
            return f"{key}={cell[key]!r} does not fit n={n} rows"
    parts = cell.get("subtasks", {})
    if parts and sum(part.get("n", 0) for part in parts.values()) != n:
        return f"the rows of its {len(parts)} subtasks do not add up to {n}"
    for name, score in metrics.items():
        value, stderr = score["value"], score.get("stderr")
        fraction = scale.get(name, None if judged else 1) == 1  # older cells have no scale
        if value is not None and fraction and not -1e-6 <= value <= 1 + 1e-6:
            return f"{name} is {value!r}, which is not between 0 and 1"
        if stderr is not None and stderr < 0:
            return f"the standard error of {name} is {stderr!r}"
    return None


def check_samples(stage: Stage, name: str, ids: Sequence[Any]) -> None:
    """Makes sure that a cell's score was made from its samples; `ids` are their `doc_id` in order.

    Raises:
        RunError: if lines were lost, doubled or changed.
    """
    file, scored = stage.samples_file(name), stage.eval_file(name)
    if not scored.exists():
        return
    cell = read_cell(stage, name)
    redo = f"{scored} belongs to other samples. Delete both files and evaluate again."
    if len(ids) != cell["n"]:
        raise RunError(f"{file} has {len(ids)} rows, but its score has {cell['n']}: {redo}")
    if len(set(ids)) < len(ids):
        twice = next(one for i, one in enumerate(ids) if one in ids[:i])
        raise RunError(f"{file} has the row {twice!r} twice: {redo}")
    if cell.get("samples") not in (None, fingerprint(file)):
        raise RunError(f"{file} has changed since it was written (its fingerprint differs): {redo}")


def check_one_checkpoint(stage: Stage) -> None:
    """Makes sure that all cells of a checkpoint from elsewhere were made from the same files."""
    if stage.external is not None:
        made = {read_json(file).get("checkpoint") for file in stage.path.glob("eval/*.json")}
        if len(made) > 1:
            raise RunError(
                f"{stage.external} changed between evaluations: the cells of stage {stage.name} are from {len(made)} "
                "different states of it. Run the same `trace-bench evaluate` again, with the same --general and "
                f"--judged, to renew the older cells; or delete {stage.path}/eval and evaluate again."
            )


# ----------------------------------------------------------------------------------------------------------- distances


def distance_file(stage: Stage, name: str) -> Path:
    """The file with the distance of a stage from the base model on a set of prompts: a task's, or `NEUTRAL`."""
    return stage.path / "distance" / f"{name}.json"


def distance_answers(base: Stage, name: str) -> Path:
    """The file with the base model's answers to a set of prompts, and its likeliest tokens at each position."""
    return base.path / "distance" / f"{name}.jsonl"


def read_distance(stage: Stage, name: str) -> dict[str, Any] | None:
    """Reads the distance of a stage on a set of prompts; None if there is none."""
    file = distance_file(stage, name)
    if not file.exists():
        return None
    found = read_json(file)
    if wrong := differing(found, {"stage": stage.name, "set": name}):
        raise RunError(f"{file} was written for {wrong}, but is at {stage.name}: it was moved or copied. {_REDO}")
    return found


def is_distance_valid(there: Mapping[str, Any] | None, base: Mapping[str, Any] | None, checkpoint: str | None) -> bool:
    """Whether a distance was measured from these weights, on the answers that the base model's file has."""
    if there is None or base is None:
        return False
    return there["checkpoint"] == checkpoint and there["answers"] == base["answers"]
