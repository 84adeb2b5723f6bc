"""Recounts from scratch what the event functions keep up to date."""

from collections.abc import Collection

from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.pipelines import Pipeline, connections_of
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Queued, Recovering, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import AttemptId, ConnectionId


class IntegrityError(AssertionError):
    """The core's books do not add up: a bug in the core."""


def check_integrity(state: ClusterState) -> None:
    """Raises IntegrityError with what does not hold."""
    for request in state.requests.values():
        _check_request(state, request)
    for node in state.nodes:
        _check_node(state, node)
    if not state.links.ends <= {node.connection for node in state.nodes.alive()}:
        raise IntegrityError("a link of a dead node is remembered")


def _check_request(state: ClusterState, request: Request) -> None:
    if len(request.tokens) >= request.spec.generation.max_tokens:
        raise IntegrityError(f"{request.id} has all its tokens and goes on")
    if request.attempts > state.config.max_attempts:
        raise IntegrityError(f"{request.id} was tried {request.attempts} times")
    match request.phase:
        case Queued() | Recovering():
            if request.copies:
                raise IntegrityError(f"{request.id} has copies and no node works on it")
        case Prefilling(attempt=attempt, prefill=prefill, pipeline=pipeline):
            _check_working(state, request, attempt, pipeline, {prefill, *connections_of(pipeline)})
        case Decoding(attempt=attempt, pipeline=pipeline):
            if [stage.layers for stage in pipeline] != [*state.config.cut]:
                raise IntegrityError(f"{attempt} has lost a stage")
            _check_working(state, request, attempt, pipeline, {*connections_of(pipeline)})


def _check_working(
    state: ClusterState,
    request: Request,
    attempt: AttemptId,
    pipeline: Pipeline,
    connections: Collection[ConnectionId],
) -> None:
    for connection in (*connections, *(copy.holder for copy in request.copies)):
        _require_lease(state.nodes.get(connection), attempt)
    sources = {(stage.layers, stage.connection) for stage in pipeline}
    for copy in request.copies:
        if (copy.layers, copy.source) not in sources:
            raise IntegrityError(f"{attempt} has a copy of what its source does not carry")
        if copy.source == copy.holder:
            raise IntegrityError(f"{attempt} has a copy where the stage is")
        if copy.tokens > request.capacity_tokens:
            raise IntegrityError(f"{attempt} has a copy of more than there can be")


def _require_lease(node: Node | None, attempt: AttemptId) -> None:
    lease = node.leases.get(attempt) if node is not None else None
    if lease is None:
        raise IntegrityError(f"{attempt} is under way without blocks")
    if lease.released_s is not None:
        raise IntegrityError(f"{attempt} is under way on blocks it was told to release")


def _check_node(state: ClusterState, node: Node) -> None:
    name = node.profile.node_id
    if node.state == "dead" and node.leases:
        raise IntegrityError(f"dead node {name} holds blocks")
    used = sum(lease.blocks for lease in node.leases.values())
    if not 0 <= used <= node.profile.kv_blocks:
        raise IntegrityError(f"{used} of {node.profile.kv_blocks} blocks of {name} are leased")
    for attempt, lease in node.leases.items():
        if lease.released_s is None and not _is_current(state, attempt):
            raise IntegrityError(f"{attempt} ended, and {name} was never told to release it")
    for part in node.held:
        _require_lease(node, part.attempt)


def _is_current(state: ClusterState, attempt: AttemptId) -> bool:
    request = state.requests.get(attempt.request_id)
    recovering = request is not None and isinstance(request.phase, Recovering)
    return recovering or state.request_of(attempt) is not None
