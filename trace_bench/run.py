"""The run directory: where all results are, and how the program knows what is done.

A step is done when its output file exists, which is written last (`trace_tasks.data.files`). docs/architecture.md
shows the folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trace_bench.manifest import differences, identity, of_tasks
from trace_bench.versions import package_versions, source_commit
from trace_tasks.data import reading
from trace_tasks.data.files import digest, fingerprint, refuse_links, remove, write_json
from trace_tasks.errors import DataError, TraceError

log = logging.getLogger(__name__)

FORMAT = 1
AS_TRAINED = "as_trained.jsonl"  # the file of a stage that has what `trainers` measured with the weights in memory
#: The folders of a run into which results are written.
WRITTEN = ("stages", "figures", "tensorboard")
#: What a training writes into the folder of a stage before its train.json.
OF_TRAINING = (AS_TRAINED, "adapter", "model", "method_state")


class RunError(TraceError):
    """A run directory is missing something, is damaged, or does not fit what was asked."""


class JsonObject(dict[str, Any]):
    """An object of a JSON file. Asking for a missing entry raises an error that names the file."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise RunError(f"{self.path} is damaged: it lacks {key!r}. {_remedy(self.path)}")


def _remedy(path: Path) -> str:
    """What to do about a damaged file of a run."""
    if path.name == "manifest.json":
        return "Restore it; or delete it and run the command that began the run, which writes it again."
    if path.parent.name == "samples":
        return "Delete it and its score, and evaluate again."
    if path.parent.name in ("eval", "judge"):
        return f"Delete it and {path.parent.name.replace('eval', 'evaluate')} again."
    if path.name == "train.json":
        return "Restore it; or delete it and run the command that began the run, which trains this stage again."
    return "Delete it, and run the command that wrote it again."


def read_jsonl(path: Path) -> list[Any]:
    """Reads what `write_jsonl` wrote.

    Raises:
        RunError: naming path and line, if the file is gone, or a line is damaged or has the wrong shape.
    """
    if not path.exists():
        raise RunError(f"{path} is missing. Delete its score and evaluate again, which writes both files.")
    from trace_bench import shapes

    try:
        lines = reading.read_file(path, reading.MOST_LINES).split(b"\n")
    except DataError as e:
        raise RunError(str(e)) from e
    rows, shape = [], shapes.of_file(path)
    for number, line in enumerate(lines, 1):
        try:
            if line:
                halves = shape is shapes.Sample
                rows.append(reading.strict(line.decode("utf-8"), partial(JsonObject, path), halves))
                if shape is not None:
                    reading.check(shape, rows[-1])
        except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, not JSON, or a far too long number
            raise RunError(f"{path}, line {number} is damaged ({e}). {_remedy(path)}") from e
    return rows


def read_json(path: Path, shape: Any = None) -> Any:
    """Reads a JSON file and checks its shape (`shapes`).

    Args:
        path: The file.
        shape: The shape; None = decided by the file's place in a run, or any shape elsewhere.

    Raises:
        RunError: naming the path and the damaged place, if it is not JSON or has another shape.
    """
    from trace_bench import shapes

    try:
        return reading.read_json(path, shape or shapes.of_file(path), partial(JsonObject, path))
    except DataError as e:
        raise RunError(f"{e} {_remedy(path)}" if isinstance(e, reading.Damaged) else str(e)) from e


def is_file_name(name: str) -> bool:
    """Whether a name can be that of a task, stage or checkpoint: it becomes a file or folder of the run."""
    return bool(name) and not name.startswith(".") and "/" not in name and name.isprintable()


