"""Folders that appear whole or not at all."""

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from edgellm.builder.errors import explain_write_errors
from edgellm.engines.bundle import file_sha256
from edgellm.engines.spec import EngineFile

_OCCUPIED: Final = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_CANNOT_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV})
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
"""Of Linux's fcntl.h and fs.h."""


@contextmanager
def new_folder(target: Path, *, keep: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A temporary folder beside `target`; it becomes `target` when the block ends, and vanishes if it raises.

    Everything is flushed to the disk before the rename, so a crash leaves the old folder or the new one. What is
    already at `target`, or came there meanwhile, is replaced, unless `keep(target)`: then the new folder vanishes. The
    two are exchanged at once; only on a file system that cannot do that is nothing at `target` for a moment, and after
    a crash in it. Raises BuildError where nothing, or no more, can be written.
    """
    with explain_write_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            yield folder
            _flush(folder)
            _put(folder, target, keep)
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


def _put(folder: Path, target: Path, keep: Callable[[Path], bool]) -> None:
    """Another process may do the same at any time: it is seen by the rename, which refuses a target in use."""
    while not _move(folder, target) and not keep(target):
        if _exchange(folder, target):
            return
        target.rename(Path(tempfile.mkdtemp(dir=folder.parent)) / "old")


def _move(folder: Path, target: Path) -> bool:
    """False if a file, or a folder that is not empty, is at `target`."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        return False
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places at once; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error not in _CANNOT_EXCHANGE:
        raise OSError(error, os.strerror(error), str(second))
    return False


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
