"""GGUF files: config and tokenizer from the metadata, weights dequantised, all in Hugging Face terms."""

from pathlib import Path
from typing import Any

from edgellm.builder.checkpoint.gguf_config import read_gguf_config
from edgellm.builder.checkpoint.gguf_format import GgufContainer
from edgellm.builder.checkpoint.gguf_tensors import GgufTensors
from edgellm.builder.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles
from edgellm.builder.checkpoint.torch_model import load_tensors


class GgufFile:
    """One .gguf file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is damaged, or uses what our graph would not compute."""
        self.path = path
        self.files = (path,)
        container = GgufContainer(path)
        self._metadata = container.metadata
        self.raw_config = read_gguf_config(path, container.metadata, container.tensors.keys())
        self.tensors = GgufTensors(container, self.raw_config)

    def read_tokenizer(self) -> TokenizerFiles:
        return read_gguf_tokenizer(self.path, self._metadata)

    def load_torch(self) -> Any:
        return load_tensors(self.raw_config, self.tensors.read)
