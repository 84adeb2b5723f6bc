"""Requests leave nodes that are alive but do not serve them: out of a peer's reach, or far slower than usual."""

from edgellm.orchestrator.core.failures import go_on_without, plan_for, resume
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.requests import Decoding, Request, Stall
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import ConnectionId


def move_stalled(state: ClusterState) -> None:
    """A node of the pipeline cannot reach the next, which still lives: go on without it.

    Where only that node has the KV, try the same once more; if that gives no token, read the prompt again.
    """
    for request in list(state.requests.values()):
        stall = request.stalled
        if stall is not None and state.now_s - stall.since_s >= state.config.broken_link_grace_s:
            request.stalled = None
            _go_round(state, request, stall)


def _go_round(state: ClusterState, request: Request, stall: Stall) -> None:
    peer = state.nodes.named(stall.peer)
    why = f"node {stall.peer} is out of reach of its pipeline"
    lost = set()
    if peer is not None and peer.state != "dead":
        state.link_failed(stall.source, peer.connection)
        can_do_without = plan_for(state, request, {peer.connection}) is not None
        lost = {peer.connection} if can_do_without or request.attempts > 0 else set()
    go_on_without(state, request, lost, why, last_sign_s=stall.since_s)


def move_from_draining(state: ClusterState) -> None:
    """By takeover, where copies allow it; the rest goes on where it is."""
    draining = {node.connection: node for node in state.nodes.alive() if node.state == "draining"}
    if not draining:
        return
    for request in list(state.requests.values()):
        slow = [node for connection, node in draining.items() if request.needs(connection)]
        if slow and request.attempts == 0:
            _move(state, request, slow, set(draining))


def _move(state: ClusterState, request: Request, slow: list[Node], draining: set[ConnectionId]) -> None:
    takeover = plan_for(state, request, draining)
    if takeover is None:
        return
    assert isinstance(request.phase, Decoding)
    names = ", ".join(node.profile.node_id for node in slow)
    request.clock.interrupt(state.now_s, state.now_s)
    resume(state, request, request.phase.attempt, takeover, f"moved away from {names}, which is draining")
