"""What happens when a node joins, is lost, says that it lives, or cannot reach another."""

from edgellm.orchestrator.core.commands import RefuseNode, ReleaseAttempt, WelcomeNode
from edgellm.orchestrator.core.events import HeartbeatReceived, NodeJoined, NodeLost, PipelineBroken
from edgellm.orchestrator.core.failures import bury_node, give_up_node
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.recovering import lease_held, recover_requests
from edgellm.orchestrator.core.requests import Decoding, Stall
from edgellm.orchestrator.core.state import ClusterState


def node_joined(state: ClusterState, event: NodeJoined) -> None:
    refusal = state.nodes.refusal(event.profile)
    if refusal is not None:
        state.out.append(RefuseNode(connection=event.connection, reason=refusal))
        return
    before = state.nodes.named(event.profile.node_id)
    if before is not None and before.state != "dead":
        give_up_node(state, before, "replaced by a newer process")
    node = state.nodes.add(state.now_s, event.connection, event.profile)
    state.epoch = max(state.epoch, event.highest_epoch)
    state.out.append(
        WelcomeNode(connection=node.connection, incarnation=node.incarnation, first_epoch=state.first_epoch)
    )
    for attempt in state.nodes.lease_orphans(state.now_s, node):
        state.out.append(ReleaseAttempt(connection=node.connection, attempt=attempt))
    lease_held(state, node, event.held)
    state.note_node(node, _description(node))
    recover_requests(state)


def _description(node: Node) -> str:
    profile = node.profile
    role = "spare" if profile.spare else profile.role
    return f"{role} on {profile.device_class}, {profile.kv_blocks} KV blocks"


def node_lost(state: ClusterState, event: NodeLost) -> None:
    node = state.nodes.get(event.connection)
    if node is not None:
        bury_node(state, node, event.reason)


def heartbeat_received(state: ClusterState, event: HeartbeatReceived) -> None:
    node = state.nodes.get(event.connection)
    if node is not None:
        state.nodes.note_beat(state.now_s, node, event.load)
        refresh_states(state)


def pipeline_broken(state: ClusterState, event: PipelineBroken) -> None:
    """The peer is most likely dead, and its stream says so in a moment; if not, the link is what broke.

    Of attempts that are over, it may only have been told so sooner.
    """
    peer = state.nodes.named(event.peer)
    requests = [request for attempt in event.attempts if (request := state.request_of(attempt)) is not None]
    for request in requests:
        if isinstance(request.phase, Decoding) and request.stalled is None:
            request.stalled = Stall(source=event.connection, peer=event.peer, since_s=state.now_s)
    if requests and peer is not None and peer.state != "dead":
        peer.suspect_until_s = state.now_s + state.config.broken_link_grace_s
        refresh_states(state)


def refresh_states(state: ClusterState) -> None:
    for node in state.nodes.refresh_states(state.now_s):
        state.note_node(node, node.why(state.now_s))
