"""Prompts that are read on this node: first waiting for blocks, then in a batch."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgellm.engines.kv import BlockId
from edgellm.runtime.batching.prefill import Prompt
from edgellm.runtime.kv.inbox import PromptPart
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import TransferJob
from edgellm.runtime.kv.types import Attempt, KvTarget, NodeId, TransferStats
from edgellm.runtime.lanes import PrefillLane
from edgellm.runtime.messages import Prefill


@dataclass(kw_only=True, eq=False)
class Reading:
    """One prompt."""

    prefill: Prefill
    lane: PrefillLane
    started_s: float = 0.0

    def prompt(self, blocks: Sequence[BlockId]) -> Prompt:
        return Prompt(
            attempt=self.prefill.attempt,
            tokens=self.prefill.prompt,
            blocks=np.array(blocks, np.int32),
            generation=None if len(self.prefill.generated) else self.prefill.generation,
        )

    def transfer(self, blocks: Sequence[BlockId], targets: tuple[KvTarget, ...]) -> TransferJob:
        return TransferJob(
            attempt=self.prefill.attempt,
            prompt_tokens=len(self.prefill.prompt),
            capacity_tokens=len(self.prefill.prompt) + self.prefill.generation.max_tokens,
            blocks=blocks,
            targets=targets,
            timeout_s=self.prefill.transfer_timeout_s,
        )


STAYED: Final = TransferStats(transport="local", codec="raw", chunks=0, bytes=0, hidden_ms=0, exposed_ms=0)
"""How KV travelled that was only for the node that computed it."""


class Readings:
    """Blocks are reserved in order of arrival, all that a prompt will need at once: what has started never waits."""

    def __init__(self, ledger: BlockLedger, node_id: NodeId, num_layers: int) -> None:
        self._ledger = ledger
        self._node_id = node_id
        self._num_layers = num_layers
        self._leaving: set[Attempt] = set()
        """Of which nothing is kept here once it was sent."""
        self._waiting: deque[Reading] = deque()
        self._started: dict[Attempt, Reading] = {}
        self._before_first_chunk: set[Attempt] = set()

    @property
    def waiting_for_blocks(self) -> int:
        return len(self._waiting)

    def reserve_tokens(self, reading: Reading) -> int:
        """The prompt, and the answer too if some of it is kept here."""
        answer = reading.prefill.generation.max_tokens if self.parts_here(reading) else 0
        return len(reading.prefill.prompt) + answer

    def parts_here(self, reading: Reading) -> list[PromptPart]:
        """What is kept on this node: the layers that are for itself, or all where there is no target."""
        tokens = len(reading.prefill.prompt)
        if not reading.prefill.targets:
            return [PromptPart(layers=range(self._num_layers), tokens=tokens, backup=False)]
        own = [target for target in reading.prefill.targets if target.node_id == self._node_id]
        return [PromptPart(layers=target.layers, tokens=tokens, backup=target.backup) for target in own]

    def is_sent_nowhere(self, reading: Reading) -> bool:
        """Whether there are targets, of which no other node's is more than a backup."""
        targets = reading.prefill.targets
        return bool(targets) and all(target.backup for target in self._sent_to(reading))

    def stays(self, attempt: Attempt) -> bool:
        """Whether KV of a prompt that was read here is kept here."""
        return attempt not in self._leaving

    def add(self, reading: Reading) -> None:
        self._waiting.append(reading)

    def start_fitting(self) -> None:
        """Hand prompts to their batchers as far as blocks are free."""
        while self._waiting and self._ledger.fits(self.reserve_tokens(self._waiting[0])):
            reading = self._waiting.popleft()
            attempt = reading.prefill.attempt
            blocks = self._ledger.reserve(attempt, self.reserve_tokens(reading))
            self._started[attempt] = reading
            self._before_first_chunk.add(attempt)
            if not self.parts_here(reading):
                self._leaving.add(attempt)
            reading.lane.batcher.add(reading.prompt(blocks))

    def step_planned(self, attempts: Iterable[Attempt], now_s: float) -> list[TransferJob]:
        """What is to be sent of the prompts whose first chunk is in this step, while they are read."""
        begun = self._before_first_chunk.intersection(attempts)
        self._before_first_chunk -= begun
        for attempt in begun:
            self._started[attempt].started_s = now_s
        readings = [self._started[attempt] for attempt in begun]
        return [
            reading.transfer(self._ledger.blocks(reading.prefill.attempt), targets)
            for reading in readings
            if (targets := self._sent_to(reading))
        ]

    def finish(self, attempt: Attempt) -> Reading:
        """The whole prompt was read."""
        return self._started.pop(attempt)

    def drop(self, attempt: Attempt) -> None:
        self._waiting = deque(reading for reading in self._waiting if reading.prefill.attempt != attempt)
        self._started.pop(attempt, None)
        self._before_first_chunk.discard(attempt)
        self._leaving.discard(attempt)

    def _sent_to(self, reading: Reading) -> tuple[KvTarget, ...]:
        return tuple(target for target in reading.prefill.targets if target.node_id != self._node_id)
