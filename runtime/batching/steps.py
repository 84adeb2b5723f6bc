"""A step's plan is data: which rows of which sequences run, and which of them are sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch
from edgellm.engines.sampling import SamplingParams
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """How to turn the logits of a segment's last row into a token."""

    sampling: SamplingParams
    history: npt.NDArray[np.int32]
    """[tokens], prompt and generated tokens so far."""
    index: int
    """Number of the generated token, from 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Consecutive rows of one sequence."""

    attempt: Attempt
    rows: int
    tokens: npt.NDArray[np.int32] | None
    """[rows]; None on a later stage of a pipeline, which takes hidden states."""
    first_position: int
    blocks: npt.NDArray[np.int32]
    """[blocks of the sequence]."""
    sample: Sample | None

    @property
    def end(self) -> int:
        """Positions that have KV once the rows were computed."""
        return self.first_position + self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One engine call."""

    segments: tuple[Segment, ...]
    batch: Batch

    @property
    def rows(self) -> int:
        return int(self.batch.row_starts[-1])

    @property
    def attempts(self) -> list[Attempt]:
        return [segment.attempt for segment in self.segments]

    @property
    def samples(self) -> list[Sample]:
        """In the order of the batch's logit rows."""
        return [segment.sample for segment in self.segments if segment.sample is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What the sampler drew for one logit row."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutput:
    """What a step gave: tokens, or at an earlier stage hidden states."""

    sampled: tuple[Sampled, ...] = ()
    """In the order of the step's samples."""
    hidden: npt.NDArray[np.float16] | None = None
    """[rows, hidden_size]."""


def build_step(segments: Sequence[Segment], hidden: npt.NDArray[np.float32] | None = None) -> Step:
    """Lay segments out as one ragged batch, in their order. `segments` is not empty.

    hidden [rows, hidden_size] is what a later stage takes in place of the segments' tokens.
    """
    row_starts = np.fromiter(accumulate((s.rows for s in segments), initial=0), np.int32, len(segments) + 1)
    tables = np.full((len(segments), max(len(s.blocks) for s in segments)), -1, np.int32)
    for table, segment in zip(tables, segments, strict=True):
        table[: len(segment.blocks)] = segment.blocks
    last_rows = [int(end) - 1 for end, s in zip(row_starts[1:], segments, strict=True) if s.sample is not None]
    batch = Batch(
        tokens=np.concatenate([s.tokens for s in segments if s.tokens is not None]) if hidden is None else None,
        hidden=hidden,
        row_starts=row_starts,
        first_positions=np.array([s.first_position for s in segments], np.int32),
        block_tables=tables,
        logit_rows=np.array(last_rows, np.int32),
    )
    return Step(segments=tuple(segments), batch=batch)
