"""Decide which device runs what, before anything is computed. Pure.

1. Prefill: the fewest tensor-parallel ranks that fit; further devices of the pool carry replicas.
2. Decode: one pipeline stage per device, in the pool's order; layers are cut so that the slowest stage is as fast as
   it can be while every stage fits beside the KV of at least one full sequence.
3. What memory is left becomes KV blocks, in equal parts for the engines of a device.
4. Takeover: with more than one stage, an engine with all layers, on every device of one class that can hold it once
   it gives up its own stage.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgellm.builder.assignment import Assignment, PlanError, PlannedEngine, kv_blocks, require_fit
from edgellm.builder.cluster import Cluster, Device
from edgellm.builder.costs import EngineCosts, engine_costs, predict_tpot_s, predict_ttft_s, read_bytes, weight_bytes
from edgellm.builder.partition import PartitionError, cut_stages, layer_ops, shard
from edgellm.builder.stages import balance_layers
from edgellm.engines.bundle import Placement, Plan
from edgellm.engines.graph import Graph, Half, Int4, linears
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits, Phase

PREFILL_ROWS: Final = 512
DECODE_ROWS: Final = 256
"""More than the sequences of a step, for catching up after a takeover and for prompts prefilled locally."""
TAKEOVER_ENGINE: Final = "decode-pp0of1"


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """One model on one cluster; the two graphs are the whole model in the precisions to plan for."""

    cluster: Cluster
    prefill_graph: Graph
    decode_graph: Graph
    contract: KvContract
    max_seq_len: int
    max_sequences: Mapping[Phase, int]
    """In one step, as the backend of each phase allows."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The plan that goes into the bundle, the engines that it needs, and what a person should know about it."""

    plan: Plan
    engines: tuple[PlannedEngine, ...]
    notes: tuple[str, ...]


def make_plan(inputs: PlanInputs) -> BuildPlan:
    """Raises PlanError where the model does not fit, PartitionError where it cannot be cut."""
    prefill = _plan_prefill(inputs)
    decode = _plan_decode(inputs, prefill)
    placed = _give_kv([*prefill, *decode])
    takeover = _plan_takeover(inputs, placed) if len(decode) > 1 else []
    plan = Plan(
        placements=_placements(inputs, placed),
        predicted_ttft_ms=1e3 * _predict_ttft_s(inputs, prefill, decode),
        predicted_tpot_ms=1e3 * _predict_tpot_s(inputs, decode),
        takeover=_placements(inputs, takeover),
    )
    engines = {assignment.engine.name: assignment.engine for assignment, _ in (*placed, *takeover)}
    notes = (_NO_TAKEOVER,) if len(decode) > 1 and not takeover else ()
    return BuildPlan(plan=plan, engines=tuple(engines.values()), notes=notes)


_NO_TAKEOVER: Final = (
    "no device has room for all layers, so there is no takeover engine: no device could carry all stages alone"
)


def precision_label(graph: Graph) -> str:
    """For people: `half`, or such as `int4-g64-a8-o16` from the linears before the head."""
    int4 = [op.precision for op in linears(graph) if isinstance(op.precision, Int4)]
    if not int4:
        return "half" if all(isinstance(op.precision, Half) for op in linears(graph)) else "int8"
    groups = "/".join(str(size) for size in sorted({precision.group_size for precision in int4}))
    return f"int4-g{groups}-a{int4[0].act_bits}-o{max(precision.outliers for precision in int4)}"


