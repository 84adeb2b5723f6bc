"""A prompt's KV to be sent, how that can fail, and what a node needs of the KV exchange."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from edgellm.engines.kv import BlockId
from edgellm.runtime.kv.types import Attempt, KvCopy, KvTarget, NodeId, TransferStats

TransferFailure: TypeAlias = Literal["transfer", "capacity", "stale"]
"""`stale`: the receiver has let go of the attempt, or has not heard of it yet; it was reached."""


class TransferError(Exception):
    """KV could not be delivered to `peer`."""

    def __init__(self, kind: TransferFailure, peer: NodeId, message: str) -> None:
        super().__init__(message)
        self.kind: TransferFailure = kind
        self.peer = peer


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferJob:
    """What to send, and to whom."""

    attempt: Attempt
    prompt_tokens: int
    capacity_tokens: int
    """Prompt and answer: what the receiver reserves."""
    blocks: Sequence[BlockId]
    targets: tuple[KvTarget, ...]
    timeout_s: float
    """Within which a transfer that has something to do must make progress."""


def total(stats: Sequence[TransferStats]) -> TransferStats:
    """Of transfers that went on side by side; at least one."""
    return TransferStats(
        transport=stats[0].transport,
        codec=stats[0].codec,
        chunks=sum(one.chunks for one in stats),
        bytes=sum(one.bytes for one in stats),
        hidden_ms=max(one.hidden_ms for one in stats),
        exposed_ms=max(one.exposed_ms for one in stats),
    )


class Transfers(Protocol):
    """The sending end of the KV exchange."""

    def start(self, job: TransferJob) -> None: ...

    def advance(self, attempt: Attempt, computed: int) -> None: ...

    def cancel(self, attempt: Attempt) -> None: ...


class Copies(Protocol):
    """Copies of this node's KV that it keeps on other nodes. What they lack is read from the pool and its holdings."""

    def start(self, attempt: Attempt, copies: Sequence[KvCopy]) -> None:
        """Keep these from now on, in place of those of the same layers."""
        ...

    def advance(self, attempt: Attempt, layers: range, computed: int) -> None:
        """This node has the first `computed` positions of these layers."""
        ...

    def stop(self, attempt: Attempt) -> None:
        """From now on the attempt's blocks are not read. No effect if nothing is copied."""
        ...


class Arrivals(Protocol):
    """The receiving end."""

    def forget(self, attempt: Attempt) -> None: ...
