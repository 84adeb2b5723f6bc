"""What a node does with commands, finished steps and arriving KV: no I/O, no clock of its own, one thread."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from edgellm.runtime.answers import Answers
from edgellm.runtime.batching.decode import TokenGenerated
from edgellm.runtime.batching.prefill import PromptProgress
from edgellm.runtime.batching.steps import Sampled, Step
from edgellm.runtime.checks import RefusedError, check_capacity, check_known_tokens, check_request
from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import Arrivals, TransferError, Transfers
from edgellm.runtime.kv.types import Attempt, KvCopy, NodeId, RequestId, TransferStats
from edgellm.runtime.lanes import DecodeLane, Lane, Lanes, PrefillLane
from edgellm.runtime.messages import (
    CopyLost,
    Decode,
    Event,
    FailureKind,
    Hold,
    KvSent,
    Prefill,
    PrefillDone,
    Protect,
    Release,
    Released,
    RequestFailed,
    Tokens,
)
from edgellm.runtime.readings import Reading, Readings

_log = logging.getLogger(__name__)


class Node:
    """All requests of one node, by attempt; at most one attempt of a request is live.

    `transfers` and `arrivals` are set before the first command.
    """

    transfers: Transfers
    arrivals: Arrivals

    def __init__(
        self,
        *,
        node_id: NodeId,
        lanes: Lanes,
        ledger: BlockLedger,
        emit: Callable[[Event], None],
        wake: Callable[[], None],
    ) -> None:
        self.node_id = node_id
        self.lanes = lanes
        self._ledger = ledger
        self._emit = emit
        self._wake = wake
        self._fence = EpochFence()
        self._live: dict[RequestId, Attempt] = {}
        self._readings = Readings(ledger)
        self._answers = Answers(ledger, lanes.decode)
        self._unanswered_releases: list[Attempt] = []

    @property
    def waiting(self) -> int:
        """Requests without a place in a batch."""
        prefill = sum(lane.batcher.waiting for lane in self.lanes.in_turn if isinstance(lane, PrefillLane))
        return self._readings.waiting_for_blocks + self._answers.waiting_for_kv + prefill

    @property
    def running(self) -> int:
        return sum(lane.batcher.running for lane in self.lanes.in_turn)

    # Commands

    def prefill(self, command: Prefill) -> None:
        if not self._admit_command(command.attempt, is_known=self._is_live(command.attempt)):
            return
        with self._failing(command.attempt):
            lane = self.lanes.degraded if command.degraded else self.lanes.half
            if lane is None:
                raise RefusedError("engine", f"this node has no engine for a {'degraded ' * command.degraded}prefill")
            check_request(lane, command)
            reading = Reading(prefill=command, lane=lane)
            check_capacity(self._ledger, reading.reserve_tokens)
            _log.info("prefill queued %s prompt_tokens=%d", command.attempt, len(command.prompt))
            self._readings.add(reading)
            self._start_readings()

    def decode(self, command: Decode, now_s: float) -> None:
        if not self._admit_command(command.attempt, is_known=command.attempt in self._answers):
            return
        with self._failing(command.attempt):
            check_request(self._answers.lane(), command)
            check_known_tokens(command)
            if command.resume_from is not None:
                raise RefusedError("transfer", f"KV of {command.resume_from} is not here")
            if len(command.stages) > 1:
                raise RefusedError("engine", f"a pipeline of {len(command.stages)} stages; this node decodes alone")
            self._lose_copies(command.attempt, command.copies)
            _log.info("decode queued %s known_tokens=%d", command.attempt, len(command.generated))
            self._answers.add(command, now_s)
            self._wake()

    def hold(self, command: Hold) -> None:
        if self._admit_command(command.attempt, is_known=self._is_live(command.attempt)):
            self._fail(command.attempt, "transfer", f"KV of {command.resume_from} is not here")

    def protect(self, command: Protect) -> None:
        if self._is_live(command.attempt):
            self._lose_copies(command.attempt, command.copies)

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
        for decode in self._answers.late(now_s):
            message = f"the prompt's KV did not arrive within {decode.kv_timeout_s} s"
            self._fail(decode.attempt, "transfer", message)

    # Steps

    def next_step(self, lane: Lane, now_s: float) -> Step | None:
        """Plan a step; its blocks stay allocated until the step ended, failed or was abandoned."""
        step = lane.batcher.plan()
        if step is not None:
            self._ledger.pin(step.attempts)
            for job in self._readings.step_planned(step.attempts, now_s):
                self.transfers.start(job)
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
        with self._failing(attempt):
            self._answers.kv_complete(attempt)
            self._wake()

    def kv_lost(self, attempt: Attempt) -> None:
        """The sender has gone before the prompt's KV was complete."""
        self._ledger.drop(attempt)
        with self._failing(attempt):
            self._answers.kv_lost(attempt)
        self._start_readings()

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

    def _lose_copies(self, attempt: Attempt, copies: Sequence[KvCopy]) -> None:
        for copy in copies:
            if copy.source == self.node_id:
                self._emit(
                    CopyLost(
                        attempt=attempt,
                        holder=copy.target.node_id,
                        first_layer=copy.target.first_layer,
                        num_layers=copy.target.num_layers,
                        message="this node keeps no copies",
                    )
                )

    def _is_live(self, attempt: Attempt) -> bool:
        return self._live.get(attempt.request_id) == attempt

    def _start_readings(self) -> None:
        self._readings.start_fitting()
        self._wake()

    def _prompt_progressed(self, progress: PromptProgress, now_s: float) -> None:
        self.transfers.advance(progress.attempt, progress.computed)
        if not progress.finished:
            return
        reading = self._readings.finish(progress.attempt)
        prefill_ms = 1e3 * (now_s - reading.started_s)
        self._emit(
            PrefillDone(
                attempt=progress.attempt,
                first_token=progress.first_token,
                logprobs=reading.prefill.generation.logprobs,
                prefill_ms=prefill_ms,
            )
        )
        _log.info("prefill done %s prefill_ms=%.1f", progress.attempt, prefill_ms)
        if progress.first_token is not None and progress.first_token.finish is not None:
            self._end(progress.attempt)
        elif not reading.prefill.targets:
            self.kv_complete(progress.attempt)

    def _tokens_generated(self, generated: list[TokenGenerated]) -> None:
        if not generated:
            return
        self._emit(Tokens(tokens=tuple(generated), with_logprob=self._answers.with_logprobs))
        for one in generated:
            if one.token.finish is not None:
                _log.info("finished %s reason=%s tokens=%d", one.attempt, one.token.finish, one.token.index + 1)
                self._end(one.attempt)

    @contextmanager
    def _failing(self, attempt: Attempt) -> Iterator[None]:
        """A refusal inside fails the attempt."""
        try:
            yield
        except RefusedError as refusal:
            self._fail(attempt, refusal.kind, str(refusal))

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
        self._readings.drop(attempt)
        self._answers.drop(attempt)
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
