"""What the control plane needs of a bundle: its table of contents and its tokenizer folder. No engine is opened."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from edgellm.orchestrator.core.values import Layers

SCHEMA_VERSION = 1


class BundleError(ValueError):
    """The bundle cannot be served; the message says why and what to do."""


class KvContract(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that `kv_contract_sha256` is made of, in the bundle's own encoding."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["fp16", "int8"]
    block_tokens: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    vocab_size: int
    max_seq_len: int
    num_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    device: str
    device_class: str
    role: Literal["prefill", "decode"]
    num_layers: int
    first_layer: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    placements: tuple[Placement, ...]

    @property
    def stages(self) -> tuple[Layers, ...]:
        """The layers of the planned decode engines, in order, each once."""
        decode = (p for p in self.placements if p.role == "decode")
        return tuple(sorted({Layers(p.first_layer, p.num_layers) for p in decode}))


class BundleIndex(msgspec.Struct, frozen=True, kw_only=True):
    """bundle.json, as far as the control plane cares; unknown fields are the engines' business."""

    schema_version: int
    model: ModelInfo
    kv: KvContract
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class ServedBundle:
    """A bundle folder that was found in order."""

    folder: Path
    index: BundleIndex
    sha256: str
    """Of the bytes of bundle.json: nodes with another one may not join."""


def open_bundle(folder: Path) -> ServedBundle:
    """Raises BundleError if bundle.json is missing, broken or of another schema."""
    path = folder / "bundle.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; --bundle takes a folder made by edgellm-build"
        ) from error
    return ServedBundle(folder=folder, index=_decode(path, data), sha256=hashlib.sha256(data).hexdigest())


def _decode(path: Path, data: bytes) -> BundleIndex:
    try:
        version = msgspec.json.decode(data, type=dict[str, object]).get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema {version}, this version reads {SCHEMA_VERSION}: build the bundle again with "
                "edgellm-build"
            )
        return msgspec.json.decode(data, type=BundleIndex)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is broken ({error}): build the bundle again with edgellm-build") from error
