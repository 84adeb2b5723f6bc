"""Answers that are written on this node: first waiting for the prompt's KV, then in the batch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgellm.runtime.batching.decode import Continuation
from edgellm.runtime.checks import RefusedError
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt
from edgellm.runtime.lanes import DecodeLane
from edgellm.runtime.messages import Decode


@dataclass(frozen=True, kw_only=True, eq=False)
class _Waiting:
    decode: Decode
    deadline_s: float


class Answers:
    """KV and the command to go on from it may come in either order."""

    def __init__(self, ledger: BlockLedger, lane: DecodeLane | None) -> None:
        self._ledger = ledger
        self._lane = lane
        self._kv: dict[Attempt, Literal["ready", "lost"]] = {}
        self._waiting: dict[Attempt, _Waiting] = {}
        self._running: dict[Attempt, Decode] = {}

    def __contains__(self, attempt: Attempt) -> bool:
        """Whether the command was given."""
        return attempt in self._waiting or attempt in self._running

    @property
    def waiting_for_kv(self) -> int:
        return len(self._waiting)

    @property
    def with_logprobs(self) -> frozenset[Attempt]:
        return frozenset(attempt for attempt, decode in self._running.items() if decode.generation.logprobs)

    def lane(self) -> DecodeLane:
        """Raises RefusedError on a node without a decode engine."""
        if self._lane is None:
            raise RefusedError("engine", "this node has no decode engine")
        return self._lane

    def add(self, decode: Decode, now_s: float) -> None:
        """Start, or wait for KV. Raises RefusedError if the KV was lost or too little room was reserved."""
        match self._kv.get(decode.attempt):
            case "ready":
                self._start(decode)
            case "lost":
                raise RefusedError("transfer", "the sender has gone before the prompt's KV was complete")
            case None:
                self._waiting[decode.attempt] = _Waiting(decode=decode, deadline_s=now_s + decode.kv_timeout_s)

    def kv_complete(self, attempt: Attempt) -> None:
        """Start what waited for it. Raises RefusedError if too little room was reserved."""
        self._kv[attempt] = "ready"
        if waiting := self._waiting.pop(attempt, None):
            self._start(waiting.decode)

    def kv_lost(self, attempt: Attempt) -> None:
        """Raises RefusedError if the answer was waiting for it; else the command, when it comes, is refused."""
        self._kv[attempt] = "lost"
        if waiting := self._waiting.pop(attempt, None):
            self.add(waiting.decode, waiting.deadline_s)

    def late(self, now_s: float) -> list[Decode]:
        """Whose KV did not come in time."""
        return [waiting.decode for waiting in self._waiting.values() if waiting.deadline_s <= now_s]

    def drop(self, attempt: Attempt) -> None:
        self._kv.pop(attempt, None)
        self._waiting.pop(attempt, None)
        self._running.pop(attempt, None)

    def _start(self, decode: Decode) -> None:
        blocks = self._ledger.blocks(decode.attempt)
        needed = len(decode.prompt) + decode.generation.max_tokens
        if len(blocks) < self._ledger.pool.contract.blocks_for(needed):
            raise RefusedError("capacity", f"{len(blocks)} blocks were reserved for {needed} tokens")
        self._running[decode.attempt] = decode
        self.lane().batcher.add(
            Continuation(
                attempt=decode.attempt,
                prompt=decode.prompt,
                generated=decode.generated,
                blocks=np.array(blocks, np.int32),
                generation=decode.generation,
            )
        )
