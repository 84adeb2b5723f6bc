"""What the core wants done. Commands to a node are sent in order on its connection."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    FinishReason,
    Generation,
    KvCopy,
    KvTarget,
    NodeId,
    NodeState,
    RequestId,
    RequestStats,
    SampledToken,
    StageAddress,
)


@dataclass(frozen=True, kw_only=True)
class WelcomeNode:
    connection: ConnectionId
    incarnation: int
    first_epoch: int
    """Attempts below are not this orchestrator's."""


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
    """Empty: the node keeps the KV and will be told to decode. KV for a target that is the node itself stays there."""
    degraded: bool


@dataclass(frozen=True, kw_only=True)
class StartDecode:
    connection: ConnectionId
    attempt: AttemptId
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    generation: Generation
    stages: tuple[StageAddress, ...] = ()
    """The pipeline in order: the first batches, the last samples. Empty: this node alone."""
    copies: tuple[KvCopy, ...] = ()
    """To keep up from now on, also those of other nodes' stages."""
    resume_from: AttemptId | None = None
    """What the node holds under this older attempt belongs to the new one, and its first `resume_tokens` positions are
    computed already. A node that lacks what it should carry answers AttemptFailed(transfer)."""
    resume_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class HoldCopies:
    """To a node that only holds copies of the attempt: they belong to `attempt` now, cut to `resume_tokens`."""

    connection: ConnectionId
    attempt: AttemptId
    resume_from: AttemptId
    resume_tokens: int


@dataclass(frozen=True, kw_only=True)
class ProtectAttempt:
    """Keep these copies from now on, in place of those the node keeps of the same layers."""

    connection: ConnectionId
    attempt: AttemptId
    copies: tuple[KvCopy, ...]


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
    state: Literal["queued", "recovering", "prefilling", "decoding", "finished"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class NoteNode:
    """For logs and metrics: a node entered a state."""

    node_id: NodeId
    incarnation: int
    state: NodeState
    detail: str


@dataclass(frozen=True, kw_only=True)
class NoteTakeover:
    """For logs and metrics: a node was lost, and requests under it go on."""

    node_id: NodeId
    restored: int
    """Requests that go on from copies."""
    begun_again: int
    """Requests whose prompts have to be read again."""
    detail: str


NodeCommand: TypeAlias = (
    WelcomeNode | RefuseNode | DropNode | StartPrefill | StartDecode | HoldCopies | ProtectAttempt | ReleaseAttempt
)
RequestCommand: TypeAlias = AcceptRequest | RejectRequest | EmitToken | FinishRequest
Note: TypeAlias = NoteRequest | NoteNode | NoteTakeover
Command: TypeAlias = NodeCommand | RequestCommand | Note
