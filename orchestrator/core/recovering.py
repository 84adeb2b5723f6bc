"""After a restart: requests of the journal meet what nodes still hold, and go on from there."""

from collections.abc import Iterator, Sequence, Set

from edgellm.orchestrator.core.events import RequestsRecovered
from edgellm.orchestrator.core.failures import resume
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.requests import Queued, Recovering, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.takeover import Part, Takeover, plan_from_parts
from edgellm.orchestrator.core.values import AttemptId, HeldKv, NodeId, RecoveredRequest


def requests_recovered(state: ClusterState, event: RequestsRecovered) -> None:
    for recovered in event.requests:
        request = _recovered(state, recovered)
        state.requests[request.id] = request
        request.clock.interrupt(state.now_s, state.now_s)
        state.note_request(request, "recovering", f"{len(recovered.tokens)} tokens are in the journal")


def _recovered(state: ClusterState, recovered: RecoveredRequest) -> Request:
    return Request(
        spec=recovered.spec,
        arrival_s=state.now_s,
        phase=Recovering(nodes=recovered.nodes, until_s=state.now_s + state.config.recovery_wait_s),
        progress_s=state.now_s,
        tokens=list(recovered.tokens),
    )


def lease_held(state: ClusterState, node: Node, held: Sequence[HeldKv]) -> None:
    """Count what a process brought along; what nobody waits for it has to release, if it was not told already."""
    for attempt in dict.fromkeys(part.attempt for part in held if part.attempt not in node.leases):
        parts = tuple(part for part in held if part.attempt == attempt)
        request = state.requests.get(attempt.request_id)
        if request is not None and isinstance(request.phase, Recovering):
            node.bring_along(attempt, parts, state.config.blocks_for(request.capacity_tokens))
        else:
            node.bring_along(attempt, parts, state.config.blocks_for(max(part.tokens for part in parts)))
            state.release_on(node.connection, attempt)


def recover_requests(state: ClusterState) -> None:
    """Those whose nodes are all back, and those that have waited long enough."""
    names = {node.profile.node_id for node in state.nodes.alive()}
    for request in list(state.requests.values()):
        phase = request.phase
        if isinstance(phase, Recovering) and (_all_back(phase, names) or state.now_s >= phase.until_s):
            _recover(state, request)


def _all_back(phase: Recovering, names: Set[NodeId]) -> bool:
    return bool(phase.nodes) and phase.nodes <= names


def _recover(state: ClusterState, request: Request) -> None:
    """From the newest attempt that is held in full; the journal may not have heard of it."""
    plans = ((attempt, _plan(state, request, attempt)) for attempt in _held_attempts(state, request))
    before, takeover = next(((attempt, plan) for attempt, plan in plans if plan is not None), (None, None))
    for node in state.nodes.alive():
        for attempt in list(node.leases):
            if attempt.request_id == request.id and attempt != before:
                state.release_on(node.connection, attempt)
    if before is None or takeover is None:
        request.phase = Queued(since_s=state.now_s, not_before_s=state.now_s)
        state.note_request(request, "queued", "its KV is gone: the prompt is read again")
    else:
        resume(state, request, before, takeover, "the orchestrator was restarted")


def _held_attempts(state: ClusterState, request: Request) -> Sequence[AttemptId]:
    held = {part.attempt for node in state.nodes.alive() for part in node.held if part.attempt.request_id == request.id}
    return sorted(held, key=lambda attempt: attempt.epoch, reverse=True)


def _plan(state: ClusterState, request: Request, attempt: AttemptId) -> Takeover | None:
    if not request.tokens:
        return None
    progress = request.progress()
    return plan_from_parts(
        state.config.cut,
        tuple(_parts(state, attempt)),
        kv_tokens=progress.positions,
        prompt_tokens=progress.prompt_tokens,
    )


def _parts(state: ClusterState, attempt: AttemptId) -> Iterator[Part]:
    for node in state.nodes.alive():
        home = node.carrier(state.config.cut).home
        for part in node.held:
            if part.attempt == attempt:
                yield Part(connection=node.connection, layers=part.layers, tokens=part.tokens, home=home)
