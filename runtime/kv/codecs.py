"""How KV is encoded on the wire: as stored, or int8; each optionally compressed with zstd.

`raw`: the planes one after the other, each [layers, tokens, heads, width].
`int8` (fp16 contracts only): K with one scale per layer, block, head and channel, V with one per layer, token and
head (KIVI, arXiv 2402.02750); the first tokens of a sequence, on which attention piles up, stay in half (KVQuant,
arXiv 2401.18079).
"""

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from edgellm.engines.kv import KvContract
from edgellm.runtime.kv.chunks import KvRange
from edgellm.runtime.kv.planes import Planes, plane_widths

CodecChoice: TypeAlias = Literal["auto", "raw", "raw+zstd", "int8", "int8+zstd"]
ZSTD_SUFFIX: Final = "+zstd"
ZSTD_LEVEL: Final = 1
FIRST_TOKENS_IN_HALF: Final = 5


class CodecError(ValueError):
    """An encoded chunk that does not decode to its announced shape."""


def codec_names(contract: KvContract) -> tuple[str, ...]:
    """Codecs that can carry this contract's KV, lossless first."""
    base = ("raw", "int8") if contract.dtype == "fp16" else ("raw",)
    return tuple(name + suffix for name in base for suffix in ("", ZSTD_SUFFIX))


def encode(codec: str, contract: KvContract, where: KvRange, planes: Planes) -> bytes:
    """Raises CodecError for a codec that cannot carry this contract's KV."""
    if codec not in codec_names(contract):
        raise CodecError(f"codec {codec!r} cannot carry {contract.dtype} KV; choose one of {codec_names(contract)}")
    arrays = _quantize(contract, where, planes) if codec.startswith("int8") else planes
    encoded = b"".join(array.tobytes() for array in arrays)
    if codec.endswith(ZSTD_SUFFIX):
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(encoded)
    return encoded


def decode(codec: str, contract: KvContract, where: KvRange, encoded: bytes) -> Planes:
    """Raises CodecError if the codec is unknown or the bytes do not have the announced shape."""
    if codec not in codec_names(contract):
        raise CodecError(f"codec {codec!r} is not one of {codec_names(contract)}")
    shapes = _int8_shapes(contract, where) if codec.startswith("int8") else _raw_shapes(contract, where)
    expected = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes)
    plain = _decompress(encoded, expected) if codec.endswith(ZSTD_SUFFIX) else encoded
    if len(plain) != expected:
        raise CodecError(f"{len(plain)} bytes arrived for {where}, {expected} expected")
    arrays = _split(plain, shapes)
    return _dequantize(contract, where, arrays) if codec.startswith("int8") else arrays


_Shapes: TypeAlias = list[tuple[tuple[int, ...], np.dtype[Any]]]
_Arrays: TypeAlias = list[npt.NDArray[Any]]


def _decompress(encoded: bytes, expected: int) -> bytes:
    """The size that a frame declares is allocated before anything is read, so it is compared first."""
    try:
        declared = zstandard.frame_content_size(encoded)
        if declared != expected:
            raise CodecError(f"zstd: the frame declares {declared} bytes, {expected} expected")
        return zstandard.ZstdDecompressor().decompress(encoded)
    except zstandard.ZstdError as error:
        raise CodecError(f"zstd: {error}") from error


def _split(plain: bytes, shapes: _Shapes) -> _Arrays:
    arrays: _Arrays = []
    start = 0
    for shape, dtype in shapes:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(plain, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    return arrays


def _raw_shapes(contract: KvContract, where: KvRange) -> _Shapes:
    return [((*where.shape, width), np.dtype(np.uint8)) for width in plane_widths(contract)]


def _kept(where: KvRange) -> int:
    """Tokens of the range that stay in half."""
    return max(0, min(FIRST_TOKENS_IN_HALF, where.tokens.stop) - where.tokens.start)


def _int8_shapes(contract: KvContract, where: KvRange) -> _Shapes:
    """K and V kept in half, K int8, K scale, V int8, V scale."""
    layers, tokens, heads = where.shape
    half, int8, dim = np.dtype(np.float16), np.dtype(np.int8), contract.head_dim
    kept = (layers, _kept(where), heads, dim)
    quantized = (layers, tokens, heads, dim)
    blocks = len(where.blocks(contract))
    k_scale, v_scale = (layers, blocks, heads, dim), (layers, tokens, heads, 1)
    return [(kept, half), (kept, half), (quantized, int8), (k_scale, half), (quantized, int8), (v_scale, half)]


def _quantize(contract: KvContract, where: KvRange, planes: Planes) -> _Arrays:
    k_half, v_half = (plane.view(np.float16) for plane in planes)
    k, v = k_half.astype(np.float32), v_half.astype(np.float32)
    k_scale = np.stack([int8_scale(np.abs(block).max(axis=1)) for block in _by_block(contract, k)], axis=1)
    v_scale = int8_scale(np.abs(v).max(axis=3, keepdims=True))
    k_int8 = to_int8(k, np.repeat(k_scale, contract.block_tokens, axis=1)[:, : k.shape[1]])
    kept = _kept(where)
    return [k_half[:, :kept], v_half[:, :kept], k_int8, k_scale, to_int8(v, v_scale), v_scale]


def _dequantize(contract: KvContract, where: KvRange, arrays: _Arrays) -> Planes:
    k_kept, v_kept, k_int8, k_scale, v_int8, v_scale = arrays
    k = from_int8(k_int8, np.repeat(k_scale, contract.block_tokens, axis=1)[:, : k_int8.shape[1]])
    v = from_int8(v_int8, v_scale)
    kept = _kept(where)
    k[:, :kept], v[:, :kept] = k_kept, v_kept
    return [k.view(np.uint8), v.view(np.uint8)]


def _by_block(contract: KvContract, plane: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    starts = range(0, plane.shape[1], contract.block_tokens)
    return [plane[:, start : start + contract.block_tokens] for start in starts]


def int8_scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Largest magnitude over 127, rounded up to half, so that no value leaves [-127, 127]."""
    exact = largest / 127
    scale = exact.astype(np.float16)
    rounded_up: npt.NDArray[np.float16] = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    return rounded_up


def to_int8(values: npt.NDArray[np.float32], scale: npt.NDArray[np.float16]) -> npt.NDArray[np.int8]:
    """Nearest multiples of the scale; a scale of 0 stores zeros."""
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    rounded: npt.NDArray[np.int8] = np.rint(values / divisor).astype(np.int8)
    return rounded


def from_int8(quantized: npt.NDArray[np.int8], scale: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Multiplied in single precision, rounded to half."""
    product: npt.NDArray[np.float16] = (quantized * scale.astype(np.float32)).astype(np.float16)
    return product
