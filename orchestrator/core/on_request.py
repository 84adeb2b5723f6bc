"""What happens when a client submits or ends a request, and when time goes on."""

from edgellm.orchestrator.core.admission import impossibility, lateness, retry_after_ms, why_waiting
from edgellm.orchestrator.core.commands import AcceptRequest, RejectRequest
from edgellm.orchestrator.core.events import RequestEnded, RequestSubmitted
from edgellm.orchestrator.core.failures import give_up_node
from edgellm.orchestrator.core.moves import move_from_draining, move_stalled
from edgellm.orchestrator.core.on_node import refresh_states
from edgellm.orchestrator.core.protection import protect_requests
from edgellm.orchestrator.core.recovering import recover_requests
from edgellm.orchestrator.core.requests import Queued, Recovering, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import RequestSpec


def request_submitted(state: ClusterState, event: RequestSubmitted) -> None:
    spec, now_s = event.spec, state.now_s
    rejection = _rejection(state, spec)
    if rejection is not None:
        state.out.append(rejection)
        return
    phase = Queued(since_s=now_s, not_before_s=now_s)
    request = Request(spec=spec, arrival_s=now_s, phase=phase, progress_s=now_s)
    state.requests[spec.request_id] = request
    state.out.append(AcceptRequest(request_id=spec.request_id))
    state.note_request(request, "queued", f"{len(spec.prompt)} prompt tokens")


def _rejection(state: ClusterState, spec: RequestSpec) -> RejectRequest | None:
    request_id = spec.request_id
    if request_id in state.requests:
        message = f"request id {request_id!r} is in use: choose another, or leave it empty"
        return RejectRequest(request_id=request_id, kind="duplicate", message=message)
    impossible = impossibility(state.config, state.nodes, spec)
    if impossible is not None:
        return RejectRequest(request_id=request_id, kind="impossible", message=impossible)
    waiting = state.waiting()
    overload = lateness(state.nodes, waiting, spec, state.now_s)
    if len(waiting) >= state.config.max_waiting:
        overload = f"{len(waiting)} requests are waiting, which is the limit: try again later"
    if overload is None:
        return None
    hint_ms = retry_after_ms(state.nodes, waiting)
    return RejectRequest(request_id=request_id, kind="overloaded", message=overload, retry_after_ms=hint_ms)


def request_ended(state: ClusterState, event: RequestEnded) -> None:
    request = state.requests.get(event.request_id)
    if request is not None:
        state.finish(request, event.reason, "")


def tick(state: ClusterState) -> None:
    _forgive_own_silence(state)
    for node, reason in state.nodes.overdue(state.now_s):
        give_up_node(state, node, reason)
    refresh_states(state)
    recover_requests(state)
    move_stalled(state)
    move_from_draining(state)
    protect_requests(state)
    for request in list(state.requests.values()):
        _check_bounds(state, request)


def _forgive_own_silence(state: ClusterState) -> None:
    """If time stood still here (a busy or suspended machine), heartbeats were not read, and silence proves nothing."""
    gap_s = state.now_s - state.last_tick_s
    state.last_tick_s = state.now_s
    if gap_s > state.config.suspect_after_s:
        for node in state.nodes.alive():
            node.last_beat_s = min(state.now_s, node.last_beat_s + gap_s)


def _check_bounds(state: ClusterState, request: Request) -> None:
    config, now_s, deadline_s = state.config, state.now_s, request.spec.deadline_s
    if deadline_s is not None and now_s >= deadline_s:
        state.finish(request, "deadline", "the deadline passed before the answer was finished")
    elif isinstance(request.phase, Queued):
        if now_s - request.phase.since_s > config.placement_timeout_s:
            state.finish(request, "error", why_waiting(config, state.nodes, request))
    elif isinstance(request.phase, Recovering):
        pass  # bounded by its own wait
    elif now_s - request.progress_s > config.attempt_timeout_s:
        state.try_elsewhere(request, None, f"no progress for {config.attempt_timeout_s:.0f} s")
