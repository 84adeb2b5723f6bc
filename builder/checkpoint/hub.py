"""Checkpoints by hub id, downloaded (or found in the local cache) with huggingface_hub."""

import re
from pathlib import Path

from edgellm.builder.checkpoint.errors import CheckpointError

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(hub_id: str) -> Path:
    """The folder of the model's snapshot. Raises CheckpointError if the id is not one, or cannot be fetched."""
    if not _ID.fullmatch(hub_id):
        raise CheckpointError(hub_id, "no such folder or file", "check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            hub_id,
            f"is no folder or file here, and the hub did not give it ({reason})",
            "download the model where there is a network and pass the path of its folder, or of a .gguf file",
        ) from error
