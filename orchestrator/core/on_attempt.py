"""What happens when a node reports on an attempt. Reports of fenced attempts only free blocks."""

from dataclasses import replace
from itertools import pairwise

from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    AttemptResumed,
    KvSent,
    PrefillDone,
    TokenGenerated,
)
from edgellm.orchestrator.core.failures import start_decode
from edgellm.orchestrator.core.pipelines import connections_of
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import AttemptId, ConnectionId


def prefill_done(state: ClusterState, event: PrefillDone) -> None:
    request = state.request_of(event.attempt)
    if request is None or not isinstance(request.phase, Prefilling) or request.phase.prefill != event.connection:
        return
    state.nodes.prefill_finished(event.connection, event.attempt)
    request.progress_s = state.now_s
    request.prefill_ms = event.prefill_ms
    if (event.first_token is None) != bool(request.tokens):
        state.try_elsewhere(request, event.connection, "the prefill node did not send exactly the tokens asked for")
        return
    _enter_decoding(state, request, request.phase)
    if event.first_token is None or not state.accept_token(request, event.first_token):
        _start_decode(state, request)


def _enter_decoding(state: ClusterState, request: Request, phase: Prefilling) -> None:
    nodes = connections_of(phase.pipeline)
    all_here = nodes == (phase.prefill,)
    request.phase = Decoding(
        attempt=phase.attempt,
        pipeline=phase.pipeline,
        kv_source=None if all_here else phase.prefill,
        kv_complete=all_here,
    )
    request.kv_tokens = len(request.spec.prompt)
    request.copies = tuple(replace(copy, since_s=state.now_s) for copy in request.copies)
    request.clock.restored(state.now_s)
    state.note_request(request, "decoding", state.nodes.names(*nodes))


def _start_decode(state: ClusterState, request: Request) -> None:
    assert isinstance(request.phase, Decoding)
    for connection in connections_of(request.phase.pipeline):
        state.out.append(start_decode(state, request, connection))


def kv_sent(state: ClusterState, event: KvSent) -> None:
    request = state.request_of(event.attempt)
    if request is None or not isinstance(request.phase, Decoding) or request.phase.kv_source != event.connection:
        return
    request.kv = event.transfer
    for connection in connections_of(request.phase.pipeline):
        state.links.worked(event.connection, connection)
    _note_kv_complete(state, request, request.phase)


def _note_kv_complete(state: ClusterState, request: Request, phase: Decoding) -> None:
    request.progress_s = state.now_s
    request.phase = replace(phase, kv_complete=True)


def token_generated(state: ClusterState, event: TokenGenerated) -> None:
    request = state.request_of(event.attempt)
    if request is not None and isinstance(request.phase, Decoding) and request.phase.samples_on(event.connection):
        _take_token(state, request, request.phase, event)
    if event.token.finish is not None:
        _let_go(state, event.connection, event.attempt)


def _take_token(state: ClusterState, request: Request, phase: Decoding, event: TokenGenerated) -> None:
    expected = len(request.tokens)
    if event.token.index > expected:
        why = f"the decode node sent token {event.token.index} where {expected} was due"
        state.try_elsewhere(request, event.connection, why)
    elif event.token.index == expected:
        if event.token.finish is not None:
            state.let_go(event.connection, event.attempt)
        _note_kv_complete(state, request, phase)
        _note_links(state, request, phase)
        state.accept_token(request, event.token)


def _note_links(state: ClusterState, request: Request, phase: Decoding) -> None:
    """A second token from a pipeline shows that its stages reach each other: the first has come back to them."""
    if request.attempts == 0 and len(request.tokens) > 1:
        for source, target in pairwise(connections_of(phase.pipeline)):
            state.links.worked(source, target)


def attempt_failed(state: ClusterState, event: AttemptFailed) -> None:
    request = state.request_of(event.attempt)
    if request is None or not request.uses(event.connection):
        _forgo(state, request, event)
    elif event.kind == "request":
        state.finish(request, "error", event.message)
    else:
        if event.kind == "transfer":
            _blame_link(state, event)
            request.avoid.add(event.connection)  # which end of the link is at fault, neither can tell
        delay_s = state.config.retry_delay_s * 2**request.attempts
        state.try_elsewhere(request, _culprit(state, event), event.message, delay_s=delay_s)


def _forgo(state: ClusterState, request: Request | None, event: AttemptFailed) -> None:
    """A node failed at something that is not needed of it, at most a copy: it only has to let go."""
    if request is not None and request.keeps_on(event.connection):
        request.drop_copies_on(event.connection)
        request.no_copies_on.add(event.connection)
    state.release_on(event.connection, event.attempt)


def _blame_link(state: ClusterState, event: AttemptFailed) -> None:
    """Only a sender knows, and names its peer. To a receiver KV may not have come because another link failed."""
    if event.peer is not None:
        state.link_failed(event.connection, _culprit(state, event))


def _culprit(state: ClusterState, event: AttemptFailed) -> ConnectionId:
    peer = state.nodes.named(event.peer) if event.peer is not None else None
    return event.connection if peer is None else peer.connection


def attempt_resumed(state: ClusterState, event: AttemptResumed) -> None:
    """KV is restored when the last node of the pipeline has said so."""
    request = state.request_of(event.attempt)
    if request is not None and request.needs(event.connection):
        request.progress_s = state.now_s
        request.clock.restored(state.now_s)


def attempt_released(state: ClusterState, event: AttemptReleased) -> None:
    _let_go(state, event.connection, event.attempt)


def _let_go(state: ClusterState, connection: ConnectionId, attempt: AttemptId) -> None:
    """The node holds nothing of the attempt any more; if it should, the attempt has failed."""
    state.let_go(connection, attempt)
    request = state.request_of(attempt)
    if request is None:
        return
    request.drop_copies_on(connection)
    if request.needs(connection):
        state.try_elsewhere(request, connection, f"{state.nodes.names(connection)} let go of it too early")
