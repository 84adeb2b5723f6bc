"""Prompts that are read on this node: first waiting for blocks, then in a batch."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.engines.kv import BlockId
from edgellm.runtime.batching.prefill import Prompt
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import TransferJob
from edgellm.runtime.kv.types import Attempt
from edgellm.runtime.lanes import PrefillLane
from edgellm.runtime.messages import Prefill


@dataclass(kw_only=True, eq=False)
class Reading:
    """One prompt."""

    prefill: Prefill
    lane: PrefillLane
    started_s: float = 0.0

    @property
    def reserve_tokens(self) -> int:
        """The prompt, and the answer too if it is written here."""
        answer = 0 if self.prefill.targets else self.prefill.generation.max_tokens
        return len(self.prefill.prompt) + answer

    def prompt(self, blocks: Sequence[BlockId]) -> Prompt:
        return Prompt(
            attempt=self.prefill.attempt,
            tokens=self.prefill.prompt,
            blocks=np.array(blocks, np.int32),
            generation=None if len(self.prefill.generated) else self.prefill.generation,
        )

    def transfer(self, blocks: Sequence[BlockId]) -> TransferJob:
        return TransferJob(
            attempt=self.prefill.attempt,
            prompt_tokens=len(self.prefill.prompt),
            capacity_tokens=len(self.prefill.prompt) + self.prefill.generation.max_tokens,
            blocks=blocks,
            targets=self.prefill.targets,
            timeout_s=self.prefill.transfer_timeout_s,
        )


class Readings:
    """Blocks are reserved in order of arrival, all that a prompt will need at once: what has started never waits."""

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._waiting: deque[Reading] = deque()
        self._started: dict[Attempt, Reading] = {}
        self._before_first_chunk: set[Attempt] = set()

    @property
    def waiting_for_blocks(self) -> int:
        return len(self._waiting)

    def add(self, reading: Reading) -> None:
        self._waiting.append(reading)

    def start_fitting(self) -> None:
        """Hand prompts to their batchers as far as blocks are free."""
        while self._waiting and self._ledger.fits(self._waiting[0].reserve_tokens):
            reading = self._waiting.popleft()
            attempt = reading.prefill.attempt
            blocks = self._ledger.reserve(attempt, reading.reserve_tokens)
            self._started[attempt] = reading
            self._before_first_chunk.add(attempt)
            reading.lane.batcher.add(reading.prompt(blocks))

    def step_planned(self, attempts: Iterable[Attempt], now_s: float) -> list[TransferJob]:
        """What is to be sent of the prompts whose first chunk is in this step, while they are read."""
        begun = self._before_first_chunk.intersection(attempts)
        self._before_first_chunk -= begun
        for attempt in begun:
            self._started[attempt].started_s = now_s
        sent = (self._started[attempt] for attempt in begun if self._started[attempt].prefill.targets)
        return [reading.transfer(self._ledger.blocks(reading.prefill.attempt)) for reading in sent]

    def finish(self, attempt: Attempt) -> Reading:
        """The whole prompt was read."""
        return self._started.pop(attempt)

    def drop(self, attempt: Attempt) -> None:
        self._waiting = deque(reading for reading in self._waiting if reading.prefill.attempt != attempt)
        self._started.pop(attempt, None)
        self._before_first_chunk.discard(attempt)
