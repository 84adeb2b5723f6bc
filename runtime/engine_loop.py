"""Steps, one after the other, on a thread of their own; everything else stays on the event loop."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from edgellm.engines.base import Engine
from edgellm.engines.sampling import sample
from edgellm.runtime.batching.steps import Sampled, Step, StepOutput
from edgellm.runtime.lanes import DecodeLane, Lane, PlannedStep, PrefillLane, StageLane
from edgellm.runtime.node import Node
from edgellm.runtime.stages.engines import to_half

_NEWEST_WEIGHT: Final = 0.1
"""Of the newest step in moving averages; what went before fades."""


@dataclass(kw_only=True, eq=False)
class Progress:
    """Counted since the start; averages are 0 until measured."""

    steps: int = 0
    decode_step_ms: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rows over seconds, so that the few rows at a prompt's end weigh only as long as they took."""
        return self._rows / self._seconds if self._seconds else 0.0

    def observe(self, planned: PlannedStep, seconds: float) -> None:
        self.steps += 1
        match planned.lane:
            case PrefillLane():
                self._rows = _average(self._rows, planned.step.rows)
                self._seconds = _average(self._seconds, seconds)
            case DecodeLane() | StageLane():
                self.decode_step_ms = _average(self.decode_step_ms, 1e3 * seconds)


class EngineLoop:
    """Lets the lanes take turns, a step each; while a step runs, the event loop sends and receives."""

    def __init__(self, node: Node, work: asyncio.Event, on_step: Callable[[PlannedStep, float], None]) -> None:
        self._node = node
        self._work = work
        self._on_step = on_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._unfinished: PlannedStep | None = None
        self._between_steps = asyncio.Event()
        self._between_steps.set()
        self.progress = Progress()

    async def run(self) -> None:
        """Until cancelled. What an engine raises, other than ValueError, ends the node."""
        while True:
            turns = [await self._turn(lane) for lane in self._node.lanes.in_turn]
            if not any(turns):
                self._work.clear()
                await self._work.wait()

    async def between_steps(self) -> None:
        """Wait until no step is running."""
        await self._between_steps.wait()

    def close(self) -> None:
        """Wait for the running step, whose outcome nobody wants any more, and end the thread."""
        self._thread.shutdown(wait=True)
        if self._unfinished is not None:
            self._node.step_abandoned(self._unfinished)

    async def _turn(self, lane: Lane) -> bool:
        planned = self._node.next_step(lane, time.monotonic())
        if planned is None:
            return False
        self._unfinished = planned
        self._between_steps.clear()
        await self._run_step(planned)
        self._unfinished = None
        self._between_steps.set()
        return True

    async def _run_step(self, planned: PlannedStep) -> None:
        started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            output = await loop.run_in_executor(self._thread, run_step, planned.engine, planned.step)
        except ValueError as error:
            self._node.step_failed(planned, f"engine {planned.engine.spec.name}: {error}")
            return
        now_s = time.monotonic()
        self._node.step_ended(planned, output, now_s)
        self.progress.observe(planned, now_s - started_s)
        self._on_step(planned, now_s - started_s)


def run_step(engine: Engine, step: Step) -> StepOutput:
    """Forward, then sample the logit rows, or round hidden states for the next stage.

    Raises ValueError if the engine refuses the batch.
    """
    output = engine.forward(step.batch)
    if output.hidden is not None:
        return StepOutput(hidden=to_half(output.hidden))
    samples = step.samples
    if not samples or output.logits is None:
        return StepOutput()
    tokens, logprobs = sample(
        output.logits,
        [one.sampling for one in samples],
        [one.history for one in samples],
        [one.index for one in samples],
    )
    drawn = zip(tokens, logprobs, strict=True)
    return StepOutput(sampled=tuple(Sampled(token_id=int(token), logprob=float(logprob)) for token, logprob in drawn))


def _average(old: float, new: float) -> float:
    return new if old == 0 else old + _NEWEST_WEIGHT * (new - old)
