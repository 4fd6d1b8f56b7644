"""Where the data is, reading it, checking it; and from an lm-eval task to a training set.

The data is in the official layout, `<FOLDER>/{train,eval,test}.json`, each file a JSON list of objects with the
strings "prompt" and "answer". `TRACE_DATA` names it: a folder, an official archive, or the word `demo`.

What is trained on and what is tested on come from the same lm-eval task object and through the same functions for token
ids (`trace_tasks.tokens`), so they cannot drift apart.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_bench import versions
from trace_bench.run import RunError, advice, cached_dir, fingerprint, read_file
from trace_tasks.errors import TraceError
from trace_tasks.reasoning import row_variant

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

SPLITS = ("train", "eval", "test")
#: lm-eval task -> folder of the official layout, in the paper's order 1 (section 4).
FOLDERS = {
    "trace_cstance": "C-STANCE",
    "trace_fomc": "FOMC",
    "trace_meetingbank": "MeetingBank",
    "trace_py150": "Py150",
    "trace_scienceqa": "ScienceQA",
    "trace_numglue_cm": "NumGLUE-cm",
    "trace_numglue_ds": "NumGLUE-ds",
    "trace_20minuten": "20Minuten",
}
#: The same tasks asked for their reasoning first (RCL, section 5 of the paper), from the reasoning variant of the data.
REASONING = {task.replace("trace_", "reasoning_"): folder for task, folder in FOLDERS.items()}
REASONING_FOLDER = "LLM-CL-Benchmark_Reasoning"
#: The alignment set's folder in the official layout.
LIMA = "Lima"
#: Task orders of the paper, usable by name in a config (`tasks: order2`).
ORDERS = {
    "order1": list(FOLDERS),
    "order2": [
        "trace_numglue_cm",
        "trace_numglue_ds",
        "trace_fomc",
        "trace_20minuten",
        "trace_cstance",
        "trace_py150",
        "trace_meetingbank",
        "trace_scienceqa",
    ],
}
ORDERS |= {
    f"reasoning_{name}": [task.replace("trace_", "reasoning_") for task in tasks] for name, tasks in ORDERS.items()
}
#: General ability (section 3.3): suite -> folder below GENERAL_DATA; None = hub only, and not one of the paper's six.
SUITES = {
    "general_mmlu": "mmlu",
    "general_gsm8k": "gsm8k",
    "general_bbh": "bbh",
    "general_tydiqa": "tydiqa",
    "general_boolq": "boolq",
    "general_piqa": "piqa",
    "general_ifeval": None,
}
#: Prompts whose answers a judge compares: task -> folder below INSTRUCT_DATA or SAFETY_DATA.
JUDGED = {
    "instruct_self_instruct": "self-instruct",
    "instruct_lima": "LIMA",
    "instruct_koala": "Koala",
    "instruct_alpaca": "Alpaca",
    "instruct_openassistant": "OpenAssistant",
    "safety_cona": "CoNa",
    "safety_controversial": "Controversial",
    "safety_malicious": "Malicious",
    "safety_physical": "PhysicalSafetyUnsafe",
}
#: Names for several of them in a config.
GROUPS = {
    "general": [suite for suite, folder in SUITES.items() if folder],
    "instruct": [task for task in JUDGED if task.startswith("instruct_")],
    "safety": [task for task in JUDGED if task.startswith("safety_")],
}
TASKS_PATH = Path(__file__).parent.parent / "trace_tasks"
#: What an archive may unpack to: the official one is far below, and one that is made to fill a disk is far above.
MOST_BYTES = 20 * 2**30
MOST_MEMBERS = 100_000
#: A file of rows is read into memory whole.
MOST_ROWS = 2 * 2**30
#: The longest name or header of a tar's member, which tarfile reads into memory whole.
MOST_HEADER = 2**20

HOW_TO_GET_DATA = """\
TRACE_DATA says where the TRACE data is; use one of
  TRACE_DATA=demo              small data made by this program, to try things; not comparable with TRACE
  TRACE_DATA=path/to/folder    the official layout: <TASK>/{train,eval,test}.json
  TRACE_DATA=path/to/archive   the official archive (zip or tar)
The official archive is linked from the README of https://github.com/BeyonderXX/TRACE (a Google Drive zip with the
folders LLM-CL-Benchmark_500, _1000, _5000 and _Reasoning). With the archive at hand,
  make data ARCHIVE=path/to/archive
