"""The engines of a simulated node: the node's own batchers in turn, with the toy model in place of a forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from edgellm.engines.sampling_params import SamplingParams
from edgellm.engines.spec import EngineLimits
from edgellm.orchestrator.core.commands import StartDecode, StartPrefill
from edgellm.orchestrator.core.values import AttemptId, EngineProfile, Generation, NodeProfile, RequestId, SampledToken
from edgellm.orchestrator.sim.device import DeviceModel, LaneName
from edgellm.orchestrator.sim.toy import kv_of, next_token
from edgellm.runtime import generation as node_generation
from edgellm.runtime.batching.decode import Continuation, DecodeBatcher
from edgellm.runtime.batching.prefill import PrefillBatcher, Prompt
from edgellm.runtime.batching.steps import Sampled, Step
from edgellm.runtime.kv import types as node_types

MAX_ROWS = 512
MAX_BATCH_TOKENS = 4096
CHUNK_ROWS = 128
_BLOCKS = np.zeros(1, np.int32)


@dataclass(frozen=True, kw_only=True)
class PromptRead:
    attempt: AttemptId
    first_token: SampledToken | None


@dataclass(frozen=True, kw_only=True)
class Answered:
    attempt: AttemptId
    token: SampledToken


Progress: TypeAlias = PromptRead | Answered


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """One step under way."""

    lane: LaneName
    step: Step
    seconds: float


class Lanes:
    """Half precision, degraded and decode batchers over one device, which runs one step at a time."""

    def __init__(self, profile: NodeProfile, device: DeviceModel) -> None:
        self._device = device
        phases = {engine.phase: _limits(engine) for engine in profile.engines}
        self._readers: dict[LaneName, PrefillBatcher] = {}
        if "prefill" in phases:
            self._readers["half"] = _reader(phases["prefill"])
        if "decode" in phases:
            self._readers["degraded"] = _reader(phases["decode"])
        self._writer = DecodeBatcher(phases.get("decode", phases.get("prefill", _NO_LIMITS)))
        self._order: list[LaneName] = ["half", "degraded", "decode"]
        self._seeds: dict[AttemptId, int] = {}
        self._kv: dict[AttemptId, int] = {}

    def read(self, command: StartPrefill) -> None:
        attempt = command.attempt
        self._seeds[attempt] = command.generation.sampling.seed
        self._kv[attempt] = kv_of(command.prompt)
        self._readers["degraded" if command.degraded else "half"].add(
            Prompt(
                attempt=_to_node(attempt),
                tokens=np.array(command.prompt, np.int32),
                blocks=_BLOCKS,
                generation=None if command.generated else _generation(command.generation),
            )
        )

    def answer(self, command: StartDecode, kv: int) -> None:
        attempt = command.attempt
        self._seeds[attempt] = command.generation.sampling.seed
        self._kv[attempt] = kv
        self._writer.add(
            Continuation(
                attempt=_to_node(attempt),
                prompt=np.array(command.prompt, np.int32),
                generated=np.array(command.generated, np.int32),
                blocks=_BLOCKS,
                generation=_generation(command.generation),
            )
        )

    def remove(self, attempt: AttemptId) -> None:
        for reader in self._readers.values():
            reader.remove(_to_node(attempt))
        self._writer.remove(_to_node(attempt))

    def plan(self) -> StepPlan | None:
        """Lanes take turns, so that neither prompts nor answers starve on a node that does both."""
        for lane in list(self._order):
            step = self._plan_lane(lane)
            if step is not None:
                self._order.remove(lane)
                self._order.append(lane)
                return StepPlan(lane=lane, step=step, seconds=self._device.seconds(lane, step))
        return None

    def commit(self, plan: StepPlan) -> Iterator[Progress]:
        sampled = [self._draw(plan, index) for index, s in enumerate(plan.step.segments) if s.sample is not None]
        if plan.lane == "decode":
            for generated in self._writer.commit(plan.step, sampled):
                yield Answered(attempt=_from_node(generated.attempt), token=_token(generated.token))
            return
        for progress in self._readers[plan.lane].commit(plan.step, sampled):
            if progress.finished:
                token = _token(progress.first_token) if progress.first_token is not None else None
                yield PromptRead(attempt=_from_node(progress.attempt), first_token=token)

    def _plan_lane(self, lane: LaneName) -> Step | None:
        if lane == "decode":
            return self._writer.plan()
        reader = self._readers.get(lane)
        return reader.plan() if reader is not None else None

    def _draw(self, plan: StepPlan, index: int) -> Sampled:
        segment = plan.step.segments[index]
        assert segment.sample is not None
        attempt = _from_node(segment.attempt)
        count = segment.sample.index
        generated = segment.sample.history[len(segment.sample.history) - count :].tolist()
        return Sampled(token_id=next_token(self._kv[attempt], generated, self._seeds[attempt]), logprob=-1.0)


_NO_LIMITS = EngineLimits(max_rows=1, max_sequences=1, max_seq_len=1)


def _limits(engine: EngineProfile) -> EngineLimits:
    return EngineLimits(max_rows=MAX_ROWS, max_sequences=engine.max_sequences, max_seq_len=engine.max_seq_len)


def _reader(limits: EngineLimits) -> PrefillBatcher:
    return PrefillBatcher(limits, max_batch_tokens=MAX_BATCH_TOKENS, chunk_rows=CHUNK_ROWS)


def _generation(generation: Generation) -> node_generation.Generation:
    return node_generation.Generation(
        sampling=SamplingParams(seed=generation.sampling.seed),
        max_tokens=generation.max_tokens,
        stop_token_ids=frozenset(generation.stop_token_ids),
    )


def _token(token: node_generation.SampledToken) -> SampledToken:
    return SampledToken(index=token.index, token_id=token.token_id, logprob=token.logprob, finish=token.finish)


def _to_node(attempt: AttemptId) -> node_types.Attempt:
    return node_types.Attempt(request_id=node_types.RequestId(attempt.request_id), epoch=attempt.epoch)


def _from_node(attempt: node_types.Attempt) -> AttemptId:
    return AttemptId(request_id=RequestId(attempt.request_id), epoch=attempt.epoch)
