"""Iteration-level (continuous) batching: every step takes one row of each running sequence, and catch-up rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from edgellm.engines.spec import EngineLimits
from edgellm.runtime.batching.steps import Sampled, Segment, Step, build_step
from edgellm.runtime.batching.transcript import Transcript
from edgellm.runtime.generation import Generation, SampledToken
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """An answer to continue."""

    attempt: Attempt
    prompt: npt.NDArray[np.int32]
    generated: npt.NDArray[np.int32]
    """[tokens], at least one and fewer than `generation.max_tokens`."""
    blocks: npt.NDArray[np.int32]
    """Enough for the prompt and `generation.max_tokens`."""
    generation: Generation
    computed: int | None = None
    """Positions that have KV, fewer than there are tokens. None: the prompt's."""


@dataclass(frozen=True, kw_only=True)
class TokenGenerated:
    """A sequence's next token; with a finish reason, the batcher has forgotten the sequence."""

    attempt: Attempt
    token: SampledToken


class _Running:
    """A sequence: its tokens, and how many of them have KV."""

    def __init__(self, continuation: Continuation, *, is_new: bool) -> None:
        self.continuation = continuation
        self.is_new = is_new
        """No node after this one is known to have its KV yet."""
        self.transcript = Transcript(continuation.prompt, continuation.generated, continuation.generation)
        self.num_computed = len(continuation.prompt) if continuation.computed is None else continuation.computed
        self.step: Step | None = None
        """The step that it is in, from `plan` to `commit`."""

    @property
    def pending(self) -> int:
        """Known tokens without KV: 1, or more while catching up."""
        return self.transcript.num_tokens - self.num_computed

    def segment(self, rows: int) -> Segment:
        return Segment(
            attempt=self.continuation.attempt,
            rows=rows,
            tokens=self.transcript.rows(self.num_computed, rows),
            first_position=self.num_computed,
            blocks=self.continuation.blocks,
            sample=self.transcript.next_sample() if rows == self.pending else None,
        )


class DecodeBatcher:
    """Runs all sequences together. Blocks are reserved up front, so nothing is ever preempted.

    Where limits allow fewer sequences in a step than are running, the least recently served go first. Every sequence
    of a step gets one row; rows left over go to those that catch up on known tokens. A pipeline of `depth` hosts has
    up to that many steps under way (micro-batches), each with its share of the sequences, so that every host has one.
    Where other nodes follow, new sequences take their first step apart, beside those: it may wait there for KV.
    """

    def __init__(self, limits: EngineLimits, *, depth: int = 1, is_followed: bool = False) -> None:
        self._max_rows = limits.max_rows
        self._max_sequences = min(limits.max_sequences, limits.max_rows)
        self._depth = depth
        self._is_followed = is_followed
        self._running: dict[Attempt, _Running] = {}
        """Least recently served first."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def steps_under_way(self) -> int:
        """Planned and not committed, but for those of which every sequence was removed."""
        return self._steps(self._running.values())

    def add(self, continuation: Continuation) -> None:
        self._running[continuation.attempt] = _Running(continuation, is_new=self._is_followed)

    def remove(self, attempt: Attempt) -> None:
        """Forget a sequence; a step that contains it may still be committed."""
        self._running.pop(attempt, None)

    def plan(self) -> Step | None:
        """The next iteration, or None if nothing can run before another step is committed."""
        settled = [running for running in self._running.values() if not running.is_new]
        share = -(-len(settled) // self._depth) if self._steps(settled) < self._depth else 0
        return self._plan(settled, share) or self._plan(
            [running for running in self._running.values() if running.is_new], self._max_sequences
        )

    def commit(self, step: Step, sampled: Sequence[Sampled]) -> list[TokenGenerated]:
        """Take in a finished step; `sampled` in the order of `step.samples`."""
        draws = iter(sampled)
        generated = []
        for segment in step.segments:
            draw = next(draws) if segment.sample is not None else None
            running = self._running.get(segment.attempt)
            if running is None or running.step is not step:
                continue
            self._serve(running, segment.rows)
            if draw is not None:
                generated.append(self._append(running, draw))
        return generated

    def _plan(self, sequences: Sequence[_Running], share: int) -> Step | None:
        """A step of at most `share` sequences that are in none."""
        idle = (running for running in sequences if running.step is None)
        served = list(islice(idle, min(self._max_sequences, share)))
        rows_left = self._max_rows - len(served)
        segments = []
        for running in served:
            extra = min(running.pending - 1, rows_left)
            rows_left -= extra
            segments.append(running.segment(1 + extra))
        step = build_step(segments) if segments else None
        for running in served:
            running.step = step
        return step

    def _steps(self, sequences: Iterable[_Running]) -> int:
        return len({id(running.step) for running in sequences if running.step is not None})

    def _serve(self, running: _Running, rows: int) -> None:
        attempt = running.continuation.attempt
        self._running[attempt] = self._running.pop(attempt)
        running.num_computed += rows
        running.step, running.is_new = None, False

    def _append(self, running: _Running, draw: Sampled) -> TokenGenerated:
        token = running.transcript.append(draw)
        if token.finish is not None:
            del self._running[running.continuation.attempt]
        return TokenGenerated(attempt=running.continuation.attempt, token=token)
