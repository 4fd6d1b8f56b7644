"""Files that are complete when they exist, and folders that several processes share.

Every file is written under a temporary name, synced to the disk, and renamed at the end. So a file that exists is
complete, and a killed program loses only the step in progress. Nothing is written through a link.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from trace_tasks.data.reading import read_json
from trace_tasks.errors import DataError

log = logging.getLogger(__name__)

#: The file in a temporary folder that its owner locks.
_LOCK = ".lock"


# ------------------------------------------------------------------------------------------------------------- links


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """`os.open` of an existing file for writing: never through a link, and only an ordinary file.

    Raises:
        DataError: if it is a link, a folder, a pipe or a device.
    """
    wrong = f"{path} is a link, a folder, a pipe or a device, so it is not written. Remove it."
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise DataError(wrong) from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DataError(wrong)
    return fd


def refuse_links(folder: Path, *names: str) -> None:
    """Refuses to write into `names` below a folder if one is a link to elsewhere; a run may be an unpacked archive.

    The folder itself and those above it may be links: the user made them. A link to a file is replaced when the
    file is written. A checkpoint may be a link, since it is only read, or replaced as a whole.

    Raises:
        DataError: naming the link, pipe or device.
    """
    todo = [folder / name for name in names]
    while todo:
        path = todo.pop()
        if not os.path.lexists(path) or path.name in ("adapter", "model"):
            continue
        if path.is_symlink() and not path.is_file():
            raise DataError(
                f"{path} is a link to {os.readlink(path)}, so files below {folder} would be written there. Remove the "
                "link, or replace it with a copy of the folder. Only the run folder itself can be a link."
            )
        if path.is_dir():
            todo += path.iterdir()
        elif not path.is_file():
            raise DataError(f"{path} is a pipe or a device, not a file. Remove it.")


def remove(path: Path) -> None:
    """Removes a file, or a folder with all its content; of a link only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- writing


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: even after a kill it has either the old content or all of the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Like `write_text`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{path.name}.")
    while True:
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        with tmp.open("xb") as f:
            try:
                if _hold(f.fileno()):
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
                    tmp.replace(path)
                    break
            finally:
                tmp.unlink(missing_ok=True)
    _fsync_dir(path.parent)


def check_writable(folder: Path) -> None:
    """Fails now, on a read-only or full disk, instead of after hours of work when the results are written."""
    probe = folder / ".room"
    write_bytes(probe, bytes(2**20))
    probe.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically. NaN is refused: a missing number is null."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON value per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextmanager
def fresh_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_dir(path.parent, f".{path.name}.") as own:
        made = own / path.name
        made.mkdir()
        yield made
        sync_files(made)
        _as_others(made)
        remove(path)
        made.replace(path)
        _fsync_dir(path.parent)


def sync_files(folder: Path) -> None:
    """Syncs all files below a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                os.fsync(f.fileno())


def _as_others(folder: Path) -> None:
    """Gives all files below a folder the permissions of new files: only their owner could read safetensors' files."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o666 != mode:
            with suppress(OSError):  # the file system may have no permissions
                file.chmod(mode)


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------- temporary files


@contextmanager
def temporary_dir(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is removed when the block ends. Leftovers of killed programs with its prefix are removed first.

    Its owner holds a lock (`flock`) on a file in it, and the system releases the lock when the process exits. So the
    next process knows which folders are no longer used, even those of other machines.
    """
    remove_leftovers(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
        with suppress(FileNotFoundError):  # a different process may have removed it as a leftover
            fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            if _hold(fd):
                break
            os.close(fd)
    try:
        yield folder
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes the temporary files and folders of a name that no process uses any more."""
    for path in parent.glob(f"{glob.escape(prefix)}*.tmp"):
        with suppress(OSError):  # a different process may remove it at the same time, or we may not remove it
            info = path.lstat()
            if info.st_uid != os.geteuid() or not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
                continue
            mark, create = (path / _LOCK, os.O_CREAT) if stat.S_ISDIR(info.st_mode) else (path, 0)
            fd = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | create, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(fd)


def _hold(fd: int) -> bool:
    """Locks a new temporary file. Returns whether it still exists: others may have removed it as a leftover."""
    with suppress(OSError):  # a file system without locks: then nobody removes the file
        fcntl.flock(fd, fcntl.LOCK_EX)
    return os.fstat(fd).st_nlink > 0


# -------------------------------------------------------------------------------------------------------- a cache


def cache_dir() -> Path:
    """The folder for things made once: demo data, unpacked archives, the quickstart model."""
    if "TRACE_CACHE" in os.environ:
        return Path(os.environ["TRACE_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trace-bench"


def cached_dir(path: Path, make: Callable[[Path], None]) -> Path:
    """A folder of a cache that processes on several machines may share. It is made if it is missing or damaged.

    Each process calls `make` on a folder of its own. The first one to finish wins: a complete folder is never replaced.
    """
    if _is_whole(path):
        return path
    # Only its user may read a new cache: the data in it may be private.
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DataError(f"The cache {path.parent} is not writable. Set TRACE_CACHE to a writable folder.")
    if path.exists():
        log.warning("%s is damaged, or from an earlier version of this program, so it is made again.", path)
    with temporary_dir(path.parent, f".{path.name}.") as own:
        made = own / path.name
        made.mkdir()
        make(made)
        files = [p for p in sorted(made.rglob("*")) if p.is_file()]
        record = {p.relative_to(made).as_posix(): [p.stat().st_size, sha256(p)] for p in files}
        sync_files(made)
        fd = open_own(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT)
        try:
            with suppress(OSError):  # no locks on this file system
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is_whole(path):
                if os.path.lexists(path):
                    path.rename(own / "damaged")
                made.rename(path)
                write_text(_record_of(path), json.dumps(record))  # in ASCII, since a name need not be UTF-8
        finally:
            os.close(fd)
    return path


def _record_of(path: Path) -> Path:
    """The record of a cached folder, file -> size and SHA-256: a file next to the folder, written last."""
    return path.with_name(f".{path.name}.json")


def _is_whole(path: Path) -> bool:
    """Whether a folder of a cache is unchanged."""
    try:
        for name, (size, digest) in read_json(_record_of(path)).items():
            state = (path / name).stat()
            # A file that this process has read before is read again only if it was written since then.
            key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            if not stat.S_ISREG(state.st_mode) or state.st_size != size:
                return False
            if digest != _sha256_once(path / name, *key):
                return False
        return path.is_dir()
    except (OSError, DataError, ValueError, TypeError, AttributeError):
        return False


@cache
def _sha256_once(path: Path, *state: int) -> str:
    return sha256(path)


# ------------------------------------------------------------------------------------------------------ fingerprints


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex (64 digits)."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 (hex, 16 digits) of a text or of any other JSON value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def fingerprint(path: Path, only: Iterable[str] | None = None) -> str:
    """SHA-256 over the names and contents of a file or of all files below a folder (hex, 16 digits).

    Hidden files do not count: hub clients, version control and file managers leave them, and no library loads them.
    """
    if not path.exists():
        raise DataError(f"{path} is missing, so it has no fingerprint. Restore it.")
    if only is not None:
        files = sorted(path / name for name in only)
    else:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    total = hashlib.sha256()
    for file in files:
        # As the file system has it: a name need not be UTF-8.
        total.update(os.fsencode(f"{file.relative_to(path).as_posix()} {sha256(file)}\n"))
    return total.hexdigest()[:16]
