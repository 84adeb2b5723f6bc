"""What a node needs to turn text into tokens and back: tokenizer.json, chat template, generation defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgellm.engines.generation import Generation


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Contents of a bundle's tokenizer folder."""

    tokenizer_json: str
    """As the `tokenizers` package writes it."""
    chat_template: str | None
    generation: Generation

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, generation.json and, where the model has one, chat_template.jinja."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        (folder / "generation.json").write_bytes(msgspec.json.encode(self.generation, order="deterministic"))
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def token_ids(value: Any) -> tuple[int, ...]:
    """A config's token id field, which is absent, one id, or a list of ids."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(int(token) for token in values))


def read_generation(fields: Mapping[str, Any], *, bos_token: str, eos_token: str) -> Generation:
    """Read a generation_config.json (or the same fields of a config.json); absent fields mean what they do there."""
    samples = bool(fields.get("do_sample", False))

    def sampling(name: str, default: float, off: float) -> float:
        value = fields.get(name)
        return off if not samples else default if value is None else float(value)

    return Generation(
        bos_token_id=next(iter(token_ids(fields.get("bos_token_id"))), None),
        eos_token_ids=token_ids(fields.get("eos_token_id")),
        bos_token=bos_token,
        eos_token=eos_token,
        temperature=sampling("temperature", 1.0, 0.0),
        top_k=int(sampling("top_k", 50, 0)),
        top_p=sampling("top_p", 1.0, 1.0),
        min_p=sampling("min_p", 0.0, 0.0),
        repetition_penalty=float(fields.get("repetition_penalty") or 1.0),
    )
