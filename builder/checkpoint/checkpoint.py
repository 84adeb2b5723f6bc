"""One opened checkpoint, whatever its format."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from edgellm.builder.checkpoint.errors import CheckpointError
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles
from edgellm.builder.checkpoint.weights import CheckpointWeights, TensorFile
from edgellm.builder.models import ModelConfig, UnsupportedModelError, read_config, source_of
from edgellm.builder.models.config import RawConfig
from edgellm.calib.recipe import LinearSource
from edgellm.engines.generation import Generation
from edgellm.engines.graph import WeightName
from edgellm.engines.weights import WeightStore


class CheckpointFormat(Protocol):
    """What a kind of checkpoint has to provide."""

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that make up the model: weights, config, tokenizer."""
        ...

    @property
    def raw_config(self) -> RawConfig:
        """Config in Hugging Face terms."""
        ...

    @property
    def tensors(self) -> TensorFile:
        """Tensors by their names in the Hugging Face state dict."""
        ...

    def read_tokenizer(self) -> TokenizerFiles:
        """The tokenizer with its template and defaults."""
        ...

    def load_torch(self) -> Any:
        """The `transformers` model in float32, in eval mode."""
        ...


class Checkpoint:
    """A model on disk: config, lazy weights by our names, tokenizer, and the same model in PyTorch."""

    def __init__(self, name: str, source: CheckpointFormat) -> None:
        """Raises CheckpointError for an unsupported model, and for missing or misshapen tensors."""
        self.id = name
        self.path = source.path
        self._source = source
        try:
            self.config: ModelConfig = read_config(source.raw_config)
        except UnsupportedModelError as error:
            raise CheckpointError(source.path, str(error), "choose another model") from error
        self.weights: WeightStore = CheckpointWeights(source.path, self.config, source.tensors)

    @property
    def architecture(self) -> str:
        """`llama`, `qwen2`, `gpt_neox` and so on."""
        return self.config.architecture

    @cached_property
    def sha256(self) -> str:
        """Hash of the names and contents of all the checkpoint's files; reads them all once."""
        digest = hashlib.sha256()
        for path in sorted(self._source.files):
            digest.update(f"{path.name} {_file_sha256(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def tokenizer(self) -> TokenizerFiles:
        """Tokenizer, chat template and generation defaults, read at first use."""
        return self._source.read_tokenizer()

    @property
    def generation(self) -> Generation:
        """Special token ids and recommended sampling."""
        return self.tokenizer.generation

    def source_of(self, weight: WeightName) -> LinearSource:
        """The Hugging Face module, and its output rows, that a weight or bias of ours came from."""
        return source_of(self.config, weight)

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json, generation.json and, where the model has one, chat_template.jinja."""
        self.tokenizer.write(folder)

    def load_torch(self) -> Any:
        """The same model as `transformers` loads it: float32, eval mode."""
        return self._source.load_torch()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
