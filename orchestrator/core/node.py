"""One process of a node: what it said of itself, how fresh it is, and what it holds by the core's own accounting."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.pipelines import Carrier
from edgellm.orchestrator.core.policy import NodeView
from edgellm.orchestrator.core.slowness import StepTimes
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    HeldKv,
    Layers,
    NodeLoad,
    NodeProfile,
    NodeState,
)

LeaseKind: TypeAlias = Literal["source", "stage", "copy"]
"""`source`: only reads the prompt, and lets go once its KV is sent, also to the holders of copies."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What an attempt may hold on a node, counted as used from dispatch until the node is known to have let go."""

    kind: LeaseKind
    blocks: int
    prefill_tokens: int
    """Prompt tokens the node still has to read for it."""
    released_s: float | None = None
    """When the release was sent."""

    @property
    def is_ending(self) -> bool:
        """Whether the node lets go in a moment: it was told to, or has read what it only had to read."""
        return self.released_s is not None or (self.kind == "source" and self.prefill_tokens == 0)


@dataclass(kw_only=True)
class Node:
    """One incarnation of a node."""

    connection: ConnectionId
    incarnation: int
    profile: NodeProfile
    last_beat_s: float
    last_sign_s: float
    """When anything was heard of it. Only heartbeats tell that it lives: tokens may come late from a dead one."""
    state: NodeState = "ready"
    load: NodeLoad = field(default_factory=NodeLoad)
    leases: dict[AttemptId, Lease] = field(default_factory=dict)
    held: tuple[HeldKv, ...] = ()
    """What its process brought along from an earlier orchestrator; each has a lease that is not released."""
    suspect_until_s: float = -math.inf
    """A peer could not reach it."""
    step_times: StepTimes = field(default_factory=StepTimes)

    def why(self, now_s: float) -> str:
        """For people: the reason for its state."""
        if now_s < self.suspect_until_s:
            return "a peer cannot reach it"
        if self.state == "draining":
            return f"decode steps take {self.step_times.factor:.1f} times as long as usual"
        return f"last heartbeat {1000 * (now_s - self.last_beat_s):.0f} ms ago"

    @property
    def used_blocks(self) -> int:
        return sum(lease.blocks for lease in self.leases.values())

    @property
    def free_blocks(self) -> int:
        return self.profile.kv_blocks - self.used_blocks

    @property
    def working(self) -> int:
        """Requests it reads or generates; copies cost blocks, but no place in a batch."""
        return sum(lease.kind != "copy" or lease.prefill_tokens > 0 for lease in self.leases.values())

    @property
    def copy_room(self) -> int:
        """Blocks that copies may still take: a node with work of its own keeps half of its blocks for that."""
        if self.profile.spare:
            return self.free_blocks
        copied = sum(lease.blocks for lease in self.leases.values() if lease.kind == "copy")
        return min(self.free_blocks, self.profile.kv_blocks // 2 - copied)

    def can_prefill(self, num_layers: int) -> bool:
        """Whether a half-precision engine carries the whole model here."""
        return any(e.phase == "prefill" and e.num_layers == num_layers for e in self.profile.engines)

    def carrier(self, cut: Sequence[Layers]) -> Carrier:
        decode = [engine for engine in self.profile.engines if engine.phase == "decode" and engine.layers in cut]
        serves = self.profile.role == "decode" and not self.profile.spare
        own = [engine for engine in decode if engine.planned] or decode
        return Carrier(
            connection=self.connection,
            node_id=self.profile.node_id,
            role=self.profile.role,
            home=own[0].layers if serves and own else None,
            carries=frozenset(engine.layers for engine in decode),
            draining=self.state == "draining",
        )

    def lease(self, attempt: AttemptId, kind: LeaseKind, blocks: int, prefill_tokens: int = 0) -> None:
        """Raises ValueError if the blocks are not free."""
        if blocks > self.free_blocks or attempt in self.leases:
            raise ValueError(
                f"{attempt} wants {blocks} blocks of node {self.profile.node_id}, which has {self.free_blocks} free"
            )
        self.leases[attempt] = Lease(kind=kind, blocks=blocks, prefill_tokens=prefill_tokens)

    def lease_copy(self, attempt: AttemptId, blocks: int) -> bool:
        """Lease what a copy takes, or widen what is leased already; False if there is no room, or it is being freed."""
        lease = self.leases.get(attempt)
        if lease is None:
            lease = Lease(kind="copy", blocks=0, prefill_tokens=0)
        if lease.is_ending or max(0, blocks - lease.blocks) > self.copy_room:
            return False
        kind: LeaseKind = "stage" if lease.kind == "stage" else "copy"
        self.leases[attempt] = replace(lease, kind=kind, blocks=max(blocks, lease.blocks))
        return True

    def bring_along(self, attempt: AttemptId, parts: tuple[HeldKv, ...], blocks: int) -> None:
        """Its process holds this from before; no more than what is free is counted."""
        self.leases[attempt] = Lease(kind="copy", blocks=min(blocks, self.free_blocks), prefill_tokens=0)
        self.held += parts

    def rename(self, before: AttemptId, after: AttemptId, kind: LeaseKind) -> None:
        """What was held for an attempt is held for the one that takes it over."""
        lease = self.leases[before]
        self.end_lease(before)
        self.leases[after] = replace(lease, kind=kind, prefill_tokens=0, released_s=None)

    def end_lease(self, attempt: AttemptId) -> bool:
        """It holds nothing of the attempt any more; False if it was not to."""
        self._forget_held(attempt)
        return self.leases.pop(attempt, None) is not None

    def mark_released(self, now_s: float, attempt: AttemptId) -> bool:
        """Note that a release goes out now; False if there is nothing to release, or it was sent before."""
        lease = self.leases.get(attempt)
        if lease is None or lease.released_s is not None:
            return False
        self.leases[attempt] = replace(lease, released_s=now_s, prefill_tokens=0)
        self._forget_held(attempt)
        return True

    def _forget_held(self, attempt: AttemptId) -> None:
        self.held = tuple(part for part in self.held if part.attempt != attempt)

    @property
    def prefill_tokens(self) -> int:
        return sum(lease.prefill_tokens for lease in self.leases.values())

    def release_overdue(self, now_s: float, timeout_s: float) -> bool:
        sent = [lease.released_s for lease in self.leases.values() if lease.released_s is not None]
        return any(now_s - released_s > timeout_s for released_s in sent)

    def max_sequences(self) -> int:
        return max((e.max_sequences for e in self.profile.engines if e.phase == self.profile.role), default=0)

    def view(self, num_layers: int, avoid: frozenset[ConnectionId]) -> NodeView:
        return NodeView(
            connection=self.connection,
            node_id=self.profile.node_id,
            role=self.profile.role,
            suspect=self.state == "suspect",
            host_id=self.profile.host_id,
            free_blocks=self.free_blocks,
            free_sequences=self.max_sequences() - self.working,
            prefill_tokens=self.prefill_tokens,
            running=self.working,
            can_prefill=self.can_prefill(num_layers),
            avoid=avoid,
            kv_bytes_per_token=self.profile.kv_bytes_per_token,
            prefill_tokens_per_s=self.load.prefill_tokens_per_s,
            decode_step_ms=self.load.decode_step_ms,
        )
