"""Where a decode pipeline goes: its stages in order, those next to each other on one node taken together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from edgellm.runtime.kv.types import NodeId, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """Adjacent stages on one node: one step of one engine."""

    node_id: NodeId
    address: str
    """host:port of its StageExchange."""
    host_id: str
    layers: range
    first_stage: int
    """Index into the stages of the Decode command."""


Route: TypeAlias = tuple[Leg, ...]
"""Legs in order; the first batches, the last samples. No two neighbours are on one node."""


def route_of(stages: Sequence[Stage], num_layers: int) -> Route:
    """Raises ValueError unless the stages are all layers of the model, in order."""
    legs = []
    for node_id, group in groupby(enumerate(stages), key=lambda one: one[1].node_id):
        (first_stage, first), *rest = group
        last = rest[-1][1] if rest else first
        layers = range(first.first_layer, last.layers.stop)
        legs.append(
            Leg(
                node_id=node_id,
                address=first.address,
                host_id=first.host_id,
                layers=layers,
                first_stage=first_stage,
            )
        )
    if [layer for stage in stages for layer in stage.layers] != list(range(num_layers)):
        raise ValueError(f"the stages carry {[stage.layers for stage in stages]}, the model has {num_layers} layers")
    return tuple(legs)


def micro_batches(route: Route) -> int:
    """How many to have under way: one for each host, so that all of them have work.

    Legs on one host share its cores: smaller steps at the same time would take longer than larger ones in turn.
    """
    return len({leg.host_id for leg in route})


def local_route(node_id: NodeId, num_layers: int) -> Route:
    """One node carries the whole model."""
    return (Leg(node_id=node_id, address="", host_id="", layers=range(num_layers), first_stage=0),)
