"""The expected failure of opening or reading a checkpoint."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message gives the path, what is wrong, and what to do."""

    def __init__(self, path: Path | str, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}; {fix}")


DOWNLOAD_AGAIN = "the file is incomplete or damaged: download or copy it again"
