"""What a graph costs: bytes of weights, activations and KV, arithmetic, and the time a roofline predicts. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from edgellm.builder.cluster import Device
from edgellm.engines.graph import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Graph,
    Half,
    Int4,
    Int8,
    Linear,
    Norm,
    Op,
    Precision,
    Rope,
    SelectRows,
    TensorName,
    linears,
    op_inputs,
)
from edgellm.engines.kv import BLOCK_TOKENS, KvContract
from edgellm.engines.spec import EngineLimits

PROMPT_TOKENS: Final = 512
"""Prompt of the predicted TTFT, and context of the predicted TPOT."""
KV_CHUNK_TOKENS: Final = 128
"""KV of a prompt is sent in chunks of so many tokens while the next ones compute."""


@dataclass(frozen=True, kw_only=True)
class EngineCosts:
    """Of one engine, on one device."""

    weight_bytes: int
    read_bytes: int
    """Weights that every step reads: all but the embedding, of which a step reads only some rows."""
    activation_bytes: int
    """Tensors alive at once in the largest step, and its logits."""
    kv_block_bytes: int
    """One block in all layers of this engine."""
    row_flops: int
    """Of the linears, for one row."""
    context_flops: int
    """Of attention, for one row and one token of context."""
    all_reduce_bytes: int
    """Sent per row to the other ranks."""


def engine_costs(graph: Graph, contract: KvContract, limits: EngineLimits) -> EngineCosts:
    """`contract` is the bundle's; a graph that keeps fewer heads is charged for those."""
    attentions = [op for op in graph.ops if isinstance(op, Attention)]
    share = attentions[0].kv_heads / contract.kv_heads
    return EngineCosts(
        weight_bytes=weight_bytes(graph.ops),
        read_bytes=read_bytes(graph.ops),
        activation_bytes=_activation_bytes(graph, limits),
        kv_block_bytes=round(graph.num_layers * contract.block_bytes * share),
        row_flops=sum(2 * op.in_features * op.out_features for op in linears(graph) if op.out != graph.output),
        context_flops=sum(4 * op.num_heads * op.head_dim for op in attentions),
        all_reduce_bytes=sum(4 * op.size for op in graph.ops if isinstance(op, AllReduce)),
    )


def weight_bytes(ops: Iterable[Op]) -> int:
    """Packed weights of the ops; a head tied to the embedding is the same bytes."""
    weighty = {op.weight: op for op in ops if isinstance(op, Embed | Linear | Norm)}
    return sum(map(_op_bytes, weighty.values()))


def read_bytes(ops: Iterable[Op]) -> int:
    """Packed weights that a step of one row reads."""
    return sum(_op_bytes(op) for op in ops if not isinstance(op, Embed))


def _op_bytes(op: Op) -> int:
    match op:
        case Embed():
            return _matrix_bytes(op.precision, op.vocab_size, op.hidden_size)
        case Linear():
            bias = 0 if op.bias is None else 4 * op.out_features
            return bias + _matrix_bytes(op.precision, op.out_features, op.in_features)
        case Norm():
            return 4 * op.size * (1 if op.bias is None else 2)
        case _:
            return 0


def _matrix_bytes(precision: Precision, rows: int, columns: int) -> int:
    match precision:
        case Half():
            return 2 * rows * columns
        case Int8():
            return rows * columns + 4 * rows
        case Int4():
            nibbles, scales = rows * columns // 2, 2 * rows * columns // precision.group_size
            return nibbles + scales + 2 * rows * precision.outliers + 4 * columns


def _activation_bytes(graph: Graph, limits: EngineLimits) -> int:
    """Float32 tensors: the widest set alive at once for every row, and the logits of every sequence."""
    last_reader = {name: index for index, op in enumerate(graph.ops) for name in op_inputs(op)}
    alive: dict[TensorName, int] = {graph.input: graph.hidden_size}
    widest = 0
    for index, op in enumerate(graph.ops):
        if op.out == graph.output and graph.is_last_stage:
            break
        alive[op.out] = _width(op)
        widest = max(widest, sum(alive.values()))
        alive = {name: width for name, width in alive.items() if last_reader.get(name, index) > index}
    logits = 4 * limits.max_sequences * graph.vocab_size if graph.is_last_stage else 0
    return 4 * limits.max_rows * widest + logits


def _width(op: Op) -> int:
    """Columns of an op's result."""
    match op:
        case Embed():
            return op.hidden_size
        case Linear():
            return op.out_features
        case Rope() | Attention():
            return op.num_heads * op.head_dim
        case Norm() | Activation() | Add() | SelectRows() | AllReduce():
            return op.size


def predict_ttft_s(ranks: Sequence[tuple[Device, EngineCosts]], *, kv_bytes_per_token: int, receiver: Device) -> float:
    """Prompt of PROMPT_TOKENS on idle devices: compute, and what of sending its KV cannot hide behind it."""
    compute_s = max(_prefill_s(device, costs, len(ranks)) for device, costs in ranks)
    link_bytes_per_s = min(receiver.link_bytes_per_s, *(device.link_bytes_per_s for device, _ in ranks))
    send_s = PROMPT_TOKENS * kv_bytes_per_token / link_bytes_per_s
    chunks = math.ceil(PROMPT_TOKENS / KV_CHUNK_TOKENS)
    exposed_s = max(send_s / chunks, send_s - compute_s * (chunks - 1) / chunks)
    return compute_s + exposed_s + receiver.link_latency_s


def _prefill_s(device: Device, costs: EngineCosts, world: int) -> float:
    mean_context = (PROMPT_TOKENS + 1) / 2
    flops = PROMPT_TOKENS * (costs.row_flops + costs.context_flops * mean_context)
    arithmetic_s = flops / device.flops_per_s
    reading_s = costs.read_bytes / device.bytes_per_s
    reduced_bytes = 2 * (world - 1) / world * PROMPT_TOKENS * costs.all_reduce_bytes
    return max(arithmetic_s, reading_s) + reduced_bytes / device.link_bytes_per_s


def predict_tpot_s(stages: Sequence[tuple[Device, EngineCosts]], *, hidden_size: int) -> float:
    """One sequence at PROMPT_TOKENS of context: every stage reads its weights and KV, hidden states hop between."""
    blocks = math.ceil(PROMPT_TOKENS / BLOCK_TOKENS)
    reading_s = sum((costs.read_bytes + blocks * costs.kv_block_bytes) / device.bytes_per_s for device, costs in stages)
    hops = [device.link_latency_s + 4 * hidden_size / device.link_bytes_per_s for device, _ in stages[1:]]
    return reading_s + sum(hops)
