"""What engine.json says of one compiled engine."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["prefill", "decode"]
Backend: TypeAlias = Literal["cpu", "tensorrt", "trtllm", "reference"]


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Upper bounds a batch must respect."""

    max_rows: int
    """Tokens in one step."""
    max_sequences: int
    """Sequences in one step."""
    max_seq_len: int
    """Tokens of one sequence, prompt and answer."""


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One file of an engine, by name inside its folder."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Identity and limits of one engine; `engine.json` is this, as JSON."""

    name: str
    """Folder in the bundle, such as `decode-pp0of2`."""
    phase: Phase
    backend: Backend
    backend_version: str
    device_class: str
    first_layer: int
    num_layers: int
    rank: int
    """Tensor-parallel rank, or pipeline stage."""
    world: int
    """Tensor-parallel ranks, or pipeline stages."""
    precision: str
    """For people: `half`, `int4-g64-a8-o8`."""
    hidden_size: int
    vocab_size: int
    limits: EngineLimits
    files: tuple[EngineFile, ...]
    compute_capability: str | None = None
    """Of the GPU that the code was made for, such as `8.7`; None where no GPU is needed."""
