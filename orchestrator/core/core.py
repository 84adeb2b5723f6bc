"""The cluster as one pure state machine: an event and the time in, commands out."""

from typing import assert_never

from edgellm.orchestrator.core import on_attempt, on_node, on_request, protection, recovering
from edgellm.orchestrator.core.commands import Command
from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    AttemptResumed,
    CopyLost,
    Event,
    HeartbeatReceived,
    KvCopied,
    KvSent,
    NodeEvent,
    NodeJoined,
    NodeLost,
    PipelineBroken,
    PrefillDone,
    RequestEnded,
    RequestsRecovered,
    RequestSubmitted,
    Tick,
    TokenGenerated,
)
from edgellm.orchestrator.core.integrity import check_integrity
from edgellm.orchestrator.core.placement import place_waiting
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.core.state import ClusterState


class Core:
    """Drives every request through `queued -> prefilling -> decoding -> ended`.

    Deterministic: equal events at equal times give equal commands. `state` is for reading only.
    """

    def __init__(self, config: CoreConfig, policy: Policy) -> None:
        self.state = ClusterState(config)
        self._policy = policy

    def handle(self, now_s: float, event: Event) -> list[Command]:
        """Take one event at time `now_s`, which must not go backwards; returns what to do, in order."""
        self.state.now_s = now_s
        if isinstance(event, NodeEvent):
            self.state.nodes.note_sign(now_s, event.connection)
        _apply(self.state, event)
        if self.state.may_place or isinstance(event, Tick):
            place_waiting(self.state, self._policy)
            self.state.may_place = False
        out, self.state.out = self.state.out, []
        return out

    def check_integrity(self) -> None:
        """Recount everything that must hold between events. Raises IntegrityError with what does not."""
        check_integrity(self.state)


def _apply(state: ClusterState, event: Event) -> None:
    match event:
        case NodeJoined():
            on_node.node_joined(state, event)
        case NodeLost():
            on_node.node_lost(state, event)
        case HeartbeatReceived():
            on_node.heartbeat_received(state, event)
        case PrefillDone():
            on_attempt.prefill_done(state, event)
        case KvSent():
            on_attempt.kv_sent(state, event)
        case TokenGenerated():
            on_attempt.token_generated(state, event)
        case AttemptFailed():
            on_attempt.attempt_failed(state, event)
        case AttemptReleased():
            on_attempt.attempt_released(state, event)
        case AttemptResumed():
            on_attempt.attempt_resumed(state, event)
        case PipelineBroken():
            on_node.pipeline_broken(state, event)
        case KvCopied():
            protection.kv_copied(state, event)
        case CopyLost():
            protection.copy_lost(state, event)
        case RequestsRecovered():
            recovering.requests_recovered(state, event)
        case RequestSubmitted():
            on_request.request_submitted(state, event)
        case RequestEnded():
            on_request.request_ended(state, event)
        case Tick():
            on_request.tick(state)
        case _:
            assert_never(event)
