"""What is left on the nodes while a plan is made: every policy places against this."""

from collections.abc import Sequence
from dataclasses import replace

from edgellm.orchestrator.core.policy import NodeView, Placement, WaitingRequest
from edgellm.orchestrator.core.values import ConnectionId


class Room:
    """Node views that shrink with each placement taken."""

    def __init__(self, nodes: Sequence[NodeView]) -> None:
        self._nodes: dict[ConnectionId, NodeView] = {node.connection: node for node in nodes if not node.suspect}

    def prefillers(self) -> list[NodeView]:
        return [node for node in self._nodes.values() if node.role == "prefill" and node.can_prefill]

    def decoders(self, request: WaitingRequest) -> list[NodeView]:
        """Decode nodes that the whole request fits on now."""
        return [n for n in self._nodes.values() if n.can_decode and fits(n, request.total_blocks)]

    def take(self, request: WaitingRequest, placement: Placement) -> None:
        """Count a placement as made."""
        local = placement.prefill == placement.decode
        self._shrink(placement.decode, request.total_blocks, request.prompt_tokens if local else 0)
        if not local:
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
