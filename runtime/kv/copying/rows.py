"""Single tokens of many sequences, out of the pool, on the wire, and into another pool."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.engines.kv import BlockId, KvContract, KvPool, Slots
from edgellm.runtime.kv.codecs import CodecError, from_int8, int8_scale, to_int8

RAW, INT8 = "raw", "int8"


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """Positions of one sequence."""

    blocks: Sequence[BlockId]
    """The sequence's, in token order."""
    tokens: range


def carried_as(codec: str, contract: KvContract) -> str:
    """`raw` where the contract's KV is as small already: fewer bytes are a wish, not a need."""
    return codec if contract.dtype == "fp16" else RAW


def wire_row_bytes(codec: str, contract: KvContract) -> int:
    """Bytes of one token in one layer. Raises CodecError for a codec that cannot carry this contract's KV."""
    if codec == RAW:
        return contract.row_bytes
    if codec == INT8 and contract.dtype == "fp16":
        return 2 * contract.kv_heads * (contract.head_dim + 2)
    raise CodecError(f"copies of {contract.dtype} KV cannot be sent as {codec!r}; choose raw")


def read_spans(pool: KvPool, layers: range, spans: Sequence[Span], codec: str) -> npt.NDArray[np.uint8]:
    """uint8 [tokens of all spans, layers, wire_row_bytes], one span after the other: one gather for all of them."""
    rows = pool.read_rows(*_slots(pool.contract, spans), layers)
    return rows if codec == RAW else _quantize(pool.contract, rows)


def write_spans(pool: KvPool, layers: range, spans: Sequence[Span], rows: npt.NDArray[np.uint8], codec: str) -> None:
    """Put what `read_spans` gave into other blocks."""
    stored = rows if codec == RAW else _dequantize(pool.contract, rows)
    pool.write_rows(*_slots(pool.contract, spans), layers, stored)


def _slots(contract: KvContract, spans: Sequence[Span]) -> tuple[Slots, Slots]:
    """Block, and token in it, of every position."""
    parts = [_slots_of(contract.block_tokens, span) for span in spans]
    return np.concatenate([blocks for blocks, _ in parts]), np.concatenate([tokens for _, tokens in parts])


def _slots_of(block_tokens: int, span: Span) -> tuple[Slots, Slots]:
    positions = np.arange(span.tokens.start, span.tokens.stop)
    first = span.tokens.start // block_tokens
    blocks = np.array(span.blocks[first : (span.tokens.stop - 1) // block_tokens + 1], np.intp)
    return blocks[positions // block_tokens - first], positions % block_tokens


def _quantize(contract: KvContract, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Half to int8 with one scale per token and head, laid out like rows of an int8 contract."""
    values = rows.view(np.float16).reshape(*rows.shape[:2], 2, contract.kv_heads, contract.head_dim).astype(np.float32)
    scale = int8_scale(np.abs(values).max(axis=4, keepdims=True))
    parts = (to_int8(values, scale).view(np.uint8), scale.view(np.uint8))
    return np.concatenate([part.reshape(*rows.shape[:2], -1) for part in parts], axis=2)


def _dequantize(contract: KvContract, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    split = 2 * contract.kv_heads * contract.head_dim
    shape = (*rows.shape[:2], 2, contract.kv_heads, -1)
    values = rows[:, :, :split].view(np.int8).reshape(shape)
    scale = np.ascontiguousarray(rows[:, :, split:]).view(np.float16).reshape(shape)
    return from_int8(values, scale).reshape(*rows.shape[:2], -1).view(np.uint8)
