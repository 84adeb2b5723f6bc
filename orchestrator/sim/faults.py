"""What can go wrong in a simulated cluster, drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never, get_args

from edgellm.orchestrator.sim.loop import KERNEL
from edgellm.orchestrator.sim.machines import Machine, SimulatedNode
from edgellm.orchestrator.sim.network import Mishap
from edgellm.orchestrator.sim.world import World

FaultKind: TypeAlias = Literal[
    "crash", "terminate", "pause", "slow", "out of memory", "clock jump",
    "partition", "one way", "cut", "delay", "narrow",
    "drop", "duplicate", "reorder", "corrupt",
]  # fmt: skip
"""`partition` is both ways, `one way` from the first to the second; `cut` breaks all streams between the two; `narrow`
leaves a fiftieth of the bandwidth. The last four befall messages that the first sends."""

ORCHESTRATOR = "orchestrator"
_OF_NODES: tuple[FaultKind, ...] = (
    *get_args(FaultKind),
    "crash",
    "crash",
    "crash",
    "crash",
    "pause",
    "cut",
    "partition",
)
_OF_THE_ORCHESTRATOR: tuple[FaultKind, ...] = ("pause", "clock jump", "delay", "crash", "crash", "crash")
_CHANCES: dict[Mishap, float] = {"drop": 0.15, "duplicate": 0.15, "reorder": 0.15, "corrupt": 0.5}
"""Per message; only those that carry KV are corrupted, and more rarely those between stages."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong with one process, or between it and another, for a while."""

    kind: FaultKind
    victim: str
    other: str
    start_s: float
    duration_s: float

    def __str__(self) -> str:
        other = f" {self.other}" if self.kind in ("partition", "one way", "cut") else ""
        return f"{self.kind} {self.victim}{other} at {self.start_s:.3f} s for {self.duration_s:.3f} s"


def draw_faults(
    rng: random.Random, nodes: Sequence[str], horizon_s: float, *, most: int, of_orchestrator: float
) -> list[Fault]:
    """Some follow on each other's heels. `of_orchestrator`: the share that befalls the orchestrator."""
    faults: list[Fault] = []
    for _ in range(rng.randint(0, most)):
        start_s = rng.uniform(0.0, horizon_s)
        if faults and rng.random() < 0.3:
            start_s = faults[-1].start_s + rng.uniform(0.0, 0.1)
        faults.append(_draw_fault(rng, nodes, start_s, of_orchestrator))
    return faults


def _draw_fault(rng: random.Random, nodes: Sequence[str], start_s: float, of_orchestrator: float) -> Fault:
    victim = ORCHESTRATOR if rng.random() < of_orchestrator else rng.choice(nodes)
    others = [name for name in (*nodes, ORCHESTRATOR) if name != victim]
    return Fault(
        kind=rng.choice(_OF_THE_ORCHESTRATOR if victim == ORCHESTRATOR else _OF_NODES),
        victim=victim,
        other=rng.choice(others),
        start_s=start_s,
        duration_s=rng.choice((0.05, 0.4, 1.5)) * rng.uniform(0.5, 1.5),
    )


def schedule_fault(world: World, fault: Fault) -> None:
    end_s = fault.start_s + fault.duration_s
    world.loop.call_at(fault.start_s, _begin, world, fault, context=KERNEL)
    world.loop.call_at(end_s, _end, world, fault, context=KERNEL)
    world.busy_until_s = max(world.busy_until_s, end_s + 0.1)


def _begin(world: World, fault: Fault) -> None:
    world.story.tell(f"FAULT {fault}")
    victim, trouble = world.machines[fault.victim], world.network.trouble
    match fault.kind:
        case "crash":
            victim.kill()
        case "terminate":
            _terminate(victim)
        case "pause" | "slow" | "clock jump":
            _disturb(victim, fault)
        case "out of memory":
            _set_out_of_memory(victim, True)
        case "partition":
            trouble.blocked |= {(fault.victim, fault.other), (fault.other, fault.victim)}
        case "one way":
            trouble.blocked.add((fault.victim, fault.other))
        case "cut":
            world.network.cut(fault.victim, fault.other)
        case "delay":
            trouble.extra_delay_s[fault.victim] = fault.duration_s / 4
        case "narrow":
            trouble.bandwidth_share[fault.victim] = 0.02
        case "drop" | "duplicate" | "reorder" | "corrupt":
            trouble.mishaps[fault.victim] = (fault.kind, _CHANCES[fault.kind])
        case _:
            assert_never(fault.kind)


def _end(world: World, fault: Fault) -> None:
    victim, trouble = world.machines[fault.victim], world.network.trouble
    match fault.kind:
        case "crash":
            victim.start()
        case "terminate" | "cut" | "clock jump":
            pass
        case "pause":
            for process in victim.history:
                world.loop.resume(process)
        case "slow":
            for process in victim.history:
                process.slowness = 1.0
        case "out of memory":
            _set_out_of_memory(victim, False)
        case "partition":
            world.network.heal(fault.victim, fault.other)
            world.network.heal(fault.other, fault.victim)
        case "one way":
            world.network.heal(fault.victim, fault.other)
        case "delay":
            trouble.extra_delay_s.pop(fault.victim, None)
        case "narrow":
            trouble.bandwidth_share.pop(fault.victim, None)
        case "drop" | "duplicate" | "reorder" | "corrupt":
            trouble.mishaps.pop(fault.victim, None)
        case _:
            assert_never(fault.kind)


def _disturb(victim: Machine, fault: Fault) -> None:
    if victim.process is None:
        return
    match fault.kind:
        case "pause":
            victim.process.paused = True
        case "slow":
            victim.process.slowness = 4.0
        case _:
            victim.wall_clock_jump_s += -3600.0 if fault.duration_s < 0.4 else 3600.0
            victim.process.wall_clock_jump_s = victim.wall_clock_jump_s


def _terminate(victim: Machine) -> None:
    if isinstance(victim, SimulatedNode) and victim.process is not None and victim.server is not None:
        victim.server.stop()


def _set_out_of_memory(victim: Machine, is_out: bool) -> None:
    if isinstance(victim, SimulatedNode):
        victim.out_of_memory = is_out
