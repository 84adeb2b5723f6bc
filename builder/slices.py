"""Parts of weights: some rows or some columns of an array or a quantised matrix, and a lazy store of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgellm.engines.graph import WeightName
from edgellm.engines.weights import Int4Weight, Int8Weight, Weight, WeightStore


@dataclass(frozen=True, kw_only=True)
class WeightSlice:
    """Rows or columns `start` to `stop` of a weight [N, K] or bias [N]."""

    axis: Literal["rows", "columns"]
    start: int
    stop: int


class SlicedWeights(Mapping[WeightName, Weight]):
    """A weight store of which some weights are cut on lookup."""

    def __init__(self, whole: WeightStore, slices: Mapping[WeightName, WeightSlice]) -> None:
        self._whole = whole
        self._slices = slices

    def __getitem__(self, name: WeightName) -> Weight:
        part = self._slices.get(name)
        weight = self._whole[name]
        return weight if part is None else slice_weight(weight, part)

    def __iter__(self) -> Iterator[WeightName]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def slice_weight(weight: Weight, part: WeightSlice) -> Weight:
    """The rows or columns of a weight, as a weight of the same kind; columns of Int4 start on a group boundary."""
    span = slice(part.start, part.stop)
    match weight, part.axis:
        case Int8Weight(), "rows":
            return Int8Weight(q=weight.q[span], scale=weight.scale[span])
        case Int8Weight(), _:
            return Int8Weight(q=np.ascontiguousarray(weight.q[:, span]), scale=weight.scale)
        case Int4Weight(), "rows":
            return _int4_rows(weight, span)
        case Int4Weight(), _:
            return _int4_columns(weight, part.start, part.stop)
        case np.ndarray(), "rows":
            return weight[span]
        case np.ndarray(), _:
            return np.ascontiguousarray(weight[:, span])
    raise TypeError(f"not a weight: {type(weight).__name__}")


def _int4_rows(weight: Int4Weight, span: slice) -> Int4Weight:
    return Int4Weight(
        q=weight.q[span],
        scale=weight.scale[span],
        group_size=weight.group_size,
        input_scale=weight.input_scale,
        outlier_columns=weight.outlier_columns,
        outlier_weight=weight.outlier_weight[span],
    )


def _int4_columns(weight: Int4Weight, start: int, stop: int) -> Int4Weight:
    inside = (weight.outlier_columns >= start) & (weight.outlier_columns < stop)
    groups = slice(start // weight.group_size, stop // weight.group_size)
    return Int4Weight(
        q=np.ascontiguousarray(weight.q[:, start:stop]),
        scale=np.ascontiguousarray(weight.scale[:, groups]),
        group_size=weight.group_size,
        input_scale=None if weight.input_scale is None else weight.input_scale[start:stop],
        outlier_columns=weight.outlier_columns[inside] - np.int32(start),
        outlier_weight=np.ascontiguousarray(weight.outlier_weight[:, inside]),
    )
