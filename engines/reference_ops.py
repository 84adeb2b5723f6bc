"""The exact meaning of each op that is not attention, on whole float32 rows in NumPy."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgellm.engines.graph import Activation, Norm, Rope, WeightName
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight


def grid_values(weight: Weight) -> FloatArray:
    """The matrix that meets the quantised activations: Int4 without input scale, and zero in the outlier columns."""
    match weight:
        case Int4Weight():
            return weight.q.astype(np.float32) * np.repeat(weight.scale, weight.group_size, axis=1)
        case Int8Weight():
            return weight.dequantize()
        case _:
            return weight


def linear(weight: Weight, dense: FloatArray, x: FloatArray, act_bits: int) -> FloatArray:
    """x [rows, K] -> [rows, N]; outlier channels are never quantised, the others are after the input scale."""
    if not isinstance(weight, Int4Weight):
        return quantize_rows(x, act_bits) @ dense.T
    scaled = x.copy() if weight.input_scale is None else x * weight.input_scale
    scaled[:, weight.outlier_columns] = 0
    return quantize_rows(scaled, act_bits) @ dense.T + x[:, weight.outlier_columns] @ weight.outlier_weight.T


def quantize_rows(x: FloatArray, bits: int) -> FloatArray:
    """x [rows, K] on a symmetric grid per row, scale = max|x| / (2^(bits-1) - 1), half to even; 16 bits: unchanged."""
    if bits == 16:
        return x
    scale: FloatArray = np.abs(x).max(axis=1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    grid: FloatArray = np.rint(x / np.where(scale == 0, np.float32(1), scale)) * scale
    return grid


def norm(op: Norm, x: FloatArray, dense: Mapping[WeightName, FloatArray]) -> FloatArray:
    """RMSNorm or LayerNorm of x [rows, size]."""
    centred = x - x.mean(axis=1, keepdims=True) if op.kind == "layer" else x
    scale = np.sqrt((centred * centred).mean(axis=1, keepdims=True) + np.float32(op.eps))
    out: FloatArray = centred / scale * dense[op.weight]
    return out if op.bias is None else out + dense[op.bias]


def rope(op: Rope, x: FloatArray, positions: npt.NDArray[np.int32]) -> FloatArray:
    """x [rows, num_heads * head_dim] rotated by its rows' positions; sine and cosine in float32."""
    angle = positions.astype(np.float32)[:, None] * np.asarray(op.inv_freq, np.float32)
    cos, sin = (part[:, None, :] * np.float32(op.attention_factor) for part in (np.cos(angle), np.sin(angle)))
    heads = x.reshape(len(x), op.num_heads, op.head_dim)
    half = len(op.inv_freq)
    left, right = heads[..., :half], heads[..., half : 2 * half]
    rotated = [left * cos - right * sin, right * cos + left * sin, heads[..., 2 * half :]]
    return np.concatenate(rotated, axis=2).reshape(x.shape)


def activation(op: Activation, x: FloatArray) -> FloatArray:
    """The activation itself; gating is the caller's. SiLU is x/2 (1 + tanh(x/2)), which cannot overflow."""
    factor: FloatArray
    match op.kind:
        case "silu":
            factor = np.tanh(x * np.float32(0.5))
        case "gelu":
            factor = np.frompyfunc(math.erf, 1, 1)(x * np.float32(math.sqrt(0.5))).astype(np.float32)
        case "gelu_tanh":
            inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
            factor = np.tanh(inner)
    out: FloatArray = x * np.float32(0.5) * (1 + factor)
    return out


def softmax(scores: FloatArray) -> FloatArray:
    """Over the last axis, which may hold -inf."""
    exponents: FloatArray = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exponents /= exponents.sum(axis=-1, keepdims=True)
    return exponents
