"""Keeps a hot copy of every stage: chooses who holds it, and makes it again where it is missing."""

from collections.abc import Iterator
from dataclasses import replace

from edgellm.orchestrator.core.addresses import copies_of
from edgellm.orchestrator.core.commands import ProtectAttempt
from edgellm.orchestrator.core.events import CopyLost, KvCopied
from edgellm.orchestrator.core.pipelines import Stage, connections_of, holders_for
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Request, Working
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.takeover import Copy
from edgellm.orchestrator.core.values import AttemptId, ConnectionId


def choose_copies(state: ClusterState, request: Request, phase: Working) -> Iterator[Copy]:
    """A copy for each stage that has none kept up, where a node has room; its blocks are leased here."""
    if not state.config.hot_copies:
        return
    for stage in phase.pipeline:
        if any(copy.live and copy.layers == stage.layers for copy in request.copies):
            continue
        reader = phase.prefill if isinstance(phase, Prefilling) else stage.connection
        holder = _choose_holder(state, request, phase.attempt, stage, reader)
        if holder is not None:
            tokens = max((copy.tokens for copy in request.copies if _is_at(copy, stage, holder)), default=0)
            yield Copy(
                layers=stage.layers,
                source=stage.connection,
                reader=reader,
                holder=holder,
                tokens=tokens,
                since_s=state.now_s,
            )


def _is_at(copy: Copy, stage: Stage, holder: ConnectionId) -> bool:
    return copy.layers == stage.layers and copy.holder == holder


def _choose_holder(
    state: ClusterState, request: Request, attempt: AttemptId, stage: Stage, reader: ConnectionId
) -> ConnectionId | None:
    """Those that the stage, or `reader`, which sends the prompt's KV, did not reach lately are the last choice."""
    blocks = state.config.blocks_for(request.capacity_tokens)
    avoid = {one for sender in (reader, stage.connection) for one in state.links.avoided_from(state.now_s, sender)}
    table = holders_for(stage, state.nodes.carriers(state.config.cut), state.config.cut)
    for connection in sorted(table, key=lambda holder: holder in avoid):
        node = state.nodes.get(connection)
        may_hold = node is not None and node.state == "ready" and connection not in request.no_copies_on
        if node is not None and may_hold and node.lease_copy(attempt, blocks):
            return connection
    return None


def protect_requests(state: ClusterState) -> None:
    """Make missing copies in the background, few at a time: each sends all KV of a request."""
    _give_up_late_copies(state)
    being_made = sum(_is_being_made(request, copy) for request in state.requests.values() for copy in request.copies)
    for request in list(state.requests.values()):
        if being_made >= state.config.max_new_copies:
            return
        if isinstance(request.phase, Decoding) and _may_protect(state, request, request.phase):
            being_made += _protect(state, request, request.phase)


def _is_being_made(request: Request, copy: Copy) -> bool:
    return isinstance(request.phase, Decoding) and copy.live and copy.tokens < len(request.spec.prompt)


def _may_protect(state: ClusterState, request: Request, phase: Decoding) -> bool:
    """Not while a pause lasts: going on comes first."""
    return phase.kv_complete and not request.clock.is_paused and request.protect_from_s <= state.now_s


def _protect(state: ClusterState, request: Request, phase: Decoding) -> int:
    """Returns how many copies were begun."""
    made = tuple(choose_copies(state, request, phase))
    request.protect_from_s = state.now_s + state.config.protect_pause_s
    replaced = {(copy.layers, copy.holder) for copy in made}
    request.copies = (*(c for c in request.copies if (c.layers, c.holder) not in replaced), *made)
    for source in connections_of(phase.pipeline):
        own = tuple(copy for copy in made if copy.source == source)
        if own:
            copies = copies_of(state.nodes, own, from_token=0)
            state.out.append(ProtectAttempt(connection=source, attempt=phase.attempt, copies=copies))
    return len(made)


def _give_up_late_copies(state: ClusterState) -> None:
    for request in state.requests.values():
        if not isinstance(request.phase, Decoding):
            continue
        for copy in request.copies:
            late = state.now_s - copy.since_s > state.config.copy_timeout_s
            if late and _is_being_made(request, copy):
                state.link_failed(copy.reader, copy.holder)
                _lose_copy(state, request, request.phase.attempt, copy)


def kv_copied(state: ClusterState, event: KvCopied) -> None:
    """What a holder claims beyond the answer's room is not believed."""
    for held in event.copies:
        request = state.request_of(held.attempt)
        if request is not None:
            tokens = min(held.tokens, request.capacity_tokens)
            request.copies = tuple(
                _grown(state, request, copy, tokens)
                if copy.holder == event.connection and copy.layers in held.layers
                else copy
                for copy in request.copies
            )


def _grown(state: ClusterState, request: Request, copy: Copy, tokens: int) -> Copy:
    if tokens <= copy.tokens:
        return copy
    state.links.worked(copy.reader if copy.tokens < len(request.spec.prompt) else copy.source, copy.holder)
    return replace(copy, tokens=tokens)


def copy_lost(state: ClusterState, event: CopyLost) -> None:
    request, holder = state.request_of(event.attempt), state.nodes.named(event.holder)
    if request is None or holder is None:
        return
    if event.kind == "transfer" and event.connection != holder.connection:
        state.link_failed(event.connection, holder.connection)
    for copy in request.copies:
        if copy.holder == holder.connection and copy.layers in event.layers:
            _lose_copy(state, request, event.attempt, copy)


def _lose_copy(state: ClusterState, request: Request, attempt: AttemptId, copy: Copy) -> None:
    """One that reaches over the prompt still serves to go on from where it ends; any other is let go of."""
    request.protect_from_s = state.now_s + state.config.protect_pause_s
    request.copies = tuple(other for other in request.copies if other != copy)
    if copy.tokens >= len(request.spec.prompt):
        request.copies += (replace(copy, live=False),)
        return
    request.no_copies_on.add(copy.holder)
    if not request.keeps_on(copy.holder) and not request.uses(copy.holder):
        state.release_on(copy.holder, attempt)


def copy_lag_tokens(state: ClusterState, source: ConnectionId) -> int:
    """Tokens by which the copies of a node's KV lag, at most; copies that are being made count in full."""
    return max((_lag(request, source) for request in state.requests.values()), default=0)


def _lag(request: Request, source: ConnectionId) -> int:
    copied = [copy.tokens for copy in request.copies if copy.source == source and copy.live]
    decoding = isinstance(request.phase, Decoding) and request.phase.kv_complete
    return max(0, request.kv_tokens - min(copied)) if decoding and copied else 0
