"""Finds the data: the rows of each task from a folder, an archive or the word `demo`.

The data is in the official layout, `<FOLDER>/{train,eval,test}.json`. `TRACE_DATA` names it, `TRACE_REASONING` its
reasoning variant, `GENERAL_DATA` local copies of the suites, and `INSTRUCT_DATA` and `SAFETY_DATA` the sets to be
judged.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trace_tasks.data import demo
from trace_tasks.data.archive import unpack
from trace_tasks.data.files import cache_dir, cached_dir, fingerprint
from trace_tasks.data.names import FOLDERS, JUDGED, REASONING, REASONING_FOLDER, SPLITS, SUITES, needs_data
from trace_tasks.data.rows import check_folders, folder_fingerprint, read_split
from trace_tasks.errors import DataError
from trace_tasks.reasoning import row_variant

HOW_TO_GET_DATA = """\
TRACE_DATA says where the TRACE data is; use one of
  TRACE_DATA=demo              small data made by this program, to try things; not comparable with TRACE
  TRACE_DATA=path/to/folder    the official layout: <TASK>/{train,eval,test}.json
  TRACE_DATA=path/to/archive   the official archive (zip or tar)
The official archive is linked from the README of https://github.com/BeyonderXX/TRACE (a Google Drive zip with the
folders LLM-CL-Benchmark_500, _1000, _5000 and _Reasoning). With the archive at hand,
  trace-bench data path/to/archive
