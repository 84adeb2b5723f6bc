"""Weights as TensorRT reads them: transposed to [K, N], two int4 per byte, scales in half precision."""

import numpy as np
import numpy.typing as npt

from edgellm.engines.weights import FloatArray

HalfArray = npt.NDArray[np.float16]


def pack_nibbles(q: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """int8 in [-8, 7], an even number of them in C order -> two's complement nibbles, the earlier value in the low one.

    uint8 [size / 2].
    """
    flat = q.reshape(-1)
    if flat.size % 2:
        raise ValueError(f"{flat.size} int4 values do not fill whole bytes")
    nibbles = flat.astype(np.uint8) & np.uint8(0xF)
    return nibbles[::2] | (nibbles[1::2] << np.uint8(4))


def to_half(values: FloatArray, what: str) -> HalfArray:
    """Raises ValueError for a value that half precision cannot hold."""
    half = np.ascontiguousarray(values, np.float32)
    if half.size and float(np.abs(half).max()) > float(np.finfo(np.float16).max):
        raise ValueError(f"{what} has a value of magnitude {np.abs(half).max():.4g}; half precision ends at 65504")
    return half.astype(np.float16)
