"""What happens when a node joins, is lost, or says that it lives."""

from edgellm.orchestrator.core.commands import RefuseNode, ReleaseAttempt, WelcomeNode
from edgellm.orchestrator.core.events import HeartbeatReceived, NodeJoined, NodeLost
from edgellm.orchestrator.core.state import ClusterState


def node_joined(state: ClusterState, event: NodeJoined) -> None:
    refusal = state.nodes.refusal(event.profile)
    if refusal is not None:
        state.out.append(RefuseNode(connection=event.connection, reason=refusal))
        return
    before = state.nodes.named(event.profile.node_id)
    if before is not None and before.state != "dead":
        state.give_up_node(before, "replaced by a newer process")
    node = state.nodes.add(state.now_s, event.connection, event.profile)
    state.out.append(WelcomeNode(connection=node.connection, incarnation=node.incarnation))
    for attempt in state.nodes.lease_orphans(state.now_s, node):
        state.out.append(ReleaseAttempt(connection=node.connection, attempt=attempt))
    profile = node.profile
    state.note_node(node, f"{profile.role} on {profile.device_class}, {profile.kv_blocks} KV blocks")


def node_lost(state: ClusterState, event: NodeLost) -> None:
    node = state.nodes.get(event.connection)
    if node is not None:
        state.bury_node(node, event.reason)


def heartbeat_received(state: ClusterState, event: HeartbeatReceived) -> None:
    node = state.nodes.get(event.connection)
    if node is not None:
        node.last_beat_s = state.now_s
        node.load = event.load
        refresh_suspicion(state)


def refresh_suspicion(state: ClusterState) -> None:
    for node in state.nodes.refresh_suspicion(state.now_s):
        state.note_node(node, f"last heartbeat {1000 * (state.now_s - node.last_beat_s):.0f} ms ago")
