"""Baseline: DistServe (OSDI'24). First come, first served; prompts only on prefill nodes; batches of 4096 tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.orchestrator.core.pipelines import Pipeline
from edgellm.orchestrator.core.policy import NodeView, Placement, WaitingRequest
from edgellm.orchestrator.policies.room import Decoders, Room, failed_links, failed_nodes, fits


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
        pairs = [(n, d) for d in room.decoders(request) for n in room.prefillers() if self._has_turn(request, n, d)]
        if not pairs:
            return None

        def order(pair: tuple[NodeView, Decoders]) -> tuple[int, int, int]:
            avoided = failed_nodes(request, *pair) + failed_links(*pair)
            return avoided, -pair[1].free_blocks, pair[0].prefill_tokens

        reader, decode = min(pairs, key=order)
        return Placement(
            request_id=request.request_id, prefill=reader.connection, pipeline=decode.pipeline, path="remote"
        )

    def _has_turn(self, request: WaitingRequest, node: NodeView, decode: Decoders) -> bool:
        if node.connection in decode.connections:
            return True
        ahead = node.prefill_tokens
        in_batch = ahead == 0 or ahead + request.prompt_tokens <= self.max_batch_tokens
        return in_batch and fits(node, request.prompt_blocks)