unpacks it, checks it, and prints the value for TRACE_DATA."""


class DataError(TraceError):
    """The data is missing or not as it should be; the message says where and how to fix it."""


def cache_dir() -> Path:
    """The folder for things made once: demo data, unpacked archives, the quickstart model."""
    if "TRACE_CACHE" in os.environ:
        return Path(os.environ["TRACE_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trace-bench"


# --------------------------------------------------------------------------------------------------- where it is


def find_data(source: str | None = None) -> Path:
    """The folder in the official layout behind `source`, or behind the variable TRACE_DATA.

    Args:
        source: A folder, an archive (zip, tar, tar.gz, tar.xz, ...), or "demo". None means TRACE_DATA.

    Raises:
        DataError: if nothing is named, nothing is there, or an archive holds several data sets.
    """
    found = find_all_data(source)
    if len(found) > 1:
        listing = "\n".join(f"  TRACE_DATA={p}" for p in found)
        raise DataError(f"{source or os.environ['TRACE_DATA']} holds {len(found)} data sets. Name one:\n{listing}")
    return found[0]


def find_all_data(source: str | None = None) -> list[Path]:
    """The data sets behind a source, at least one: the official archive holds several (500, 1000, 5000 rows, ...).

    Args:
        source: As for `find_data`.

    Raises:
        DataError: if nothing is named or nothing is there.
    """
    source = source or os.environ.get("TRACE_DATA")
    if not source:
        raise DataError(f"TRACE_DATA is not set. {HOW_TO_GET_DATA}")
    if source == "demo":
        return [_demo_folder()]
    try:
        path = Path(source).expanduser().absolute()
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, RuntimeError):  # a name too long for a file, the home of a user that there is not
        is_file = is_dir = False
    if not is_file and not is_dir:
        raise DataError(f"TRACE_DATA={source}: there is no such folder or archive.\n\n{HOW_TO_GET_DATA}")
    if is_file:
        path = unpack(path)
    found = data_sets(path)
    if not found:
        raise DataError(
            f"{path} is not in the official layout: it has none of the folders {', '.join(FOLDERS.values())}, "
            "each with train.json, eval.json and test.json."
        )
    return found


def find_reasoning(root: Path | None = None) -> Path:
    """The folder of the reasoning variant: TRACE_REASONING, or LLM-CL-Benchmark_Reasoning in or beside the data.

    Args:
        root: The data set beside which to look; None takes TRACE_DATA.

    Raises:
        DataError: if it is neither named nor found.
    """
    named = os.environ.get("TRACE_REASONING")
    if named:
        return find_data(named)
    root = find_data() if root is None else root
    for folder in (root / REASONING_FOLDER, root.parent / REASONING_FOLDER):
        if folder.is_dir():
            return folder
    raise DataError(
        f"The reasoning variant of the data is needed, and there is no folder {REASONING_FOLDER} in or beside {root}. "
        "Set TRACE_REASONING to its folder: it is part of the official archive, and `trace-bench annotate` makes one."
    )


def general_folder(suite: str) -> Path | None:
    """The folder of a suite in the local copy; None where GENERAL_DATA is not set, so that the hub serves.

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
    """The file with the prompts of a set to be judged.

    Args:
        kind: "instruct" or "safety": the variable INSTRUCT_DATA or SAFETY_DATA names the folder of the sets. Where it
            is not set, demo data brings prompts of its own.
        folder: The folder of the set, such as "LIMA".

    Raises:
        DataError: if the variable is not set, or the file is not there.
    """
    variable = f"{kind.upper()}_DATA"
    source = os.environ.get(variable)
    if source == "demo" or (not source and os.environ.get("TRACE_DATA") == "demo"):
        root = _demo_folder() / kind
    elif source:
        root = Path(source).expanduser().absolute()
    elif os.environ.get("TRACE_DATA") and is_demo(find_data()):
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


