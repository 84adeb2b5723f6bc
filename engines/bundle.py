"""The bundle's table of contents: bundle.json, and how a bundle is opened and checked.

    bundle.json                 Bundle; names every small file below with its sha256
    tokenizer/                  tokenizer.json, chat template, generation defaults
    <engine>/engine.json        EngineSpec; names every file of the engine with its sha256
    <engine>/...                what the backend compiled

So the sha256 of bundle.json alone identifies every byte of a bundle. Opening hashes the small files and compares
the sizes of the engines' files; loading an engine hashes its files too, unless they are known to be unchanged since
they were hashed (see verified.py), because a flipped bit in weights is wrong text and not an error.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import msgspec

from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineFile, EngineSpec

SCHEMA_VERSION: Final = 1
BUNDLE_FILE: Final = "bundle.json"
ENGINE_FILE: Final = "engine.json"
TOKENIZER_FOLDER: Final = "tokenizer"

_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model that was compiled."""

    id: str
    """Name a client may ask for: the checkpoint's folder, file or hub name."""
    architecture: str
    """`llama`, `qwen2`, `gpt_neox`."""
    checkpoint_sha256: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_seq_len: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One planned engine on one planned device."""

    engine: str
    """Engine folder of the bundle."""
    device: str
    device_class: str
    role: str
    """`prefill` or `decode`."""
    first_layer: int
    num_layers: int
    precision: str
    weight_bytes: int
    kv_tokens: int
    """Tokens whose KV fits beside the weights."""
    kv_blocks: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who runs what, and what the device profiles predict."""

    placements: tuple[Placement, ...]
    predicted_ttft_ms: float
    """For a 512-token prompt on idle devices."""
    predicted_tpot_ms: float
    """At batch 1 and 512 tokens of context."""
    takeover: tuple[Placement, ...] = ()
    """Where all layers fit in place of a device's own stage. Nodes take over with the stages' own engines: no node
    loads the engine of all layers."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measured on text that was not calibrated on; losses in nats per token on the second half of each window."""

    text: str
    """Where the text came from."""
    windows: int
    window_tokens: int
    perplexity: dict[str, float]
    """By `reference`, `half`, `int4`, `hybrid`."""
    kl_to_reference: dict[str, float]
    """Mean next-token KL divergence from `reference`, nats."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """bundle.json."""

    schema_version: int
    model: ModelInfo
    kv: KvContract
    engines: tuple[str, ...]
    """Engine folders, each with an engine.json."""
    plan: Plan
    quality: Quality | None
    provenance: dict[str, str] = field(default_factory=dict)
    """Versions and options that produced this bundle; nothing that differs between two runs of the same build."""
    files: tuple[EngineFile, ...] = ()
    """Every file but bundle.json and what the engines list themselves, by path with `/` inside the bundle."""


class BundleError(Exception):
    """A bundle that must not be used; the message says what is wrong and what to do."""


def open_bundle(path: Path) -> Bundle:
    """Read and check a bundle: schema, hashes of bundle.json's files, presence and size of every engine's files.

    Raises BundleError.
    """
    bundle = _decode(_read_bundle_file(path), Bundle, path / BUNDLE_FILE)
    verify_files(path, bundle.files)
    for name in bundle.engines:
        verify_sizes(path / name, engine_spec(path, name).files)
    return bundle


def bundle_sha256(path: Path) -> str:
    """Identity of a bundle: sha256 of bundle.json's bytes. Raises BundleError if there is none."""
    return hashlib.sha256(_read_bundle_file(path)).hexdigest()


def engine_spec(path: Path, name: str) -> EngineSpec:
    """The engine.json of engine `name` of the bundle at `path`. Raises BundleError."""
    file = _locate(path, name) / ENGINE_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        built = sorted(found.parent.name for found in path.glob(f"*/{ENGINE_FILE}"))
        raise BundleError(f"bundle {path} has no engine {name!r} ({error.strerror}); it has {built}") from error
    spec = _decode(data, EngineSpec, file)
    if spec.name != name:
        raise BundleError(f"{file} describes engine {spec.name!r}: a folder was renamed or copied; {_REMEDY}")
    return spec


def verify_sizes(folder: Path, files: Iterable[EngineFile]) -> None:
    """Raise BundleError unless every file is there with its recorded size."""
    for file in files:
        location = _locate(folder, file.name)
        try:
            size = location.stat().st_size
        except OSError as error:
            raise BundleError(f"{location} cannot be read ({error.strerror}); {_REMEDY}") from error
        if size != file.bytes:
            raise BundleError(f"{location} has {size} bytes, {file.bytes} were written; {_REMEDY}")


def verify_files(folder: Path, files: Iterable[EngineFile]) -> None:
    """Raise BundleError unless every file is there with its recorded size and sha256."""
    files = tuple(files)
    verify_sizes(folder, files)
    for file in files:
        found = file_sha256(folder / file.name)
        if found != file.sha256:
            raise BundleError(
                f"{folder / file.name} is damaged: sha256 {found[:12]}, {file.sha256[:12]} expected; {_REMEDY}"
            )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_REMEDY: Final = "copy the bundle again, or rebuild it with edgellm-build"


def _read_bundle_file(path: Path) -> bytes:
    """The bytes of bundle.json, once their schema version is known to be ours."""
    file = path / BUNDLE_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BundleError(
            f"no bundle at {path}: {BUNDLE_FILE} cannot be read ({error.strerror}); pass a folder edgellm-build wrote"
        ) from error
    found = _decode(data, dict[str, Any], file).get("schema_version")
    if found != SCHEMA_VERSION:
        raise BundleError(
            f"{file} has schema version {found}, this version of EdgeLLM reads {SCHEMA_VERSION}; "
            "rebuild the bundle with the edgellm-build of this version"
        )
    return data


def _decode(data: bytes, kind: type[_Decoded], file: Path) -> _Decoded:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise BundleError(f"{file} cannot be understood: {error}; {_REMEDY}") from error


def _locate(folder: Path, name: str) -> Path:
    """Where file or folder `name` lies; names that lead out of `folder` are refused."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        raise BundleError(f"{folder} cannot hold {name!r}, which is outside of it; {_REMEDY}")
    return folder.joinpath(*parts)
