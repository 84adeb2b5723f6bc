"""Steps between nodes: on from here, into here, and their results back. No I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.engines.base import Engine
from edgellm.runtime.answers import Answers
from edgellm.runtime.attempts import Attempts
from edgellm.runtime.batching.decode import TokenGenerated
from edgellm.runtime.batching.steps import Sampled, Segment, Step, StepOutput, build_step
from edgellm.runtime.generation import SampledToken
from edgellm.runtime.kv.types import Attempt, NodeId
from edgellm.runtime.lanes import DecodeLane, Lanes, PlannedStep
from edgellm.runtime.stages.hops import Batched, Hops, Relayed
from edgellm.runtime.stages.messages import StageLinks, StageResult, StageSegment, StageStep, StepSource
from edgellm.runtime.stages.queue import Arrived
from edgellm.runtime.stages.routes import Leg

STEP_PATIENCE_S = 10.0
"""How long a step waits for KV of its segments; then those that have none are left out."""

_LOST = Sampled(token_id=0, logprob=0.0)
"""In place of what was not drawn, for a sequence that the batcher has forgotten."""


@dataclass(frozen=True, kw_only=True)
class ResultEffects:
    """What a result means for the requests of a step that began here."""

    stalled: tuple[Attempt, ...] = ()
    """A later stage does not hold them."""
    peer: NodeId | None = None
    """The next stage, which said so."""
    failed: tuple[Attempt, ...] = ()
    error: str = ""


class Pipelines:
    """Both sides of the stage exchange. `links` is set before the first step."""

    links: StageLinks

    def __init__(self, answers: Answers, lanes: Lanes, attempts: Attempts) -> None:
        self._answers = answers
        self._lanes = lanes
        self._attempts = attempts
        self._hops = Hops()

    def pass_on(self, lane: DecodeLane, step: Step, output: StepOutput) -> None:
        """The first leg of a pipeline has run a step."""
        segments = [_rows_of(segment) for segment in step.segments]
        self._send(lane.route[1], Batched(lane=lane, step=step), segments, output)

    def arrived(self, step: StageStep, source: StepSource, now_s: float) -> None:
        self._lanes.later.queue.waiting.append(Arrived(step=step, source=source, deadline_s=now_s + STEP_PATIENCE_S))

    def source_gone(self, source: StepSource) -> None:
        self._lanes.later.queue.forget(source)

    def is_overdue(self, now_s: float) -> bool:
        """Whether a step has waited for too long: `plan` runs it with what is here, or answers it."""
        return any(arrived.deadline_s <= now_s for arrived in self._lanes.later.queue.waiting)

    def plan(self, now_s: float) -> PlannedStep | None:
        """The oldest arrived step whose KV is here."""
        queue = self._lanes.later.queue
        for arrived in list(queue.waiting):
            if now_s < arrived.deadline_s and any(self._is_waiting(s.attempt) for s in arrived.step.segments):
                continue
            queue.waiting.remove(arrived)
            if planned := self._keep_held(arrived):
                queue.begin(arrived)
                return planned
            arrived.lose()
        return None

    def ended(self, output: StepOutput) -> list[TokenGenerated]:
        """A step of a later leg has run. Returns what was sampled, where it is the last leg."""
        arrived = self._lanes.later.queue.end()
        segments = arrived.kept_segments()
        if arrived.following is not None:
            self._send(arrived.following, Relayed(arrived=arrived), segments, output)
            return []
        tokens = self._append(segments, output.sampled)
        arrived.answer(tokens)
        wanted = [segment.attempt for segment in segments if segment.sample]
        return [TokenGenerated(attempt=a, token=t) for a, t in zip(wanted, tokens, strict=True) if t is not None]

    def failed(self, message: str) -> None:
        """The engine refused a step of a later leg."""
        self._lanes.later.queue.end().fail(message)

    def result(self, result: StageResult) -> ResultEffects:
        """A later stage has answered a step."""
        match self._hops.take(result.step_id):
            case Relayed(arrived=arrived):
                if result.error:
                    arrived.fail(result.error)
                else:
                    arrived.answer(result.samples)
            case Batched(lane=lane, step=step):
                if result.error:
                    return ResultEffects(failed=tuple(step.attempts), error=result.error)
                return ResultEffects(stalled=_commit(lane, step, result.samples), peer=lane.route[1].node_id)
            case None:
                pass
        return ResultEffects()

    def broken(self, peer: NodeId) -> list[Attempt]:
        """The stream to a later stage has broken. Returns whose steps were on it."""
        hops = self._hops.broken(peer)
        for origin, _ in hops:
            if isinstance(origin, Relayed):
                origin.arrived.lose()
        return [attempt for _, attempts in hops for attempt in attempts]

    def _send(self, leg: Leg, origin: Batched | Relayed, segments: Sequence[StageSegment], output: StepOutput) -> None:
        if output.hidden is None:
            raise ValueError(f"an engine before layers {leg.layers} gave no hidden states")
        self._hops.send(self.links, leg, origin, segments, output.hidden)

    def _is_waiting(self, attempt: Attempt) -> bool:
        """Whether the attempt's command, or its KV, may still come."""
        answer = self._answers.get(attempt)
        return self._attempts.fence.admits(attempt) if answer is None else answer.state == "waiting"

    def _keep_held(self, arrived: Arrived) -> PlannedStep | None:
        """The step, without the segments that are not held here, or rows before them; None if none is left.

        Rows that catch up have no sample that could be lost: what comes after them is lost instead.
        """
        kept: list[Segment] = []
        engine: Engine | None = None
        for index, rows in enumerate(arrived.step.segments):
            answer = self._answers.get(rows.attempt)
            leg = None if answer is None or answer.state != "running" else answer.leg_at(arrived.step.stage)
            if answer is None or leg is None:
                continue
            segment = answer.segment(rows, leg, self._answers.reach(rows.attempt, leg))
            if segment is not None:
                kept.append(segment)
                arrived.kept.append(index)
                arrived.following = answer.leg_after(leg)
                engine = self._lanes.stages.of(leg.layers)
        if engine is None:
            return None
        return PlannedStep(lane=self._lanes.later, engine=engine, step=build_step(kept, arrived.kept_hidden()))

    def _append(self, segments: Sequence[StageSegment], sampled: Sequence[Sampled]) -> list[SampledToken | None]:
        """To the transcripts of those that are still held."""
        wanted = [segment.attempt for segment in segments if segment.sample]
        tokens: list[SampledToken | None] = []
        for attempt, draw in zip(wanted, sampled, strict=True):
            answer = self._answers.get(attempt)
            is_held = answer is not None and answer.state == "running"
            tokens.append(answer.transcript.append(draw) if answer is not None and is_held else None)
        return tokens


def _rows_of(segment: Segment) -> StageSegment:
    return StageSegment(
        attempt=segment.attempt,
        first_position=segment.first_position,
        rows=segment.rows,
        sample=segment.sample is not None,
    )


def _commit(lane: DecodeLane, step: Step, samples: Sequence[SampledToken | None]) -> tuple[Attempt, ...]:
    """Take drawn tokens into the batch. Returns the attempts whose token is lost."""
    wanted = [segment.attempt for segment in step.segments if segment.sample is not None]
    lost = tuple(attempt for attempt, token in zip(wanted, samples, strict=True) if token is None)
    for attempt in lost:
        lane.batcher.remove(attempt)
    draws = [_LOST if token is None else Sampled(token_id=token.token_id, logprob=token.logprob) for token in samples]
    lane.batcher.commit(step, draws)
    return lost