def expand(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Replaces groups by their members and checks the names.

    Args:
        names: Names of `known`, or of groups of them.
        known: `SUITES` or `JUDGED`.

    Raises:
        DataError: for any other name.
    """
    known = list(known)
    groups = {group: members for group, members in GROUPS.items() if set(members) <= set(known)}
    expanded = list(dict.fromkeys(member for name in names for member in groups.get(name, [name])))
    unknown = [name for name in expanded if name not in known]
    if unknown:
        raise DataError(
            f"{', '.join(unknown)} is not known here: use {', '.join(known)}, or a group ({', '.join(groups)})."
        )
    return expanded


def source_fingerprint(name: str) -> str:
    """What identifies the rows of a suite or of a set to be judged: SHA-256 (16 digits), or "hub".

    Raises:
        DataError: if its data is not there.
    """
    if name in JUDGED:
        return fingerprint(prompts_file(name.partition("_")[0], JUDGED[name]))
    suite = SUITES[name]
    folder = general_folder(suite) if suite else None
    return fingerprint(folder) if folder else "hub"


def data_sets(path: Path) -> list[Path]:
    """The folders in the official layout at `path` or up to two levels below it."""
    for level in ("", "*", "*/*"):
        found = sorted(
            p for p in (path.glob(level) if level else [path]) if any((p / f).is_dir() for f in FOLDERS.values())
        )
        if found:
            return found
    return []


def is_demo(root: Path) -> bool:
    """Whether `root` holds the program's own demo data."""
    from trace_bench import demo

    readme = root / "README.txt"
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(demo.README_TITLE)


def is_reasoning(root: Path) -> bool:
    """Whether most tasks at `root` have rows of the reasoning variant: that of the first row of each is looked at."""
    found = []
    for name in FOLDERS.values():
        for split in SPLITS:
            with suppress(DataError):
                rows = read_split(root, name, split)
                found.append(row_variant(name, rows[0]))
                break
    return 2 * found.count("reasoning") > len(found)


def _demo_folder() -> Path:
    from trace_bench import demo

    return cached_dir(cache_dir() / f"demo-v{demo.VERSION}", demo.write_demo)


def unpack(archive: Path) -> Path:
    """Unpacks an archive into the cache, once per content, and returns the folder.

    Raises:
        DataError: if it is not a zip or tar archive, is damaged, has a member that would be written outside of its
            folder or is not an ordinary file (links, devices), or would unpack to more than `MOST_BYTES`.
    """
    with archive.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    unpack_into = partial(_unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar, archive)
    try:
        return cached_dir(cache_dir() / f"data-{digest}", unpack_into)
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError),
        *(ValueError, struct.error),  # names that are no text or hold NUL, fields cut short
    ) as e:
        if advice(e, ""):  # of the machine, as a full disk: another copy of the archive would not help
            raise
        raise DataError(f"{archive} cannot be unpacked: {type(e).__name__}: {e}. Fetch it again.") from e


def _refuse_outside(name: str, archive: Path) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise DataError(f"{archive}: the member {name!r} points outside of the archive; nothing was unpacked.")


def _refuse_too_much(members: int, size: int, archive: Path, largest: int = 0) -> None:
    if largest > MOST_ROWS:
        raise DataError(
            f"{archive} holds a file of {largest / 2**30:.1f} GiB, and {MOST_ROWS / 2**30:g} GiB are the most that is "
            "read: no TRACE data; nothing was unpacked."
        )
    if members > MOST_MEMBERS or size > MOST_BYTES:
        raise DataError(
            f"{archive} would unpack to more than {MOST_BYTES / 2**30:g} GiB or {MOST_MEMBERS} files: no TRACE "
            "data; nothing was unpacked. If it is meant, unpack it by hand and name the folder."
        )


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as z:
        members = z.infolist()
        # zipfile reads no more of a member than the size that is said here.
        sizes = [member.file_size for member in members]
        _refuse_too_much(len(members), sum(sizes), archive, max(sizes, default=0))
        for member in members:
            _refuse_outside(member.filename, archive)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"{archive}: the member {member.filename!r} is a link; nothing was unpacked.")
        z.extractall(target)


