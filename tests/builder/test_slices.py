"""Slicing a quantised weight slices the matrix that it stands for."""

import numpy as np
import pytest

from edgellm.builder.slices import SlicedWeights, WeightSlice, slice_weight
from edgellm.engines.graph import WeightName
from edgellm.engines.weights import Int4Weight, Int8Weight, Weight


def int8_weight() -> Int8Weight:
    random = np.random.default_rng(0)
    return Int8Weight(q=random.integers(-127, 128, (8, 128), np.int8), scale=random.random(8, np.float32))


def int4_weight(*, scaled: bool) -> Int4Weight:
    random = np.random.default_rng(1)
    outliers = np.array([3, 40, 41, 127], np.int32)
    q = random.integers(-8, 8, (8, 128), np.int8)
    q[:, outliers] = 0
    return Int4Weight(
        q=q,
        scale=random.random((8, 4), np.float32),
        group_size=32,
        input_scale=random.random(128, np.float32) + 0.5 if scaled else None,
        outlier_columns=outliers,
        outlier_weight=random.random((8, 4), np.float32),
    )


def dense(weight: Weight) -> np.ndarray:
    return weight if isinstance(weight, np.ndarray) else weight.dequantize()


WEIGHTS: list[Weight] = [
    np.arange(8 * 128, dtype=np.float32).reshape(8, 128),
    int8_weight(),
    int4_weight(scaled=True),
    int4_weight(scaled=False),
]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 7), (0, 8)])
def test_rows(weight: Weight, start: int, stop: int) -> None:
    part = slice_weight(weight, WeightSlice(axis="rows", start=start, stop=stop))
    np.testing.assert_array_equal(dense(part), dense(weight)[start:stop])


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 128), (32, 96), (64, 96)])
def test_columns(weight: Weight, start: int, stop: int) -> None:
    part = slice_weight(weight, WeightSlice(axis="columns", start=start, stop=stop))
    np.testing.assert_array_equal(dense(part), dense(weight)[:, start:stop])


def test_only_named_weights_are_cut() -> None:
    cut, kept = WeightName("cut"), WeightName("kept")
    store = SlicedWeights({cut: WEIGHTS[0], kept: WEIGHTS[0]}, {cut: WeightSlice(axis="rows", start=1, stop=2)})
    assert list(store) == [cut, kept]
    assert len(store) == 2
    assert dense(store[cut]).shape == (1, 128)
    assert dense(store[kept]).shape == (8, 128)
