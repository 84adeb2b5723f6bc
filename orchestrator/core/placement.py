"""Asks the policy where waiting requests go, and starts them there."""

from collections.abc import Sequence

from edgellm.orchestrator.core.addresses import target_of
from edgellm.orchestrator.core.commands import StartPrefill
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.pipelines import Pipeline, connections_of, solo_pipelines
from edgellm.orchestrator.core.policy import NodeView, Placement, Policy, WaitingRequest
from edgellm.orchestrator.core.protection import choose_copies
from edgellm.orchestrator.core.requests import Prefilling, Queued, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.takeover import Copy
from edgellm.orchestrator.core.values import ConnectionId, KvTarget


def place_waiting(state: ClusterState, policy: Policy) -> None:
    waiting = _placeable(state)
    if not waiting:
        return
    views = [_view(state, node) for node in state.nodes.alive()]
    placements = policy.plan(state.now_s, waiting, views, _pipelines(state, views))
    for placement in placements:
        _lease(state, state.requests[placement.request_id], placement)
    for placement in placements:
        _start(state, state.requests[placement.request_id])


def _placeable(state: ClusterState) -> list[WaitingRequest]:
    return [
        request.waiting_view(state.config)
        for request in state.requests.values()
        if isinstance(request.phase, Queued) and request.phase.not_before_s <= state.now_s
    ]


def _view(state: ClusterState, node: Node) -> NodeView:
    return node.view(state.config.num_layers, state.links.avoided_from(state.now_s, node.connection))


def _pipelines(state: ClusterState, views: Sequence[NodeView]) -> tuple[Pipeline, ...]:
    """Without any half-precision engine only those count that can read a prompt with the decode engine."""
    if any(view.can_prefill for view in views):
        return state.pipelines()
    return solo_pipelines(state.nodes.carriers(state.config.cut), state.config.cut)


def _lease(state: ClusterState, request: Request, placement: Placement) -> None:
    """Take what the placement needs, so that copies, which come after, take nothing away from another one."""
    attempt = state.next_attempt(request.id)
    prompt_tokens = len(request.spec.prompt)
    total_blocks = state.config.blocks_for(request.capacity_tokens)
    on_pipeline = connections_of(placement.pipeline)
    for connection in on_pipeline:
        reading = prompt_tokens if connection == placement.prefill else 0
        _node(state, placement, connection).lease(attempt, "stage", total_blocks, reading)
    if placement.prefill not in on_pipeline:
        blocks = state.config.blocks_for(prompt_tokens)
        _node(state, placement, placement.prefill).lease(attempt, "source", blocks, prompt_tokens)
    request.begin_attempt(
        state.now_s,
        Prefilling(attempt=attempt, prefill=placement.prefill, pipeline=placement.pipeline, path=placement.path),
    )


def _node(state: ClusterState, placement: Placement, connection: ConnectionId) -> Node:
    node = state.nodes.get(connection)
    if node is None:
        raise ValueError(f"the policy placed {placement.request_id} on a node that is not there: {placement}")
    return node


def _start(state: ClusterState, request: Request) -> None:
    phase = request.phase
    assert isinstance(phase, Prefilling)
    request.copies = tuple(choose_copies(state, request, phase))
    names = state.nodes.names(phase.prefill, *connections_of(phase.pipeline))
    state.note_request(request, "prefilling", f"{phase.path}, {names}")
    state.out.append(
        StartPrefill(
            connection=phase.prefill,
            attempt=phase.attempt,
            prompt=request.spec.prompt,
            generated=tuple(request.tokens),
            generation=request.spec.generation,
            targets=_targets(state, phase, request.copies),
            degraded=phase.path == "degraded",
        )
    )


def _targets(state: ClusterState, phase: Prefilling, copies: Sequence[Copy]) -> tuple[KvTarget, ...]:
    stages = [target_of(state.nodes, stage.connection, stage.layers) for stage in phase.pipeline]
    backups = [target_of(state.nodes, copy.holder, copy.layers, backup=True) for copy in copies]
    alone = connections_of(phase.pipeline) == (phase.prefill,)
    return () if alone and not backups else (*stages, *backups)
