"""The state all event functions share, and the steps they have in common."""

from typing import Literal

from edgellm.orchestrator.core.commands import (
    Command,
    EmitToken,
    FinishRequest,
    NoteNode,
    NoteRequest,
    ReleaseAttempt,
)
from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.links import Links
from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.nodes import NodeRegistry
from edgellm.orchestrator.core.pipelines import Pipeline, form_pipelines
from edgellm.orchestrator.core.requests import Queued, Request
from edgellm.orchestrator.core.values import AttemptId, ConnectionId, FinishReason, RequestId, SampledToken


class ClusterState:
    """Nodes, requests, the time of the event under way, and the commands it has caused so far."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.nodes = NodeRegistry(config)
        self.links = Links(config)
        self.requests: dict[RequestId, Request] = {}
        self.finished_count = 0
        self.now_s = 0.0
        self.last_tick_s = 0.0
        self.may_place = False
        """Whether the event under way made room or work, so that the policy should be asked."""
        self.out: list[Command] = []
        self.epoch = config.first_epoch
        """The highest that was given, or heard of."""
        self._first_given: int | None = None

    @property
    def first_epoch(self) -> int:
        """Of this orchestrator's attempts; of others before it, as far as is known. A node that had the highest of
        them may join after the first was given."""
        return self.epoch + 1 if self._first_given is None else self._first_given

    def next_attempt(self, request_id: RequestId) -> AttemptId:
        self._first_given = self.first_epoch
        self.epoch += 1
        return AttemptId(request_id=request_id, epoch=self.epoch)

    def waiting(self) -> list[Request]:
        return [request for request in self.requests.values() if isinstance(request.phase, Queued)]

    def request_of(self, attempt: AttemptId) -> Request | None:
        """The request, if this attempt is the one under way."""
        request = self.requests.get(attempt.request_id)
        return request if request is not None and request.working(attempt) is not None else None

    def let_go(self, connection: ConnectionId, attempt: AttemptId) -> None:
        """The node is known to hold nothing of the attempt any more."""
        node = self.nodes.get(connection)
        if node is not None and node.end_lease(attempt):
            self.may_place = True

    def pipelines(self) -> tuple[Pipeline, ...]:
        """Those that new requests may go to."""
        cut = self.config.cut
        return form_pipelines(self.nodes.carriers(cut), cut, self.links.avoided(self.now_s))

    def link_failed(self, source: ConnectionId, target: ConnectionId) -> None:
        """Between two nodes that are both alive. What else was on the link and fails with it tells nothing new."""
        sender, receiver = self.nodes.get(source), self.nodes.get(target)
        if sender is None or receiver is None or sender is receiver:
            return
        if self.now_s < self.links.avoided_until_s(source, target):
            return
        pause_s = self.links.failed(self.now_s, source, target)
        self.note_node(receiver, f"{sender.profile.node_id} does not reach it: avoided for {pause_s:.0f} s")

    def release(self, request: Request) -> None:
        """Tell every node that may hold something of the request to forget it."""
        for node in self.nodes.alive():
            for attempt in [attempt for attempt in node.leases if attempt.request_id == request.id]:
                self.release_on(node.connection, attempt)
        request.forget_kv()

    def release_on(self, connection: ConnectionId, attempt: AttemptId) -> None:
        """Tell one node, unless it has nothing of the attempt, or was told before."""
        if self.nodes.mark_released(self.now_s, connection, attempt):
            self.out.append(ReleaseAttempt(connection=connection, attempt=attempt))

    def accept_token(self, request: Request, token: SampledToken) -> bool:
        """Pass the next token on; returns whether it ended the request."""
        request.add_token(self.now_s, token)
        self.out.append(EmitToken(request_id=request.id, token=token))
        full = len(request.tokens) >= request.spec.generation.max_tokens
        reason = token.finish or ("length" if full else None)
        if reason is None:
            return False
        self.finish(request, reason, "")
        return True

    def finish(self, request: Request, reason: FinishReason, message: str) -> None:
        self.release(request)
        stats = request.stats(self.now_s)
        self.note_request(request, "finished", f"{reason}, {stats.generated_tokens} tokens {message}".rstrip())
        del self.requests[request.id]
        self.finished_count += 1
        self.out.append(FinishRequest(request_id=request.id, reason=reason, message=message, stats=stats))

    def try_elsewhere(
        self,
        request: Request,
        avoid: ConnectionId | None,
        why: str,
        *,
        delay_s: float = 0.0,
        last_sign_s: float | None = None,
    ) -> None:
        """Fence the attempt and queue the request again: whatever still comes from the attempt is ignored.

        `last_sign_s`: when the node that failed was last heard of, where it was silence that told.
        """
        self.release(request)
        request.clock.interrupt(self.now_s, self.now_s if last_sign_s is None else last_sign_s)
        if avoid is not None:
            request.avoid.add(avoid)
        if request.attempts >= self.config.max_attempts:
            self.finish(request, "error", f"gave up after {request.attempts} attempts: {why}")
            return
        self.note_request(request, "queued", why)
        request.phase = Queued(since_s=self.now_s, not_before_s=self.now_s + delay_s)

    def note_request(
        self,
        request: Request,
        state: Literal["queued", "recovering", "prefilling", "decoding", "finished"],
        detail: str,
    ) -> None:
        self.may_place = True
        self.out.append(NoteRequest(request_id=request.id, epoch=request.epoch, state=state, detail=detail))

    def note_node(self, node: Node, detail: str) -> None:
        self.may_place = True
        profile = node.profile
        self.out.append(
            NoteNode(node_id=profile.node_id, incarnation=node.incarnation, state=node.state, detail=detail)
        )
