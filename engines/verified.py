"""Which files were already found to have their recorded sha256, so that loading an engine again need not read them.

A file is known by its identity: device, inode, size, and the times of its last write and last change, in nanoseconds.
Whatever writes to a file changes these. Only a file that has been left alone for a while is remembered, because two
writes within one tick of the file system's clock leave the same times. Records lie in the user's cache folder; without
one, or with a damaged one, files are hashed.
"""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edgellm.engines.bundle import verify_files, verify_sizes
from edgellm.engines.spec import EngineFile

SETTLED_S: Final = 2.0
"""Longer than a tick of any file system's clock."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A file as it was when its bytes had this hash."""

    device: int
    inode: int
    bytes: int
    written_ns: int
    changed_ns: int
    sha256: str


def verify_once(folder: Path, files: Iterable[EngineFile], *, records: Path | None = None) -> None:
    """`verify_files`, hashing only those files that no record knows as they are.

    `records`: their folder; None is the user's cache. Raises BundleError.
    """
    files = tuple(files)
    verify_sizes(folder, files)
    records = records or _user_records()
    if records is None:
        verify_files(folder, files)
        return
    unknown = [file for file in files if not _is_known(folder, file, records)]
    before = {file.name: _record(folder, file) for file in unknown}
    verify_files(folder, unknown)
    for file in unknown:
        if _has_settled(before[file.name]) and _record(folder, file) == before[file.name]:
            _write(records, before[file.name])


def _user_records() -> Path | None:
    """None for a user without a home."""
    try:
        return Path.home() / ".cache" / "edgellm" / "verified"
    except RuntimeError:
        return None


def _record(folder: Path, file: EngineFile) -> Record:
    status = (folder / file.name).stat()
    return Record(
        device=status.st_dev,
        inode=status.st_ino,
        bytes=status.st_size,
        written_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
        sha256=file.sha256,
    )


def _is_known(folder: Path, file: EngineFile, records: Path) -> bool:
    now = _record(folder, file)
    try:
        return msgspec.json.decode(_path(records, now).read_bytes(), type=Record) == now
    except (OSError, msgspec.DecodeError):
        return False


def _has_settled(record: Record) -> bool:
    return time.time_ns() - max(record.written_ns, record.changed_ns) > SETTLED_S * 1e9


def _path(records: Path, record: Record) -> Path:
    return records / f"{record.device:x}-{record.inode:x}.json"


def _write(records: Path, record: Record) -> None:
    """Replace the file's record; where that is not possible, it is hashed again next time."""
    try:
        records.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=records, delete=False) as partial:
            partial.write(msgspec.json.encode(record))
        Path(partial.name).replace(_path(records, record))
    except OSError:
        return
