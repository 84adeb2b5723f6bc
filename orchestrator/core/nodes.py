"""Who is in the cluster, how fresh it is, and what each node holds by the core's own accounting."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.policy import NodeView
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    NodeId,
    NodeLoad,
    NodeProfile,
    NodeState,
    Role,
)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What an attempt may hold on a node, counted as used from dispatch until the node is known to have let go."""

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
    state: NodeState = "ready"
    load: NodeLoad = field(default_factory=NodeLoad)
    leases: dict[AttemptId, Lease] = field(default_factory=dict)

    @property
    def used_blocks(self) -> int:
        return sum(lease.blocks for lease in self.leases.values())

    @property
    def free_blocks(self) -> int:
        return self.profile.kv_blocks - self.used_blocks

    def can(self, phase: Role, num_layers: int) -> bool:
        """Whether an engine of this phase carries the whole model here."""
        return any(e.phase == phase and e.num_layers == num_layers for e in self.profile.engines)

    def lease(self, attempt: AttemptId, blocks: int, prefill_tokens: int) -> None:
        """Raises ValueError if the blocks are not free."""
        if blocks > self.free_blocks or attempt in self.leases:
            raise ValueError(
                f"{attempt} wants {blocks} blocks of node {self.profile.node_id}, which has {self.free_blocks} free"
            )
        self.leases[attempt] = Lease(blocks=blocks, prefill_tokens=prefill_tokens)

    def mark_released(self, now_s: float, attempt: AttemptId) -> bool:
        """Note that a release goes out now; False if there is nothing to release, or it was sent before."""
        lease = self.leases.get(attempt)
        if lease is None or lease.released_s is not None:
            return False
        self.leases[attempt] = replace(lease, released_s=now_s, prefill_tokens=0)
        return True

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
            free_sequences=self.max_sequences() - len(self.leases),
            prefill_tokens=sum(lease.prefill_tokens for lease in self.leases.values()),
            running=len(self.leases),
            can_prefill=self.can("prefill", num_layers),
            can_decode=self.profile.role == "decode" and self.can("decode", num_layers),
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
            node.leases[attempt] = Lease(blocks=0, prefill_tokens=0, released_s=now_s)
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
        if named is None or named.state != "ready" or _process(named.profile) == _process(profile):
            return None
        return (
            f"node id {profile.node_id} is in use by process {named.profile.pid} at "
            f"{named.profile.exchange_address}: choose another --node-id, or stop that process"
        )

    def prefill_finished(self, connection: ConnectionId, attempt: AttemptId) -> None:
        node = self._alive[connection]
        node.leases[attempt] = replace(node.leases[attempt], prefill_tokens=0)

    def mark_released(self, now_s: float, attempt: AttemptId) -> list[Node]:
        """Note that releases go out now; returns the nodes that must be told."""
        return [node for node in self._alive.values() if node.mark_released(now_s, attempt)]

    def mark_one_released(self, now_s: float, connection: ConnectionId, attempt: AttemptId) -> bool:
        """The same for one node; returns whether it must be told."""
        node = self._alive.get(connection)
        return node is not None and node.mark_released(now_s, attempt)

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

    def refresh_suspicion(self, now_s: float) -> list[Node]:
        """Update ready and suspect from heartbeat ages; returns the nodes that changed."""
        changed = []
        for node in self._alive.values():
            late = now_s - node.last_beat_s > self._config.suspect_after_s
            state: NodeState = "suspect" if late else "ready"
            if state != node.state:
                node.state = state
                changed.append(node)
        return changed


def _process(profile: NodeProfile) -> tuple[str, int]:
    """Process ids are told apart by their host: in containers every node is process 1."""
    return profile.host_id, profile.pid
