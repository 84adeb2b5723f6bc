"""What can happen to the cluster. `Core.handle` takes one of these and the time."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    FailureKind,
    HeldKv,
    KvTransfer,
    Layers,
    NodeId,
    NodeLoad,
    NodeProfile,
    RecoveredRequest,
    RequestId,
    RequestSpec,
    SampledToken,
)


@dataclass(frozen=True, kw_only=True)
class NodeJoined:
    connection: ConnectionId
    profile: NodeProfile
    held: tuple[HeldKv, ...] = ()
    """What its process still has of requests that an orchestrator, this one or one before it, gave it."""
    highest_epoch: int = 0
    """That its process has heard of. It would take lower ones for stale."""


@dataclass(frozen=True, kw_only=True)
class NodeLost:
    """The stream of a node ended, however it ended."""

    connection: ConnectionId
    reason: str


@dataclass(frozen=True, kw_only=True)
class HeartbeatReceived:
    connection: ConnectionId
    load: NodeLoad


@dataclass(frozen=True, kw_only=True)
class PrefillDone:
    connection: ConnectionId
    attempt: AttemptId
    first_token: SampledToken | None
    """Absent where the prompt was read again for tokens already known."""
    prefill_ms: float


@dataclass(frozen=True, kw_only=True)
class KvSent:
    """Every stage has all KV of the prompt; the prefill node may still be sending copies."""

    connection: ConnectionId
    attempt: AttemptId
    transfer: KvTransfer


@dataclass(frozen=True, kw_only=True)
class TokenGenerated:
    connection: ConnectionId
    attempt: AttemptId
    token: SampledToken


@dataclass(frozen=True, kw_only=True)
class AttemptFailed:
    connection: ConnectionId
    attempt: AttemptId
    kind: FailureKind
    message: str
    peer: NodeId | None = None
    """For `transfer`: the node at the other end."""


@dataclass(frozen=True, kw_only=True)
class AttemptReleased:
    """The node holds nothing of this attempt: it was told to let go, or has read and sent what it only had to read."""

    connection: ConnectionId
    attempt: AttemptId


@dataclass(frozen=True, kw_only=True)
class AttemptResumed:
    """The node has the KV of an attempt that it was told to take over, and goes on."""

    connection: ConnectionId
    attempt: AttemptId


@dataclass(frozen=True, kw_only=True)
class PipelineBroken:
    """The node cannot reach the next stage. It dropped nothing: the attempts wait for a release, or a new decode."""

    connection: ConnectionId
    peer: NodeId
    attempts: tuple[AttemptId, ...]


@dataclass(frozen=True, kw_only=True)
class KvCopied:
    """How far copies reach that the node holds for others."""

    connection: ConnectionId
    copies: tuple[HeldKv, ...]


@dataclass(frozen=True, kw_only=True)
class CopyLost:
    """The node stopped keeping a copy of its layers up to date; decoding goes on."""

    connection: ConnectionId
    attempt: AttemptId
    holder: NodeId
    layers: Layers
    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True)
class RequestSubmitted:
    spec: RequestSpec


@dataclass(frozen=True, kw_only=True)
class RequestEnded:
    """The client side ends it: it went away, or the gateway saw a stop string."""

    request_id: RequestId
    reason: Literal["cancelled", "stop"]


@dataclass(frozen=True, kw_only=True)
class RequestsRecovered:
    """What the journal of an earlier orchestrator has not seen end. The first event of all, where it comes."""

    requests: tuple[RecoveredRequest, ...]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time went on. Sent at a steady rate, so that no timer depends on other events."""


NodeEvent: TypeAlias = (
    HeartbeatReceived
    | PrefillDone
    | KvSent
    | TokenGenerated
    | AttemptFailed
    | AttemptReleased
    | AttemptResumed
    | PipelineBroken
    | KvCopied
    | CopyLost
)
Event: TypeAlias = NodeJoined | NodeLost | NodeEvent | RequestSubmitted | RequestEnded | RequestsRecovered | Tick
