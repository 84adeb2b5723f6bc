"""Opens checkpoints: Hugging Face folders, GGUF files, hub ids."""

from pathlib import Path

from edgellm.builder.checkpoint.checkpoint import Checkpoint
from edgellm.builder.checkpoint.errors import CheckpointError
from edgellm.builder.checkpoint.folder import HfFolder
from edgellm.builder.checkpoint.gguf import GgufFile
from edgellm.builder.checkpoint.hub import download

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]


def open_checkpoint(path_or_id: str) -> Checkpoint:
    """Open a model folder, a .gguf file, or a hub id (downloaded first).

    Reads config and tensor headers, not the weights. Raises CheckpointError for whatever is missing, damaged or not
    supported.
    """
    path = Path(path_or_id)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(path, "is a file, but not a .gguf file", "pass a .gguf file or a model's folder")
        return Checkpoint(path.stem, GgufFile(path))
    if path.is_dir():
        return Checkpoint(path.resolve().name, HfFolder(path))
    return Checkpoint(path_or_id, HfFolder(download(path_or_id)))
