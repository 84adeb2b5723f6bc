"""Token rows of K and V as they are stored in the paged pool: the exact meaning of the KV contract's bytes."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgellm.engines.kv import BlockId, KvContract, KvPool
from edgellm.engines.weights import FloatArray

IndexArray = npt.NDArray[np.int32]


class KvRows(Protocol):
    """K and V by token slot. Slot i of a sequence is token `i % block_tokens` of block `i // block_tokens`."""

    def write(self, layer: int, blocks: IndexArray, tokens: IndexArray, k: FloatArray, v: FloatArray) -> None:
        """Store row r of k and v [rows, kv_heads, head_dim] as token `tokens[r]` of block `blocks[r]`."""
        ...

    def read(self, layer: int, blocks: IndexArray, length: int) -> tuple[FloatArray, FloatArray]:
        """The first `length` tokens of a sequence's blocks: k and v, each [length, kv_heads, head_dim]."""
        ...


class PoolKvRows:
    """Rows in a KvPool, rounded to the contract's dtype.

    int8: scale = half(max|x| / 127) over one head of one token, q = round_half_to_even(x / scale) within [-127, 127];
    a scale of 0 stores zeros.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool

    def write(self, layer: int, blocks: IndexArray, tokens: IndexArray, k: FloatArray, v: FloatArray) -> None:
        touched, which = np.unique(blocks, return_inverse=True)
        ids = [BlockId(int(block)) for block in touched]
        data = self._pool.read(ids, layer)
        rows = np.stack([k, v], axis=1)
        values, scales = _views(self._pool.contract, data)
        if scales is None:
            values[which, :, tokens] = rows.astype(np.float16)
        else:
            values[which, :, tokens], scales[which, :, tokens] = _to_int8(rows)
        self._pool.write(ids, layer, data)

    def read(self, layer: int, blocks: IndexArray, length: int) -> tuple[FloatArray, FloatArray]:
        data = self._pool.read([BlockId(int(block)) for block in blocks], layer)
        values, scales = _views(self._pool.contract, data)
        rows = values.astype(np.float32)
        if scales is not None:
            rows *= scales.astype(np.float32)[..., None]
        return _first_tokens(rows, length)


class Float32KvRows:
    """Rows kept unrounded beside the pool, whose bytes stay unused: for comparing with float32 models."""

    def __init__(self, pool: KvPool) -> None:
        contract = pool.contract
        shape = (pool.num_blocks, 2, contract.block_tokens, contract.kv_heads, contract.head_dim)
        self._rows = {layer: np.zeros(shape, np.float32) for layer in pool.layers}

    def write(self, layer: int, blocks: IndexArray, tokens: IndexArray, k: FloatArray, v: FloatArray) -> None:
        self._rows[layer][blocks, :, tokens] = np.stack([k, v], axis=1)

    def read(self, layer: int, blocks: IndexArray, length: int) -> tuple[FloatArray, FloatArray]:
        return _first_tokens(self._rows[layer][blocks], length)


def _first_tokens(rows: FloatArray, length: int) -> tuple[FloatArray, FloatArray]:
    """[blocks, 2, block_tokens, kv_heads, head_dim] -> k and v, each [length, kv_heads, head_dim]."""
    k, v = rows[:, 0], rows[:, 1]
    return k.reshape(-1, *k.shape[2:])[:length], v.reshape(-1, *v.shape[2:])[:length]


def _views(
    contract: KvContract, data: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float16 | np.int8], npt.NDArray[np.float16] | None]:
    """Views of block bytes: values [blocks, 2, block_tokens, kv_heads, head_dim], and for int8 the scales."""
    shape = (len(data), 2, contract.block_tokens, contract.kv_heads, contract.head_dim)
    if contract.dtype == "fp16":
        return data.view(np.float16).reshape(shape), None
    split = 2 * contract.values_per_block
    return data[:, :split].view(np.int8).reshape(shape), data[:, split:].view(np.float16).reshape(shape[:-1])


def _to_int8(rows: FloatArray) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """rows [..., head_dim] -> q, and scale [...]."""
    scale = (np.abs(rows).max(axis=-1) / 127).astype(np.float16)
    divisor = np.where(scale == 0, np.float32(np.inf), scale.astype(np.float32))
    q = np.clip(np.rint(rows / divisor[..., None]), -127, 127)
    return q.astype(np.int8), scale
