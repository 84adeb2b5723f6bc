"""Names that nodes and the orchestrator share; imports nothing but the standard library."""

from dataclasses import dataclass
from typing import NewType

NodeId = NewType("NodeId", str)
RequestId = NewType("RequestId", str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt at one request. Whatever carries an older epoch is ignored everywhere."""

    request_id: RequestId
    epoch: int

    def __str__(self) -> str:
        return f"request={self.request_id} epoch={self.epoch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTarget:
    """A node that takes the KV of some layers of a prompt."""

    node_id: NodeId
    address: str
    """host:port of its KvExchange."""
    host_id: str
    first_layer: int
    num_layers: int
    backup: bool = False

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of a decode pipeline: a node and the layers it carries. A node may carry several."""

    node_id: NodeId
    address: str
    """host:port of its StageExchange and KvExchange."""
    host_id: str
    first_layer: int
    num_layers: int

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCopy:
    """`source` keeps a copy of its KV of these layers on `target`."""

    source: NodeId
    target: KvTarget
    from_token: int
    """Position of the first row to copy; what is before it is there already, or on its way from the prefill node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldKv:
    """KV on a node: the first `tokens` positions of a range of layers."""

    attempt: Attempt
    first_layer: int
    num_layers: int
    tokens: int

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.first_layer + self.num_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferStats:
    """How a prompt's KV travelled."""

    transport: str
    codec: str
    chunks: int
    bytes: int
    """Encoded payload, resent chunks included."""
    hidden_ms: float
    """Sending time while the prompt was still being computed."""
    exposed_ms: float
    """From the first token sampled to the last acknowledgement."""
