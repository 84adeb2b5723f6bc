"""A node without engines: the node's own batchers, a ledger of blocks, and the toy model. No clock, no I/O."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from edgellm.orchestrator.core.commands import ReleaseAttempt, StartDecode, StartPrefill
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    KvSent,
    NodeEvent,
    PrefillDone,
    TokenGenerated,
)
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    FailureKind,
    KvTarget,
    KvTransfer,
    NodeLoad,
    NodeProfile,
    RequestId,
    SampledToken,
)
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.lanes import Answered, Lanes, Progress, PromptRead, StepPlan
from edgellm.orchestrator.sim.toy import kv_of


class SimulationError(AssertionError):
    """An invariant does not hold: a node was asked for what it cannot do, or holds what it must not."""


@dataclass(frozen=True, kw_only=True)
class SendKv:
    """The prompt's KV leaves for another node."""

    attempt: AttemptId
    target: KvTarget
    prompt_tokens: int
    capacity_tokens: int
    kv: int
    """Stands for the contents."""


@dataclass(kw_only=True)
class _Held:
    """What a node knows of one attempt."""

    blocks: int
    prefill: StartPrefill | None = None
    decode: StartDecode | None = None
    kv: int | None = None
    """The prompt's KV, once it is all here."""
    kv_deadline_s: float | None = None


Output: TypeAlias = NodeEvent | SendKv