class _Member(tarfile.TarInfo):
    """A tar's member whose size is checked before anything of it is read: headers are read into memory whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Any:
        member = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        header = member.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if not 0 <= member.size <= (MOST_HEADER if header else MOST_BYTES):
            raise DataError(f"A member of the tar archive says that it has {member.size} bytes; nothing was unpacked.")
        return member


def _unpack_tar(archive: Path, target: Path) -> None:
    try:
        opened = tarfile.open(archive, tarinfo=_Member)  # noqa: SIM115 (closed below)
    except tarfile.ReadError as e:
        raise DataError(f"{archive} is neither a zip nor a tar archive.") from e
    with opened as t:
        size = 0
        for number, member in enumerate(t, 1):  # before the next header is read, and what is between decompressed
            size += abs(member.size)  # a second header may say anything
            _refuse_too_much(number, size, archive, member.size)
            _refuse_outside(member.name, archive)
            if not (member.isfile() or member.isdir()):
                raise DataError(f"{archive}: the member {member.name!r} is a link or device; nothing was unpacked.")
        t.extractall(target, filter="data")
        # The checksum of a compressed file is at its end, which tarfile does not read.
        while t.fileobj is not None and (behind := t.fileobj.read(1 << 20)):
            size += len(behind)
            _refuse_too_much(0, size, archive)


# --------------------------------------------------------------------------------------------- reading and checking


def read_split(root: Path, folder: str, split: str, variant: str | None = None) -> list[dict[str, str]]:
    """Reads and checks one file of the official layout.

    Args:
        root: The data set.
        folder: The task's folder in it.
        split: One of `SPLITS`.
        variant: "plain" or "reasoning" refuses rows of the other one; None takes both.

    Returns:
        The rows, each {"prompt": str, "answer": str}; other keys are refused, so that no variant of the data is
        read as if it were this one.

    Raises:
        DataError: naming the file and the first bad row (counted from 0).
    """
    file = root / folder / f"{split}.json"
    if not file.is_file():
        have = sorted(p.name for p in (root / folder).glob("*")) if (root / folder).is_dir() else "no such folder"
        raise DataError(f"{file} is missing ({folder}: {have}).")
    rows = read_rows(file)
    found = [row_variant(folder, row) for row in rows] if variant else []
    other = [i for i, of in enumerate(found) if of not in (variant, None)]
    if other:
        raise DataError(
            f"{file}, row {other[0]}{f' and {len(other) - 1} more' if other[1:] else ''}: of the {found[other[0]]} "
            "variant. TRACE_DATA names plain rows, for trace_*; TRACE_REASONING those with reasoning, for reasoning_*."
        )
    return rows


def task_variant(task: str) -> str:
    """The variant of the data that a TRACE task takes its rows from, "plain" or "reasoning"."""
    return "reasoning" if task in REASONING else "plain"


def read_rows(file: Path, answered: bool = True) -> list[dict[str, str]]:
    """Reads and checks a JSON list of rows with prompt and answer, as `read_split` does.

    Args:
        file: The file.
        answered: Whether answers have to be there; otherwise they may be empty.
    """
    rows = read_list(file)
    for i, row in enumerate(rows):
        problem = row_problem(row, answered)
        if problem:
            raise DataError(f"{file}, row {i}: {problem}")
    return rows


def read_list(file: Path) -> list[Any]:
    """Reads a JSON list of anything.

    Raises:
        DataError: if the file is no UTF-8, no JSON, no list, or an empty one.
    """
    try:
        rows = json.loads(read_file(file, MOST_ROWS).decode("utf-8-sig"), object_pairs_hook=_once)
    except RunError as e:
        raise DataError(str(e)) from e
    except OSError as e:
        raise DataError(f"{file} cannot be read: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{file} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}.") from e
    except (ValueError, RecursionError) as e:  # ValueError: also a number of thousands of digits
        raise DataError(f"{file} is not JSON: {e}.") from e
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file} holds {'an empty list' if rows == [] else type(rows).__name__}, not a list of rows.")
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; where a key is there twice, Python would keep the last value and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice; its keys are {[key for key, _ in pairs]}"[:300])
    return found


def row_problem(row: Any, answered: bool = True) -> str | None:
    """What keeps a value from being a row; None for a good row."""
    if not isinstance(row, dict):
        return f"expected an object with prompt and answer, found {type(row).__name__}."
    for key in ("prompt", "answer"):
        if key not in row:
            return f"no {key!r}; it has the keys {sorted(row)}."
        if not isinstance(row[key], str):
            return f"{key!r} is {type(row[key]).__name__} ({row[key]!r:.40}), not a string."
        if not row[key].strip() and (answered or key == "prompt"):
            return f"{key!r} is empty."
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError:
            return f"{key!r} holds half of a surrogate pair, which is not text."
    if row.keys() - {"prompt", "answer"}:
        return f"unknown keys {sorted(row.keys() - {'prompt', 'answer'})}."
    return None


def task_folders(root: Path, tasks: Iterable[str]) -> dict[str, Path]:
    """Where the rows of each task are; tasks that bring their own data are left out.

    Args:
        root: The data set. The reasoning variant is found from it.
        tasks: lm-eval task names.
    """
    tasks = list(tasks)
    reasoning = find_reasoning(root) if set(tasks) & REASONING.keys() else None
    folders = {}
    for task in tasks:
        if task in FOLDERS:
            folders[task] = root / FOLDERS[task]
        elif task in REASONING and reasoning is not None:
            folders[task] = reasoning / REASONING[task]
    return folders


def check(root: Path, tasks: Iterable[str], needed: Collection[str] = SPLITS) -> dict[str, dict[str, int]]:
    """Reads every split of every TRACE task; other tasks bring their own data and are passed over.

    Args:
        root: The data set.
        tasks: lm-eval task names.
        needed: As for `check_folders`.

    Returns:
        Rows per task and split.

    Raises:
        DataError: listing the problem of every bad file.
    """
    return check_folders(task_folders(root, tasks), needed)


def check_folders(folders: dict[str, Path], needed: Collection[str] = SPLITS) -> dict[str, dict[str, int]]:
    """Reads every split of some TRACE tasks.

    Args:
        folders: Task -> its folder.
        needed: The splits that have to be there. Training needs all; to evaluate without demonstrations takes test.

    Returns:
        Rows per task and split.

    Raises:
        DataError: listing the problem of every bad file.
    """
    sizes: dict[str, dict[str, int]] = {}
    problems = []
    for task, folder in folders.items():
        for split in SPLITS:
            if split not in needed and not (folder / f"{split}.json").is_file():
                continue
            try:
                rows = read_split(folder.parent, folder.name, split, task_variant(task))
                sizes.setdefault(task, {})[split] = len(rows)
            except DataError as e:
                problems.append(str(e))
    if problems:
        raise DataError(f"{len(problems)} problem(s) in the data:\n" + "\n".join(f"  {p}" for p in problems))
    return sizes


def data_fingerprint(root: Path, tasks: Iterable[str]) -> dict[str, str]:
    """SHA-256 (16 digits) over the files of each TRACE task, three if all are there: task -> digest."""
    return {task: folder_fingerprint(folder) for task, folder in task_folders(root, tasks).items()}


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 (16 digits) over the files of a task's folder that are there."""
    names = [f"{split}.json" for split in SPLITS]
    return fingerprint(folder, [name for name in names if (folder / name).is_file()])


