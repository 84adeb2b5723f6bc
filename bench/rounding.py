"""Weights rounded to nearest, without calibration: the speed of an engine does not depend on their values."""

import numpy as np

from edgellm.engines.graph import Embed, Graph, Int4, Linear, WeightName
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight, WeightStore


def rounded(graph: Graph, weights: WeightStore) -> dict[WeightName, Weight]:
    """Weights in the forms that the graph's ops ask for, rounded to nearest."""
    rounded: dict[WeightName, Weight] = dict(weights)
    for op in graph.ops:
        weight = rounded[op.weight] if isinstance(op, Embed | Linear) else None
        if not isinstance(op, Embed | Linear) or not isinstance(weight, np.ndarray):
            continue
        is_int4 = isinstance(op.precision, Int4)
        rounded[op.weight] = _int4(weight, op.precision) if is_int4 else _int8(weight)
    return rounded


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
