"""What a node is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path

from edgellm.runtime.kv.codecs import CodecChoice
from edgellm.runtime.kv.copying.queue import CopyConfig
from edgellm.runtime.kv.servicer import ExchangeConfig
from edgellm.runtime.kv.types import NodeId


class NodeError(Exception):
    """A node that cannot start or go on; the message says what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """How a node reaches its orchestrator."""

    orchestrator: str
    """host:port."""
    join_timeout_s: float = 30.0
    """How long to try at the start."""
    lease_s: float = 30.0
    """How long to try again after the orchestrator went away."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Options of edgellm-node."""

    node_id: NodeId
    bundle: Path
    engine: str
    join: JoinConfig
    spare: bool = False
    """A decode node that takes no requests of its own: it holds copies, and takes over."""
    listen: str = "127.0.0.1:0"
    """Address of the KV exchange; port 0: any."""
    advertise: str | None = None
    """host:port that other nodes dial. None: where this node listens."""
    kv_blocks: int | None = None
    """None: what the bundle's plan says."""
    device_class: str | None = None
    """None: as found. An engine for `cpu-local` runs on every machine."""
    threads: int | None = None
    metrics_port: int | None = None
    kv_codec: CodecChoice = "raw"
    allow_shm: bool = True
    max_batch_tokens: int = 4096
    """Prompt tokens read as one batch on a prefill node."""
    prefill_chunk_rows: int = 128
    """Prompt tokens per step on a prefill node: KV is sent after each."""
    local_chunk_rows: int = 128
    """Prompt tokens per step on a decode node: running answers wait for one such step."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    copies: CopyConfig = field(default_factory=CopyConfig)
    tp_leader: str | None = None
    """host:port of rank 0, for a rank of a tensor-parallel engine."""
    parent_pid: int | None = None
    """The node ends when this is no longer its parent process. None: it does not look."""
