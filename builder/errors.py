"""Expected failures of a build that belong to no single step."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class BuildError(Exception):
    """The build cannot go on; the message says why and what to do."""


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the system's ways of saying that `folder` can take no more bytes into a BuildError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise BuildError(
            f"no space left while writing to {folder} ({error.strerror}); nothing unfinished was left behind. "
            "Free some space, or choose another --output or --cache-dir"
        ) from error
