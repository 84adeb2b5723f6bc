"""Steps that came from an earlier stage, until they are run here and answered."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgellm.runtime.generation import SampledToken
from edgellm.runtime.stages.messages import StageResult, StageSegment, StageStep, StepSource
from edgellm.runtime.stages.routes import Leg


@dataclass(kw_only=True, eq=False)
class Arrived:
    """One step. Segments of attempts that this node does not hold are left out, and answered as lost."""

    step: StageStep
    source: StepSource
    deadline_s: float
    """Until when to wait for the KV of all its segments."""
    kept: list[int] = field(default_factory=list)
    """Indices of the segments that are run."""
    following: Leg | None = None
    """Where to go on from here; None: this is the last leg."""

    def kept_segments(self) -> list[StageSegment]:
        return [self.step.segments[index] for index in self.kept]

    def kept_hidden(self) -> npt.NDArray[np.float32]:
        """[rows of the kept segments, hidden_size]."""
        hidden = self.step.hidden
        if len(self.kept) < len(self.step.segments):
            ends = np.cumsum([segment.rows for segment in self.step.segments])
            hidden = np.concatenate([hidden[ends[i] - self.step.segments[i].rows : ends[i]] for i in self.kept])
        return hidden.astype(np.float32)

    def answer(self, samples: Sequence[SampledToken | None]) -> None:
        """`samples` of the kept segments that want one, in order."""
        draws, kept = iter(samples), set(self.kept)
        every = (next(draws) if i in kept else None for i, s in enumerate(self.step.segments) if s.sample)
        self.source.answer(StageResult(step_id=self.step.step_id, samples=tuple(every)))

    def lose(self) -> None:
        """Nothing of it can be run, here or further on."""
        self.kept = []
        self.answer([])

    def fail(self, error: str) -> None:
        self.source.answer(StageResult(step_id=self.step.step_id, samples=(), error=error))


class StageQueue:
    """In order of arrival; a step that waits for KV is overtaken, which no sequence notices: it is in one at a time."""

    def __init__(self) -> None:
        self.waiting: list[Arrived] = []
        self.under_way: Arrived | None = None
        """The step that the engine runs."""

    def begin(self, arrived: Arrived) -> None:
        self.under_way = arrived

    def end(self) -> Arrived:
        """The step that the engine ran. Raises ValueError if there is none."""
        arrived, self.under_way = self.under_way, None
        if arrived is None:
            raise ValueError("no step of a later stage is under way")
        return arrived

    def forget(self, source: StepSource) -> None:
        """Nobody waits for this source's steps any more."""
        self.waiting = [arrived for arrived in self.waiting if arrived.source is not source]
