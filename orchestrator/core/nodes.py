"""Who is in the cluster, and what may be asked of all nodes at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.node import Lease, Node
from edgellm.orchestrator.core.pipelines import Carrier
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    Layers,
    NodeId,
    NodeLoad,
    NodeProfile,
    NodeState,
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
        node.held = ()
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
        return "ready" if node.step_times.slow_since_s is None else "draining"


def _process(profile: NodeProfile) -> tuple[str, int]:
    """Process ids are told apart by their host: in containers every node is process 1."""
    return profile.host_id, profile.pid
