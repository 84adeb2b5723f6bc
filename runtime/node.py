"""What a node does with commands, finished steps and arriving KV: no I/O, no clock of its own, one thread."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgellm.engines.sampling import SamplingError
from edgellm.runtime.batching.decode import Continuation, TokenGenerated
from edgellm.runtime.batching.prefill import Prompt, PromptProgress
from edgellm.runtime.batching.steps import Sampled, Step
from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import TransferError, TransferJob
from edgellm.runtime.kv.types import Attempt, NodeId, RequestId, TransferStats
from edgellm.runtime.lanes import DecodeLane, Lane, Lanes, PrefillLane
from edgellm.runtime.messages import (
    Decode,
    Event,
    FailureKind,
    KvSent,
    Prefill,
    PrefillDone,
    Release,
    Released,
    RequestFailed,
    Tokens,
)

_log = logging.getLogger(__name__)


class Transfers(Protocol):
    """The sending end of the KV exchange."""

    def start(self, job: TransferJob) -> None: ...

    def advance(self, attempt: Attempt, computed: int) -> None: ...

    def cancel(self, attempt: Attempt) -> None: ...


class Arrivals(Protocol):
    """The receiving end."""

    def forget(self, attempt: Attempt) -> None: ...


class RefusedError(Exception):
    """A command that this node cannot carry out."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


@dataclass(kw_only=True, eq=False)
class _Reading:
    """A prompt that is read here."""

    prefill: Prefill
    lane: PrefillLane
    started_s: float | None = None

    @property
    def reserve_tokens(self) -> int:
        """The prompt, and the answer too if it is written here."""
        answer = 0 if self.prefill.targets else self.prefill.generation.max_tokens
        return len(self.prefill.prompt) + answer


@dataclass(frozen=True, kw_only=True, eq=False)
class _AwaitingKv:
    decode: Decode
    deadline_s: float


