"""The graph in PyTorch, on whole windows of calibration text, one linear's input at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from edgellm.engines.graph import (
    Activation,
    Add,
    Attention,
    Embed,
    Graph,
    Linear,
    Norm,
    Op,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
    op_inputs,
    op_weights,
)
from edgellm.engines.weights import WeightStore


class TorchWeights(Mapping[WeightName, torch.Tensor]):
    """A store of plain float32 arrays as tensors; as lazy as the store is."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    def __getitem__(self, name: WeightName) -> torch.Tensor:
        array = self._store[name]
        if not isinstance(array, np.ndarray):
            raise TypeError(f"weight {name!r} is quantised already")
        return torch.from_numpy(array)

    def __iter__(self) -> Iterator[WeightName]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """The linears that read one tensor."""

    x: TensorName
    linears: tuple[Linear, ...]


def linear_groups(graph: Graph) -> list[LinearGroup]:
    """All linears before the head, in execution order, grouped by the tensor that they read."""
    by_input: dict[TensorName, list[Linear]] = {}
    for op in graph.ops:
        if isinstance(op, Linear) and op.out != graph.output:
            by_input.setdefault(op.x, []).append(op)
    return [LinearGroup(x=x, linears=tuple(found)) for x, found in by_input.items()]


def linear_inputs(
    graph: Graph, weights: Mapping[WeightName, torch.Tensor], windows: torch.Tensor
) -> Iterator[tuple[LinearGroup, torch.Tensor]]:
    """Run windows [count, tokens] int64, each from position 0, through a whole float32 model; before the first linear
    of a group runs, yield the group and its input [count * tokens, in_features] float32.

    The head never runs. A tensor is dropped after its last reader.
    """
    groups = {group.linears[0].out: group for group in linear_groups(graph)}
    last_reader = {name: op.out for op in graph.ops for name in op_inputs(op)}
    tensors = {graph.input: windows}
    for op in graph.ops:
        if isinstance(op, SelectRows):
            return
        inputs = [tensors[name] for name in op_inputs(op)]
        if op.out in groups:
            yield groups[op.out], inputs[0].flatten(0, 1)
        tensors[op.out] = run_op(op, inputs, [weights[name] for name in op_weights(op)])
        for name in op_inputs(op):
            if last_reader[name] == op.out:
                tensors.pop(name, None)


def run_op(op: Op, inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """One op on [windows, tokens, width] float32 tensors; weights in the order of `op_weights`."""
    match op:
        case Embed():
            return weights[0][inputs[0]]
        case Linear():
            return functional.linear(inputs[0], *weights)
        case Norm():
            return _norm(op, inputs[0], weights)
        case Rope():
            return _rope(op, inputs[0])
        case Attention():
            return _attention(op, *inputs)
        case Activation():
            return _activation(op, inputs[0]) * (inputs[1] if op.up is not None else 1)
        case Add():
            return inputs[0] + inputs[1]
        case _:
            raise ValueError(f"calibration runs a whole model on one device; it knows no {type(op).__name__}")


def _norm(op: Norm, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    if op.kind == "layer":
        return functional.layer_norm(x, (op.size,), weights[0], weights[1], op.eps)
    return functional.rms_norm(x, (op.size,), weights[0], op.eps)


def _rope(op: Rope, x: torch.Tensor) -> torch.Tensor:
    heads = x.view(*x.shape[:2], op.num_heads, op.head_dim)
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor(op.inv_freq)
    cos, sin = (part[:, None, :] * op.attention_factor for part in (angle.cos(), angle.sin()))
    half = op.rotary_dim // 2
    left, right, rest = heads.tensor_split((half, op.rotary_dim), dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1).flatten(-2)


def _attention(op: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    def heads(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(*x.shape[:2], count, op.head_dim).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(
        heads(q, op.num_heads),
        heads(k, op.kv_heads),
        heads(v, op.kv_heads),
        is_causal=True,
        scale=op.scale,
        enable_gqa=op.num_heads != op.kv_heads,
    )
    return attended.transpose(1, 2).flatten(-2)


def _activation(op: Activation, x: torch.Tensor) -> torch.Tensor:
    match op.kind:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
