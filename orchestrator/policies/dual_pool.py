"""Ours: two pools, least slack first, and a cost model that decides per prompt whether to send its KV at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import nsmallest

from edgellm.orchestrator.core.pipelines import Pipeline
from edgellm.orchestrator.core.policy import NodeView, Placement, WaitingRequest
from edgellm.orchestrator.core.values import PrefillPath
from edgellm.orchestrator.policies.cost import CostModel
from edgellm.orchestrator.policies.room import Decoders, Room, failed_nodes, fits


@dataclass(frozen=True, kw_only=True)
class _Option:
    """One way to serve a request; `now` is false where it would have to wait for the prefill node."""

    placement: Placement
    cost_s: float
    failed_nodes: int
    now: bool


@dataclass(frozen=True, kw_only=True)
class DualPool:
    """Places requests in this order: those a device died under, then by slack, the least first.

    Slack is the time left until the deadline after the prompt was read. A request without a deadline gets one that is
    later for long prompts, so short ones tend to go first, but is fixed at arrival, so nobody starves. A request that
    does not fit is overtaken until it has no slack left; from then on it blocks the queue. The decode engine reads a
    prompt only where no half-precision engine is alive: one that is merely late is waited for.
    """

    name = "dual_pool"
    cost: CostModel = field(default_factory=CostModel)
    patience_s: float = 2.0
    """Implied deadline of an empty prompt."""
    stretch: float = 3.0
    """Seconds of implied deadline per second of reading."""
    max_ahead_tokens: int = 4096
    """Prompt tokens a prefill node is given at a time; a longer prompt goes alone."""
    max_considered: int = 64
    """Requests looked at per plan, the most urgent ones: bounds the time of a plan under overload."""

    def plan(
        self,
        now_s: float,
        waiting: Sequence[WaitingRequest],
        nodes: Sequence[NodeView],
        pipelines: Sequence[Pipeline],
    ) -> list[Placement]:
        nodes = self.cost.with_speeds(nodes)
        room = Room(nodes, pipelines)
        half_precision = any(node.can_prefill for node in nodes)
        placements = []
        for request in nsmallest(self.max_considered, waiting, key=lambda request: self._order(request, nodes)):
            option = self._best(request, room, may_degrade=request.allow_degraded and not half_precision)
            if option is not None and option.now:
                room.take(request, option.placement)
                placements.append(option.placement)
            elif option is not None:
                room.queue_behind(request, option.placement)
            elif self._slack_at(request, nodes) < now_s:
                break
        return placements

    def _order(self, request: WaitingRequest, nodes: Sequence[NodeView]) -> tuple[bool, float, str]:
        return (request.generated_tokens == 0, self._slack_at(request, nodes), request.request_id)

    def _slack_at(self, request: WaitingRequest, nodes: Sequence[NodeView]) -> float:
        """The time from which there is no slack left."""
        read_s = min((self.cost.read_s(node, request.prompt_tokens) for node in nodes if node.can_prefill), default=0.0)
        implied_s = request.arrival_s + self.patience_s + self.stretch * read_s
        return min(request.deadline_s if request.deadline_s is not None else implied_s, implied_s) - read_s

    def _best(self, request: WaitingRequest, room: Room, *, may_degrade: bool) -> _Option | None:
        decoders = room.decoders(request)
        options = [self._remote(request, p, d) for p in room.prefillers() for d in decoders if p not in d.nodes]
        options += [self._local(request, d) for d in decoders if d.head.can_prefill]
        if may_degrade:
            options = [self._degraded(request, d) for d in decoders if len(d.nodes) == 1]
        return min(options, key=lambda option: (option.failed_nodes, option.cost_s), default=None)

    def _remote(self, request: WaitingRequest, prefill: NodeView, decode: Decoders) -> _Option:
        ahead = prefill.prefill_tokens
        has_turn = ahead == 0 or ahead + request.prompt_tokens <= self.max_ahead_tokens
        return _Option(
            placement=_placement(request, prefill, decode, "remote"),
            cost_s=self.cost.remote_s(request, prefill, decode) + self._crowding_s(decode),
            failed_nodes=failed_nodes(request, prefill, decode),
            now=has_turn and fits(prefill, request.prompt_blocks),
        )

    def _local(self, request: WaitingRequest, decode: Decoders) -> _Option:
        return _Option(
            placement=_placement(request, decode.head, decode, "local"),
            cost_s=self.cost.local_s(request, decode) + self._crowding_s(decode),
            failed_nodes=failed_nodes(request, decode.head, decode),
            now=True,
        )

    def _degraded(self, request: WaitingRequest, decode: Decoders) -> _Option:
        return replace(self._local(request, decode), placement=_placement(request, decode.head, decode, "degraded"))

    def _crowding_s(self, decode: Decoders) -> float:
        """Spreads answers over the pipelines: each running one lengthens the step a little."""
        return 0.001 * decode.running


def _placement(request: WaitingRequest, prefill: NodeView, decode: Decoders, path: PrefillPath) -> Placement:
    return Placement(request_id=request.request_id, prefill=prefill.connection, pipeline=decode.pipeline, path=path)
