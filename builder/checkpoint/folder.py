"""Hugging Face folders: config.json, safetensors, tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgellm.builder.checkpoint.errors import DOWNLOAD_AGAIN, CheckpointError
from edgellm.builder.checkpoint.safetensors import SafetensorsFiles
from edgellm.builder.checkpoint.tokenizer import TokenizerFiles, read_generation
from edgellm.builder.checkpoint.torch_model import load_folder

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


class HfFolder:
    """A folder as `save_pretrained` writes it."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the config or weights are missing or unreadable."""
        self.path = path
        self.raw_config = _read_json(path / "config.json")
        if not self.raw_config:
            raise CheckpointError(
                path, "has no config.json", "pass the folder of a Hugging Face model, or a .gguf file"
            )
        self.tensors = SafetensorsFiles(path)
        sides = [path / name for name in _SIDE_FILES]
        self.files = (*self.tensors.paths, *(side for side in sides if side.is_file()))

    def read_tokenizer(self) -> TokenizerFiles:
        settings = _read_json(self.path / "tokenizer_config.json")
        generation = {**self.raw_config, **_read_json(self.path / "generation_config.json")}
        return TokenizerFiles(
            tokenizer_json=self._tokenizer_json(),
            chat_template=self._chat_template(settings),
            generation=read_generation(
                generation, bos_token=_token_text(settings, "bos_token"), eos_token=_token_text(settings, "eos_token")
            ),
        )

    def load_torch(self) -> Any:
        return load_folder(self.path)

    def _tokenizer_json(self) -> str:
        path = self.path / "tokenizer.json"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        return self._converted_tokenizer_json()

    def _converted_tokenizer_json(self) -> str:
        """Older folders have a SentencePiece model or vocabulary lists instead."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            return str(tokenizer.backend_tokenizer.to_str())
        except (OSError, ValueError, ImportError, AttributeError) as error:
            raise CheckpointError(
                self.path, f"has no tokenizer.json, and its tokenizer does not convert ({error})", "add tokenizer.json"
            ) from error

    def _chat_template(self, settings: Mapping[str, Any]) -> str | None:
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = settings.get("chat_template")
        if isinstance(template, list):
            return next((str(named["template"]) for named in template if named["name"] == "default"), None)
        return template


def _token_text(settings: Mapping[str, Any], name: str) -> str:
    """A special token in tokenizer_config.json: null, its text, or a mapping that holds its text."""
    token = settings.get(name)
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"is not a JSON object ({error})", DOWNLOAD_AGAIN) from error
