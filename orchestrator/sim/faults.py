"""What can go wrong in a simulated cluster, drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.orchestrator.core.values import NodeId, RequestId
from edgellm.orchestrator.sim.world import World

FaultKind: TypeAlias = Literal["crash", "pause", "delay", "silence", "no kv"]
KINDS: tuple[FaultKind, ...] = ("crash", "pause", "delay", "silence", "no kv")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong on one node for a while. A crashed node is started again at the end."""

    kind: FaultKind
    node: NodeId
    start_s: float
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    request_id: RequestId
    at_s: float


def draw_faults(rng: random.Random, nodes: Sequence[NodeId], horizon_s: float, most: int) -> list[Fault]:
    return [
        Fault(
            kind=rng.choice(KINDS),
            node=rng.choice(nodes),
            start_s=rng.uniform(0.0, horizon_s),
            duration_s=rng.choice((0.05, 0.4, 1.5)) * rng.uniform(0.5, 1.5),
        )
        for _ in range(rng.randint(0, most))
    ]


def schedule_fault(world: World, fault: Fault) -> None:
    world.timeline.at(fault.start_s, lambda: _begin(world, fault))
    world.timeline.at(fault.start_s + fault.duration_s, lambda: _end(world, fault))


def schedule_cancellation(world: World, cancellation: Cancellation) -> None:
    world.timeline.at(cancellation.at_s, lambda: world.cancel(cancellation.request_id))


def _begin(world: World, fault: Fault) -> None:
    world.tell(f"{fault.node} FAULT {fault.kind} for {fault.duration_s:.2f} s")
    match fault.kind:
        case "crash":
            world.processes[fault.node].crash()
        case "pause":
            world.processes[fault.node].pause()
        case "delay":
            world.trouble.extra_delay_s[fault.node] = fault.duration_s / 4
        case "silence":
            world.trouble.silent.add(fault.node)
        case "no kv":
            world.trouble.deaf.add(fault.node)


def _end(world: World, fault: Fault) -> None:
    match fault.kind:
        case "crash":
            world.processes[fault.node].start()
        case "pause":
            world.processes[fault.node].resume()
        case "delay":
            world.trouble.extra_delay_s.pop(fault.node, None)
        case "silence":
            world.trouble.silent.discard(fault.node)
        case "no kv":
            world.trouble.deaf.discard(fault.node)
