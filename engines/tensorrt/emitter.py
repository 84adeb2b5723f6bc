"""A segment of a graph, written as a TensorRT network.

Linears and attention take and give half; the residual stream, norms and rotation are float32, and so is all that
crosses a network's border. Quantised linears dequantise their weights to half and leave activations as they are
(W4A16), whatever `act_bits` says: that is at least as fine as it asks for.
"""

from typing import assert_never

import numpy as np

from edgellm.engines.graph import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Linear,
    Norm,
    Op,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
)
from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.attention import AttentionForm
from edgellm.engines.tensorrt.layers import Tensor
from edgellm.engines.tensorrt.linear import WeightWriter
from edgellm.engines.tensorrt.segments import Crossing, Segment
from edgellm.engines.tensorrt.step import Step
from edgellm.engines.weights import FloatArray

_GELU = {"gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH"}


class Emitter:
    """Writes one op after the other; tensors are [rows, width], those of Rope [batch, heads, chunk, head_dim]."""

    def __init__(self, step: Step, weights: WeightWriter, form: AttentionForm, world: int) -> None:
        """`world`: ranks of a sum inside of the network."""
        self._step = step
        self._layers = step.layers
        self._weights = weights
        self._form = form
        self._world = world
        self._tensors: dict[TensorName, Tensor] = {}
        self._heads: dict[TensorName, Tensor] = {}

    def emit(self, segment: Segment) -> None:
        """The whole segment, inputs and outputs included."""
        for crossing in segment.inputs:
            self._tensors[crossing.tensor] = self._input(crossing)
        for op in segment.ops:
            self._emit(op)
        for crossing in segment.outputs:
            rows = self._layers.cast(self._tensors[crossing.tensor], "FLOAT")
            is_selected = crossing.name == interface.LOGITS
            self._layers.output(rows if is_selected else self._step.padded(rows, crossing.width), crossing.name)

    def _input(self, crossing: Crossing) -> Tensor:
        if crossing.name == interface.TOKENS:
            return self._step.tokens()
        return self._step.hidden(crossing.name, crossing.width)

    def _emit(self, op: Op) -> None:
        match op:
            case Rope():
                heads = self._step.heads(self._float(op.x), op.num_heads, op.head_dim)
                self._heads[op.out] = self._form.rope(op, heads)
            case Embed():
                self._tensors[op.out] = self._weights.embed(op, self._tensors[op.tokens])
            case Norm():
                self._tensors[op.out] = self._norm(op)
            case Linear():
                self._tensors[op.out] = self._weights.linear(op, self._half(op.x))
            case Attention():
                self._tensors[op.out] = self._attention(op)
            case Activation():
                self._tensors[op.out] = self._activation(op)
            case Add():
                self._tensors[op.out] = self._layers.elementwise(self._float(op.a), self._float(op.b), "SUM")
            case SelectRows():
                self._tensors[op.out] = self._select(self._tensors[op.x])
            case AllReduce():
                self._tensors[op.out] = self._sum_over_ranks(self._half(op.x))
            case _:
                assert_never(op)

    def _norm(self, op: Norm) -> Tensor:
        layers, x = self._layers, self._float(op.x)
        if op.kind == "layer":
            x = layers.elementwise(x, layers.mean(x, 1), "SUB")
        variance = layers.mean(layers.elementwise(x, x, "PROD"), 1)
        deviation = layers.unary(layers.elementwise(variance, self._row(f"eps {op.eps}", [op.eps]), "SUM"), "SQRT")
        scaled = layers.elementwise(x, deviation, "DIV")
        out = layers.elementwise(scaled, self._row(op.weight, self._weights.vector(op.weight, op.size)), "PROD")
        if op.bias is not None:
            out = layers.elementwise(out, self._row(op.bias, self._weights.vector(op.bias, op.size)), "SUM")
        return layers.cast(out, "HALF")

    def _attention(self, op: Attention) -> Tensor:
        layers, step = self._layers, self._step
        scale = layers.constant(f"scale {op.scale}", np.full((1, 1, 1, 1), op.scale, np.float32))
        q = layers.elementwise(layers.cast(self._as_heads(op.q, op.num_heads, op.head_dim), "FLOAT"), scale, "PROD")
        k, v = (self._as_heads(name, op.kv_heads, op.head_dim) for name in (op.k, op.v))
        q, k, v = (layers.cast(heads, "HALF") for heads in (q, k, v))
        for kind, heads in (("k", k), ("v", v)):
            layers.output(heads, interface.new_rows(interface.cache(kind, op.layer)))
        return step.rows(self._form.attention(op, q, k, v), op.num_heads * op.head_dim)

    def _as_heads(self, name: TensorName, num_heads: int, head_dim: int) -> Tensor:
        if name in self._heads:
            return self._heads[name]
        return self._step.heads(self._tensors[name], num_heads, head_dim)

    def _activation(self, op: Activation) -> Tensor:
        x = self._half(op.x)
        if op.kind == "silu":
            activated = self._layers.elementwise(x, self._layers.activation(x, "SIGMOID"), "PROD")
        else:
            activated = self._layers.activation(x, _GELU[op.kind])
        return activated if op.up is None else self._layers.elementwise(activated, self._half(op.up), "PROD")

    def _select(self, x: Tensor) -> Tensor:
        """In a decode network every row is the only one of its sequence."""
        return x if self._step.bounds.is_decode else self._layers.gather(x, self._step.selected, 0)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        trt, ranks = self._layers.trt, list(range(self._world))
        layer = self._layers.network.add_dist_collective(
            x, trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM, -1, ranks
        )
        return self._layers.checked(layer, "a sum over ranks").get_output(0)

    def _row(self, name: str | WeightName, values: FloatArray | list[float]) -> Tensor:
        return self._layers.constant(name, np.asarray(values, np.float32)[None])

    def _float(self, name: TensorName) -> Tensor:
        return self._layers.cast(self._tensors[name], "FLOAT")

    def _half(self, name: TensorName) -> Tensor:
        return self._layers.cast(self._tensors[name], "HALF")
