"""One request from submission to end: its phase, its tokens, its times."""

from dataclasses import dataclass, field
from typing import TypeAlias

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.policy import WaitingRequest
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    KvTransfer,
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
class Prefilling:
    """`prefill` reads the prompt and sends KV to `decode` (the same node, but for the remote path)."""

    attempt: AttemptId
    prefill: ConnectionId
    decode: ConnectionId
    path: PrefillPath


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """`decode` generates."""

    attempt: AttemptId
    decode: ConnectionId
    kv_source: ConnectionId | None
    """The prefill node; None where the KV was computed on `decode`."""
    kv_complete: bool
    """`decode` is known to have all KV of the prompt, so the loss of `kv_source` does no harm."""


Phase: TypeAlias = Queued | Prefilling | Decoding
Working: TypeAlias = Prefilling | Decoding


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
    avoid: set[ConnectionId] = field(default_factory=set)
    path: PrefillPath | None = None
    kv: KvTransfer = field(default_factory=KvTransfer)
    prefill_ms: float = 0.0
    first_dispatch_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    interrupted_s: float | None = None
    """When a device failed under it, until the next token."""
    recovery_s: float = 0.0

    @property
    def id(self) -> RequestId:
        return self.spec.request_id

    @property
    def epoch(self) -> int:
        """Of the attempt under way; 0 while queued."""
        return 0 if isinstance(self.phase, Queued) else self.phase.attempt.epoch

    @property
    def capacity_tokens(self) -> int:
        """Prompt and longest answer."""
        return len(self.spec.prompt) + self.spec.generation.max_tokens

    def working(self, attempt: AttemptId) -> Working | None:
        """The phase, if this is the attempt under way."""
        if isinstance(self.phase, Queued) or self.phase.attempt != attempt:
            return None
        return self.phase

    def uses(self, connection: ConnectionId) -> bool:
        """Whether the loss of this node interrupts the request."""
        match self.phase:
            case Queued():
                return False
            case Prefilling(prefill=prefill, decode=decode):
                return connection in (prefill, decode)
            case Decoding(decode=decode, kv_source=source, kv_complete=complete):
                return connection == decode or (connection == source and not complete)

    def needs(self, connection: ConnectionId) -> bool:
        """Whether the attempt under way cannot go on without the blocks it has on this node."""
        match self.phase:
            case Queued():
                return False
            case Prefilling(prefill=prefill, decode=decode):
                return connection in (prefill, decode)
            case Decoding(decode=decode):
                return connection == decode

    def begin_attempt(self, now_s: float, phase: Prefilling) -> None:
        self.attempts += 1
        self.phase = phase
        self.path = phase.path
        self.progress_s = now_s
        self.first_dispatch_s = self.first_dispatch_s if self.first_dispatch_s is not None else now_s

    def add_token(self, now_s: float, token: SampledToken) -> None:
        self.tokens.append(token.token_id)
        self.first_token_s = self.first_token_s if self.first_token_s is not None else now_s
        self.last_token_s = now_s
        if self.interrupted_s is not None:
            self.recovery_s += now_s - self.interrupted_s
            self.interrupted_s = None

    def interrupt(self, now_s: float) -> None:
        """A device failed under it; the pause lasts until the next token."""
        self.interrupted_s = now_s if self.interrupted_s is None else self.interrupted_s

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
            takeovers=max(0, self.attempts - 1),
            recovery_ms=1000 * self.recovery_s,
        )


def _ms(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else 1000 * (end_s - start_s)