def _plan_prefill(inputs: PlanInputs) -> list[Assignment]:
    """The smallest tensor-parallel world that fits, repeated over the pool."""
    devices = inputs.cluster.prefill
    _require_one_class(devices)
    refusal = PlanError("the prefill pool is empty")
    for world in range(1, len(devices) + 1):
        used = devices[: len(devices) // world * world]
        try:
            ranks = [_prefill_rank(inputs, device, index % world, world) for index, device in enumerate(used)]
            for rank in ranks:
                require_fit([rank])
        except PlanError as error:
            refusal = error
        except PartitionError:
            continue
        else:
            return ranks
    raise refusal


def _require_one_class(devices: Sequence[Device]) -> None:
    classes = sorted({device.device_class for device in devices})
    if len(classes) > 1:
        raise PlanError(f"the prefill pool mixes {' and '.join(classes)}; its devices share engines, so use one class")


def _prefill_rank(inputs: PlanInputs, device: Device, rank: int, world: int) -> Assignment:
    graph, _ = shard(inputs.prefill_graph, {}, rank, world) if world > 1 else (inputs.prefill_graph, {})
    return _assign(inputs, device, "prefill", graph, f"prefill-tp{rank}of{world}", rank, world)


def _plan_decode(inputs: PlanInputs, prefill: Sequence[Assignment]) -> list[Assignment]:
    """One stage per decode device; what prefill needs on the same device is taken off first."""
    devices, num_layers = inputs.cluster.decode, inputs.decode_graph.num_layers
    if len(devices) > num_layers:
        raise PlanError(f"the decode pool has {len(devices)} devices for {num_layers} layers; each needs one at least")
    taken = {assignment.device.name: assignment.min_bytes for assignment in prefill}
    stage_s = _StageTimes(inputs, devices, [device.usable_bytes - taken.get(device.name, 0) for device in devices])
    counts = balance_layers(num_layers, len(devices), stage_s.fitting)
    counts = counts or balance_layers(num_layers, len(devices), stage_s.unlimited)
    graphs = cut_stages(inputs.decode_graph, counts or ())
    world = len(devices)
    return [
        _assign(inputs, device, "decode", graph, f"decode-pp{stage}of{world}", stage, world)
        for stage, (device, graph) in enumerate(zip(devices, graphs, strict=True))
    ]


class _StageTimes:
    """Time of any run of layers on any device, from sums over the layers."""

    def __init__(self, inputs: PlanInputs, devices: Sequence[Device], free_bytes: Sequence[int]) -> None:
        layers = layer_ops(inputs.decode_graph)
        whole = engine_costs(inputs.decode_graph, inputs.contract, _limits(inputs, "decode"))
        kv_bytes = _min_kv_blocks(inputs) * inputs.contract.block_bytes
        self._activation_bytes = whole.activation_bytes
        self._layer_bytes = [weight_bytes(ops) + kv_bytes for ops in layers]
        self._layer_reads = [read_bytes(ops) for ops in layers]
        self._devices = devices
        self._free_bytes = free_bytes

    def fitting(self, device: int, first: int, end: int) -> float:
        """Seconds per step, infinite where the layers do not fit."""
        needed = self._activation_bytes + sum(self._layer_bytes[first:end])
        return self.unlimited(device, first, end) if needed <= self._free_bytes[device] else math.inf

    def unlimited(self, device: int, first: int, end: int) -> float:
        """Seconds per step, whatever the memory."""
        return sum(self._layer_reads[first:end]) / self._devices[device].bytes_per_s


def _give_kv(assignments: Sequence[Assignment]) -> list[tuple[Assignment, int]]:
    """Each assignment with its KV blocks, in the given order. Raises PlanError where a device is too small."""
    by_device: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        by_device.setdefault(assignment.device.name, []).append(assignment)
    blocks = {
        (assignment.device.name, assignment.engine.name): count
        for shared in by_device.values()
        for assignment, count in zip(shared, kv_blocks(shared), strict=True)
    }
    return [(assignment, blocks[assignment.device.name, assignment.engine.name]) for assignment in assignments]


def _plan_takeover(inputs: PlanInputs, placed: Sequence[tuple[Assignment, int]]) -> list[tuple[Assignment, int]]:
    """All layers, on every device of one class where they fit in place of its stage; decode devices come first."""
    devices = {device.name: device for device in (*inputs.cluster.decode, *inputs.cluster.prefill)}
    takeovers: list[tuple[Assignment, int]] = []
    for device in devices.values():
        assignment = _assign(inputs, device, "decode", inputs.decode_graph, TAKEOVER_ENGINE, 0, 1)
        blocks = _takeover_blocks(assignment, placed)
        one_class = not takeovers or takeovers[0][0].device.device_class == device.device_class
        if one_class and blocks >= assignment.min_kv_blocks:
            takeovers.append((assignment, blocks))
    return takeovers


def _takeover_blocks(takeover: Assignment, placed: Sequence[tuple[Assignment, int]]) -> int:
    """KV blocks that fit beside all layers, and beside a prefill engine that stays; negative if not even those fit."""
    staying_bytes = sum(
        other.fixed_bytes + blocks * other.costs.kv_block_bytes
        for other, blocks in placed
        if other.device == takeover.device and other.engine.phase == "prefill"
    )
    room_bytes = takeover.device.usable_bytes - staying_bytes - takeover.fixed_bytes
    return min(room_bytes // takeover.costs.kv_block_bytes, takeover.max_kv_blocks)


def _assign(
    inputs: PlanInputs, device: Device, phase: Phase, graph: Graph, name: str, rank: int, world: int
) -> Assignment:
    limits = _limits(inputs, phase)
    engine = PlannedEngine(
        name=name,
        phase=phase,
        device_class=device.device_class,
        rank=rank,
        world=world,
        limits=limits,
        graph=graph,
    )
    return Assignment(
        engine=engine,
        device=device,
        costs=engine_costs(graph, inputs.contract, limits),
        min_kv_blocks=_min_kv_blocks(inputs),
        max_kv_blocks=_min_kv_blocks(inputs) * limits.max_sequences,
    )


def _limits(inputs: PlanInputs, phase: Phase) -> EngineLimits:
    rows = PREFILL_ROWS if phase == "prefill" else DECODE_ROWS
    return EngineLimits(max_rows=rows, max_sequences=inputs.max_sequences[phase], max_seq_len=inputs.max_seq_len)


def _min_kv_blocks(inputs: PlanInputs) -> int:
    return inputs.contract.blocks_for(inputs.max_seq_len)


def _placements(inputs: PlanInputs, placed: Sequence[tuple[Assignment, int]]) -> tuple[Placement, ...]:
    return tuple(
        Placement(
            engine=assignment.engine.name,
            device=assignment.device.name,
            device_class=assignment.device.device_class,
            role=assignment.engine.phase,
            first_layer=assignment.engine.graph.first_layer,
            num_layers=assignment.engine.graph.num_layers,
            precision=precision_label(assignment.engine.graph),
            weight_bytes=assignment.costs.weight_bytes,
            kv_tokens=blocks * inputs.contract.block_tokens,
            kv_blocks=blocks,
        )
        for assignment, blocks in placed
    )


def _predict_ttft_s(inputs: PlanInputs, prefill: Sequence[Assignment], decode: Sequence[Assignment]) -> float:
    ranks = _costs(prefill[: prefill[0].engine.world])
    return predict_ttft_s(ranks, kv_bytes_per_token=inputs.contract.bytes_per_token, receiver=decode[0].device)


def _predict_tpot_s(inputs: PlanInputs, decode: Sequence[Assignment]) -> float:
    return predict_tpot_s(_costs(decode), hidden_size=inputs.decode_graph.hidden_size)


def _costs(assignments: Iterable[Assignment]) -> list[tuple[Device, EngineCosts]]:
    return [(assignment.device, assignment.costs) for assignment in assignments]
