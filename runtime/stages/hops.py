"""Steps that this node has sent to a later stage, until their results come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.runtime.batching.steps import Step
from edgellm.runtime.kv.types import Attempt, NodeId
from edgellm.runtime.lanes import DecodeLane
from edgellm.runtime.stages.messages import StageLinks, StageSegment, StageStep
from edgellm.runtime.stages.queue import Arrived
from edgellm.runtime.stages.routes import Leg


@dataclass(frozen=True, kw_only=True, eq=False)
class Batched:
    """A step that began here."""

    lane: DecodeLane
    step: Step


@dataclass(frozen=True, kw_only=True, eq=False)
class Relayed:
    """A step that came from an earlier stage."""

    arrived: Arrived


Origin: TypeAlias = Batched | Relayed


@dataclass(frozen=True, kw_only=True, eq=False)
class _Hop:
    peer: NodeId
    origin: Origin
    segments: tuple[StageSegment, ...]


class Hops:
    """Numbers the steps; every step leaves again by `take` or `broken`."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._hops: dict[int, _Hop] = {}

    def __len__(self) -> int:
        return len(self._hops)

    def send(
        self,
        links: StageLinks,
        leg: Leg,
        origin: Origin,
        segments: Sequence[StageSegment],
        hidden: npt.NDArray[np.float16],
    ) -> None:
        step_id = next(self._ids)
        self._hops[step_id] = _Hop(peer=leg.node_id, origin=origin, segments=tuple(segments))
        links.send(leg, StageStep(step_id=step_id, stage=leg.first_stage, segments=tuple(segments), hidden=hidden))

    def take(self, step_id: int) -> Origin | None:
        """Where the step came from; None if it broke meanwhile."""
        hop = self._hops.pop(step_id, None)
        return None if hop is None else hop.origin

    def broken(self, peer: NodeId) -> list[tuple[Origin, list[Attempt]]]:
        """No result of this node will come for what it was sent."""
        lost = [step_id for step_id, hop in self._hops.items() if hop.peer == peer]
        hops = [self._hops.pop(step_id) for step_id in lost]
        return [(hop.origin, [segment.attempt for segment in hop.segments]) for hop in hops]
