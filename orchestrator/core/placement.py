"""Asks the policy where waiting requests go, and starts them there."""

from edgellm.orchestrator.core.commands import StartPrefill
from edgellm.orchestrator.core.nodes import Node
from edgellm.orchestrator.core.policy import Placement, Policy, WaitingRequest
from edgellm.orchestrator.core.requests import Prefilling, Queued, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import AttemptId, KvTarget, Layers


def place_waiting(state: ClusterState, policy: Policy) -> None:
    waiting = _placeable(state)
    if not waiting:
        return
    views = [node.view(state.config.num_layers) for node in state.nodes.alive()]
    for placement in policy.plan(state.now_s, waiting, views):
        _start(state, state.requests[placement.request_id], placement)


def _placeable(state: ClusterState) -> list[WaitingRequest]:
    return [
        request.waiting_view(state.config)
        for request in state.requests.values()
        if isinstance(request.phase, Queued) and request.phase.not_before_s <= state.now_s
    ]


def _start(state: ClusterState, request: Request, placement: Placement) -> None:
    attempt = state.next_attempt(request.id)
    prefill, decode = _lease_nodes(state, request, placement, attempt)
    request.begin_attempt(
        state.now_s,
        Prefilling(attempt=attempt, prefill=prefill.connection, decode=decode.connection, path=placement.path),
    )
    names = state.nodes.names(prefill.connection, decode.connection)
    state.note_request(request, "prefilling", f"{placement.path}, {names}")
    state.out.append(
        StartPrefill(
            connection=prefill.connection,
            attempt=attempt,
            prompt=request.spec.prompt,
            generated=tuple(request.tokens),
            generation=request.spec.generation,
            targets=() if prefill is decode else (_target(state, decode),),
            degraded=placement.path == "degraded",
        )
    )


def _lease_nodes(state: ClusterState, request: Request, placement: Placement, attempt: AttemptId) -> tuple[Node, Node]:
    prefill, decode = state.nodes.get(placement.prefill), state.nodes.get(placement.decode)
    if prefill is None or decode is None:
        raise ValueError(f"the policy placed {request.id} on a node that is not there: {placement}")
    prompt_tokens = len(request.spec.prompt)
    total_blocks = state.config.blocks_for(request.capacity_tokens)
    if prefill is decode:
        decode.lease(attempt, total_blocks, prompt_tokens)
    else:
        prefill.lease(attempt, state.config.blocks_for(prompt_tokens), prompt_tokens)
        decode.lease(attempt, total_blocks, 0)
    return prefill, decode


def _target(state: ClusterState, node: Node) -> KvTarget:
    return KvTarget(
        node_id=node.profile.node_id,
        address=node.profile.exchange_address,
        host_id=node.profile.host_id,
        layers=Layers(0, state.config.num_layers),
    )