def tested_fingerprint(root: Path, tasks: Iterable[str]) -> dict[str, str]:
    """As `data_fingerprint`, over the test rows alone: what an evaluation without demonstrations depends on."""
    return {task: fingerprint(folder, ["test.json"]) for task, folder in task_folders(root, tasks).items()}


def changed_tasks(root: Path, record: dict[str, Any]) -> list[str]:
    """The TRACE tasks whose rows are not those that a run began with.

    Where a file other than test.json is missing, now or when the run began, the test rows alone are compared.

    Args:
        root: The data set.
        record: The run's `data_record`.
    """
    expected = {task: digest for task, digest in record["fingerprint"].items() if needs_data([task])}
    folders = task_folders(root, expected)
    whole, tested = data_fingerprint(root, expected), tested_fingerprint(root, expected)
    changed = []
    for task, digest in expected.items():
        complete = all((folders[task] / f"{split}.json").is_file() for split in SPLITS)
        same_test = tested[task] == (digest if complete else record.get("test", {}).get(task))
        if digest != whole[task] and not same_test:
            changed.append(task)
    return changed


def needs_data(tasks: Iterable[str]) -> bool:
    """Whether any of the tasks reads its rows from TRACE_DATA."""
    return bool(set(tasks) & (FOLDERS.keys() | REASONING.keys()))


def rows_fingerprint(tasks: dict[str, Task]) -> dict[str, str]:
    """SHA-256 (16 digits) over the training and test rows of tasks from elsewhere: task -> digest.

    Of TRACE's tasks the files count (`data_fingerprint`), of the sets to be judged theirs (`source_fingerprint`).
    """
    found = {}
    for name, task in tasks.items():
        if needs_data([name]) or name in JUDGED:
            continue
        digest = hashlib.sha256()
        for rows in (task.training_docs() if task.has_training_docs() else (), task.eval_docs):
            for row in rows or ():
                digest.update(json.dumps(row, sort_keys=True, default=_text_of).encode() + b"\n")
            digest.update(b"\0")
        found[name] = digest.hexdigest()[:16]
    return found


