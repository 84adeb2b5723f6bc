"""What a node can do: its engines, each with the batcher of one kind of work."""

from dataclasses import dataclass
from typing import Final, TypeAlias

from edgellm.engines.base import Engine
from edgellm.runtime.batching.decode import DecodeBatcher
from edgellm.runtime.batching.prefill import PrefillBatcher
from edgellm.runtime.batching.steps import Step
from edgellm.runtime.kv.types import Attempt
from edgellm.runtime.stages.engines import StageEngines
from edgellm.runtime.stages.queue import StageQueue
from edgellm.runtime.stages.routes import Route, micro_batches


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillLane:
    """An engine reading prompts."""

    engine: Engine
    batcher: PrefillBatcher


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeLane:
    """Answers of one pipeline that begins on this node."""

    route: Route
    engine: Engine
    """Of the route's first leg."""
    batcher: DecodeBatcher


@dataclass(frozen=True, kw_only=True, eq=False)
class StageLane:
    """Steps of pipelines that began elsewhere."""

    queue: StageQueue


Lane: TypeAlias = PrefillLane | DecodeLane | StageLane


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedStep:
    """A step of a lane, and the engine that is to run it."""

    lane: Lane
    engine: Engine
    step: Step


class Lanes:
    """All lanes share one KV pool and take turns, so a long prompt never stops running answers."""

    def __init__(
        self, *, half: PrefillLane | None, degraded: PrefillLane | None, stages: StageEngines, num_layers: int
    ) -> None:
        self.half: Final = half
        """The half-precision engine."""
        self.degraded: Final = degraded
        """All decode stages, as a reader of prompts."""
        self.stages: Final = stages
        self.num_layers: Final = num_layers
        """Of the model."""
        self.later: Final = StageLane(queue=StageQueue())
        self._writers: dict[Route, DecodeLane] = {}

    @property
    def in_turn(self) -> tuple[Lane, ...]:
        readers = (lane for lane in (self.half, self.degraded) if lane is not None)
        return (*readers, *self._writers.values(), self.later)

    @property
    def waiting(self) -> int:
        """Prompts without a place in a batch."""
        return sum(lane.batcher.waiting for lane in (self.half, self.degraded) if lane is not None)

    @property
    def reading(self) -> int:
        """Prompts with a place in a batch."""
        return sum(lane.batcher.running for lane in (self.half, self.degraded) if lane is not None)

    @property
    def steps_elsewhere(self) -> int:
        """Steps of pipelines that begin here, on their way through them."""
        return sum(lane.batcher.steps_under_way for lane in self._writers.values() if len(lane.route) > 1)

    def writer(self, route: Route) -> DecodeLane:
        """The lane of a pipeline that begins here. Raises KeyError if there is no engine for its first leg."""
        if route not in self._writers:
            engine = self.stages.of(route[0].layers)
            if engine is None:
                raise KeyError(route[0].layers)
            batcher = DecodeBatcher(engine.spec.limits, depth=micro_batches(route), is_followed=len(route) > 1)
            self._writers[route] = DecodeLane(route=route, engine=engine, batcher=batcher)
        return self._writers[route]

    def remove(self, attempt: Attempt) -> None:
        for reader in (self.half, self.degraded):
            if reader is not None:
                reader.batcher.remove(attempt)
        for lane in self._writers.values():
            lane.batcher.remove(attempt)
        self._writers = {route: lane for route, lane in self._writers.items() if lane.batcher.running}
