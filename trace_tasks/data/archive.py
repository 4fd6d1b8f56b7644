"""Unpacks an official archive (zip or tar) into the cache. Archives come from others and may be hostile."""

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

#: The most bytes and files of an unpacked archive: far more than the official one has, far fewer than fill a disk.
MOST_BYTES = 20 * 2**30
MOST_MEMBERS = 100_000
#: The most seconds and bytes of memory: a tar's headers are read into memory and may have any size.
UNPACKING = (3600.0, 2**31)


def unpack(archive: Path) -> Path:
    """Unpacks an archive into the cache, once per content, and returns the folder.

    Raises:
        DataError: if it is not a zip or tar archive, is damaged, or would unpack to more than `MOST_BYTES`; or if a
            member would be written outside of its folder, or is not an ordinary file (links, devices).
    """
    digest = sha256(archive)[:16]
    unpack_into = partial(_unpack_zip if zipfile.is_zipfile(archive) else _unpack_tar, archive)
    try:
        with limited(*UNPACKING):
            return cached_dir(cache_dir() / f"data-{digest}", unpack_into)
    except DataError:
        raise
    except Exception as e:  # the libraries raise many kinds of errors for a damaged archive
        if isinstance(e, OSError) and advice(e, ""):  # the machine's error: a new copy would not help
            raise
        what = str(e) if isinstance(e, TraceError) else f"{type(e).__name__}: {e}. Download it again"
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
        # Check each member before tarfile reads the next header, for which it decompresses the bytes between them.
        for number, member in enumerate(t, 1):
            size += member.size
            _check_member(archive, member.name, member.size, member.isfile() or member.isdir(), number, size)
        t.extractall(target, filter="data")
        # Read up to the end of a compressed file: its checksum is there, and tarfile does not read that far.
        while t.fileobj is not None and (behind := t.fileobj.read(1 << 20)):
            size += len(behind)
            _check_total(archive, 0, size)


def _check_member(archive: Path, name: str, size: int, is_plain: bool, number: int, total: int) -> None:
    """Refuses a bad member before it is unpacked. It is member `number`; up to it the headers say `total` bytes."""
    parts = name.replace("\\", "/").split("/")  # also split as Windows does, since a cache may be shared
    if not parts[0] or ".." in parts or ":" in parts[0]:
        raise DataError(f"{archive}: the member {name!r} points outside the archive. Nothing was unpacked.")
    if not is_plain:
        raise DataError(f"{archive}: the member {name!r} is a link or device. Nothing was unpacked.")
    if not 0 <= size <= MOST_ROWS:
        raise DataError(
            f"{archive} has a file of {size} bytes, but at most {MOST_ROWS / 2**30:g} GiB are read: it is not TRACE "
            "data. Nothing was unpacked."
        )
    _check_total(archive, number, total)


def _check_total(archive: Path, members: int, size: int) -> None:
    if members > MOST_MEMBERS or size > MOST_BYTES:
        raise DataError(
            f"{archive} would unpack to more than {MOST_BYTES / 2**30:g} GiB or {MOST_MEMBERS} files: it is not TRACE "
            "data. Nothing was unpacked. If you trust it, unpack it by hand and give the folder."
        )
