"""Folders that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm.builder.errors import explain_write_errors
from edgellm.engines.bundle import file_sha256
from edgellm.engines.spec import EngineFile


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`; it becomes `target` when the block ends, and vanishes if it raises.

    Everything is flushed to the disk before the rename, so a crash leaves the old folder or the new one. A folder
    that is already at `target` is replaced. Raises BuildError where nothing, or no more, can be written.
    """
    with explain_write_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            yield folder
            _flush(folder)
            if target.exists():
                target.rename(Path(scratch) / "old")
            folder.rename(target)
            _flush_one(target.parent)


def list_files(folder: Path) -> tuple[EngineFile, ...]:
    """Every file below `folder`, in the order of its path, with size and sha256."""
    return tuple(describe_file(folder, path) for path in sorted(folder.rglob("*")) if path.is_file())


def describe_file(folder: Path, path: Path) -> EngineFile:
    """Path inside `folder`, size and sha256 of a file."""
    return EngineFile(name=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))


def copy_files(source: Path, target: Path, files: tuple[EngineFile, ...]) -> None:
    """Copy the listed files of one folder into another. A copy, not a link: editing one must not change the other."""
    for file in files:
        destination = target / file.name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file.name, destination)


def text_sha256(text: str) -> str:
    """Hex sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
