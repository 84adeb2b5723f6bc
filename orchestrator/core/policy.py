"""What a scheduling policy sees and answers: values in, values out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.orchestrator.core.pipelines import Pipeline
from edgellm.orchestrator.core.values import ConnectionId, NodeId, PrefillPath, RequestId, Role


@dataclass(frozen=True, kw_only=True)
class WaitingRequest:
    """A request that no node works on."""

    request_id: RequestId
    arrival_s: float
    deadline_s: float | None
    prompt_tokens: int
    generated_tokens: int
    """Tokens the client already has: more than 0 after a device died under the request."""
    prompt_blocks: int
    total_blocks: int
    """KV blocks of prompt and longest answer."""
    allow_degraded: bool
    avoid: frozenset[ConnectionId]
    """Nodes on which this request failed before: used only if nothing else is left."""


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """A node that is not dead, and what is free on it."""

    connection: ConnectionId
    node_id: NodeId
    role: Role
    suspect: bool
    """Silent for longer than it should be: it may be back at any moment, but nothing may be placed on it."""
    host_id: str
    free_blocks: int
    free_sequences: int
    """Requests that may still be added to it."""
    prefill_tokens: int
    """Prompt tokens given to it and not finished."""
    running: int
    """Requests that hold blocks on it."""
    can_prefill: bool
    """Has the half-precision engine."""
    avoid: frozenset[ConnectionId]
    """Nodes that what it sent did not reach lately: it sends them KV only if nothing else is left."""
    kv_bytes_per_token: int
    prefill_tokens_per_s: float
    """Measured, or 0."""
    decode_step_ms: float
    """Measured, or 0."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a request goes. `prefill` carries the first stage but for the remote path."""

    request_id: RequestId
    prefill: ConnectionId
    pipeline: Pipeline
    path: PrefillPath


class Policy(Protocol):
    """Decides which waiting requests start where. Must not keep state that the arguments do not carry."""

    name: str

    def plan(
        self,
        now_s: float,
        waiting: Sequence[WaitingRequest],
        nodes: Sequence[NodeView],
        pipelines: Sequence[Pipeline],
    ) -> list[Placement]:
        """Placements on some of these pipelines that fit together: summed over them, no node gets more blocks or
        sequences than it has free, and suspects get nothing. A request holds blocks once on each of its nodes, for
        prompt and answer on those of the pipeline."""
        ...
