"""What the core wants done. Commands to a node are sent in order on its connection."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    FinishReason,
    Generation,
    KvTarget,
    NodeId,
    NodeState,
    RequestId,
    RequestStats,
    SampledToken,
)


@dataclass(frozen=True, kw_only=True)
class WelcomeNode:
    connection: ConnectionId
    incarnation: int


@dataclass(frozen=True, kw_only=True)
class RefuseNode:
    """End the stream of a node that may not join, with what to do."""

    connection: ConnectionId
    reason: str


@dataclass(frozen=True, kw_only=True)
class DropNode:
    """End the stream of a node that was given up."""

    connection: ConnectionId
    reason: str


@dataclass(frozen=True, kw_only=True)
class StartPrefill:
    connection: ConnectionId
    attempt: AttemptId
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    generation: Generation
    targets: tuple[KvTarget, ...]
    """Empty: the node keeps the KV and will be told to decode."""
    degraded: bool


@dataclass(frozen=True, kw_only=True)
class StartDecode:
    connection: ConnectionId
    attempt: AttemptId
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    generation: Generation


@dataclass(frozen=True, kw_only=True)
class ReleaseAttempt:
    connection: ConnectionId
    attempt: AttemptId


@dataclass(frozen=True, kw_only=True)
class AcceptRequest:
    request_id: RequestId


@dataclass(frozen=True, kw_only=True)
class RejectRequest:
    """`duplicate`: the id is in use. `impossible`: can never fit. `overloaded`: come back after `retry_after_ms`."""

    request_id: RequestId
    kind: Literal["duplicate", "impossible", "overloaded"]
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class EmitToken:
    request_id: RequestId
    token: SampledToken


@dataclass(frozen=True, kw_only=True)
class FinishRequest:
    request_id: RequestId
    reason: FinishReason
    message: str
    stats: RequestStats


@dataclass(frozen=True, kw_only=True)
class NoteRequest:
    """For logs and metrics: a request entered a state. `epoch` is 0 before the first attempt."""

    request_id: RequestId
    epoch: int
    state: Literal["queued", "prefilling", "decoding", "finished"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class NoteNode:
    """For logs and metrics: a node entered a state."""

    node_id: NodeId
    incarnation: int
    state: NodeState
    detail: str


NodeCommand: TypeAlias = WelcomeNode | RefuseNode | DropNode | StartPrefill | StartDecode | ReleaseAttempt
RequestCommand: TypeAlias = AcceptRequest | RejectRequest | EmitToken | FinishRequest
Command: TypeAlias = NodeCommand | RequestCommand | NoteRequest | NoteNode
