"""Who is in the cluster, how fresh it is, and what each node holds by the core's own accounting."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.pipelines import Carrier
from edgellm.orchestrator.core.policy import NodeView
from edgellm.orchestrator.core.slowness import StepTimes
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    HeldKv,
    Layers,
    NodeId,
    NodeLoad,
    NodeProfile,
    NodeState,
)

LeaseKind: TypeAlias = Literal["source", "stage", "copy"]
"""`source`: only reads the prompt, and lets go once its KV is sent."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What an attempt may hold on a node, counted as used from dispatch until the node is known to have let go."""

    kind: LeaseKind
    blocks: int
    prefill_tokens: int
    """Prompt tokens the node still has to read for it."""
    released_s: float | None = None
    """When the release was sent."""


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
    """What its process brought along from an earlier orchestrator, as long as requests wait to hear of it."""
    suspect_until_s: float = -math.inf
    """A peer could not reach it."""
    unreachable_until_s: float = -math.inf
    """The same, and it was still alive: the link is what is broken."""
    step_times: StepTimes = field(default_factory=StepTimes)

    def why(self, now_s: float) -> str:
        """For people: the reason for its state."""
        if now_s < max(self.suspect_until_s, self.unreachable_until_s):
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
        if lease.released_s is not None or max(0, blocks - lease.blocks) > self.copy_room:
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
        lease = self.leases.pop(before)
        self.leases[after] = replace(lease, kind=kind, prefill_tokens=0, released_s=None)

    def mark_released(self, now_s: float, attempt: AttemptId) -> bool:
        """Note that a release goes out now; False if there is nothing to release, or it was sent before."""
        lease = self.leases.get(attempt)
        if lease is None or lease.released_s is not None:
            return False
        self.leases[attempt] = replace(lease, released_s=now_s, prefill_tokens=0)
        return True

    @property
    def prefill_tokens(self) -> int:
        return sum(lease.prefill_tokens for lease in self.leases.values())

    def release_overdue(self, now_s: float, timeout_s: float) -> bool:
        sent = [lease.released_s for lease in self.leases.values() if lease.released_s is not None]
        return any(now_s - released_s > timeout_s for released_s in sent)

    def max_sequences(self) -> int:
        return max((e.max_sequences for e in self.profile.engines if e.phase == self.profile.role), default=0)

    def view(self, num_layers: int) -> NodeView:
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
            kv_bytes_per_token=self.profile.kv_bytes_per_token,
            prefill_tokens_per_s=self.load.prefill_tokens_per_s,
            decode_step_ms=self.load.decode_step_ms,
        )


