"""What the loss of a node does to its requests: each goes on from copies, or begins again elsewhere."""

import math
from collections.abc import Collection

from edgellm.orchestrator.core.addresses import copies_of, stages_of
from edgellm.orchestrator.core.commands import DropNode, HoldCopies, NoteTakeover, StartDecode
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.pipelines import Pipeline, connections_of
from edgellm.orchestrator.core.requests import Decoding, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.takeover import RecoveryCost, Takeover, plan_takeover
from edgellm.orchestrator.core.values import AttemptId, ConnectionId

FAR_SLOWER = 2.0
"""Times as long for a step: only then is it asked whether reading the prompt again would be sooner."""


def give_up_node(state: ClusterState, node: Node, reason: str) -> None:
    """Fence off a node whose stream is still there."""
    state.out.append(DropNode(connection=node.connection, reason=reason))
    bury_node(state, node, reason)


def bury_node(state: ClusterState, node: Node, reason: str) -> None:
    """Its process is gone, and with it all it held: what it worked on goes on elsewhere."""
    state.nodes.bury(node)
    state.links.forget(node.connection)
    state.note_node(node, reason)
    why = f"node {node.profile.node_id} died: {reason}"
    restored, begun_again = 0, 0
    for request in list(state.requests.values()):
        if request.uses(node.connection):
            went_on = go_on_without(state, request, {node.connection}, why, last_sign_s=node.last_sign_s)
            restored, begun_again = restored + went_on, begun_again + (not went_on)
        request.drop_copies_on(node.connection)
    if restored or begun_again:
        state.out.append(
            NoteTakeover(node_id=node.profile.node_id, restored=restored, begun_again=begun_again, detail=why)
        )


def go_on_without(
    state: ClusterState, request: Request, lost: Collection[ConnectionId], why: str, *, last_sign_s: float
) -> bool:
    """Fence the attempt and go on: True if from copies, False if the prompt has to be read again."""
    takeover = plan_for(state, request, lost)
    if takeover is None or request.attempts >= state.config.max_attempts or _is_worse(state, request, takeover):
        avoid = next(iter(lost), None)
        state.try_elsewhere(request, avoid, why, last_sign_s=last_sign_s)
        return False
    request.clock.interrupt(state.now_s, last_sign_s)
    assert isinstance(request.phase, Decoding)
    resume(state, request, request.phase.attempt, takeover, why)
    return True


def plan_for(state: ClusterState, request: Request, lost: Collection[ConnectionId]) -> Takeover | None:
    """Who carries the stages without the lost nodes; None if only the prompt can restore them."""
    phase = request.phase
    if not isinstance(phase, Decoding) or not phase.kv_complete:
        return None
    return plan_takeover(
        phase.pipeline,
        request.copies,
        lost,
        kv_tokens=request.kv_tokens,
        prompt_tokens=len(request.spec.prompt),
        avoid=state.links.avoided(state.now_s),
    )


def resume(state: ClusterState, request: Request, before: AttemptId, takeover: Takeover, why: str) -> None:
    """Give what nodes hold under `before` to a new attempt, and have them go on."""
    after = state.next_attempt(request.id)
    working = connections_of(takeover.pipeline)
    holding = dict.fromkeys(copy.holder for copy in takeover.copies)
    for node in state.nodes.alive():
        if node.connection in working or node.connection in holding:
            node.rename(before, after, "stage" if node.connection in working else "copy")
        else:
            state.release_on(node.connection, before)
    request.take_over(state.now_s, Decoding(attempt=after, pipeline=takeover.pipeline), takeover)
    state.note_request(request, "decoding", f"{state.nodes.names(*working)} from position {takeover.tokens}: {why}")
    for connection in working:
        state.out.append(start_decode(state, request, connection, resume_from=before))
    for connection in holding:
        if connection not in working:
            state.out.append(
                HoldCopies(connection=connection, attempt=after, resume_from=before, resume_tokens=takeover.tokens)
            )


def start_decode(
    state: ClusterState, request: Request, connection: ConnectionId, *, resume_from: AttemptId | None = None
) -> StartDecode:
    """The same for every node of the pipeline."""
    phase = request.phase
    assert isinstance(phase, Decoding)
    return StartDecode(
        connection=connection,
        attempt=phase.attempt,
        prompt=request.spec.prompt,
        generated=tuple(request.tokens),
        generation=request.spec.generation,
        stages=stages_of(state.nodes, phase.pipeline),
        copies=copies_of(state.nodes, request.copies, from_token=len(request.spec.prompt)),
        resume_from=resume_from,
        resume_tokens=request.kv_tokens if resume_from is not None else 0,
    )


def _is_worse(state: ClusterState, request: Request, takeover: Takeover) -> bool:
    """Whether it would go on at a far slower device for so long that reading the prompt again is predicted to end
    sooner, on a pipeline for new requests. Nearer speeds are mostly chance, and copies spare everybody the reading."""
    steps = [_step_s(state, pipeline) for pipeline in state.pipelines()]
    step_s, best_step_s = _step_s(state, takeover.pipeline), min(steps, default=math.inf)
    if step_s < FAR_SLOWER * best_step_s:
        return False
    cost, progress = _recovery_cost(state), request.progress()
    return cost is not None and cost.recompute_s(progress, best_step_s) < cost.restore_s(takeover, progress, step_s)


def _recovery_cost(state: ClusterState) -> RecoveryCost | None:
    """With all prompts that wait now; None where no speed of reading was measured."""
    readers = [node for node in state.nodes.ready() if node.can_prefill(state.config.num_layers)]
    speed = sum(node.load.prefill_tokens_per_s for node in readers)
    if speed == 0:
        return None
    waiting = sum(node.prefill_tokens for node in readers) + sum(len(other.spec.prompt) for other in state.waiting())
    return RecoveryCost(prefill_tokens_per_s=speed, waiting_tokens=waiting)


def _step_s(state: ClusterState, pipeline: Pipeline) -> float:
    """Of one token through all stages; nodes that have not measured it are taken for average."""
    measured = [node.load.decode_step_ms for node in state.nodes.alive() if node.load.decode_step_ms > 0]
    average = sum(measured) / len(measured) if measured else 0.0
    nodes = [node for stage in pipeline if (node := state.nodes.get(stage.connection))]
    return sum(node.load.decode_step_ms or average for node in nodes) / 1e3
