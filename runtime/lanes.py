"""What a node can do: its engines, each with the batcher of one kind of work."""

from dataclasses import dataclass
from typing import TypeAlias

from edgellm.engines.base import Engine
from edgellm.runtime.batching.decode import DecodeBatcher
from edgellm.runtime.batching.prefill import PrefillBatcher
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillLane:
    """An engine reading prompts."""

    engine: Engine
    batcher: PrefillBatcher


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeLane:
    """An engine writing answers."""

    engine: Engine
    batcher: DecodeBatcher


Lane: TypeAlias = PrefillLane | DecodeLane


@dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """All lanes share one KV pool and take turns, so a long prompt never stops running answers."""

    half: PrefillLane | None
    """The half-precision engine."""
    degraded: PrefillLane | None
    """The decode engine, as a reader of prompts."""
    decode: DecodeLane | None

    @property
    def in_turn(self) -> tuple[Lane, ...]:
        return tuple(lane for lane in (self.half, self.degraded, self.decode) if lane is not None)

    def remove(self, attempt: Attempt) -> None:
        for lane in self.in_turn:
            lane.batcher.remove(attempt)
