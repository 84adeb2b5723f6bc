"""Iteration-level (continuous) batching: every step takes one row of each running sequence, and catch-up rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from edgellm.engines.spec import EngineLimits
from edgellm.runtime.batching.steps import Sample, Sampled, Segment, Step, build_step
from edgellm.runtime.generation import Generation, SampledToken
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """An answer to continue; KV of the prompt exists, KV of the generated tokens does not."""

    attempt: Attempt
    prompt: npt.NDArray[np.int32]
    generated: npt.NDArray[np.int32]
    """[tokens], at least one and fewer than `generation.max_tokens`."""
    blocks: npt.NDArray[np.int32]
    """Enough for the prompt and `generation.max_tokens`."""
    generation: Generation


@dataclass(frozen=True, kw_only=True)
class TokenGenerated:
    """A sequence's next token; with a finish reason, the batcher has forgotten the sequence."""

    attempt: Attempt
    token: SampledToken


class _Running:
    """A sequence: its tokens, and how many of them have KV."""

    def __init__(self, continuation: Continuation) -> None:
        self.continuation = continuation
        self.num_prompt = len(continuation.prompt)
        self.num_tokens = self.num_prompt + len(continuation.generated)
        self.num_computed = self.num_prompt
        self.tokens = np.empty(self.num_prompt + continuation.generation.max_tokens, np.int32)
        self.tokens[: self.num_tokens] = np.concatenate([continuation.prompt, continuation.generated])

    @property
    def pending(self) -> int:
        """Known tokens without KV: 1, or more while catching up."""
        return self.num_tokens - self.num_computed

    def segment(self, rows: int) -> Segment:
        sample = None
        if rows == self.pending:
            index = self.num_tokens - self.num_prompt
            history = self.tokens[: self.num_tokens]
            sample = Sample(sampling=self.continuation.generation.sampling, history=history, index=index)
        return Segment(
            attempt=self.continuation.attempt,
            tokens=self.tokens[self.num_computed : self.num_computed + rows],
            first_position=self.num_computed,
            blocks=self.continuation.blocks,
            sample=sample,
        )

    def append(self, draw: Sampled) -> SampledToken:
        index = self.num_tokens - self.num_prompt
        self.tokens[self.num_tokens] = draw.token_id
        self.num_tokens += 1
        finish = self.continuation.generation.finish_reason(index, draw.token_id)
        return SampledToken(index=index, token_id=draw.token_id, logprob=draw.logprob, finish=finish)


class DecodeBatcher:
    """Runs all sequences together. Blocks are reserved up front, so nothing is ever preempted.

    Where limits allow fewer sequences in a step than are running, the least recently served go first. Every sequence
    of a step gets one row; rows left over go to those that catch up on known tokens.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._max_rows = limits.max_rows
        self._max_sequences = min(limits.max_sequences, limits.max_rows)
        self._running: dict[Attempt, _Running] = {}
        """Least recently served first."""

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, continuation: Continuation) -> None:
        self._running[continuation.attempt] = _Running(continuation)

    def remove(self, attempt: Attempt) -> None:
        """Forget a sequence; a step that contains it may still be committed."""
        self._running.pop(attempt, None)

    def plan(self) -> Step | None:
        """The next iteration, or None if nothing is running. Call again only after `commit`."""
        served = list(islice(self._running.values(), self._max_sequences))
        rows_left = self._max_rows - len(served)
        segments = []
        for running in served:
            extra = min(running.pending - 1, rows_left)
            rows_left -= extra
            segments.append(running.segment(1 + extra))
        return build_step(segments) if segments else None

    def commit(self, step: Step, sampled: Sequence[Sampled]) -> list[TokenGenerated]:
        """Take in a finished step; `sampled` in the order of `step.samples`."""
        draws = iter(sampled)
        generated = []
        for segment in step.segments:
            draw = next(draws) if segment.sample is not None else None
            running = self._running.pop(segment.attempt, None)
            if running is None:
                continue
            self._running[segment.attempt] = running
            running.num_computed += len(segment.tokens)
            if draw is not None:
                generated.append(self._append(running, draw))
        return generated

    def _append(self, running: _Running, draw: Sampled) -> TokenGenerated:
        token = running.append(draw)
        if token.finish is not None:
            del self._running[running.continuation.attempt]
        return TokenGenerated(attempt=running.continuation.attempt, token=token)
