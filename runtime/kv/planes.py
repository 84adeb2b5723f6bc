"""KV outside of the pool: one array per plane of a block (K, V, and for int8 the scales of K and of V)."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.kv import BlockId, KvContract, KvPool
from edgellm.runtime.kv.chunks import KvRange

Planes: TypeAlias = list[npt.NDArray[np.uint8]]
"""K, V (and K scale, V scale for int8), each uint8 [layers, tokens, heads, bytes per token and head]."""


def plane_widths(contract: KvContract) -> tuple[int, ...]:
    """Bytes per token and head of each plane, in block order."""
    if contract.dtype == "fp16":
        return 2 * contract.head_dim, 2 * contract.head_dim
    return contract.head_dim, contract.head_dim, 2, 2


def gather(pool: KvPool, blocks: Sequence[BlockId], where: KvRange) -> Planes:
    """Copy a range of a sequence out of the pool; `blocks` are the sequence's, in token order."""
    contract = pool.contract
    chosen = [blocks[index] for index in where.blocks(contract)]
    stored = np.stack([pool.read(chosen, layer) for layer in where.layers])
    heads = _stored_heads(pool, where)
    planes = []
    for plane in _plane_views(contract, stored):
        flat = plane.reshape(len(where.layers), -1, *plane.shape[3:])
        planes.append(np.ascontiguousarray(flat[:, : len(where.tokens), heads]))
    return planes


def scatter(pool: KvPool, blocks: Sequence[BlockId], where: KvRange, planes: Planes) -> None:
    """Copy planes into the pool; what lies around the range stays."""
    contract = pool.contract
    chosen = [blocks[index] for index in where.blocks(contract)]
    heads = _stored_heads(pool, where)
    whole_blocks = len(where.heads) == contract.kv_heads and where.tokens.stop % contract.block_tokens == 0
    for index, layer in enumerate(where.layers):
        stored = np.empty((len(chosen), contract.block_bytes), np.uint8) if whole_blocks else pool.read(chosen, layer)
        for target, plane in zip(_plane_views(contract, stored[None]), planes, strict=True):
            _fill(target[0], plane[index], heads)
        pool.write(chosen, layer, stored)


def _stored_heads(pool: KvPool, where: KvRange) -> slice:
    return slice(where.heads.start - pool.heads.start, where.heads.stop - pool.heads.start)


def _fill(target: npt.NDArray[np.uint8], plane: npt.NDArray[np.uint8], heads: slice) -> None:
    """target [blocks, block_tokens, kv_heads, width], a view; plane [tokens, heads, width]."""
    block_tokens = target.shape[1]
    full = len(plane) // block_tokens
    target[:full, :, heads] = plane[: full * block_tokens].reshape(full, block_tokens, *plane.shape[1:])
    rest = plane[full * block_tokens :]
    if len(rest):
        target[full, : len(rest), heads] = rest


def _plane_views(contract: KvContract, stored: npt.NDArray[np.uint8]) -> Planes:
    """stored [layers, blocks, block_bytes] -> per plane a view [layers, blocks, block_tokens, kv_heads, width]."""
    views, start = [], 0
    for width in plane_widths(contract):
        end = start + contract.block_tokens * contract.kv_heads * width
        shape = (*stored.shape[:2], contract.block_tokens, contract.kv_heads, width)
        views.append(stored[:, :, start:end].reshape(shape, copy=False))
        start = end
    return views
