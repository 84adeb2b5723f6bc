"""Who carries which stage, and who keeps its copy: pure functions of the nodes that are there.

The plan cuts the model into stages once and for all; only who carries them changes. A pipeline names a node for each
stage in order, and a node may carry several.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.orchestrator.core.values import ConnectionId, Layers, NodeId, Role


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a pipeline."""

    connection: ConnectionId
    layers: Layers


Pipeline: TypeAlias = tuple[Stage, ...]


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A node that is alive, as far as pipelines go."""

    connection: ConnectionId
    node_id: NodeId
    role: Role
    home: Layers | None
    """The stage it was started for; None for spares and prefill nodes."""
    carries: frozenset[Layers]
    """The stages it has engines for."""
    draining: bool = False


def connections_of(pipeline: Pipeline) -> tuple[ConnectionId, ...]:
    """Each node once, in the order of the stages."""
    return tuple(dict.fromkeys(stage.connection for stage in pipeline))


def form_pipelines(carriers: Iterable[Carrier], cut: Sequence[Layers]) -> tuple[Pipeline, ...]:
    """The pipelines that new requests may go to.

    1. One node per stage, as many times over as there are nodes for every stage; further nodes are spares.
    2. Where a stage has no node, one pipeline with its holes filled: from spares, else by the next node in the ring.
    3. Without any decode node that is well, the same with those that are draining, and at last with prefill nodes.
    """
    by_name = sorted(carriers, key=lambda carrier: carrier.node_id)
    decoders = [carrier for carrier in by_name if carrier.role == "decode"]
    well = [carrier for carrier in decoders if not carrier.draining]
    prefillers = [carrier for carrier in by_name if carrier.role == "prefill"]
    for group in (well, decoders, prefillers):
        found = _whole_pipelines(group, cut) or _patched_pipeline(group, cut)
        if found:
            return found
    return ()


def solo_pipelines(carriers: Iterable[Carrier], cut: Sequence[Layers]) -> tuple[Pipeline, ...]:
    """Decode nodes that can carry all stages alone: only these can read a prompt with the decode engine."""
    return tuple(
        tuple(Stage(connection=carrier.connection, layers=layers) for layers in cut)
        for carrier in sorted(carriers, key=lambda carrier: carrier.node_id)
        if carrier.role == "decode" and carrier.carries >= set(cut)
    )


def _whole_pipelines(group: Sequence[Carrier], cut: Sequence[Layers]) -> tuple[Pipeline, ...]:
    at_home = [[carrier for carrier in group if carrier.home == layers] for layers in cut]
    return tuple(
        tuple(Stage(connection=carrier.connection, layers=layers) for carrier, layers in zip(row, cut, strict=True))
        for row in zip(*at_home, strict=False)
    )


def _patched_pipeline(group: Sequence[Carrier], cut: Sequence[Layers]) -> tuple[Pipeline, ...]:
    members: list[Carrier | None] = [next((c for c in group if c.home == layers), None) for layers in cut]
    unused = [carrier for carrier in group if carrier not in members]
    stages = []
    for index, layers in enumerate(cut):
        ring = [member for member in members[index:] + members[:index] if member is not None]
        carrier = next((c for c in (ring[:1] if members[index] else [*unused, *ring]) if layers in c.carries), None)
        if carrier is None:
            return ()
        unused = [other for other in unused if other is not carrier] or unused
        stages.append(Stage(connection=carrier.connection, layers=layers))
    return (tuple(stages),)


def holders_for(stage: Stage, carriers: Iterable[Carrier], cut: Sequence[Layers]) -> Iterator[ConnectionId]:
    """Who may keep the copy of a stage, and take it over, the best first: the pre-planned table.

    Spares, taken in turn by the stages; then the decode nodes, from the next in the ring on; then prefill nodes.
    """
    able = [c for c in carriers if stage.layers in c.carries and not c.draining and c.connection != stage.connection]
    able.sort(key=lambda carrier: carrier.node_id)
    decoders = [carrier for carrier in able if carrier.role == "decode"]
    at_home = [carrier for carrier in decoders if carrier.home is not None]
    index = cut.index(stage.layers)
    yield from (c.connection for c in _rotated([c for c in decoders if c.home is None], index))
    yield from (c.connection for c in _from_next_stage(at_home, stage, cut))
    yield from (carrier.connection for carrier in able if carrier.role == "prefill")


def _from_next_stage(at_home: Sequence[Carrier], stage: Stage, cut: Sequence[Layers]) -> Sequence[Carrier]:
    """In a ring over stages, then names, from the stage after this one on; its own stage's nodes come last."""
    index = cut.index(stage.layers)

    def distance(carrier: Carrier) -> tuple[int, bool, ConnectionId]:
        assert carrier.home is not None
        steps = (cut.index(carrier.home) - index - 1) % len(cut)
        return steps, carrier.connection < stage.connection, carrier.connection

    return sorted(at_home, key=distance)


def _rotated(carriers: Sequence[Carrier], by: int) -> Sequence[Carrier]:
    start = by % len(carriers) if carriers else 0
    return [*carriers[start:], *carriers[:start]]
