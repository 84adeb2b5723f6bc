"""Weights in the layouts the kernels read: panels of 16 output columns, in lines of 64 bytes.

One layout serves every instruction set. N is padded to 16 with zeros, K to what the widest kernel wants.
"""

from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from edgellm.engines.cpu.plan import PANEL_COLUMNS
from edgellm.engines.weights import FloatArray

_T = TypeVar("_T", bound=np.generic)

HALF_CHANNELS: Final = 32
"""K of a half-precision panel is padded to this."""
INT8_CHANNELS: Final = 64
INT4_LINE_CHANNELS: Final = 8


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple that is at least `value`."""
    return -(-value // multiple) * multiple


def bf16_bits(values: FloatArray) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return rounded


def pack_half(weight: FloatArray, padded_channels: int) -> npt.NDArray[np.uint16]:
    """[N, K] float32 -> bf16 [N/16, K/2, 16, 2]."""
    lines = _panels(bf16_bits(weight), padded_channels, np.uint16(0))
    return np.ascontiguousarray(lines.reshape(*lines.shape[:2], -1, 2).transpose(0, 2, 1, 3))


def pack_int8(q: npt.NDArray[np.int8], padded_channels: int) -> npt.NDArray[np.uint8]:
    """[N, K] int8 -> q + 128, uint8 [N/16, K/4, 16, 4]."""
    lines = _panels(_offset(q, 128), padded_channels, np.uint8(128))
    return np.ascontiguousarray(lines.reshape(*lines.shape[:2], -1, 4).transpose(0, 2, 1, 3))


def pack_int4(q: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """[N, K] int8 in [-8, 7] -> uint8 [N/16, K/8, 16, 4]: channel j + 8 in the low, 4 + j + 8 in the high nibble."""
    lines = _panels(_offset(q, 8), q.shape[1], np.uint8(8))
    halves = lines.reshape(*lines.shape[:2], -1, 2, 4)
    pairs = halves[..., 0, :] | (halves[..., 1, :] << np.uint8(4))
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3))


def pack_group_scales(scale: FloatArray) -> tuple[npt.NDArray[np.float16], FloatArray]:
    """[N, G] float32 -> fp16 [N/16, G, 16] and a power of two per column, whose product is the scale.

    The power of two keeps each column's largest scale in [0.5, 1), away from the ends of fp16's range.
    """
    _, exponent = np.frexp(np.abs(scale).max(axis=1))
    normalised = np.ldexp(scale, -exponent[:, None]).astype(np.float16)
    panels = _panels(normalised, scale.shape[1], np.float16(0)).transpose(0, 2, 1)
    return np.ascontiguousarray(panels), pad_columns(np.ldexp(np.float32(1), exponent).astype(np.float32))


def pad_columns(values: FloatArray) -> FloatArray:
    """[N] -> [N padded to 16], zeros at the end."""
    return np.pad(values.astype(np.float32), (0, round_up(len(values), PANEL_COLUMNS) - len(values)))


def rotation_table(inv_freq: tuple[float, ...], attention_factor: float, max_seq_len: int) -> FloatArray:
    """float32 [max_seq_len, 2 * pairs]: cosines then sines of position * inv_freq, times the factor.

    The angle is a float32 product, as in the models' own code; its cosine is taken in float64.
    """
    angles = np.arange(max_seq_len, dtype=np.float32)[:, None] * np.asarray(inv_freq, np.float32)[None, :]
    exact = angles.astype(np.float64)
    table: FloatArray = (np.hstack([np.cos(exact), np.sin(exact)]) * attention_factor).astype(np.float32)
    return table


def _offset(q: npt.NDArray[np.int8], offset: int) -> npt.NDArray[np.uint8]:
    """q + offset as uint8; the wrap-around of the cast is the sum that is meant."""
    return q.view(np.uint8) + np.uint8(offset)


def _panels(values: npt.NDArray[_T], channels: int, fill: _T) -> npt.NDArray[_T]:
    """[N, K] -> [N/16, 16, channels], padded with `fill`."""
    rows, columns = values.shape
    padding = ((0, round_up(rows, PANEL_COLUMNS) - rows), (0, channels - columns))
    return np.pad(values, padding, constant_values=fill).reshape(-1, PANEL_COLUMNS, channels)
