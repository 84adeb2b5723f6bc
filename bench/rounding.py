"""Weights rounded to nearest, without calibration: the speed of an engine does not depend on their values."""

from collections.abc import Iterator, Mapping

import numpy as np

from edgellm.engines.graph import Embed, Graph, Int4, Int8, Linear, Precision, WeightName
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight, WeightStore


class RoundedWeights(Mapping[WeightName, Weight]):
    """Weights in the forms that a graph's ops ask for, each rounded when it is looked up."""

    def __init__(self, graph: Graph, weights: WeightStore) -> None:
        self._weights = weights
        self._precisions = {op.weight: op.precision for op in graph.ops if isinstance(op, Embed | Linear)}

    def __getitem__(self, name: WeightName) -> Weight:
        weight = self._weights[name]
        precision = self._precisions.get(name)
        return _rounded(weight, precision) if isinstance(weight, np.ndarray) and precision is not None else weight

    def __iter__(self) -> Iterator[WeightName]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _rounded(weight: FloatArray, precision: Precision) -> Weight:
    match precision:
        case Int4():
            return _int4(weight, precision)
        case Int8():
            return _int8(weight)
        case _:
            return weight


def _int4(weight: FloatArray, precision: Int4) -> Int4Weight:
    groups = weight.reshape(len(weight), -1, precision.group_size)
    scale = np.maximum(np.abs(groups).max(axis=2) / 7, 1e-8).astype(np.float32)
    q = np.rint(groups / scale[..., None]).astype(np.int8).reshape(weight.shape)
    outliers = np.arange(precision.outliers, dtype=np.int32)
    q[:, outliers] = 0
    return Int4Weight(
        q=q,
        scale=scale,
        group_size=precision.group_size,
        input_scale=None,
        outlier_columns=outliers,
        outlier_weight=weight[:, outliers],
    )


def _int8(weight: FloatArray) -> Int8Weight:
    scale = np.maximum(np.abs(weight).max(axis=1) / 127, 1e-8).astype(np.float32)
    return Int8Weight(q=np.rint(weight / scale[:, None]).astype(np.int8), scale=scale)
