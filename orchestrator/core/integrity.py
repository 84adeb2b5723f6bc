"""Recounts from scratch what the event functions keep up to date."""

from edgellm.orchestrator.core.nodes import Node
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Queued, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import AttemptId


class IntegrityError(AssertionError):
    """The core's books do not add up: a bug in the core."""


def check_integrity(state: ClusterState) -> None:
    """Raises IntegrityError with what does not hold."""
    for request in state.requests.values():
        _check_request(state, request)
    for node in state.nodes:
        _check_node(state, node)


def _check_request(state: ClusterState, request: Request) -> None:
    _require(len(request.tokens) < request.spec.generation.max_tokens, f"{request.id} has all its tokens and goes on")
    _require(request.attempts <= state.config.max_attempts, f"{request.id} was tried {request.attempts} times")
    match request.phase:
        case Queued():
            pass
        case Prefilling(attempt=attempt, prefill=prefill, decode=decode):
            for connection in (prefill, decode):
                _require_lease(state.nodes.get(connection), attempt)
        case Decoding(attempt=attempt, decode=decode):
            _require_lease(state.nodes.get(decode), attempt)


def _require_lease(node: Node | None, attempt: AttemptId) -> None:
    lease = node.leases.get(attempt) if node is not None else None
    _require(lease is not None, f"{attempt} is under way without blocks")
    _require(lease is None or lease.released_s is None, f"{attempt} is under way on blocks it was told to release")


def _check_node(state: ClusterState, node: Node) -> None:
    name = node.profile.node_id
    _require(node.state != "dead" or not node.leases, f"dead node {name} holds blocks")
    used = sum(lease.blocks for lease in node.leases.values())
    _require(0 <= used <= node.profile.kv_blocks, f"{used} of {node.profile.kv_blocks} blocks of {name} are leased")
    for attempt, lease in node.leases.items():
        current = state.request_of(attempt) is not None
        _require(current or lease.released_s is not None, f"{attempt} ended, and {name} was never told to release it")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IntegrityError(otherwise)