unpacks it, checks it, and prints the value for TRACE_DATA."""


@dataclass(frozen=True)
class Data:
    """The rows of some TRACE tasks. `open_data` or `Data.at` makes it once, and other functions take it."""

    #: The data set; None if no task needs it.
    root: Path | None
    #: Its reasoning variant; None if no task needs it.
    reasoning: Path | None
    #: Task -> the folder with its rows. Tasks with data of their own are left out.
    folders: Mapping[str, Path]

    @classmethod
    def at(cls, root: Path | None, tasks: Iterable[str]) -> Data:
        """The rows of tasks in the data set at `root`; the reasoning variant is found from there.

        Raises:
            DataError: if the reasoning variant is needed and not found.
        """
        tasks = list(tasks)
        reasoning = find_reasoning(root) if set(tasks) & REASONING.keys() else None
        there = {task: root / folder for task, folder in FOLDERS.items()} if root else {}
        there |= {task: reasoning / folder for task, folder in REASONING.items()} if reasoning else {}
        return cls(root, reasoning, {task: there[task] for task in tasks if task in there})

    @property
    def demo(self) -> bool:
        """Whether these are the program's own demo data."""
        return self.root is not None and demo.is_demo(self.root)

    def use(self) -> None:
        """Sets TRACE_DATA, which lm-eval's tasks read, to this data set."""
        if self.root is not None:
            os.environ["TRACE_DATA"] = str(self.root)

    def check(self, needed: Collection[str] = SPLITS) -> dict[str, dict[str, int]]:
        """Reads and checks every row; see `check_folders`."""
        return check_folders(self.folders, needed)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 (16 digits) over the existing files of each task, three if it is complete."""
        return {task: folder_fingerprint(folder) for task, folder in self.folders.items()}

    @cached_property
    def tested(self) -> dict[str, str]:
        """SHA-256 (16 digits) over the test rows of each task: all that an evaluation without demonstrations reads."""
        return {task: fingerprint(folder, ["test.json"]) for task, folder in self.folders.items()}

    def record(self) -> dict[str, Any]:
        """The entry of a manifest about the data."""
        return {
            "path": str(self.root) if self.root else None,
            **({"reasoning": str(self.reasoning)} if self.reasoning else {}),
            "demo": self.demo,
            "fingerprint": self.fingerprint,
            **({"test": self.tested} if self.root else {}),
        }

    def changed(self, record: dict[str, Any]) -> list[str]:
        """The tasks whose rows have changed since a run began.

        If a file other than test.json is missing, now or when the run began, only the test rows are compared.
        `record` is the entry of the run's manifest about its data.
        """
        changed = []
        for task, folder in self.folders.items():
            began = record["fingerprint"][task]
            complete = all((folder / f"{split}.json").is_file() for split in SPLITS)
            began_test = began if complete else record.get("test", {}).get(task)
            if began != self.fingerprint[task] and began_test != self.tested[task]:
                changed.append(task)
        return changed


def open_data(tasks: Iterable[str], source: str | None = None) -> Data:
    """The rows of a run's tasks, from a source as for `find_data`. The source is ignored if no task is TRACE's.

    Raises:
        DataError: if the rows are needed and not found.
    """
    tasks = list(tasks)
    return Data.at(find_data(source) if needs_data(tasks) else None, tasks)


def find_data(source: str | None = None) -> Path:
    """The folder in the official layout that `source` or the variable TRACE_DATA names.

    Args:
        source: A folder, an archive (zip, tar, tar.gz, tar.xz, ...), or "demo". None means TRACE_DATA.

    Raises:
        DataError: if nothing is named, nothing is found, or an archive contains several data sets.
    """
    found = find_all_data(source)
    if len(found) > 1:
        listing = "\n".join(f"  TRACE_DATA={shlex.quote(str(p))}" for p in found)
        raise DataError(f"{source or os.environ['TRACE_DATA']} holds {len(found)} data sets. Name one:\n{listing}")
    return found[0]


def find_all_data(source: str | None = None) -> list[Path]:
    """Like `find_data`, but all data sets of an archive. The official one has several (500, 1000, 5000 rows, ...)."""
    source = source or os.environ.get("TRACE_DATA")
    if not source:
        raise DataError(f"TRACE_DATA is not set. {HOW_TO_GET_DATA}")
    if source == "demo":
        return [demo_folder()]
    try:
        path = Path(source).expanduser().absolute()
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, RuntimeError):  # a name that is too long for a file, or the home of an unknown user
        is_file = is_dir = False
    if not is_file and not is_dir:
        raise DataError(f"TRACE_DATA={source}: there is no such folder or archive.\n\n{HOW_TO_GET_DATA}")
    if is_file:
        path = unpack(path)
    # Search for folders in the official layout: the path itself and up to two levels below it.
    for level in ("", "*", "*/*"):
        folders = sorted(path.glob(level)) if level else [path]
        if found := [p for p in folders if any((p / f).is_dir() for f in FOLDERS.values())]:
            return found
    raise DataError(
        f"{path} is not in the official layout: it has none of the folders {', '.join(FOLDERS.values())}, "
        "each with train.json, eval.json and test.json."
    )


def find_reasoning(root: Path | None = None) -> Path:
    """The folder of the reasoning variant: TRACE_REASONING, or LLM-CL-Benchmark_Reasoning in or next to the data.

    `root` is the data; None = TRACE_DATA.

    Raises:
        DataError: if the variant is neither named nor found.
    """
    if named := os.environ.get("TRACE_REASONING"):
        return find_data(named)
    root = find_data() if root is None else root
    for parent in (root, root.parent):
        if (folder := parent / REASONING_FOLDER).is_dir():
            return folder
    raise DataError(
        f"The reasoning variant of the data is needed, and there is no folder {REASONING_FOLDER} in or beside {root}. "
        "Set TRACE_REASONING to its folder: it is part of the official archive, and `trace-bench annotate` makes one."
    )


def is_reasoning(root: Path) -> bool:
    """Whether most tasks at `root` have rows of the reasoning variant, judged by the first row of each."""
    found = []
    for name in FOLDERS.values():
        for split in SPLITS:
            with suppress(DataError):
                found.append(row_variant(name, read_split(root, name, split)[0]))
                break
    return 2 * found.count("reasoning") > len(found)


def demo_folder() -> Path:
    """The folder of the demo data, which are made if they are missing."""
    return cached_dir(cache_dir() / f"demo-v{demo.VERSION}", demo.write_demo)


def general_folder(suite: str) -> Path | None:
    """The folder of a suite in the local copy. None if GENERAL_DATA is not set: then the rows come from the hub.

    Raises:
        DataError: if the local copy lacks it.
    """
    source = os.environ.get("GENERAL_DATA")
    if not source:
        return None
    folder = Path(source).expanduser().absolute() / suite
    if not folder.is_dir():
        raise DataError(
            f"GENERAL_DATA={source} has no folder {suite}. Leave that suite out, add the folder (trace_tasks/README.md "
            "has the layout), or unset GENERAL_DATA to take all suites from the hub."
        )
    return folder


def prompts_file(kind: str, folder: str) -> Path:
    """The file with the prompts of a set to be judged, such as "LIMA" of the kind "instruct" (or "safety").

    INSTRUCT_DATA or SAFETY_DATA names the folder of the sets. If it is not set, demo data has prompts of its own.

    Raises:
        DataError: if the variable is not set, or the file does not exist.
    """
    variable = f"{kind.upper()}_DATA"
    source = os.environ.get(variable)
    if source == "demo":
        root = demo_folder() / kind
    elif source:
        root = Path(source).expanduser().absolute()
    elif os.environ.get("TRACE_DATA") and demo.is_demo(find_data()):
        root = find_data() / kind
    else:
        part = {"instruct": "helpful", "safety": "harmless"}[kind]
        raise DataError(
            f"{variable} is not set: it names the folder with {folder}/test.json in it, which is inference/HHH/{part} "
            f"in https://github.com/BeyonderXX/TRACE. {variable}=demo takes the program's own few prompts."
        )
    file = root / folder / "test.json"
    if not file.is_file():
        raise DataError(f"{file} is missing. {variable} names the folder of the sets: <SET>/test.json.")
    return file


def source_fingerprint(name: str) -> str:
    """Identifies the rows of a suite or of a set to be judged: SHA-256 (16 digits), or "hub".

    Raises:
        DataError: if its data is not found.
    """
    if name in JUDGED:
        return fingerprint(prompts_file(name.partition("_")[0], JUDGED[name]))
    suite = SUITES[name]
    folder = general_folder(suite) if suite else None
    return fingerprint(folder) if folder else "hub"
