"""Who carries which stage, and who keeps its copy: pure functions of the nodes that are there.

The plan cuts the model into stages once and for all; only who carries them changes. A pipeline names a node for each
stage in order, and a node may carry several.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.orchestrator.core.links import Link
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


def form_pipelines(
    carriers: Iterable[Carrier], cut: Sequence[Layers], avoid: Set[Link] = frozenset()
) -> tuple[Pipeline, ...]:
    """The pipelines that new requests may go to.

    1. One node per stage, as many times over as there are nodes for every stage; further nodes are spares.
    2. Where a stage has no node, one pipeline with its holes filled: from spares, else by the next node in the ring.
    3. Without any decode node that is well, the same with those that are draining.
    4. Where all that takes a link of `avoid`, the same over such links, and at last with prefill nodes.
    """
    by_name = sorted(carriers, key=lambda carrier: carrier.node_id)
    decoders = [carrier for carrier in by_name if carrier.role == "decode"]
    well = [carrier for carrier in decoders if not carrier.draining]
    prefillers = [carrier for carrier in by_name if carrier.role == "prefill"]
    none: Set[Link] = frozenset()
    for group, avoided in ((well, avoid), (decoders, avoid), (well, none), (decoders, none), (prefillers, none)):
        found = _whole_pipelines(group, cut, avoided) or _patched_pipeline(group, cut, avoided)
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


def _whole_pipelines(group: Sequence[Carrier], cut: Sequence[Layers], avoid: Set[Link]) -> tuple[Pipeline, ...]:
    rows: list[tuple[ConnectionId, ...]] = [(one.connection,) for one in group if one.home == cut[0]]
    for layers in cut[1:]:
        rows = _continued(rows, [carrier.connection for carrier in group if carrier.home == layers], avoid)
    return tuple(
        tuple(Stage(connection=connection, layers=layers) for connection, layers in zip(row, cut, strict=True))
        for row in rows
    )


def _continued(
    rows: Sequence[tuple[ConnectionId, ...]], nodes: Sequence[ConnectionId], avoid: Set[Link]
) -> list[tuple[ConnectionId, ...]]:
    """As many rows as can be, each with one more node; in turn where nothing is avoided. (Kuhn's matching.)"""
    row_of = dict[ConnectionId, int]()

    def place(row: int, seen: set[ConnectionId]) -> bool:
        open_to = [node for node in nodes if node not in seen and (rows[row][-1], node) not in avoid]
        for node in sorted(open_to, key=lambda node: node in row_of):
            seen.add(node)
            if node not in row_of or place(row_of[node], seen):
                row_of[node] = row
                return True
        return False

    for row in range(len(rows)):
        place(row, set())
    return [(*rows[row], node) for node, row in sorted(row_of.items(), key=lambda pair: pair[1])]


def _patched_pipeline(group: Sequence[Carrier], cut: Sequence[Layers], avoid: Set[Link]) -> tuple[Pipeline, ...]:
    members: list[Carrier | None] = [next((c for c in group if c.home == layers), None) for layers in cut]
    unused = [carrier for carrier in group if carrier not in members]
    stages = list[Stage]()
    for index, layers in enumerate(cut):
        ring = [member for member in members[index:] + members[:index] if member is not None]
        choice = [*(ring[:1] if members[index] else ()), *unused, *ring]
        if stages:
            choice = [carrier for carrier in choice if (stages[-1].connection, carrier.connection) not in avoid]
        carrier = next((carrier for carrier in choice if layers in carrier.carries), None)
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
