"""What weights look like before a backend packs them: plain arrays, and two quantised forms of a linear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.graph import WeightName

FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Weight:
    """w[n, k] = q[n, k] * scale[n].

    q [N, K] int8 in [-127, 127]; scale [N] float32.
    """

    q: npt.NDArray[np.int8]
    scale: FloatArray

    def dequantize(self) -> FloatArray:
        """[N, K] float32."""
        return self.q.astype(np.float32) * self.scale[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Int4Weight:
    """y = (x * input_scale) @ (q * scale).T over all channels but the outliers, + x[:, outliers] @ outlier_weight.T.

    q [N, K] int8 in [-8, 7], zero in the outlier columns; scale [N, K / group_size] float32;
    input_scale [K] float32, AWQ's per-channel pre_quant_scale applied to activations (None: all ones; 0 never occurs);
    outlier_columns [O] int32 ascending; outlier_weight [N, O] float32, to be multiplied with the *unscaled* x.
    Linears that read the same tensor share `input_scale` and `outlier_columns`, so that their input is quantised once.
    """

    q: npt.NDArray[np.int8]
    scale: FloatArray
    group_size: int
    input_scale: FloatArray | None
    outlier_columns: npt.NDArray[np.int32]
    outlier_weight: FloatArray

    def dequantize(self) -> FloatArray:
        """The [N, K] float32 matrix that this weight applies to an unquantised input."""
        dense = self.q.astype(np.float32) * np.repeat(self.scale, self.group_size, axis=1)
        if self.input_scale is not None:
            dense *= self.input_scale[None, :]
        dense[:, self.outlier_columns] = self.outlier_weight
        return dense


Weight: TypeAlias = FloatArray | Int8Weight | Int4Weight
WeightStore: TypeAlias = Mapping[WeightName, Weight]
"""Weights by name. May be lazy: a lookup can read from disk, so look each weight up once."""
