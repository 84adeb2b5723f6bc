"""The network API with names, shapes and errors: each method adds one layer and returns its output tensor."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.tensorrt.api import Api, TensorRtError
from edgellm.engines.tensorrt.packing import pack_nibbles

Tensor: TypeAlias = Any
"""nvinfer1::ITensor."""


class Layers:
    """Adds layers to one network. Constants are kept here: the network only points to their memory."""

    def __init__(self, api: Api, network: Any) -> None:
        self.trt = api.trt
        self.network = network
        self.constants: dict[str, npt.NDArray[Any]] = {}
        """By layer name; int4 constants as packed bytes."""
        self._shared: dict[str, Tensor] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """A network input; -1 for dimensions that the profile bounds. `dtype` is a name of DataType."""
        return self.network.add_input(name, getattr(self.trt.DataType, dtype), tuple(shape))

    def output(self, tensor: Tensor, name: str) -> None:
        """Make a tensor an output of the network."""
        tensor.name = name
        self.network.mark_output(tensor)

    def constant(self, name: str, values: npt.NDArray[Any]) -> Tensor:
        """A constant of the array's own type; the same name gives the same constant."""
        if name not in self._shared:
            kept = np.ascontiguousarray(values)
            layer = self.network.add_constant(kept.shape, self.trt.Weights(kept))
            self._shared[name] = self._keep(name, layer, kept)
        return self._shared[name]

    def int4_constant(self, name: str, q: npt.NDArray[np.int8]) -> Tensor:
        """A constant of INT4 values, two per byte."""
        packed = pack_nibbles(q)
        weights = self.trt.Weights(self.trt.DataType.INT4, packed.ctypes.data, q.size)
        return self._keep(name, self.network.add_constant(q.shape, weights), packed)

    def dequantize(self, name: str, q: Tensor, scale: Tensor, axis: int | None) -> Tensor:
        """Half values of quantised ones. With `axis`, one scale per index of it; without, `scale` has q's rank and is
        smaller along one dimension, whose blocks share a scale."""
        layer = self._named(self.network.add_dequantize(q, scale, self.trt.DataType.HALF), name)
        if axis is not None:
            layer.axis = axis
        return layer.get_output(0)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """Nothing is added where the type is that already."""
        wanted = getattr(self.trt.DataType, dtype)
        return x if x.dtype == wanted else self._out(self.network.add_cast(x, wanted))

    def elementwise(self, a: Tensor, b: Tensor, operation: str) -> Tensor:
        """`operation` is a name of ElementWiseOperation."""
        return self._out(self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)))

    def unary(self, x: Tensor, operation: str) -> Tensor:
        return self._out(self.network.add_unary(x, getattr(self.trt.UnaryOperation, operation)))

    def activation(self, x: Tensor, kind: str) -> Tensor:
        return self._out(self.network.add_activation(x, getattr(self.trt.ActivationType, kind)))

    def mean(self, x: Tensor, axis: int) -> Tensor:
        """Over one axis, which stays with size 1."""
        return self._out(self.network.add_reduce(x, self.trt.ReduceOperation.AVG, 1 << axis, True))

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        layer = self.network.add_softmax(x)
        layer.axes = 1 << axis
        return self._out(layer)

    def matmul(self, a: Tensor, b: Tensor, *, transpose_b: bool = False) -> Tensor:
        """Over the last two dimensions; sums in float32."""
        plain, transposed = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self._out(self.network.add_matrix_multiply(a, plain, b, transposed if transpose_b else plain))

    def gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        return self._out(self.network.add_gather(x, indices, axis))

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self._out(layer)

    def select(self, condition: Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
        return self._out(self.network.add_select(condition, then, otherwise))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """A 0 takes the input's size at that place, one -1 what is left."""
        return self.shuffle(x, shape=shape)

    def shuffle(
        self,
        x: Tensor,
        *,
        first: Sequence[int] | None = None,
        shape: Sequence[int] | Tensor | None = None,
        second: Sequence[int] | None = None,
    ) -> Tensor:
        """Transpose, reshape (to sizes known now, or to those in an int64 tensor), transpose."""
        layer = self.network.add_shuffle(x)
        if first is not None:
            layer.first_transpose = self.trt.Permutation(list(first))
        if isinstance(shape, Sequence):
            layer.reshape_dims = tuple(shape)
        elif shape is not None:
            layer.set_input(1, shape)
        if second is not None:
            layer.second_transpose = self.trt.Permutation(list(second))
        return self._out(layer)

    def slice(self, x: Tensor, start: Sequence[int], sizes: Sequence[int] | Tensor) -> Tensor:
        """Sizes known now, or an int64 tensor of them."""
        rank = len(start)
        if isinstance(sizes, Sequence):
            return self._out(self.network.add_slice(x, tuple(start), tuple(sizes), (1,) * rank))
        layer = self.network.add_slice(x, tuple(start), (0,) * rank, (1,) * rank)
        layer.set_input(2, sizes)
        return self._out(layer)

    def shape(self, x: Tensor) -> Tensor:
        """int64 [rank]."""
        return self._out(self.network.add_shape(x))

    def sizes(self, *parts: Tensor | int) -> Tensor:
        """int64 [count]: sizes known now beside int64 [1] tensors of sizes that are not."""
        known = [self._size(part) if isinstance(part, int) else part for part in parts]
        return self.concat(known, 0)

    def _size(self, size: int) -> Tensor:
        return self.constant(f"size {size}", np.array([size], np.int64))

    def checked(self, layer: Any, what: str) -> Any:
        """The layer, or TensorRtError where the API returned none."""
        if layer is None:
            raise TensorRtError(f"TensorRT {self.trt.__version__} refused {what}; its log says why")
        return layer

    def _named(self, layer: Any, name: str) -> Any:
        self.checked(layer, name).name = name
        return layer

    def _keep(self, name: str, layer: Any, values: npt.NDArray[Any]) -> Tensor:
        self.constants[name] = values
        return self._named(layer, name).get_output(0)

    def _out(self, layer: Any) -> Tensor:
        return self.checked(layer, "a layer").get_output(0)
