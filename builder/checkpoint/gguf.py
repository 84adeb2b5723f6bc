"""GGUF files: config and tokenizer from the metadata, weights dequantised, all in Hugging Face terms."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from edgellm.builder.checkpoint.errors import DOWNLOAD_AGAIN, CheckpointError
from edgellm.builder.checkpoint.gguf_config import read_gguf_config
from edgellm.builder.checkpoint.gguf_tensors import GgufTensors
from edgellm.builder.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles
from edgellm.builder.checkpoint.torch_model import load_tensors

_MAGIC = b"GGUF"


class GgufFile:
    """One .gguf file, read through the `gguf` package."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is damaged, or uses what our graph would not compute."""
        self.path = path
        self.files = (path,)
        reader = _open(path)
        self._metadata = {name: field.contents for name, field in reader.fields.items()}
        names = frozenset(tensor.name for tensor in reader.tensors)
        self.raw_config = read_gguf_config(path, self._field, names)
        self.tensors = GgufTensors(reader.tensors, self.raw_config)

    def read_tokenizer(self) -> TokenizerFiles:
        return read_gguf_tokenizer(self.path, self._field)

    def load_torch(self) -> Any:
        return load_tensors(self.raw_config, self.tensors.read)

    def _field(self, name: str) -> Any:
        """A metadata value, or None. Decoded on demand: vocabularies are long."""
        return self._metadata[name]() if name in self._metadata else None


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(path, "does not start with GGUF", "pass a .gguf file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(path, f"cannot be read as GGUF ({error})", DOWNLOAD_AGAIN) from error
