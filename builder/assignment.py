"""An engine assigned to a device: what it needs there, whether it fits, and the KV that fits beside it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgellm.builder.cluster import Device
from edgellm.builder.costs import EngineCosts
from edgellm.engines.graph import Graph
from edgellm.engines.spec import EngineLimits, Phase

_MIB: Final = 1 << 20


class PlanError(Exception):
    """The model does not fit; the message shows the arithmetic and what could be changed."""


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """One engine to compile."""

    name: str
    phase: Phase
    device_class: str
    rank: int
    """Tensor-parallel rank, or pipeline stage."""
    world: int
    limits: EngineLimits
    graph: Graph
    """Its part of the graph that was planned for."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """An engine on a device."""

    engine: PlannedEngine
    device: Device
    costs: EngineCosts
    min_kv_blocks: int
    """For one sequence of full length."""
    max_kv_blocks: int
    """For as many sequences as a step can have; more is of no use."""

    @property
    def fixed_bytes(self) -> int:
        """Weights and activations."""
        return self.costs.weight_bytes + self.costs.activation_bytes

    @property
    def min_bytes(self) -> int:
        return self.fixed_bytes + self.min_kv_blocks * self.costs.kv_block_bytes


def require_fit(assignments: Sequence[Assignment]) -> None:
    """Raise PlanError unless these engines of one device fit on it together, each with its least KV."""
    device = assignments[0].device
    needed = sum(assignment.min_bytes for assignment in assignments)
    if needed > device.usable_bytes:
        parts = " + ".join(_arithmetic(assignment) for assignment in assignments)
        raise PlanError(
            f"device {device.name!r} ({device.device_class}) is too small: {parts} = {_mib(needed)} needed, "
            f"{_mib(device.usable_bytes)} usable ({_mib(device.usable_bytes + device.reserved_bytes)} less "
            f"{_mib(device.reserved_bytes)} for the system). Add devices to its pool, choose a larger class, or lower "
            "--max-seq-len"
        )


def kv_blocks(assignments: Sequence[Assignment]) -> list[int]:
    """KV blocks of each of the engines of one device: its least, and equal parts of the memory that is left."""
    require_fit(assignments)
    spare_bytes = assignments[0].device.usable_bytes - sum(assignment.min_bytes for assignment in assignments)
    blocks = []
    for index, assignment in enumerate(assignments):
        part = spare_bytes // (len(assignments) - index)
        extra = min(part // assignment.costs.kv_block_bytes, assignment.max_kv_blocks - assignment.min_kv_blocks)
        spare_bytes -= extra * assignment.costs.kv_block_bytes
        blocks.append(assignment.min_kv_blocks + extra)
    return blocks


def _arithmetic(assignment: Assignment) -> str:
    costs = assignment.costs
    kv_bytes = assignment.min_kv_blocks * costs.kv_block_bytes
    return (
        f"{assignment.engine.name} (weights {_mib(costs.weight_bytes)}, activations {_mib(costs.activation_bytes)}, "
        f"KV of one sequence of {assignment.engine.limits.max_seq_len} tokens {_mib(kv_bytes)})"
    )


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f} MiB"
