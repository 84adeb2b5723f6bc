"""What a node does with commands, finished steps and arriving KV: no I/O, no clock of its own, one thread."""

import logging
from collections.abc import Callable, Sequence

from edgellm.engines.load import engine_layers
from edgellm.runtime.answers import Answers
from edgellm.runtime.attempts import Attempts
from edgellm.runtime.batching.decode import TokenGenerated
from edgellm.runtime.batching.prefill import PromptProgress
from edgellm.runtime.batching.steps import Step, StepOutput
from edgellm.runtime.checks import RefusedError, check_capacity, check_request
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.inbox import PromptPart
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import TransferError
from edgellm.runtime.kv.types import Attempt, HeldKv, KvCopy, NodeId, TransferStats
from edgellm.runtime.lanes import DecodeLane, Lane, Lanes, PlannedStep, PrefillLane, StageLane
from edgellm.runtime.lifecycle import Exchanges, Lifecycle
from edgellm.runtime.messages import (
    CopyLost,
    Decode,
    Event,
    Hold,
    KvCopied,
    KvSent,
    PipelineBroken,
    Prefill,
    PrefillDone,
    Protect,
    Release,
    Resumed,
    Tokens,
)
from edgellm.runtime.readings import STAYED, Reading, Readings
from edgellm.runtime.stages.messages import StageResult, StageStep, StepSource
from edgellm.runtime.stages.pipelines import Pipelines

_log = logging.getLogger(__name__)


