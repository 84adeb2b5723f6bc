"""Baseline: DistServe (OSDI'24). First come, first served; prompts only on prefill nodes; batches of 4096 tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.orchestrator.core.pipelines import Pipeline
from edgellm.orchestrator.core.policy import NodeView, Placement, WaitingRequest
from edgellm.orchestrator.policies.room import Room, fits


@dataclass(frozen=True, kw_only=True)
class DistServe:
    """Stops at the first request that does not fit, so nobody is overtaken.

    Here a decode node's blocks are taken when the prompt starts, where DistServe pulls KV when it has room: prompts
    wait in the queue instead of on the prefill node.
    """

    name = "distserve"
    max_batch_tokens: int = 4096

    def plan(
        self,
        now_s: float,
        waiting: Sequence[WaitingRequest],
        nodes: Sequence[NodeView],
        pipelines: Sequence[Pipeline],
    ) -> list[Placement]:
        room = Room(nodes, pipelines)
        placements = []
        for request in sorted(waiting, key=lambda request: (request.arrival_s, request.request_id)):
            placement = self._place(request, room)
            if placement is None:
                break
            room.take(request, placement)
            placements.append(placement)
        return placements

    def _place(self, request: WaitingRequest, room: Room) -> Placement | None:
        decoders = room.decoders(request)
        if not decoders:
            return None
        chosen = min(decoders, key=lambda d: (not d.connections.isdisjoint(request.avoid), -d.free_blocks))
        prefillers = [n for n in room.prefillers() if n.connection in chosen.connections or self._has_turn(request, n)]
        if not prefillers:
            return None
        reader = min(prefillers, key=lambda node: (node.connection in request.avoid, node.prefill_tokens))
        return Placement(
            request_id=request.request_id, prefill=reader.connection, pipeline=chosen.pipeline, path="remote"
        )

    def _has_turn(self, request: WaitingRequest, node: NodeView) -> bool:
        ahead = node.prefill_tokens
        in_batch = ahead == 0 or ahead + request.prompt_tokens <= self.max_batch_tokens
        return in_batch and fits(node, request.prompt_blocks)
