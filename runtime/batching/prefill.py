"""Request-level batching: whole prompts, first come first served, chunk after chunk."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgellm.engines.spec import EngineLimits
from edgellm.runtime.batching.steps import Sample, Sampled, Segment, Step, build_step
from edgellm.runtime.generation import Generation, SampledToken
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt to read."""

    attempt: Attempt
    tokens: npt.NDArray[np.int32]
    """[prompt tokens], at least one."""
    blocks: npt.NDArray[np.int32]
    generation: Generation | None
    """None: nothing is sampled, the answer's first tokens are known."""


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """KV of the first `computed` prompt tokens exists; `finished` when that is the whole prompt."""

    attempt: Attempt
    computed: int
    finished: bool
    first_token: SampledToken | None


@dataclass(kw_only=True, eq=False)
class _Reading:
    prompt: Prompt
    computed: int = field(default=0)

    @property
    def remaining(self) -> int:
        return len(self.prompt.tokens) - self.computed


class PrefillBatcher:
    """Takes whole prompts into a batch of at most `max_batch_tokens` (or one longer prompt) and finishes it.

    A step holds up to `chunk_rows` rows: the oldest prompt's next tokens first, then the next prompt's, so that the
    first answer of a batch does not wait for the last.
    """

    def __init__(self, limits: EngineLimits, *, max_batch_tokens: int, chunk_rows: int) -> None:
        self._max_sequences = limits.max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._chunk_rows = min(chunk_rows, limits.max_rows)
        self._waiting: deque[_Reading] = deque()
        self._batch: list[_Reading] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._batch)

    def add(self, prompt: Prompt) -> None:
        self._waiting.append(_Reading(prompt=prompt))

    def remove(self, attempt: Attempt) -> None:
        """Forget a prompt, wherever it is; a step that contains it may still be committed."""
        self._waiting = deque(reading for reading in self._waiting if reading.prompt.attempt != attempt)
        self._batch = [reading for reading in self._batch if reading.prompt.attempt != attempt]

    def plan(self) -> Step | None:
        """The next chunk, or None if nothing is to be read. Call again only after `commit`."""
        if not self._batch:
            self._form_batch()
        segments: list[Segment] = []
        rows_left = self._chunk_rows
        for reading in self._batch:
            if rows_left == 0:
                break
            rows = min(rows_left, reading.remaining)
            segments.append(_segment(reading, rows))
            rows_left -= rows
        return build_step(segments) if segments else None

    def commit(self, step: Step, sampled: Sequence[Sampled]) -> list[PromptProgress]:
        """Take in a finished step; `sampled` in the order of `step.samples`."""
        readings = {reading.prompt.attempt: reading for reading in self._batch}
        draws = iter(sampled)
        progress = []
        for segment in step.segments:
            draw = next(draws) if segment.sample is not None else None
            if reading := readings.get(segment.attempt):
                reading.computed += segment.rows
                progress.append(_progress(reading, draw))
        self._batch = [reading for reading in self._batch if reading.remaining]
        return progress

    def _form_batch(self) -> None:
        tokens = 0
        while self._waiting and len(self._batch) < self._max_sequences:
            tokens += self._waiting[0].remaining
            if self._batch and tokens > self._max_batch_tokens:
                break
            self._batch.append(self._waiting.popleft())


def _segment(reading: _Reading, rows: int) -> Segment:
    prompt = reading.prompt
    sample = None
    if rows == reading.remaining and prompt.generation is not None:
        sample = Sample(sampling=prompt.generation.sampling, history=prompt.tokens, index=0)
    return Segment(
        attempt=prompt.attempt,
        rows=rows,
        tokens=prompt.tokens[reading.computed : reading.computed + rows],
        first_position=reading.computed,
        blocks=prompt.blocks,
        sample=sample,
    )


def _progress(reading: _Reading, draw: Sampled | None) -> PromptProgress:
    first_token = None
    if draw is not None and reading.prompt.generation is not None:
        first_token = SampledToken(
            index=0,
            token_id=draw.token_id,
            logprob=draw.logprob,
            finish=reading.prompt.generation.finish_reason(0, draw.token_id),
        )
    return PromptProgress(
        attempt=reading.prompt.attempt,
        computed=reading.computed,
        finished=reading.remaining == 0,
        first_token=first_token,
    )