@dataclass(frozen=True)
class Stage:
    """One stage of a run: the model after training on `task`; stage 0 is the base model.

    Attributes:
        external: The folder of a checkpoint that was trained elsewhere.
        below: In a chain: the earlier adapters, which were merged into the base model before this one was trained.
    """

    index: int
    name: str
    task: str | None
    path: Path
    external: Path | None = None
    below: tuple[Path, ...] = ()

    @property
    def number(self) -> int:
        """The number of its folder: the index, unless an earlier checkpoint was dropped."""
        return int(self.name.partition("_")[0])

    @property
    def train_file(self) -> Path:
        """train.json; the stage is trained when it exists."""
        return self.path / "train.json"

    @property
    def is_trained(self) -> bool:
        """Whether the stage has weights, which can be evaluated or trained further."""
        return self.index == 0 or self.external is not None or self.train_file.exists()

    @property
    def attempt(self) -> Path:
        """The folder of checkpoints within the stage and other temporary files; removed when the stage is trained."""
        return self.path / ".trainer"

    @property
    def progress_file(self) -> Path:
        """The progress of the training; the file exists while the stage is in training or was interrupted."""
        return self.attempt / "progress.json"

    @property
    def method_state(self) -> Path:
        """The folder of what a method passes to the next stage in addition to the checkpoint."""
        return self.path / "method_state"

    @property
    def saved(self) -> list[Path]:
        """The folders of checkpoints that a training left: one, unless it was dropped or a method is wrong."""
        return [folder for kind in ("adapter", "model") if (folder := self.path / kind).is_dir()]

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the adapter or the full model; None for the base model.

        Raises:
            RunError: if the stage is not trained or its checkpoint was dropped (`keep`).
        """
        if self.external is not None or self.index == 0:
            return self.external
        if not self.is_trained:
            raise RunError(f"Stage {self.name} is not trained yet: {self.train_file} does not exist.")
        if self.saved:
            return self.saved[0]
        raise RunError(
            f"The checkpoint of stage {self.name} is not in {self.path}. With keep=last or keep=evaluated only the "
            "newest full model stays on disk; train with keep=all to evaluate earlier stages later."
        )

    def fingerprint(self) -> str | None:
        """The fingerprint of the weights; None for the base model, which the manifest identifies."""
        if self.index == 0:
            return None
        if self.external is None:
            return read_json(self.train_file)["checkpoint"]
        if not self.external.is_dir():  # gone, or on another machine: its cells have the fingerprint
            measured = {read_json(file)["checkpoint"] for file in self.path.glob("eval/*.json")}
            if len(measured) == 1:
                return measured.pop()
            raise RunError(
                f"The checkpoint {self.external} does not exist. Give its new place with --checkpoint NAME=PATH, or "
                "remove it from the run with --drop NAME."
            )
        if not self.below:
            return fingerprint(self.external)
        return digest("\n".join(fingerprint(path) for path in (*self.below, self.external)))

    def eval_file(self, task: str) -> Path:
        """The score file of one cell."""
        return self.path / "eval" / f"{task}.json"

    def samples_file(self, task: str) -> Path:
        """The samples of one cell, one JSON object a line."""
        return self.path / "eval" / "samples" / f"{task}.jsonl"


@dataclass(frozen=True)
class Run:
    """A run directory with its manifest, which never changes.

    Attributes:
        left_out: Task -> `doc_id` of test rows that a report without leaked rows leaves out.
        rows: Task -> its training rows as texts; filled when a training begins, empty elsewhere.
    """

    path: Path
    manifest: Mapping[str, Any]
    left_out: dict[str, set[int]] = field(default_factory=dict)
    rows: dict[str, list[tuple[str, str]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Makes the manifest read-only."""
        object.__setattr__(self, "manifest", MappingProxyType(self.manifest))

    def __reduce__(self) -> tuple[Any, ...]:
        """For sending a run to another process: a read-only view cannot be pickled."""
        return Run, (self.path, dict(self.manifest), self.left_out, self.rows)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens an existing run.

        Raises:
            RunError: if there is no run, it has another format, or a name in it cannot be that of a folder.
        """
        path = Path(path)
        file = path / "manifest.json"
        if not file.is_file():
            if cls(path, {}).has_results():
                raise RunError(f"{path} has no manifest.json. The command that began the run writes it again: run it.")
            runs = sorted(str(p.parent) for at in (path, path.parent) for p in at.glob("*/manifest.json")) or ["none"]
            raise RunError(f"{path} is not a run (no manifest.json). Runs in it or next to it: {', '.join(runs)}.")
        written = read_json(file, dict[str, Any]).get("format")
        if written != FORMAT:  # checked first: other formats may have other shapes
            what = f"{file} has format {written!r}; this program reads {FORMAT}."
            raise RunError(f"{what} Use the version of trace-bench that made the run.")
        manifest = read_json(file)
        for name in [*manifest["tasks"], *manifest.get("stages", []), *manifest.get("checkpoints", {})]:
            if not is_file_name(name):
                raise RunError(
                    f"{file}: {name!r} cannot be the name of a task or stage, since the name becomes a folder. Use "
                    "printable characters without '/', and do not begin with '.'."
                )
        return cls(path, manifest)

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any], *, restart: bool = False) -> Run:
        """Creates a run, or opens the existing one to resume it.

        With `restart`, a run in which nothing is trained or measured yet begins again with the new configuration.

        Raises:
            RunError: if the existing run has another configuration; the message lists every differing key.
        """
        path, file = Path(path), Path(path) / "manifest.json"
        refuse_links(path, *WRITTEN)
        manifest = {"format": FORMAT, **manifest, "packages": package_versions(), "commit": source_commit()}
        manifest = json.loads(json.dumps(manifest))  # as it is read back: lists instead of tuples
        if not file.exists():
            manifest = cls(path, manifest)._restored()
            write_json(file, manifest)
            return cls(path, manifest)
        run = cls.open(path)
        there, asked = run.tasks, manifest["tasks"]
        # Tasks can be added at the end, but not if one stage trains all tasks together.
        goes_on = len(asked) > len(there) and asked[: len(there)] == there and "stages" not in manifest
        if goes_on and not differences(run.manifest, of_tasks(manifest, there)):
            log.warning("Adding %s to %s.", ", ".join(asked[len(there) :]), path)
            as_begun = {key: run.manifest[key] for key in ("packages", "commit", "date") if key in run.manifest}
            write_json(file, {**manifest, **as_begun})
            return cls.open(path)
        lines = differences(run.manifest, manifest)
        if lines and restart and not run.has_results():
            log.warning("%s gets a new configuration, since no stage is trained yet (before -> now):", path)
            log.warning("%s", "\n".join(lines))
            run.drop_attempts()
            write_json(file, manifest)
            return cls(path, manifest)
        if lines:
            raise RunError(
                f"{path} holds a run with a different configuration (in the run -> asked for):\n"
                + "\n".join(lines)
                + "\nUse the values of the run to continue it, or use a new folder."
            )
        then, now = run.manifest["packages"], manifest["packages"]
        if then != now:
            log.warning("The package versions have changed since the run began: %s then, %s now.", then, now)
        return run

    def _restored(self) -> dict[str, Any]:
        """The manifest for a folder without one; if the folder has results, with their date.

        Raises:
            RunError: if there are results of another configuration, or without a record of it.
        """
        date = self.manifest.get("date")
        names = {stage.path.name for stage in self.stages}
        for file in self._results():
            made = read_json(file)
            identity = made.get("run")
            if identity not in self.identities or file.relative_to(self.path / "stages").parts[0] not in names:
                raise RunError(
                    f"{self.path} has results but no manifest.json, and {file} was made with a different command: its "
                    f"configuration is {identity or 'not on record'}, yours is {self.identity}. Run the command that "
                    "made it, which restores the manifest; restore the manifest from a copy; or use a new folder for "
                    "this run."
                )
            date = made.get("date") or date
        if date != self.manifest.get("date"):
            log.warning("%s: restored the missing manifest.json; the run began on %s.", self.path, date)
        return {**self.manifest, **({"date": date} if date else {})}

    @cached_property
    def identity(self) -> str:
        """Identifies the run, independent of circumstances and added checkpoints: SHA-256, 16 digits."""
        return identity(self.manifest)

    @cached_property
    def identities(self) -> set[str]:
        """The run's identity, and those it had before tasks were added."""
        shorter = (of_tasks(self.manifest, self.tasks[:n]) for n in range(1, len(self.tasks)))
        return {self.identity, *map(identity, shorter)}

    def _results(self) -> list[Path]:
        """All train.json files and cells in the folder, also of stages that the manifest does not have."""
        return sorted(self.path.glob("stages/*/train.json")) + sorted(self.path.glob("stages/*/eval/*.json"))

    def has_results(self) -> bool:
        """Whether any stage is trained or anything is measured."""
        return bool(self._results())

    def drop_attempts(self) -> None:
        """Removes what unfinished trainings left, including checkpoints within a stage."""
        for attempt in self.path.glob("stages/*/.trainer"):
            if steps := len(list(attempt.glob("checkpoint-*"))):
                log.warning("%s: removed %d checkpoint(s), which have the old configuration.", attempt, steps)
        for kind in (".trainer", *OF_TRAINING):
            for leftover in self.path.glob(f"stages/*/{kind}"):
                remove(leftover)

    @property
    def tasks(self) -> list[str]:
        """The tasks of the matrix, in the order of training: its columns."""
        return self.manifest["tasks"]

    @cached_property
    def stages(self) -> list[Stage]:
        """The rows of the matrix: the base model, and the given checkpoints or the trained stages.

        One stage per task, unless the method says otherwise: joint training has one, in-context learning none.
        """
        folders = {name: Path(target) for name, target in self.manifest.get("checkpoints", {}).items()}
        chain = list(folders.values()) if self.manifest.get("chain") else []
        stages = [Stage(0, "0_base", None, self.path / "stages" / "0_base")]
        names = folders if "checkpoints" in self.manifest else self.manifest.get("stages", self.tasks)
        kept = self.manifest.get("folders", {})  # after a checkpoint was dropped the others keep theirs
        for i, name in enumerate(names, 1):
            task = name if name in self.tasks else None
            at = self.path / "stages" / kept.get(name, f"{i}_{name}")
            stages.append(Stage(i, at.name, task, at, folders.get(name), tuple(chain[: i - 1])))
        return stages

    def seen_tasks(self, stage: Stage, which: str) -> list[str]:
        """The tasks that a stage is evaluated on; `which` is "seen", "all" or "own" (the option `cells`)."""
        if which == "all" or stage.task is None:
            return self.tasks
        own = self.tasks.index(stage.task)
        return self.tasks[own if which == "own" else 0 : own + 1]

    def chosen(self, numbers: Collection[int] | None) -> list[Stage]:
        """The stages with these numbers, in their order; None = all of them.

        Raises:
            RunError: if a stage does not exist.
        """
        there = {stage.number: stage for stage in self.stages}
        if unknown := sorted(set(numbers or ()) - set(there)):
            raise RunError(f"There is no stage {unknown}: the run has {', '.join(map(str, there))}.")
        return [stage for number, stage in there.items() if numbers is None or number in numbers]

    def is_sequence(self) -> bool:
        """Whether row t is the model after task t, so that OP_t and BWT_t are defined."""
        return [s.task for s in self.stages[1:]] == self.tasks[: len(self.stages) - 1]

    @property
    def old_tasks(self) -> list[str]:
        """The tasks before that of the last stage, where one model learned them in order; else none."""
        one_model = self.is_sequence() and self.manifest["method"] != "single"
        return [str(s.task) for s in self.stages[1:-1]] if one_model else []