class NodeRegistry:
    """The latest incarnation of every node that ever joined; dead ones are kept for their size and for `status`."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._by_id: dict[NodeId, Node] = {}
        self._alive: dict[ConnectionId, Node] = {}
        self._orphans: dict[NodeId, set[AttemptId]] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_id.values())

    def alive(self) -> list[Node]:
        return list(self._alive.values())

    def ready(self) -> list[Node]:
        return [node for node in self._alive.values() if node.state == "ready"]

    def get(self, connection: ConnectionId) -> Node | None:
        """The node behind a connection, if it has not been given up."""
        return self._alive.get(connection)

    def carriers(self, cut: Sequence[Layers]) -> list[Carrier]:
        return [node.carrier(cut) for node in self._alive.values()]

    def named(self, node_id: NodeId) -> Node | None:
        return self._by_id.get(node_id)

    def add(self, now_s: float, connection: ConnectionId, profile: NodeProfile) -> Node:
        """Enter a new incarnation. The one before must be dead."""
        before = self._by_id.get(profile.node_id)
        node = Node(
            connection=connection,
            incarnation=before.incarnation + 1 if before else 1,
            profile=profile,
            last_beat_s=now_s,
            last_sign_s=now_s,
        )
        self._by_id[profile.node_id] = node
        self._alive[connection] = node
        return node

    def bury(self, node: Node) -> None:
        """Its process is gone or fenced off, and with it everything it held."""
        node.state = "dead"
        self._orphans.setdefault(node.profile.node_id, set()).update(node.leases)
        node.leases.clear()
        del self._alive[node.connection]

    def lease_orphans(self, now_s: float, node: Node) -> list[AttemptId]:
        """Attempts that a new incarnation must be told to release, although it never had them.

        They were on earlier incarnations when those died. A node that has not heard of it may still send their KV to
        this address, where it would stay for ever. Those that nobody else has a part of are forgotten.
        """
        orphans = self._orphans.pop(node.profile.node_id, set())
        for attempt in orphans:
            node.leases[attempt] = Lease(kind="copy", blocks=0, prefill_tokens=0, released_s=now_s)
        others = [other for other in self._alive.values() if other is not node]
        kept = {attempt for attempt in orphans if any(attempt in other.leases for other in others)}
        if kept:
            self._orphans[node.profile.node_id] = kept
        return sorted(orphans, key=lambda attempt: attempt.epoch)

    def refusal(self, profile: NodeProfile) -> str | None:
        """Why this process may not join, with what to do; None if it may."""
        if profile.bundle_sha256 != self._config.bundle_sha256:
            return (
                f"node {profile.node_id} has bundle {profile.bundle_sha256[:12]}, this cluster serves "
                f"{self._config.bundle_sha256[:12]}: start it with the same --bundle as edgellm-serve"
            )
        if profile.kv_contract_sha256 != self._config.kv_contract_sha256:
            return (
                f"node {profile.node_id} stores KV under contract {profile.kv_contract_sha256[:12]}, this cluster "
                f"under {self._config.kv_contract_sha256[:12]}: rebuild its bundle"
            )
        if profile.role not in ("prefill", "decode"):
            return f"node {profile.node_id} has role {profile.role!r}: it must be prefill or decode"
        return self._name_conflict(profile)

    def _name_conflict(self, profile: NodeProfile) -> str | None:
        named = self._by_id.get(profile.node_id)
        if named is None or named.state in ("suspect", "dead") or _process(named.profile) == _process(profile):
            return None
        return (
            f"node id {profile.node_id} is in use by process {named.profile.pid} at "
            f"{named.profile.exchange_address}: choose another --node-id, or stop that process"
        )

    def prefill_finished(self, connection: ConnectionId, attempt: AttemptId) -> None:
        node = self._alive[connection]
        node.leases[attempt] = replace(node.leases[attempt], prefill_tokens=0)

    def mark_released(self, now_s: float, connection: ConnectionId, attempt: AttemptId) -> bool:
        """Note that a release goes to the node now; returns whether it must be told."""
        node = self._alive.get(connection)
        return node is not None and node.mark_released(now_s, attempt)

    def only_reads(self, connection: ConnectionId, attempt: AttemptId) -> bool:
        """Whether the node lets go of the attempt once the prompt's KV is sent."""
        node = self._alive.get(connection)
        lease = node.leases.get(attempt) if node is not None else None
        return lease is not None and lease.kind == "source"

    def names(self, *connections: ConnectionId) -> str:
        """For people: the nodes behind the connections, each once."""
        names = [node.profile.node_id for c in connections if (node := self._alive.get(c))]
        return " -> ".join(dict.fromkeys(names))

    def overdue(self, now_s: float) -> list[tuple[Node, str]]:
        """Nodes to give up now, with the reason."""
        found = []
        for node in self._alive.values():
            silence_s = now_s - node.last_beat_s
            if silence_s > self._config.dead_after_s:
                found.append((node, f"no heartbeat for {silence_s:.1f} s"))
            elif node.release_overdue(now_s, self._config.release_timeout_s):
                found.append((node, f"a release was not answered for {self._config.release_timeout_s:.0f} s"))
        return found

    def note_sign(self, now_s: float, connection: ConnectionId) -> None:
        node = self._alive.get(connection)
        if node is not None:
            node.last_sign_s = now_s

    def note_beat(self, now_s: float, node: Node, load: NodeLoad) -> None:
        others = [other.step_times for other in self._alive.values() if other is not node and other.load.running > 0]
        node.last_beat_s, node.load = now_s, load
        node.step_times.observe(now_s, load, others)

    def refresh_states(self, now_s: float) -> list[Node]:
        """Update ready, suspect and draining; returns the nodes that changed."""
        changed = []
        for node in self._alive.values():
            state = self._state(now_s, node)
            if state != node.state:
                node.state = state
                changed.append(node)
        return changed

    def _state(self, now_s: float, node: Node) -> NodeState:
        if now_s - node.last_beat_s > self._config.suspect_after_s or now_s < node.suspect_until_s:
            return "suspect"
        slow = node.step_times.slow_since_s is not None
        return "draining" if slow or now_s < node.unreachable_until_s else "ready"


def _process(profile: NodeProfile) -> tuple[str, int]:
    """Process ids are told apart by their host: in containers every node is process 1."""
    return profile.host_id, profile.pid
