"""Cut a graph into pipeline stages (by layers) or tensor-parallel ranks (by heads and columns). Pure.

A stage ends where a single tensor, the residual stream, is all that the rest of the model needs; it crosses as
float32, so stages composed give the bits of the whole. In a rank, the linears that feed attention or an activation
keep a share of their output rows (whole heads); the linears that read those keep the matching input columns, and
their partial results are added by an AllReduce (Megatron-LM, arXiv 1909.08053). Everything else is replicated.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from edgellm.builder.slices import SlicedWeights, WeightSlice
from edgellm.engines.graph import (
    HIDDEN,
    Activation,
    AllReduce,
    Attention,
    Graph,
    Int4,
    Linear,
    Op,
    Rope,
    TensorName,
    WeightName,
    op_inputs,
)
from edgellm.engines.weights import WeightStore


class PartitionError(Exception):
    """The graph cannot be cut as asked; the message has the numbers."""


def cut_stages(graph: Graph, layer_counts: Sequence[int]) -> tuple[Graph, ...]:
    """Consecutive stages with so many layers each. All read the weights of the whole model by the same names."""
    if sum(layer_counts) != graph.num_layers or min(layer_counts) < 1:
        raise PartitionError(f"stages of {list(layer_counts)} layers do not make up {graph.num_layers}")
    starts = _layer_starts(graph)
    ends = list(accumulate(layer_counts))
    return tuple(_stage(graph, starts, end - count, end) for count, end in zip(layer_counts, ends, strict=True))


def layer_ops(graph: Graph) -> tuple[tuple[Op, ...], ...]:
    """The ops of each layer; the embedding goes with the first, final norm and head with the last."""
    starts = _layer_starts(graph)
    return tuple(graph.ops[start:end] for start, end in pairwise(starts))


def _stage(graph: Graph, starts: Sequence[int], first: int, end: int) -> Graph:
    ops = graph.ops[starts[first] : starts[end]]
    source, output = graph.input, graph.output
    if first > 0:
        source, entering = HIDDEN, _live_before(graph, starts[first])[0]
        ops = tuple(_rename_input(op, entering, HIDDEN) for op in ops)
    if end < graph.num_layers:
        output = _live_before(graph, starts[end])[0]
    return dataclasses.replace(
        graph, ops=ops, input=source, output=output, num_layers=end - first, first_layer=graph.first_layer + first
    )


def _layer_starts(graph: Graph) -> list[int]:
    """Index of the first op of each layer, and the number of ops: [num_layers + 1].

    A layer starts at the last place before its attention where only one tensor is alive.
    """
    attentions = [index for index, op in enumerate(graph.ops) if isinstance(op, Attention)]
    starts = [0]
    for before, attention in pairwise(attentions):
        single = [index for index in range(before + 1, attention + 1) if len(_live_before(graph, index)) == 1]
        if not single:
            raise PartitionError(f"layers {len(starts) - 1} and {len(starts)} share more than the residual stream")
        starts.append(single[-1])
    return [*starts, len(graph.ops)]


def _live_before(graph: Graph, index: int) -> list[TensorName]:
    """Tensors written before op `index` and read by it or a later op."""
    needed = {name for op in graph.ops[index:] for name in op_inputs(op)} | {graph.output}
    return [name for name in (graph.input, *(op.out for op in graph.ops[:index])) if name in needed]


def _rename_input(op: Op, old: TensorName, new: TensorName) -> Op:
    renamed: dict[str, Any] = {
        field.name: new
        for field in dataclasses.fields(op)
        if field.name in ("x", "up", "q", "k", "v", "a", "b") and getattr(op, field.name) == old
    }
    return dataclasses.replace(op, **renamed)


def shard(graph: Graph, weights: WeightStore, rank: int, world: int) -> tuple[Graph, WeightStore]:
    """The graph and weights of tensor-parallel rank `rank` of `world`; weights are sliced when looked up."""
    if not 0 <= rank < world:
        raise PartitionError(f"rank {rank} of {world} does not exist")
    split = _split_tensors(graph)
    slices: dict[WeightName, WeightSlice] = {}
    ops: list[Op] = []
    for op in graph.ops:
        ops.extend(_shard_op(op, split, rank, world, slices))
    return dataclasses.replace(graph, ops=tuple(ops)), SlicedWeights(weights, slices)


def _split_tensors(graph: Graph) -> frozenset[TensorName]:
    """Tensors of which every rank holds its own columns: all around attention and activations."""
    split: set[TensorName] = set()
    for op in reversed(graph.ops):
        if isinstance(op, Attention | Activation) or (isinstance(op, Rope) and op.out in split):
            split.update((op.out, *op_inputs(op)))
    return frozenset(split)


def _shard_op(
    op: Op, split: frozenset[TensorName], rank: int, world: int, slices: dict[WeightName, WeightSlice]
) -> Iterator[Op]:
    match op:
        case Attention():
            yield dataclasses.replace(
                op,
                num_heads=_share("attention heads", op.num_heads, world),
                kv_heads=_share("KV heads", op.kv_heads, world),
            )
        case Rope() if op.out in split:
            yield dataclasses.replace(op, num_heads=_share("heads", op.num_heads, world))
        case Activation():
            yield dataclasses.replace(op, size=_share("activation columns", op.size, world))
        case Linear() if op.out in split and op.x not in split:
            yield _column_parallel(op, rank, world, slices)
        case Linear() if op.x in split and op.out not in split:
            yield from _row_parallel(op, rank, world, slices)
        case _ if op.out in split or any(name in split for name in op_inputs(op)):
            raise PartitionError(f"{type(op).__name__} {op.out!r} cannot work on a share of the columns")
        case _:
            yield op


def _column_parallel(op: Linear, rank: int, world: int, slices: dict[WeightName, WeightSlice]) -> Linear:
    rows = _share(f"output rows of {op.weight}", op.out_features, world)
    for name in (op.weight, op.bias):
        if name is not None:
            slices[name] = WeightSlice(axis="rows", start=rank * rows, stop=(rank + 1) * rows)
    return dataclasses.replace(op, out_features=rows)


def _row_parallel(op: Linear, rank: int, world: int, slices: dict[WeightName, WeightSlice]) -> tuple[Linear, AllReduce]:
    columns = _share(f"input columns of {op.weight}", op.in_features, world)
    if isinstance(op.precision, Int4) and columns % op.precision.group_size:
        raise PartitionError(
            f"a rank's {columns} input columns of {op.weight} are not a multiple of group size "
            f"{op.precision.group_size}"
        )
    slices[op.weight] = WeightSlice(axis="columns", start=rank * columns, stop=(rank + 1) * columns)
    partial = TensorName(f"{op.out}.partial")
    bias = op.bias if rank == 0 else None
    return (
        dataclasses.replace(op, out=partial, in_features=columns, bias=bias),
        AllReduce(out=op.out, x=partial, size=op.out_features),
    )


def _share(what: str, count: int, world: int) -> int:
    if count % world:
        raise PartitionError(f"{count} {what} cannot be shared by {world} ranks")
    return count // world
