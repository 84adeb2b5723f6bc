"""Each layer type that the emitters use, on arrays: its Python class and what it computes.

An evaluator gets the network's evaluator, the layer, and its inputs as `input_names` lists them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgellm.engines.tensorrt.evaluate import NetworkEvaluator

Array: TypeAlias = npt.NDArray[Any]
Inputs: TypeAlias = Sequence[Array]
Evaluate: TypeAlias = Callable[["NetworkEvaluator", Any, Inputs], Array]

_BINARY: Final[Mapping[str, Callable[[Array, Array], Array]]] = {
    "SUM": np.add,
    "SUB": np.subtract,
    "PROD": np.multiply,
    "DIV": np.divide,
    "LESS": np.less,
}


def input_names(layer: Any) -> tuple[str, ...]:
    """The inputs that are set, in order. An attention's lie at its entrance, and its mask and lengths apart."""
    if layer.type.name == "ATTENTION_OUTPUT":
        attention = layer.attention
        tensors = [attention.get_input(index) for index in range(3)]
        tensors += [attention.mask, attention.key_value_lengths]
    else:
        tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
    return tuple(tensor.name for tensor in tensors if tensor is not None)


def _constant(network: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """TensorRT gives the values back as an array, but for INT4, of which only the packed bytes it reads are known."""
    values = layer.weights if isinstance(layer.weights, np.ndarray) else unpack_nibbles(network.constants[layer.name])
    return values.reshape(tuple(layer.shape))


def unpack_nibbles(packed: Array) -> Array:
    """uint8 [size / 2] -> int8 [size] in [-8, 7]; the first value of a pair is in the low nibble."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.where(pairs > 7, pairs - 16, pairs).astype(np.int8)


def _dequantize(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """By block where the scale has q's rank, else by index of the layer's axis."""
    q, scale = inputs
    if scale.ndim == q.ndim:
        for axis, (size, blocks) in enumerate(zip(q.shape, scale.shape, strict=True)):
            scale = np.repeat(scale, size // blocks, axis=axis)
        return q.astype(np.float32) * scale.astype(np.float32)
    shape = [1] * q.ndim
    shape[layer.axis] = -1
    return q.astype(np.float32) * scale.astype(np.float32).reshape(shape)


def _gather(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    data, indices = inputs
    if indices.size and not 0 <= indices.min() <= indices.max() < data.shape[layer.axis]:
        raise ValueError(f"{layer.name} reads index {indices.max()} of {data.shape[layer.axis]}")
    return np.take(data, indices, axis=layer.axis)


def _matmul(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    a, b = inputs
    a = a.swapaxes(-1, -2) if layer.op0.name == "TRANSPOSE" else a
    b = b.swapaxes(-1, -2) if layer.op1.name == "TRANSPOSE" else b
    product: Array = a.astype(np.float32) @ b.astype(np.float32)
    return product


def _elementwise(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    a, b = inputs
    if a.ndim != b.ndim:
        raise ValueError(f"{layer.name} has operands of rank {a.ndim} and {b.ndim}")
    return _BINARY[layer.op.name](a, b)


def _unary(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    root: Array = {"SQRT": np.sqrt}[layer.op.name](inputs[0])
    return root


def _activation(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    (x,) = inputs
    factor: Array
    match layer.type.name:
        case "SIGMOID":
            factor = np.exp(-x)
            return np.asarray(1 / (1 + factor))
        case "GELU_ERF":
            factor = np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))
        case "GELU_TANH":
            factor = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        case other:
            raise NotImplementedError(f"activation {other}")
    return np.asarray(x * (1 + factor) / 2)


def _reduce(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    (x,) = inputs
    mean: Array = {"AVG": np.mean}[layer.op.name](x, axis=_axes(layer.axes, x.ndim), keepdims=layer.keep_dims)
    return mean


def _softmax(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    (x,) = inputs
    return softmax(x, _axes(layer.axes, x.ndim))


def softmax(x: Array, axes: tuple[int, ...]) -> Array:
    exponents = np.exp(x - x.max(axis=axes, keepdims=True))
    normalized: Array = exponents / exponents.sum(axis=axes, keepdims=True)
    return normalized


def _axes(mask: int, rank: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if mask >> axis & 1)


def _cast(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    return inputs[0]


def _select(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    condition, then, otherwise = inputs
    return np.where(condition, then, otherwise)


def _concat(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    return np.concatenate(inputs, axis=layer.axis)


def _shape(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    return np.array(inputs[0].shape, np.int64)


def _shuffle(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """Transpose, reshape, transpose; a 0 among sizes known at build time copies the input's size at that place."""
    x = inputs[0].transpose(tuple(layer.first_transpose)[: inputs[0].ndim])
    if len(inputs) > 1:
        shape = tuple(int(size) for size in inputs[1])
    else:
        shape = tuple(x.shape[index] if size == 0 else size for index, size in enumerate(layer.reshape_dims))
    reshaped = x.reshape(shape)
    return reshaped.transpose(tuple(layer.second_transpose)[: reshaped.ndim])


def _slice(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    x, sizes = inputs[0], tuple(layer.shape) if len(inputs) == 1 else tuple(int(size) for size in inputs[1])
    spans = list(zip(layer.start, sizes, layer.stride, strict=True))
    for (start, size, stride), available in zip(spans, x.shape, strict=True):
        if start + (size - 1) * stride >= available:
            raise ValueError(f"{layer.name} reads {size} of {available} from {start}")
    return x[tuple(slice(start, start + size * stride, stride) for start, size, stride in spans)]


def _rotary(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """x [batch, heads, chunk, head_dim]; the tables [positions, rotary_dim / 2] are read at the position ids."""
    x, cos, sin, positions = inputs
    dim = layer.rotary_embedding_dim or x.shape[-1]
    cos, sin = (table[positions][:, None] for table in (cos, sin))
    if layer.interleaved:
        raise NotImplementedError(f"{layer.name} is interleaved")
    left, right = x[..., : dim // 2], x[..., dim // 2 : dim]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin, x[..., dim:]], axis=-1)


def _cache_update(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """out[i, :, write_at[i] + s] = update[i, :, s]; writing beyond the cache is undefined, and an error here."""
    cache, update, write_at = inputs
    out, count = cache.copy(), update.shape[2]
    for slot, start in enumerate(write_at):
        if start + count > out.shape[2]:
            raise ValueError(f"{layer.name} writes {count} tokens at {start} of {out.shape[2]}")
        out[slot, :, start : start + count] = update[slot]
    return out


def _attention_input(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """Only a border; everything happens at the other one."""
    return inputs[0]


def _attention_output(_: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    """softmax(q k^T, masked) v, with query heads that share the keys of a group; q is scaled already."""
    q, k, v, *limits = inputs
    k, v = (np.repeat(heads, q.shape[1] // k.shape[1], axis=1) for heads in (k, v))
    scores = q @ k.swapaxes(-1, -2)
    weights = softmax(np.where(_attention_mask(layer.attention, limits, scores.shape), scores, -np.inf), (3,))
    attended: Array = weights @ v
    return attended


def _attention_mask(attention: Any, limits: list[Array], shape: tuple[int, ...]) -> Array:
    """bool [batch, 1, rows, keys]; `limits` are the mask and the lengths, where they are set."""
    batch, _, rows, keys = shape
    mask = np.True_ if attention.mask is None else limits.pop(0)
    lengths = limits.pop(0) if limits else np.full(batch, keys)
    lengths = lengths[:, None, None, None]
    row, key = np.arange(rows)[:, None], np.arange(keys)
    visible = mask & (key < lengths)
    match attention.causal_kind.name:
        case "LOWER_RIGHT":
            visible = visible & (key <= row + (lengths - rows))
        case "UPPER_LEFT":
            visible = visible & (key <= row)
    return visible


def _collective(network: "NetworkEvaluator", layer: Any, inputs: Inputs) -> Array:
    if network.all_reduce is None:
        raise ValueError(f"{layer.name} sums over ranks: give the evaluator an all_reduce")
    return network.all_reduce(inputs[0])


EVALUATORS: Final[Mapping[str, tuple[str, Evaluate]]] = {
    "CONSTANT": ("IConstantLayer", _constant),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "GATHER": ("IGatherLayer", _gather),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "REDUCE": ("IReduceLayer", _reduce),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "CAST": ("ICastLayer", _cast),
    "SELECT": ("ISelectLayer", _select),
    "CONCATENATION": ("IConcatenationLayer", _concat),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _cache_update),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention_output),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _collective),
}
