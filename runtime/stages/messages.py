"""What goes between the stages of a pipeline: hidden states down, sampled tokens back."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgellm.runtime.generation import SampledToken
from edgellm.runtime.kv.types import Attempt
from edgellm.runtime.stages.routes import Leg


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSegment:
    """Consecutive rows of one sequence."""

    attempt: Attempt
    first_position: int
    rows: int
    sample: bool
    """Whether the token after the last row is wanted."""

    @property
    def end(self) -> int:
        """Positions that have KV once the rows were computed."""
        return self.first_position + self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class StageStep:
    """One iteration of one micro-batch, after the layers before `stage`."""

    step_id: int
    """Unique among the steps that its sender has under way."""
    stage: int
    """What to run now: index into the stages of the segments' Decode commands."""
    segments: tuple[StageSegment, ...]
    hidden: npt.NDArray[np.float16]
    """[rows, hidden_size], in the order of the segments."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The answer to a step."""

    step_id: int
    samples: tuple[SampledToken | None, ...]
    """Of the segments with `sample`, in order; None where the attempt is not held by a later stage (any more)."""
    error: str = ""
    """Where an engine refused the step; there are no samples then."""


class StepSource(Protocol):
    """Where a step came from, and where its result goes."""

    def answer(self, result: StageResult) -> None:
        """No effect if the stream has ended."""
        ...


class StageLinks(Protocol):
    """Streams to the nodes of later stages. Results and breaks are given to the Node, never during `send`."""

    def send(self, leg: Leg, step: StageStep) -> None: ...
