"""Unpacks an official archive (zip or tar) into the cache. Archives come from elsewhere and may be hostile."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from functools import partial
from pathlib import Path

from trace_tasks.data.files import cache_dir, cached_dir, sha256
from trace_tasks.data.rows import MOST_ROWS
from trace_tasks.errors import DataError, TraceError, advice
from trace_tasks.limits import limited

#: What an archive may unpack to: the official one is far below, and one that is made to fill a disk is far above.
MOST_BYTES = 20 * 2**30
MOST_MEMBERS = 100_000
#: The most seconds and bytes of memory: a tar's headers, which may be of any size, are read into memory.
UNPACKING = (3600.0, 2**31)


def unpack(archive: Path) -> Path:
    """Unpacks an archive into the cache, once per content, and returns the folder.

    Raises:
        DataError: if it is not a zip or tar archive, is damaged, has a member that would be written outside of its
            folder or is not an ordinary file (links, devices), or would unpack to more than `MOST_BYTES`.
    """
    digest = sha256(archive)[:16]
    unpack_into = partial(_unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar, archive)
    try:
        with limited(*UNPACKING):
            return cached_dir(cache_dir() / f"data-{digest}", unpack_into)
    except DataError:
        raise
    except Exception as e:  # whatever the libraries say of a damaged archive
        if isinstance(e, OSError) and advice(e, ""):  # of the machine: another copy of the archive would not help
            raise
        what = str(e) if isinstance(e, TraceError) else f"{type(e).__name__}: {e}. Fetch it again"
        raise DataError(f"{archive} cannot be unpacked: {what}.") from e


def _unpack_zip(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as z:
        size = 0
        for number, member in enumerate(z.infolist(), 1):
            # zipfile reads at most the size in a member's header.
            size += member.file_size
            link = stat.S_ISLNK(member.external_attr >> 16)
            _check_member(archive, member.filename, member.file_size, not link, number, size)
        z.extractall(target)


def _unpack_tar(archive: Path, target: Path) -> None:
    try:
        opened = tarfile.open(archive)  # noqa: SIM115 (closed below)
    except tarfile.ReadError as e:
        raise DataError(f"{archive} is neither a zip nor a tar archive.") from e
    with opened as t:
        size = 0
        for number, member in enumerate(t, 1):  # before the next header is read, and what is between decompressed
            size += member.size
            _check_member(archive, member.name, member.size, member.isfile() or member.isdir(), number, size)
        t.extractall(target, filter="data")
        # The checksum of a compressed file is at its end, which tarfile does not read.
        while t.fileobj is not None and (behind := t.fileobj.read(1 << 20)):
            size += len(behind)
            _check_total(archive, 0, size)


def _check_member(archive: Path, name: str, size: int, is_plain: bool, number: int, total: int) -> None:
    """Refuses a member before it is unpacked; with it there are `number`, of `total` bytes by their headers."""
    parts = name.replace("\\", "/").split("/")  # also as Windows reads names, since a cache may be shared
    if not parts[0] or ".." in parts or ":" in parts[0]:
        raise DataError(f"{archive}: the member {name!r} points outside of the archive; nothing was unpacked.")
    if not is_plain:
        raise DataError(f"{archive}: the member {name!r} is a link or device; nothing was unpacked.")
    if not 0 <= size <= MOST_ROWS:
        raise DataError(
            f"{archive} holds a file of {size} bytes, and {MOST_ROWS / 2**30:g} GiB are the most that is read: no "
            "TRACE data; nothing was unpacked."
        )
    _check_total(archive, number, total)


def _check_total(archive: Path, members: int, size: int) -> None:
    if members > MOST_MEMBERS or size > MOST_BYTES:
        raise DataError(
            f"{archive} would unpack to more than {MOST_BYTES / 2**30:g} GiB or {MOST_MEMBERS} files: no TRACE "
            "data; nothing was unpacked. If it is meant, unpack it by hand and name the folder."
        )