@dataclass(kw_only=True)
class SimNode:
    """One process of a node. After every call, `take_outputs` has what it wants to say."""

    profile: NodeProfile
    device: DeviceModel
    block_tokens: int
    connection: ConnectionId
    kv_timeout_s: float = 10.0
    steps: int = 0
    _held: dict[AttemptId, _Held] = field(default_factory=dict)
    _fence: dict[RequestId, int] = field(default_factory=dict)
    _outputs: list[Output] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lanes = Lanes(self.profile, self.device)

    def take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def held_attempts(self) -> list[AttemptId]:
        return list(self._held)

    @property
    def free_blocks(self) -> int:
        return self.profile.kv_blocks - sum(held.blocks for held in self._held.values())

    def load(self) -> NodeLoad:
        return NodeLoad(
            steps=self.steps,
            running=len(self._held),
            kv_blocks_free=self.free_blocks,
            prefill_tokens_per_s=1 / self.device.read_token_s,
            decode_step_ms=1000 * self.device.step_s,
        )

    # Commands

    def receive(self, now_s: float, command: StartPrefill | StartDecode | ReleaseAttempt) -> None:
        match command:
            case StartPrefill():
                self._prefill(command)
            case StartDecode():
                self._decode(now_s, command)
            case ReleaseAttempt():
                self._fence[command.attempt.request_id] = command.attempt.epoch
                self._held.pop(command.attempt, None)
                self._lanes.remove(command.attempt)
                self._outputs.append(AttemptReleased(connection=self.connection, attempt=command.attempt))
            case _:
                assert_never(command)

    def _prefill(self, command: StartPrefill) -> None:
        if self._is_stale(command.attempt):
            return
        here = len(command.prompt) + (0 if command.targets else command.generation.max_tokens)
        self._reserve(command.attempt, here).prefill = command
        self._lanes.read(command)

    def _decode(self, now_s: float, command: StartDecode) -> None:
        if self._is_stale(command.attempt):
            return
        tokens = len(command.prompt) + command.generation.max_tokens
        held = self._reserve(command.attempt, tokens)
        held.decode = command
        held.kv_deadline_s = now_s + self.kv_timeout_s
        self._start_answer(held)

    def _start_answer(self, held: _Held) -> None:
        if held.decode is not None and held.kv is not None:
            held.kv_deadline_s = None
            self._lanes.answer(held.decode, held.kv)

    # KV

    def kv_arrives(self, delivery: SendKv) -> str:
        """Install the KV of a prompt; returns why not, or nothing.

        No room is no bug here: KV of an attempt that this node's earlier process had may lie in the way until the
        orchestrator's release of it arrives.
        """
        if self._is_stale(delivery.attempt):
            return "the attempt is stale"
        if self._missing(delivery.attempt, delivery.capacity_tokens) > 0:
            return "no room"
        held = self._reserve(delivery.attempt, delivery.capacity_tokens)
        held.kv = delivery.kv
        self._start_answer(held)
        return ""

    def kv_acknowledged(self, attempt: AttemptId, transfer: KvTransfer) -> None:
        if self._held.pop(attempt, None) is not None:
            self._outputs.append(KvSent(connection=self.connection, attempt=attempt, transfer=transfer))

    def kv_refused(self, delivery: SendKv, why: str) -> None:
        if delivery.attempt in self._held:
            self._fail(delivery.attempt, "transfer", why, delivery.target)

    def expire(self, now_s: float) -> None:
        """Give up waiting for KV that does not come."""
        for attempt, held in list(self._held.items()):
            if held.kv_deadline_s is not None and held.kv_deadline_s <= now_s:
                self._fail(attempt, "transfer", "the prompt's KV did not arrive", None)

    # Steps

    def plan_step(self) -> StepPlan | None:
        """The next step and how long it takes; None if there is nothing to do. Call again only after `commit_step`."""
        return self._lanes.plan()

    def commit_step(self, plan: StepPlan) -> None:
        self.steps += 1
        for progress in self._lanes.commit(plan):
            self._outputs.extend(self._progressed(progress, plan))

    def _progressed(self, progress: Progress, plan: StepPlan) -> Iterator[Output]:
        match progress:
            case PromptRead(attempt=attempt, first_token=first_token):
                yield from self._prompt_read(attempt, first_token, plan)
            case Answered(attempt=attempt, token=token):
                if token.finish is not None:
                    del self._held[attempt]
                yield TokenGenerated(connection=self.connection, attempt=attempt, token=token)
            case _:
                assert_never(progress)

    def _prompt_read(self, attempt: AttemptId, first_token: SampledToken | None, plan: StepPlan) -> Iterator[Output]:
        held = self._held[attempt]
        prefill = held.prefill
        if prefill is None:
            raise SimulationError(f"{attempt} was read without having been asked for")
        yield PrefillDone(
            connection=self.connection, attempt=attempt, first_token=first_token, prefill_ms=1000 * plan.seconds
        )
        if first_token is not None and first_token.finish is not None:
            del self._held[attempt]
            return
        held.kv = kv_of(prefill.prompt)
        for target in prefill.targets:
            yield SendKv(
                attempt=attempt,
                target=target,
                prompt_tokens=len(prefill.prompt),
                capacity_tokens=len(prefill.prompt) + prefill.generation.max_tokens,
                kv=held.kv,
            )

    # Blocks

    def _is_stale(self, attempt: AttemptId) -> bool:
        return attempt.epoch <= self._fence.get(attempt.request_id, -1)

    def _reserve(self, attempt: AttemptId, tokens: int) -> _Held:
        """What is held for the attempt, which grows to `tokens`. Raises SimulationError if that does not fit."""
        if (missing := self._missing(attempt, tokens)) > 0:
            raise SimulationError(f"node {self.profile.node_id} was given {attempt} and lacks {missing} blocks for it")
        held = self._held.setdefault(attempt, _Held(blocks=0))
        held.blocks = max(held.blocks, self._blocks(tokens))
        return held

    def _missing(self, attempt: AttemptId, tokens: int) -> int:
        held = self._held[attempt].blocks if attempt in self._held else 0
        return self._blocks(tokens) - held - self.free_blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _fail(self, attempt: AttemptId, kind: FailureKind, message: str, target: KvTarget | None) -> None:
        del self._held[attempt]
        self._lanes.remove(attempt)
        self._outputs.append(
            AttemptFailed(
                connection=self.connection,
                attempt=attempt,
                kind=kind,
                message=message,
                peer=target.node_id if target is not None else None,
            )
        )
