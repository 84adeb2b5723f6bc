"""The bundle's table of contents: bundle.json, and how a bundle is opened and checked."""

from dataclasses import dataclass, field
from typing import Final

from edgellm.engines.kv import KvContract

SCHEMA_VERSION: Final = 1


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