class Node:
    """All requests of one node, by attempt; at most one attempt of a request is live.

    `transfers` and `arrivals` are set before the first command.
    """

    transfers: Transfers
    arrivals: Arrivals

    def __init__(
        self, *, lanes: Lanes, ledger: BlockLedger, emit: Callable[[Event], None], wake: Callable[[], None]
    ) -> None:
        self.lanes = lanes
        self._ledger = ledger
        self._emit = emit
        self._wake = wake
        self._fence = EpochFence()
        self._live: dict[RequestId, Attempt] = {}
        self._waiting_for_blocks: deque[_Reading] = deque()
        self._reading: dict[Attempt, _Reading] = {}
        self._kv_ready: set[Attempt] = set()
        self._awaiting_kv: dict[Attempt, _AwaitingKv] = {}
        self._answering: dict[Attempt, Decode] = {}
        self._unanswered_releases: list[Attempt] = []

    @property
    def waiting(self) -> int:
        """Requests without a place in a batch."""
        prefill = sum(lane.batcher.waiting for lane in self.lanes.in_turn if isinstance(lane, PrefillLane))
        return len(self._waiting_for_blocks) + len(self._awaiting_kv) + prefill

    @property
    def running(self) -> int:
        return sum(lane.batcher.running for lane in self.lanes.in_turn)

    # Commands

    def prefill(self, command: Prefill) -> None:
        if not self._admit_command(command.attempt, is_known=self._is_live(command.attempt)):
            return
        try:
            lane = self._prefill_lane(command)
            reading = _Reading(prefill=command, lane=lane)
            _check_request(lane, command)
            self._check_capacity(reading.reserve_tokens)
        except RefusedError as refusal:
            self._fail(command.attempt, refusal.kind, str(refusal))
            return
        self._waiting_for_blocks.append(reading)
        _log.info("prefill queued %s prompt_tokens=%d", command.attempt, len(command.prompt))
        self._start_readings()

    def decode(self, command: Decode, now_s: float) -> None:
        is_known = command.attempt in self._awaiting_kv or command.attempt in self._answering
        if not self._admit_command(command.attempt, is_known=is_known):
            return
        try:
            lane = self._decode_lane()
            _check_request(lane, command)
            if not 0 < len(command.generated) < command.generation.max_tokens:
                raise RefusedError(
                    "request", f"{len(command.generated)} of {command.generation.max_tokens} tokens known"
                )
        except RefusedError as refusal:
            self._fail(command.attempt, refusal.kind, str(refusal))
            return
        if command.attempt in self._kv_ready:
            self._start_answer(lane, command)
        else:
            deadline_s = now_s + command.kv_timeout_s
            self._awaiting_kv[command.attempt] = _AwaitingKv(decode=command, deadline_s=deadline_s)

    def release(self, command: Release) -> None:
        self._fence.close(command.attempt)
        live = self._live.get(command.attempt.request_id)
        if live is not None and live.epoch <= command.attempt.epoch:
            _log.info("released %s", live)
            self._drop(live)
        self._unanswered_releases.append(command.attempt)
        self._answer_releases()

    def drop_everything(self) -> None:
        """The orchestrator that gave the commands is gone: forget its requests, and what it fenced."""
        for attempt in list(self._live.values()):
            self._drop(attempt)
        self._unanswered_releases.clear()
        self._fence = EpochFence()

    def expire(self, now_s: float) -> None:
        """Fail requests whose KV did not arrive in time."""
        late = [attempt for attempt, waiting in self._awaiting_kv.items() if waiting.deadline_s <= now_s]
        for attempt in late:
            timeout_s = self._awaiting_kv[attempt].decode.kv_timeout_s
            self._fail(attempt, "transfer", f"the prompt's KV did not arrive within {timeout_s} s")

    # Steps

    def next_step(self, lane: Lane, now_s: float) -> Step | None:
        """Plan a step; its blocks stay allocated until `step_ended`."""
        step = lane.batcher.plan()
        if step is not None:
            self._ledger.pin(step.attempts)
            for attempt in step.attempts:
                reading = self._reading.get(attempt)
                if reading is not None and reading.started_s is None:
                    reading.started_s = now_s
        return step

    def step_ended(self, lane: Lane, step: Step, sampled: Sequence[Sampled], now_s: float) -> None:
        self._ledger.unpin(step.attempts)
        match lane:
            case PrefillLane(batcher=batcher):
                for progress in batcher.commit(step, sampled):
                    self._prompt_progressed(progress, now_s)
            case DecodeLane(batcher=batcher):
                self._tokens_generated(batcher.commit(step, sampled))
        self._answer_releases()
        self._start_readings()

    def step_failed(self, step: Step, message: str) -> None:
        """The engine refused the step: none of its requests goes on."""
        self._ledger.unpin(step.attempts)
        for attempt in step.attempts:
            if self._is_live(attempt):
                self._fail(attempt, "engine", message)
        self._answer_releases()

    def step_abandoned(self, step: Step) -> None:
        """The step's outcome will not be committed; nothing uses its blocks any more."""
        self._ledger.unpin(step.attempts)

    # The KV exchange

    def admit(self, attempt: Attempt) -> bool:
        """Whether an attempt may take room here; older epochs of its request lose theirs."""
        if not self._fence.admits(attempt):
            return False
        live = self._live.get(attempt.request_id)
        if live is not None and live != attempt:
            self._drop(live)
        self._fence.enter(attempt)
        self._live[attempt.request_id] = attempt
        return True

    def kv_complete(self, attempt: Attempt) -> None:
        """All KV of the attempt's prompt is in the pool."""
        self._kv_ready.add(attempt)
        if waiting := self._awaiting_kv.pop(attempt, None):
            self._start_answer(self._decode_lane(), waiting.decode)

    def kv_lost(self, attempt: Attempt) -> None:
        """The sender has gone before the prompt's KV was complete."""
        if attempt in self._awaiting_kv:
            self._fail(attempt, "transfer", "the sender has gone before the prompt's KV was complete")
        else:
            self._drop(attempt)

    def kv_sent(self, attempt: Attempt, stats: TransferStats) -> None:
        self._emit(KvSent(attempt=attempt, stats=stats))
        _log.info(
            "kv sent %s transport=%s bytes=%d exposed_ms=%.1f", attempt, stats.transport, stats.bytes, stats.exposed_ms
        )
        self._end(attempt)

    def kv_not_sent(self, attempt: Attempt, error: TransferError) -> None:
        self._fail(attempt, error.kind, str(error), error.peer)

    # Inside

    def _admit_command(self, attempt: Attempt, *, is_known: bool) -> bool:
        if is_known or not self.admit(attempt):
            _log.info("command ignored %s reason=%s", attempt, "repeated" if is_known else "stale")
            return False
        return True

    def _is_live(self, attempt: Attempt) -> bool:
        return self._live.get(attempt.request_id) == attempt

    def _prefill_lane(self, command: Prefill) -> PrefillLane:
        lane = self.lanes.degraded if command.degraded else self.lanes.half
        if lane is None:
            raise RefusedError("engine", f"this node has no engine for a {'degraded ' * command.degraded}prefill")
        return lane

    def _decode_lane(self) -> DecodeLane:
        if self.lanes.decode is None:
            raise RefusedError("engine", "this node has no decode engine")
        return self.lanes.decode

    def _check_capacity(self, tokens: int) -> None:
        if not self._ledger.ever_fits(tokens):
            pool = self._ledger.pool
            raise RefusedError(
                "capacity", f"{tokens} tokens do not fit {pool.num_blocks} blocks of {pool.contract.block_tokens}"
            )

    def _start_readings(self) -> None:
        """Prompts in order of arrival, as far as their blocks are free."""
        while self._waiting_for_blocks and self._ledger.fits(self._waiting_for_blocks[0].reserve_tokens):
            reading = self._waiting_for_blocks.popleft()
            prefill = reading.prefill
            blocks = self._ledger.reserve(prefill.attempt, reading.reserve_tokens)
            self._reading[prefill.attempt] = reading
            reading.lane.batcher.add(
                Prompt(
                    attempt=prefill.attempt,
                    tokens=prefill.prompt,
                    blocks=np.array(blocks, np.int32),
                    generation=None if len(prefill.generated) else prefill.generation,
                )
            )
            if prefill.targets:
                self.transfers.start(
                    TransferJob(
                        attempt=prefill.attempt,
                        prompt_tokens=len(prefill.prompt),
                        capacity_tokens=len(prefill.prompt) + prefill.generation.max_tokens,
                        blocks=blocks,
                        targets=prefill.targets,
                        timeout_s=prefill.transfer_timeout_s,
                    )
                )
            self._wake()

    def _prompt_progressed(self, progress: PromptProgress, now_s: float) -> None:
        self.transfers.advance(progress.attempt, progress.computed)
        if not progress.finished:
            return
        reading = self._reading.pop(progress.attempt)
        started_s = now_s if reading.started_s is None else reading.started_s
        self._emit(
            PrefillDone(
                attempt=progress.attempt,
                first_token=progress.first_token,
                logprobs=reading.prefill.generation.logprobs,
                prefill_ms=1e3 * (now_s - started_s),
            )
        )
        _log.info("prefill done %s prefill_ms=%.1f", progress.attempt, 1e3 * (now_s - started_s))
        if progress.first_token is not None and progress.first_token.finish is not None:
            self._end(progress.attempt)
        elif not reading.prefill.targets:
            self.kv_complete(progress.attempt)

    def _start_answer(self, lane: DecodeLane, decode: Decode) -> None:
        blocks = self._ledger.blocks(decode.attempt)
        needed = len(decode.prompt) + decode.generation.max_tokens
        if len(blocks) < self._ledger.pool.contract.blocks_for(needed):
            self._fail(decode.attempt, "capacity", f"{len(blocks)} blocks were reserved for {needed} tokens")
            return
        lane.batcher.add(
            Continuation(
                attempt=decode.attempt,
                prompt=decode.prompt,
                generated=decode.generated,
                blocks=np.array(blocks, np.int32),
                generation=decode.generation,
            )
        )
        self._answering[decode.attempt] = decode
        _log.info("decoding %s known_tokens=%d", decode.attempt, len(decode.generated))
        self._wake()

    def _tokens_generated(self, generated: list[TokenGenerated]) -> None:
        if not generated:
            return
        with_logprob = frozenset(attempt for attempt, d in self._answering.items() if d.generation.logprobs)
        self._emit(Tokens(tokens=tuple(generated), with_logprob=with_logprob))
        for one in generated:
            if one.token.finish is not None:
                _log.info("finished %s reason=%s tokens=%d", one.attempt, one.token.finish, one.token.index + 1)
                self._end(one.attempt)

    def _fail(self, attempt: Attempt, kind: FailureKind, message: str, peer: NodeId | None = None) -> None:
        _log.warning("failed %s kind=%s message=%s", attempt, kind, message)
        self._emit(RequestFailed(attempt=attempt, kind=kind, message=message, peer=peer))
        self._end(attempt)

    def _end(self, attempt: Attempt) -> None:
        """Nothing more of this attempt is wanted here."""
        self._fence.close(attempt)
        self._drop(attempt)

    def _drop(self, attempt: Attempt) -> None:
        """Take the attempt out of everything that may hold it; its blocks are free when no step uses them."""
        if self._is_live(attempt):
            del self._live[attempt.request_id]
        self._waiting_for_blocks = deque(r for r in self._waiting_for_blocks if r.prefill.attempt != attempt)
        self._reading.pop(attempt, None)
        self._kv_ready.discard(attempt)
        self._awaiting_kv.pop(attempt, None)
        self._answering.pop(attempt, None)
        self.transfers.cancel(attempt)
        self.arrivals.forget(attempt)
        self.lanes.remove(attempt)
        self._ledger.drop(attempt)
        self._start_readings()

    def _answer_releases(self) -> None:
        """Answer once no block of the request is held any more, by this epoch or an older one."""
        if not self._unanswered_releases:
            return
        held = self._ledger.attempts()
        still_held = []
        for attempt in self._unanswered_releases:
            if any(other.request_id == attempt.request_id and other.epoch <= attempt.epoch for other in held):
                still_held.append(attempt)
            else:
                self._emit(Released(attempt=attempt))
        self._unanswered_releases = still_held


def _check_request(lane: Lane, command: Prefill | Decode) -> None:
    spec = lane.engine.spec
    num_prompt, max_tokens = len(command.prompt), command.generation.max_tokens
    if not num_prompt or max_tokens < 1:
        raise RefusedError("request", f"{num_prompt} prompt tokens, at most {max_tokens} to generate")
    if num_prompt + max_tokens > spec.limits.max_seq_len:
        raise RefusedError("request", f"{num_prompt} + {max_tokens} tokens exceed {spec.limits.max_seq_len}")
    for tokens in (command.prompt, command.generated):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < spec.vocab_size:
            raise RefusedError("request", f"a token id is outside of the vocabulary of {spec.vocab_size}")
    try:
        command.generation.sampling.validate(spec.vocab_size)
    except SamplingError as error:
        raise RefusedError("request", str(error)) from error
