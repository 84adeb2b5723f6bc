"""What is left on the nodes while a plan is made: every policy places against this."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgellm.orchestrator.core.pipelines import Pipeline, connections_of
from edgellm.orchestrator.core.policy import NodeView, Placement, WaitingRequest
from edgellm.orchestrator.core.values import ConnectionId


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """A pipeline, and its nodes as they are now, each once, the first stage's first."""

    pipeline: Pipeline
    nodes: tuple[NodeView, ...]

    @property
    def connections(self) -> frozenset[ConnectionId]:
        return frozenset(node.connection for node in self.nodes)

    @property
    def head(self) -> NodeView:
        """Carries the first stage."""
        return self.nodes[0]

    @property
    def running(self) -> int:
        return max(node.running for node in self.nodes)

    @property
    def free_blocks(self) -> int:
        return min(node.free_blocks for node in self.nodes)


def failed_nodes(request: WaitingRequest, prefill: NodeView, decode: Decoders) -> int:
    """How many of them the request failed on before: used only if nothing else is left."""
    return len({prefill.connection, *decode.connections} & request.avoid)


def failed_links(prefill: NodeView, decode: Decoders) -> int:
    """How many of the links that KV takes failed lately."""
    return len(prefill.avoid & decode.connections)


class Room:
    """Node views that shrink with each placement taken."""

    def __init__(self, nodes: Sequence[NodeView], pipelines: Sequence[Pipeline]) -> None:
        self._nodes: dict[ConnectionId, NodeView] = {node.connection: node for node in nodes if not node.suspect}
        self._pipelines = [p for p in pipelines if self._nodes.keys() >= set(connections_of(p))]

    def prefillers(self) -> list[NodeView]:
        return [node for node in self._nodes.values() if node.role == "prefill" and node.can_prefill]

    def decoders(self, request: WaitingRequest) -> list[Decoders]:
        """Pipelines that the whole request fits on now."""
        found = [
            Decoders(pipeline=pipeline, nodes=tuple(self._nodes[c] for c in connections_of(pipeline)))
            for pipeline in self._pipelines
        ]
        return [d for d in found if all(fits(node, request.total_blocks) for node in d.nodes)]

    def take(self, request: WaitingRequest, placement: Placement) -> None:
        """Count a placement as made."""
        on_pipeline = connections_of(placement.pipeline)
        for connection in on_pipeline:
            reading = request.prompt_tokens if connection == placement.prefill else 0
            self._shrink(connection, request.total_blocks, reading)
        if placement.prefill not in on_pipeline:
            self._shrink(placement.prefill, request.prompt_blocks, request.prompt_tokens)

    def queue_behind(self, request: WaitingRequest, placement: Placement) -> None:
        """The request waits for its prefill node: those after it find a longer queue there."""
        node = self._nodes[placement.prefill]
        self._nodes[placement.prefill] = replace(node, prefill_tokens=node.prefill_tokens + request.prompt_tokens)

    def _shrink(self, connection: ConnectionId, blocks: int, prefill_tokens: int) -> None:
        node = self._nodes[connection]
        self._nodes[connection] = replace(
            node,
            free_blocks=node.free_blocks - blocks,
            free_sequences=node.free_sequences - 1,
            prefill_tokens=node.prefill_tokens + prefill_tokens,
            running=node.running + 1,
        )


def fits(node: NodeView, blocks: int) -> bool:
    return node.free_blocks >= blocks and node.free_sequences >= 1
