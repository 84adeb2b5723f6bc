"""Expected failures of a build that belong to no single step, and how others become them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_ALLOWED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})


class BuildError(Exception):
    """The build cannot go on; the message says why and what to do."""


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says when `folder` can take no more bytes, or none at all, into a BuildError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise BuildError(
                f"no space left while writing to {folder} ({error.strerror}); nothing unfinished was left behind. "
                "Free some space, or choose another --output or --cache-dir"
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise BuildError(
                f"cannot write to {folder} ({error.strerror}); choose another --output or --cache-dir"
            ) from error
        raise


@contextmanager
def expected(*kinds: type[Exception]) -> Iterator[None]:
    """Turn failures that a step names itself, such as unusable calibration text, into a BuildError of the same text."""
    try:
        yield
    except kinds as error:
        raise BuildError(str(error)) from error
