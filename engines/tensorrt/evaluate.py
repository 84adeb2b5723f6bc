"""A finished network, evaluated in NumPy: what TensorRT's documentation says that each layer does, and nothing faster.

The plain twin of the engines, for machines without a GPU. It reads the network as it is (layers, their parameters and
the constants' memory), not the graph it was written from, so that an emitter's mistakes show. It knows the layers that
the emitters use. Everything is float32; with `rounds`, tensors that are half are rounded to half.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.tensorrt.evaluate_layers import EVALUATORS, Evaluate, input_names
from edgellm.engines.tensorrt.layers import Layers

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """One layer, looked up once."""

    evaluate: Evaluate
    layer: Any
    inputs: tuple[str, ...]
    output: str
    dtype: str


class NetworkEvaluator:
    """Runs one network. `all_reduce` sums over ranks where the network does."""

    def __init__(self, layers: Layers, *, rounds: bool, all_reduce: Callable[[Array], Array] | None = None) -> None:
        """Raises NotImplementedError for a layer that no emitter uses."""
        self.constants = layers.constants
        self.all_reduce = all_reduce
        self._network = layers.network
        self._rounds = rounds
        self._fixed: dict[str, Array] = {}
        """Tensors that do not depend on any input."""
        self._steps: list[_Step] = []
        for index in range(self._network.num_layers):
            self._add(_step(layers.trt, self._network.get_layer(index)))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises KeyError for a missing input, ValueError for one of another shape."""
        tensors = dict(self._fixed)
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            tensors[tensor.name] = self._input(tensor, inputs[tensor.name])
        for step in self._steps:
            tensors[step.output] = self._run(step, tensors)
        outputs = (self._network.get_output(index).name for index in range(self._network.num_outputs))
        return {name: tensors[name] for name in outputs}

    def _add(self, step: _Step) -> None:
        if step.output in self._fixed or any(step.output == known.output for known in self._steps):
            raise ValueError(f"two layers write {step.output}")
        if all(name in self._fixed for name in step.inputs):
            self._fixed[step.output] = self._run(step, self._fixed)
        else:
            self._steps.append(step)

    def _run(self, step: _Step, tensors: Mapping[str, Array]) -> Array:
        operands = [tensors[name] for name in step.inputs]
        return self._typed(step.dtype, step.evaluate(self, step.layer, operands))

    def _input(self, tensor: Any, value: Array) -> Array:
        shape = tuple(tensor.shape)
        sizes = zip(shape, value.shape, strict=False)
        if len(shape) != value.ndim or any(known not in (-1, size) for known, size in sizes):
            raise ValueError(f"input {tensor.name} has shape {list(value.shape)}, the network wants {list(shape)}")
        return self._typed(tensor.dtype.name, value)

    def _typed(self, dtype: str, value: Array) -> Array:
        if dtype == "HALF":
            return value.astype(np.float16).astype(np.float32) if self._rounds else value.astype(np.float32)
        types = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
        return value.astype(types[dtype], copy=False) if dtype in types else value


def _step(trt: Any, layer: Any) -> _Step:
    kind = layer.type.name
    if kind not in EVALUATORS:
        raise NotImplementedError(f"layer {layer.name} is a {kind}, which no emitter uses")
    class_name, evaluate = EVALUATORS[kind]
    layer.__class__ = getattr(trt, class_name)  # the binding gives every layer back as its base class
    output = layer.get_output(0)
    return _Step(
        evaluate=evaluate,
        layer=layer,
        inputs=input_names(layer),
        output=output.name,
        dtype=output.dtype.name,
    )
