"""One request from submission to end: its phase, its tokens, its times."""

from dataclasses import dataclass, field
from typing import TypeAlias

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.pipelines import Pipeline, connections_of
from edgellm.orchestrator.core.policy import WaitingRequest
from edgellm.orchestrator.core.recovery import RecoveryClock
from edgellm.orchestrator.core.takeover import Copy, Progress, Takeover
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    KvTransfer,
    NodeId,
    PrefillPath,
    RequestId,
    RequestSpec,
    RequestStats,
    SampledToken,
)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """No node works on it, and none will before `not_before_s`."""

    since_s: float
    not_before_s: float


@dataclass(frozen=True, kw_only=True)
class Recovering:
    """Was under way when an earlier orchestrator ended; waits for its nodes to say what they hold, until `until_s`."""

    nodes: frozenset[NodeId]
    """Those that carried its stages, if this is known."""
    until_s: float


@dataclass(frozen=True, kw_only=True)
class Prefilling:
    """`prefill` reads the prompt and sends KV to the nodes of `pipeline`, of which it may be one."""

    attempt: AttemptId
    prefill: ConnectionId
    pipeline: Pipeline
    path: PrefillPath


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """`pipeline` generates."""

    attempt: AttemptId
    pipeline: Pipeline
    kv_source: ConnectionId | None = None
    """The prefill node; None where all KV is on the pipeline already."""
    kv_complete: bool = True
    """The pipeline is known to have all KV of the prompt, so the loss of `kv_source` does no harm."""

    def samples_on(self, connection: ConnectionId) -> bool:
        """Tokens come from the last stage."""
        return self.pipeline[-1].connection == connection


Phase: TypeAlias = Queued | Recovering | Prefilling | Decoding
Working: TypeAlias = Prefilling | Decoding


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A node of the pipeline, `source`, cannot reach the next."""

    source: ConnectionId
    peer: NodeId
    since_s: float


@dataclass(kw_only=True)
class Request:
    """A request that has not ended."""

    spec: RequestSpec
    arrival_s: float
    phase: Phase
    progress_s: float
    """When something was last heard of it."""
    tokens: list[int] = field(default_factory=list)
    attempts: int = 0
    """Since the last token."""
    avoid: set[ConnectionId] = field(default_factory=set)
    path: PrefillPath | None = None
    kv: KvTransfer = field(default_factory=KvTransfer)
    prefill_ms: float = 0.0
    first_dispatch_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    clock: RecoveryClock = field(default_factory=RecoveryClock)
    copies: tuple[Copy, ...] = ()
    kv_tokens: int = 0
    """Positions that every stage of the pipeline is known to have."""
    stalled: Stall | None = None
    no_copies_on: set[ConnectionId] = field(default_factory=set)
    """Nodes that let go of a copy of the attempt under way, and are fenced off from it."""
    protect_from_s: float = 0.0
    """Not before this time is a missing copy made again."""

    @property
    def id(self) -> RequestId:
        return self.spec.request_id

    @property
    def epoch(self) -> int:
        """Of the attempt under way; 0 while queued."""
        return self.phase.attempt.epoch if isinstance(self.phase, Prefilling | Decoding) else 0

    @property
    def capacity_tokens(self) -> int:
        """Prompt and longest answer."""
        return len(self.spec.prompt) + self.spec.generation.max_tokens

    def working(self, attempt: AttemptId) -> Working | None:
        """The phase, if this is the attempt under way."""
        if isinstance(self.phase, Prefilling | Decoding) and self.phase.attempt == attempt:
            return self.phase
        return None

    def uses(self, connection: ConnectionId) -> bool:
        """Whether the loss of this node interrupts the request."""
        match self.phase:
            case Decoding(kv_source=source, kv_complete=complete) if not complete and connection == source:
                return True
            case _:
                return self.needs(connection)

    def needs(self, connection: ConnectionId) -> bool:
        """Whether the attempt under way cannot go on without the blocks it has on this node."""
        match self.phase:
            case Prefilling(prefill=prefill, pipeline=pipeline):
                return connection == prefill or connection in connections_of(pipeline)
            case Decoding(pipeline=pipeline):
                return connection in connections_of(pipeline)
            case Queued() | Recovering():
                return False

    def keeps_on(self, connection: ConnectionId) -> bool:
        """Whether the node carries a stage of the attempt under way, or keeps a copy for it."""
        working = isinstance(self.phase, Prefilling | Decoding) and connection in connections_of(self.phase.pipeline)
        return working or any(copy.holder == connection for copy in self.copies)

    def forget_kv(self) -> None:
        """No node is known to hold anything of it that counts."""
        self.copies, self.kv_tokens, self.stalled = (), 0, None
        self.no_copies_on.clear()

    def drop_copies_on(self, connection: ConnectionId) -> None:
        self.copies = tuple(copy for copy in self.copies if copy.holder != connection)

    def begin_attempt(self, now_s: float, phase: Prefilling) -> None:
        self.attempts += 1
        self.phase = phase
        self.path = phase.path
        self.progress_s = now_s
        self.first_dispatch_s = self.first_dispatch_s if self.first_dispatch_s is not None else now_s
        self.clock.commanded(now_s)

    def take_over(self, now_s: float, phase: Decoding, takeover: Takeover) -> None:
        """Go on from what other nodes hold."""
        self.phase = phase
        self.forget_kv()
        self.copies, self.kv_tokens = takeover.copies, takeover.tokens
        self.progress_s = self.protect_from_s = now_s
        self.attempts += 1
        self.clock.commanded(now_s)
        self.clock.restored(now_s)

    def progress(self) -> Progress:
        return Progress(
            prompt_tokens=len(self.spec.prompt),
            known_tokens=len(self.tokens),
            remaining_tokens=self.spec.generation.max_tokens - len(self.tokens),
        )

    def add_token(self, now_s: float, token: SampledToken) -> None:
        self.tokens.append(token.token_id)
        self.first_token_s = self.first_token_s if self.first_token_s is not None else now_s
        self.last_token_s = now_s
        self.clock.token(now_s)
        self.attempts = 0
        self.kv_tokens = len(self.spec.prompt) + len(self.tokens) - 1

    def waiting_view(self, config: CoreConfig) -> WaitingRequest:
        return WaitingRequest(
            request_id=self.id,
            arrival_s=self.arrival_s,
            deadline_s=self.spec.deadline_s,
            prompt_tokens=len(self.spec.prompt),
            generated_tokens=len(self.tokens),
            prompt_blocks=config.blocks_for(len(self.spec.prompt)),
            total_blocks=config.blocks_for(self.capacity_tokens),
            allow_degraded=self.spec.allow_degraded_prefill,
            avoid=frozenset(self.avoid),
        )

    def stats(self, now_s: float) -> RequestStats:
        later_tokens = max(1, len(self.tokens) - 1)
        return RequestStats(
            prompt_tokens=len(self.spec.prompt),
            generated_tokens=len(self.tokens),
            queue_ms=_ms(self.arrival_s, self.first_dispatch_s if self.first_dispatch_s is not None else now_s),
            prefill_ms=self.prefill_ms,
            ttft_ms=_ms(self.arrival_s, self.first_token_s),
            tpot_ms=_ms(self.first_token_s, self.last_token_s) / later_tokens,
            total_ms=_ms(self.arrival_s, now_s),
            prefill_path=self.path,
            kv=self.kv,
            takeovers=self.clock.interruptions,
            recovery=self.clock.stats,
        )


def _ms(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else 1000 * (end_s - start_s)