class Node:
    """All requests of one node, by attempt. Needs `connect` before the first command."""

    def __init__(
        self,
        *,
        node_id: NodeId,
        lanes: Lanes,
        ledger: BlockLedger,
        holdings: Holdings,
        emit: Callable[[Event], None],
        wake: Callable[[], None],
        lease_s: float = 30.0,
    ) -> None:
        """`lease_s`: how long KV is kept for somebody who decides what becomes of it."""
        self.node_id = node_id
        self.lanes = lanes
        self._ledger = ledger
        self._holdings = holdings
        self._emit = emit
        self._wake = wake
        self._attempts = Attempts()
        self._readings = Readings(ledger, node_id, lanes.num_layers)
        self._answers = Answers(node_id, ledger, holdings, lanes)
        self._pipelines = Pipelines(self._answers, lanes, self._attempts)
        self.lifecycle = Lifecycle(
            attempts=self._attempts,
            readings=self._readings,
            answers=self._answers,
            lanes=lanes,
            ledger=ledger,
            holdings=holdings,
            emit=emit,
            wake=wake,
            lease_s=lease_s,
        )

    def connect(self, exchanges: Exchanges) -> None:
        self._exchanges = self.lifecycle.exchanges = exchanges
        self._pipelines.links = exchanges.links

    @property
    def waiting(self) -> int:
        """Requests without a place in a batch."""
        return self._readings.waiting_for_blocks + self._answers.waiting_for_kv + self.lanes.waiting

    @property
    def running(self) -> int:
        """Prompts and answers under way here; an answer is so on every node of its pipeline."""
        return self.lanes.reading + self._answers.running

    @property
    def held(self) -> list[HeldKv]:
        """What is left of the requests of an orchestrator that has gone."""
        return self._holdings.held()

    @property
    def highest_epoch(self) -> int:
        """That it has heard of."""
        return self._attempts.highest_epoch

    # Commands

    def welcome(self, first_epoch: int) -> None:
        """An orchestrator counts what this node holds, and attempts from this epoch on."""
        self._attempts.welcome(first_epoch)

    def prefill(self, command: Prefill) -> None:
        if not self.lifecycle.admit_command(command.attempt, is_known=self._attempts.is_live(command.attempt)):
            return
        with self.lifecycle.failing(command.attempt):
            lane = self.lanes.degraded if command.degraded else self.lanes.half
            if lane is None:
                raise RefusedError("engine", f"this node has no engine for a {'degraded ' * command.degraded}prefill")
            check_request(lane.engine.spec, command)
            reading = Reading(prefill=command, lane=lane)
            check_capacity(self._ledger, self._readings.reserve_tokens(reading))
            _log.info("prefill queued %s prompt_tokens=%d", command.attempt, len(command.prompt))
            self._readings.add(reading)
            self.lifecycle.start_readings()

    def decode(self, command: Decode, now_s: float) -> None:
        if not self.lifecycle.admit_command(
            command.attempt, is_known=command.attempt in self._answers, resume_from=command.resume_from
        ):
            return
        with self.lifecycle.failing(command.attempt):
            if command.resume_from is not None:
                self.lifecycle.take_over(command.attempt, command.resume_from, command.resume_tokens)
            _log.info("decode queued %s known_tokens=%d", command.attempt, len(command.generated))
            self._attempts.decided(command.attempt)
            self._answers.add(command, now_s)
            self._start_answer(command.attempt)
            if command.resume_from is not None:
                self._answers.check_started(command.attempt)
                self._emit(Resumed(attempt=command.attempt))

    def hold(self, command: Hold) -> None:
        if not self.lifecycle.admit_command(command.attempt, is_known=False, resume_from=command.resume_from):
            return
        try:
            self.lifecycle.take_over(command.attempt, command.resume_from, command.resume_tokens)
        except RefusedError as refusal:
            _log.warning("nothing to hold %s reason=%s", command.attempt, refusal)
        self.report_copies()

    def protect(self, command: Protect) -> None:
        own = self._own(command.copies)
        if self._answers.is_running(command.attempt):
            self._exchanges.copies.start(command.attempt, own)
        elif self._answers.is_waiting(command.attempt):
            self._answers.protect(command.attempt, own)
        else:
            for copy in own:
                error = TransferError("stale", copy.target.node_id, "no answer runs here")
                self.copy_lost(command.attempt, copy.target.layers, error)

    def release(self, command: Release) -> None:
        self.lifecycle.release(command.attempt)

    # Steps

    def next_step(self, lane: Lane, now_s: float) -> PlannedStep | None:
        """Plan a step; its blocks stay allocated until the step ended, failed or was abandoned."""
        planned = self._plan(lane, now_s)
        if planned is not None:
            self._ledger.pin(planned.step.attempts)
            for job in self._readings.step_planned(planned.step.attempts, now_s):
                self._exchanges.transfers.start(job)
        return planned

    def step_ended(self, planned: PlannedStep, output: StepOutput, now_s: float) -> None:
        step = planned.step
        self._ledger.unpin(step.attempts)
        match planned.lane:
            case PrefillLane(batcher=batcher):
                for progress in batcher.commit(step, output.sampled):
                    self._prompt_progressed(progress, now_s)
            case DecodeLane(route=route, batcher=batcher) as lane:
                if len(route) > 1:
                    self._pipelines.pass_on(lane, step, output)
                self._computed(step, route[0].layers)
                if len(route) == 1:
                    self._tokens_generated(batcher.commit(step, output.sampled))
            case StageLane():
                generated = self._pipelines.ended(output)
                self._computed(step, engine_layers(planned.engine.spec))
                self._tokens_generated(generated)
        self.lifecycle.answer_releases()
        self.lifecycle.start_readings()

    def step_failed(self, planned: PlannedStep, message: str) -> None:
        """The engine refused the step: none of its requests goes on."""
        self._ledger.unpin(planned.step.attempts)
        if isinstance(planned.lane, StageLane):
            self._pipelines.failed(message)
        else:
            self.lifecycle.fail_live(planned.step.attempts, message)
        self.lifecycle.answer_releases()

    def step_abandoned(self, planned: PlannedStep) -> None:
        """The step's outcome will not be committed; nothing uses its blocks any more."""
        self._ledger.unpin(planned.step.attempts)

    def expire(self, now_s: float) -> None:
        """To be called many times a second: nothing waits for longer than it may, whatever else happens."""
        self.lifecycle.expire(now_s)
        if self._pipelines.is_overdue(now_s):
            self._wake()

    # The stage exchange

    def stage_step(self, step: StageStep, source: StepSource, now_s: float) -> None:
        """An earlier stage has sent a step."""
        self._pipelines.arrived(step, source, now_s)
        self._wake()

    def stage_source_gone(self, source: StepSource) -> None:
        """Nobody waits for the results of this source's steps any more."""
        self._pipelines.source_gone(source)

    def stage_result(self, result: StageResult, now_s: float) -> None:
        """A later stage has answered a step."""
        effects = self._pipelines.result(result)
        self.lifecycle.fail_live(effects.failed, effects.error)
        if effects.peer is not None:
            self._stall(effects.peer, effects.stalled, now_s)
        self._wake()

    def stage_broken(self, peer: NodeId, now_s: float) -> None:
        """The stream to a later stage has broken: what was on it is lost, and nothing else."""
        self._stall(peer, self._pipelines.broken(peer), now_s)

    # The KV exchange

    def kv_complete(self, attempt: Attempt, part: PromptPart) -> None:
        """All KV of these layers of the attempt's prompt is in the pool."""
        self._holdings.add(attempt, part.layers, range(part.tokens), "copy" if part.backup else "own")
        if part.backup:
            self.report_copies([attempt])
        else:
            with self.lifecycle.failing(attempt):
                self._start_answer(attempt)

    def kv_lost(self, attempt: Attempt, part: PromptPart) -> None:
        """The sender has gone before the KV of these layers was complete."""
        if part.backup:
            self.copy_lost(attempt, part.layers, TransferError("transfer", self.node_id, "its sender has gone"))
            return
        if not self._attempts.is_counted:
            self.lifecycle.drop(attempt)
            return
        self.lifecycle.forget_kv(attempt)
        with self.lifecycle.failing(attempt):
            self._answers.kv_lost(attempt)
        self.lifecycle.start_readings()

    def kv_sent(self, attempt: Attempt, stats: TransferStats) -> None:
        """All targets but backups have the prompt's KV."""
        self._emit(KvSent(attempt=attempt, stats=stats))
        _log.info(
            "kv sent %s transport=%s bytes=%d exposed_ms=%.1f", attempt, stats.transport, stats.bytes, stats.exposed_ms
        )

    def kv_not_sent(self, attempt: Attempt, error: TransferError) -> None:
        self.lifecycle.fail(attempt, error.kind, str(error), error.peer)

    def transfers_over(self, attempt: Attempt) -> None:
        """Nothing more of the prompt is on its way."""
        if not self._readings.stays(attempt):
            self.lifecycle.let_go(attempt)

    def copy_lost(self, attempt: Attempt, layers: range, error: TransferError) -> None:
        """The copy at the peer of `error` is not kept up any more; the request goes on without."""
        _log.info("copy lost %s holder=%s kind=%s message=%s", attempt, error.peer, error.kind, error)
        self._emit(
            CopyLost(
                attempt=attempt,
                holder=error.peer,
                first_layer=layers.start,
                num_layers=len(layers),
                kind=error.kind,
                message=str(error),
            )
        )

    def report_copies(self, attempts: Sequence[Attempt] | None = None) -> None:
        """Tell how far copies reach that changed since they were last told, of these attempts or of all."""
        if copies := self._holdings.copies_changed(attempts):
            self._emit(KvCopied(copies=tuple(copies)))

    # Inside

    def _stall(self, peer: NodeId, attempts: Sequence[Attempt], now_s: float) -> None:
        """Their steps got lost at the next stage, or behind it."""
        stalled = tuple(attempt for attempt in attempts if attempt in self._answers)
        for attempt in stalled:
            self.lifecycle.stall(attempt, now_s)
        if stalled:
            _log.warning("pipeline broken peer=%s stalled=%d", peer, len(stalled))
            self._emit(PipelineBroken(peer=peer, attempts=stalled))

    def _start_answer(self, attempt: Attempt) -> None:
        """Let an answer run as soon as its KV is here. Raises RefusedError if too little room was reserved."""
        if (answer := self._answers.start_ready(attempt)) is not None:
            if own := self._own(answer.decode.copies):
                self._exchanges.copies.start(attempt, own)
            self._wake()

    def _own(self, copies: Sequence[KvCopy]) -> list[KvCopy]:
        """Those that this node keeps up."""
        return [copy for copy in copies if copy.source == self.node_id]

    def _plan(self, lane: Lane, now_s: float) -> PlannedStep | None:
        if isinstance(lane, StageLane):
            return self._pipelines.plan(now_s)
        step = lane.batcher.plan()
        return None if step is None else PlannedStep(lane=lane, engine=lane.engine, step=step)

    def _computed(self, step: Step, layers: range) -> None:
        for segment in step.segments:
            if self._attempts.is_live(segment.attempt):
                self._holdings.computed(segment.attempt, layers, segment.end)
                self._exchanges.copies.advance(segment.attempt, layers, segment.end)

    def _prompt_progressed(self, progress: PromptProgress, now_s: float) -> None:
        self._exchanges.transfers.advance(progress.attempt, progress.computed)
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
            self.lifecycle.end(progress.attempt)
            return
        if self._readings.is_sent_nowhere(reading):
            self.kv_sent(progress.attempt, STAYED)
        for part in self._readings.parts_here(reading):
            self.kv_complete(progress.attempt, part)

    def _tokens_generated(self, generated: list[TokenGenerated]) -> None:
        if not generated:
            return
        self._emit(Tokens(tokens=tuple(generated), with_logprob=self._answers.with_logprobs))
        for one in generated:
            if one.token.finish is not None:
                _log.info("finished %s reason=%s tokens=%d", one.attempt, one.token.finish, one.token.index + 1)
                self.lifecycle.end(one.attempt)