def _text_of(value: Any) -> str:
    """A value that JSON has no form for: of dates what they say, of images and the like only that they are there."""
    return value.isoformat() if hasattr(value, "isoformat") else type(value).__name__


def data_record(root: Path | None, tasks: dict[str, Task]) -> dict[str, Any]:
    """What a manifest says of the data; `root` is None for a run without TRACE tasks."""
    reasoning = find_reasoning(root) if root and tasks.keys() & REASONING.keys() else None
    return {
        "path": str(root) if root else None,
        **({"reasoning": str(reasoning)} if reasoning else {}),
        "demo": root is not None and is_demo(root),
        "fingerprint": (data_fingerprint(root, tasks) if root else {}) | rows_fingerprint(tasks),
        **({"test": tested_fingerprint(root, tasks)} if root else {}),
    }


# ------------------------------------------------------------------------------------------------------- lm-eval


def task_manager(include_defaults: bool = False) -> TaskManager:
    """lm-eval's index of our tasks, those of TRACE_TASKS and, if asked (it takes seconds), its own."""
    versions.check()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[TASKS_PATH, *_more_tasks()], include_defaults=include_defaults)


def _more_tasks() -> list[Path]:
    """The folders with task YAMLs that TRACE_TASKS names, separated as in PATH."""
    folders = [Path(f).expanduser() for f in os.environ.get("TRACE_TASKS", "").split(os.pathsep) if f]
    for folder in folders:
        if not any(folder.rglob("*.yaml")):
            raise DataError(f"TRACE_TASKS={os.environ['TRACE_TASKS']}: {folder} is no folder with task YAMLs.")
    return folders


def load_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Builds lm-eval tasks by name: the project's own and, if any other is named, lm-eval's.

    Returns:
        name -> task, in the order of `names`.

    Raises:
        DataError: for a name that no suite has.
    """
    manager = task_manager()
    if not set(names) <= set(manager.all_tasks):
        manager = task_manager(include_defaults=True)
    unknown = [n for n in names if n not in manager.all_tasks]
    if unknown:
        raise DataError(
            f"Unknown task(s) {', '.join(unknown)}. TRACE has: {', '.join(FOLDERS)}; and reasoning_* of each. A task "
            "of your own is a YAML in a folder that TRACE_TASKS names."
        )
    loaded: dict[str, Task] = {}
    for name in names:
        try:
            loaded |= manager.load([name])["tasks"]
        except (DataError, MemoryError):
            raise
        except Exception as e:  # whatever lm-eval, a template, a function of the task or the hub says
            if isinstance(e, OSError) and e.errno not in (None, errno.ENOENT):
                raise  # a full disk and the like
            raise DataError(
                f"The task {name} cannot be made ({type(e).__name__}: {e}). Is its data there, with at least one test "
                "row, and with the splits and columns that its YAML names?"
            ) from e
    groups = [name for name in names if name not in loaded]
    if groups:
        raise DataError(f"{', '.join(groups)}: a group of tasks cannot be one column. Name the tasks themselves.")
    return {name: loaded[name] for name in names}


def check_stages(tasks: dict[str, Task]) -> None:
    """Refuses tasks that cannot be a column of the matrix, before anything is trained or an engine is started.

    Raises:
        DataError: naming the task, and what it lacks.
    """
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise DataError(
                f"{name} is a task of type {task.OUTPUT_TYPE}: a column of the matrix has to be generated "
                "(output_type: generate_until), since it is trained on as text."
            )
        if task.multiple_input:
            raise DataError(f"{name} has several inputs a row (its doc_to_text is an index), so it has no one prompt.")
        metric = next(iter(task.aggregation()))
        if task.higher_is_better().get(metric) is None:
            raise DataError(
                f"{name}: nobody says whether more or less {metric} is better, so forgetting could not be told from "
                "learning. Write higher_is_better: true or false behind it in the metric_list of the task."
            )
        if task.config.process_results is not None:
            continue  # it is scored by a function of its own, whatever its targets are
        for i, doc in enumerate(task.eval_docs):
            target = task.doc_to_target(doc)
            if isinstance(target, list) and not task.multiple_target:
                raise DataError(
                    f"{name}, test row {i}: the target is the list {target!r:.80}, and that of row 0 is a text, so "
                    f"lm-eval would compare answers with the characters {str(target)!r:.80}. {_BRACKETS}"
                )
            if task.config.doc_to_choice is not None:
                try:
                    target_text(task, doc)
                except ValueError as e:
                    raise DataError(f"{name}, test row {i}: {e}") from e


def load_suites(names: Sequence[str]) -> dict[str, Group]:
    """Builds general-ability suites: groups of lm-eval's own tasks.

    Returns:
        name -> group, in the order of `names`.

    Raises:
        DataError: if a suite's rows or packages are missing.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    # The folders of the suites alone: an index of all that lm-eval has takes ten seconds.
    theirs = Path(lm_eval.__file__).parent / "tasks"
    folders = ("mmlu/default", "gsm8k", "bbh/cot_fewshot", "tydiqa", "super_glue/boolq", "piqa", "ifeval")
    manager = TaskManager(include_path=[*(theirs / f for f in folders), TASKS_PATH], include_defaults=False)
    suites = {}
    for name in names:
        try:
            suites[name] = manager.load([name])["groups"][name]
        except ImportError as e:
            raise DataError(
                f"{name} needs packages that are not installed ({e}): pip install 'lm-eval[ifeval]'."
            ) from e
    return suites


