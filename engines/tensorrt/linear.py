"""Embeddings and linears in each of their precisions."""

import numpy as np

from edgellm.engines.graph import Embed, Half, Int4, Int8, Linear, Precision, WeightName
from edgellm.engines.tensorrt.layers import Layers, Tensor
from edgellm.engines.tensorrt.packing import to_half
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight, WeightStore


class WeightWriter:
    """Looks weights up, checks them against their ops, and writes them with the layers that apply them."""

    def __init__(self, layers: Layers, weights: WeightStore) -> None:
        self._layers = layers
        self._store = weights
        self._tables: dict[WeightName, Tensor] = {}
        self.linear_weights = 0
        """Elements of the int4 linears written so far."""
        self.linear_bytes = 0
        """Of everything those linears keep: nibbles, scales, outlier channels and input scales."""

    def vector(self, name: WeightName, size: int) -> FloatArray:
        """float32 [size]."""
        weight = self._take(name)
        if not isinstance(weight, np.ndarray) or weight.shape != (size,):
            shape = weight.shape if isinstance(weight, np.ndarray) else type(weight).__name__
            raise ValueError(f"weight {name!r} is {shape}, its op needs float32 [{size}]")
        return weight

    def embed(self, op: Embed, tokens: Tensor) -> Tensor:
        """tokens int32 [rows] -> half [rows, hidden_size]."""
        return self._layers.gather(self._table(op.weight, (op.vocab_size, op.hidden_size), op.precision), tokens, 0)

    def linear(self, op: Linear, x: Tensor) -> Tensor:
        """half [rows, in_features] -> half [rows, out_features]."""
        shape = (op.out_features, op.in_features)
        if isinstance(op.precision, Int4):
            out = self._int4(op, self._matrix(op.weight, shape, op.precision), x)
        else:
            out = self._layers.matmul(x, self._table(op.weight, shape, op.precision), transpose_b=True)
        if op.bias is None:
            return out
        return self._layers.elementwise(out, self._half_row(op.bias, self.vector(op.bias, op.out_features)), "SUM")

    def _table(self, name: WeightName, shape: tuple[int, int], precision: Precision) -> Tensor:
        """Half [N, K]; an embedding and the head tied to it share one."""
        if name not in self._tables:
            weight = self._matrix(name, shape, precision)
            if isinstance(weight, Int8Weight):
                q = self._layers.constant(name, weight.q)
                scale = self._layers.constant(f"{name}.scale", to_half(weight.scale, f"the scale of {name}"))
                self._tables[name] = self._layers.dequantize(f"{name}.half", q, scale, axis=0)
            elif isinstance(weight, np.ndarray):
                self._tables[name] = self._layers.constant(name, to_half(weight, f"weight {name}"))
        return self._tables[name]

    def _int4(self, op: Linear, weight: Weight, x: Tensor) -> Tensor:
        """(x * input_scale) @ (q * scale) + x[:, outliers] @ outlier_weight."""
        assert isinstance(weight, Int4Weight)
        layers, name = self._layers, op.weight
        q = layers.int4_constant(name, np.ascontiguousarray(weight.q.T))
        scale = layers.constant(f"{name}.scale", to_half(weight.scale.T, f"the scale of {name}"))
        scaled = x
        if weight.input_scale is not None:
            scaled = layers.elementwise(x, self._half_row(f"{name}.input_scale", weight.input_scale), "PROD")
        out = layers.matmul(scaled, layers.dequantize(f"{name}.half", q, scale, axis=None))
        if len(weight.outlier_columns):
            columns = layers.constant(f"{name}.outlier_columns", weight.outlier_columns.astype(np.int32))
            outlier = layers.constant(f"{name}.outliers", to_half(weight.outlier_weight, f"the outliers of {name}"))
            beside = layers.matmul(layers.gather(x, columns, 1), outlier, transpose_b=True)
            out = layers.elementwise(out, beside, "SUM")
        self._count(name, weight)
        return out

    def _count(self, name: WeightName, weight: Int4Weight) -> None:
        parts = [f"{name}{part}" for part in ("", ".scale", ".input_scale", ".outlier_columns", ".outliers")]
        self.linear_weights += weight.q.size
        self.linear_bytes += sum(
            self._layers.constants[part].nbytes for part in parts if part in self._layers.constants
        )

    def _matrix(self, name: WeightName, shape: tuple[int, int], precision: Precision) -> Weight:
        weight = self._take(name)
        forms = {Half: np.ndarray, Int8: Int8Weight, Int4: Int4Weight}
        if not isinstance(weight, forms[type(precision)]):
            raise ValueError(f"weight {name!r} is a {type(weight).__name__}, its op asks for {precision}")
        found = weight.shape if isinstance(weight, np.ndarray) else weight.q.shape
        if found != shape:
            raise ValueError(f"weight {name!r} has shape {list(found)}, its op needs {list(shape)}")
        return weight

    def _take(self, name: WeightName) -> Weight:
        if name not in self._store:
            raise ValueError(f"the checkpoint has no weight {name!r}")
        return self._store[name]

    def _half_row(self, name: str, values: FloatArray) -> Tensor:
        return self._layers.constant(name, to_half(values, name)[None])