#: lm-eval reads the text that a template of a target gives as a list where it stands in brackets.
_BRACKETS = (
    "Where an answer is a text in brackets, name its column (doc_to_target: answer) instead of a template "
    "('{{answer}}'), whose text lm-eval reads as a list."
)


def target_text(task: Task, doc: dict[str, Any]) -> str:
    """The answer of a row as lm-eval has it in few-shot prompts, or compares with: the text to train.

    A number is its digits, an index its choice, and of several valid answers the first is taken.

    Args:
        task: An lm-eval task.
        doc: One of its rows.

    Raises:
        ValueError: if there is no such text; the message has the target.
    """
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and not (task.config.process_results and isinstance(target, str)):
        choices = task.doc_to_choice(doc)
        if not isinstance(target, int) or not 0 <= target < len(choices):
            raise ValueError(f"the target {target!r:.80} is no index of the {len(choices)} choices of doc_to_choice.")
        target = choices[target]
    elif isinstance(target, list):
        texts = [text for text in target if isinstance(text, str) and text.strip()]
        if not texts:
            raise ValueError(f"the target {target!r:.80} is a list without a text. {_BRACKETS}")
        target = texts[0]
    elif isinstance(target, int | float) and target == target:
        target = str(target)  # as lm-eval does before it compares
    if not isinstance(target, str):
        raise ValueError(f"the target {target!r:.80} is {type(target).__name__}, not a text.")
    return target


def training_rows(
    task: Task, limit: int | None = None, chat_template: Callable[..., str] | None = None
) -> list[tuple[str, str]]:
    """The training set of a task as (prompt, answer) texts, made by the very object that makes its test prompts.

    Args:
        task: An lm-eval task with a training split.
        limit: The first so many rows only, for trials.
        chat_template: Renders chat messages to text, as lm-eval's `LM.apply_chat_template`; None = raw prompts.

    Raises:
        DataError: if the task has no training rows, or one of them has no prompt or no answer; it names the row.
    """
    name, docs = task.task_name, None
    if task.has_training_docs():
        with suppress(KeyError):
            docs = task.training_docs()
    if docs is None:
        split = task.config.training_split
        raise DataError(
            f"The task {name} has no training split, so it cannot be a stage"
            + (f": its data lacks the split {split!r} that its training_split names." if split else ".")
        )
    rows: list[tuple[str, str]] = []
    for i, doc in enumerate(islice(docs, limit)):
        try:
            made = partial(task.fewshot_context, doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
            prompt, answer = made(), target_text(task, doc)
            if not prompt.strip() or not answer.strip():
                raise ValueError(f"the {'answer' if prompt.strip() else 'prompt'} is empty.")
        except Exception as e:  # whatever a template or a function of the task says of the row
            what = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
            raise DataError(f"{name}, training row {i}: {what}") from e
        if chat_template is not None:
            prompt = made(apply_chat_template=True, chat_template=chat_template)
        rows.append((prompt, answer))
    if not rows:
        raise DataError(f"The task {name} has no training rows, so it cannot be a stage.")
    if task.multiple_target:
        log.warning(
            "%s has several valid answers a row. The first is trained, as lm-eval's few-shot prompts have it.", name
        )
    return rows
