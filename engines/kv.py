"""The KV contract that all engines of a bundle share, and the paged pool of engines that live in host memory."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NewType, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.engines.memory import private_memory

BlockId = NewType("BlockId", int)
Slots: TypeAlias = npt.NDArray[np.intp]
BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class KvContract:
    """How KV is stored, byte for byte, so that a prefill engine's blocks are a decode engine's input.

    One block of one layer is `K [block_tokens, kv_heads, head_dim]` then `V` likewise, in `dtype`; keys are stored
    after RoPE. `int8` is followed by `K scale [block_tokens, kv_heads]` and `V scale` likewise, IEEE half, with
    value = int8 * scale. `num_layers` counts the whole model.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["fp16", "int8"] = "fp16"
    block_tokens: int = BLOCK_TOKENS

    @property
    def values_per_block(self) -> int:
        """Elements of K (or of V) in one block of one layer."""
        return self.block_tokens * self.kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        if self.dtype == "fp16":
            return 4 * self.values_per_block
        return 2 * self.values_per_block + 4 * self.block_tokens * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.block_bytes // self.block_tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers."""
        return self.num_layers * self.row_bytes

    @property
    def sha256(self) -> str:
        """Identity compared at every handshake."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)


class KvPoolExhaustedError(RuntimeError):
    """The pool has fewer free blocks than were asked for; nothing was allocated."""


class KvPool(Protocol):
    """Owns the KV blocks of one node; a block id means the same 32 token slots in every layer of `layers`."""

    contract: KvContract
    """As this pool stores it: with its share of the KV heads."""
    layers: range
    heads: range
    """KV heads of the model that are kept here: all, but on a tensor-parallel rank."""
    num_blocks: int

    @property
    def free_blocks(self) -> int: ...

    def allocate(self, count: int) -> list[BlockId]:
        """Take `count` blocks, contents undefined. Raises KvPoolExhaustedError and takes none if fewer are free."""
        ...

    def free(self, blocks: Sequence[BlockId]) -> None:
        """Give blocks back. Raises ValueError, and frees none, if one of them is not allocated or is named twice."""
        ...

    def read(self, blocks: Sequence[BlockId], layer: int) -> npt.NDArray[np.uint8]:
        """Copy of the blocks of one model layer: uint8 [len(blocks), contract.block_bytes]."""
        ...

    def write(self, blocks: Sequence[BlockId], layer: int, data: npt.NDArray[np.uint8]) -> None:
        """Overwrite whole blocks of one model layer from uint8 [len(blocks), contract.block_bytes]."""
        ...

    def read_rows(self, blocks: Slots, tokens: Slots, layers: range) -> npt.NDArray[np.uint8]:
        """Copy of token `tokens[r]` of block `blocks[r]`: uint8 [rows, len(layers), contract.row_bytes], where a row is
        K, V and, where the contract has them, their scales."""
        ...

    def write_rows(self, blocks: Slots, tokens: Slots, layers: range, rows: npt.NDArray[np.uint8]) -> None:
        """Overwrite single tokens from what `read_rows` gives; no slot is named twice."""
        ...


class HostKvPool:
    """KvPool in host memory, for backends that compute there; pages are taken from the system when first touched."""

    def __init__(self, contract: KvContract, layers: range, num_blocks: int, *, first_head: int = 0) -> None:
        self.contract = contract
        self.layers = layers
        self.heads = range(first_head, first_head + contract.kv_heads)
        self.num_blocks = num_blocks
        shape = (len(layers), num_blocks, contract.block_bytes)
        self.data = private_memory(shape[0] * shape[1] * shape[2]).reshape(shape)
        """uint8 [layers, num_blocks, block_bytes]; native engines compute on this memory in place."""
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]  # changed in place: windows share it
        self._is_free = [True] * num_blocks
        self.versions = np.zeros((len(layers), num_blocks), np.int64)
        """Goes up when a block is freed or written through this class: a copy of its bytes elsewhere is out of date."""

    def window(self, layers: range) -> "HostKvPool":
        """The same pool, seen by an engine of only these layers: blocks, their owners and their bytes are shared."""
        if not self.layers.start <= layers.start < layers.stop <= self.layers.stop:
            raise ValueError(f"layers {layers} are not in a pool of layers {self.layers}")
        window = copy.copy(self)
        first = self.layers.start
        inside = slice(layers.start - first, layers.stop - first)
        window.layers, window.data, window.versions = layers, self.data[inside], self.versions[inside]
        return window

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[BlockId]:
        if count > len(self._free):
            raise KvPoolExhaustedError(f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def free(self, blocks: Sequence[BlockId]) -> None:
        wrong = [block for block in blocks if not 0 <= block < self.num_blocks or self._is_free[block]]
        if wrong or len(set(blocks)) != len(blocks):
            raise ValueError(f"KV blocks {wrong or list(blocks)} are not allocated, or named twice")
        for block in blocks:
            self._is_free[block] = True
        self.versions[:, np.asarray(blocks, np.intp)] += 1
        self._free.extend(reversed(blocks))

    def read(self, blocks: Sequence[BlockId], layer: int) -> npt.NDArray[np.uint8]:
        return np.take(self.data[layer - self.layers.start], np.asarray(blocks, np.intp), axis=0)

    def write(self, blocks: Sequence[BlockId], layer: int, data: npt.NDArray[np.uint8]) -> None:
        self.data[layer - self.layers.start, np.asarray(blocks, np.intp)] = data
        self.versions[layer - self.layers.start, np.asarray(blocks, np.intp)] += 1

    def read_rows(self, blocks: Slots, tokens: Slots, layers: range) -> npt.NDArray[np.uint8]:
        shape = (len(blocks), len(layers), -1)
        planes = [plane[:, blocks, :, tokens].reshape(shape) for plane in self._planes(layers)]
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)

    def write_rows(self, blocks: Slots, tokens: Slots, layers: range, rows: npt.NDArray[np.uint8]) -> None:
        start = 0
        for plane in self._planes(layers):
            end = start + 2 * plane.shape[4]
            plane[:, blocks, :, tokens] = rows[:, :, start:end].reshape(len(blocks), len(layers), 2, -1)
            start = end
        first = self.layers.start
        self.versions[layers.start - first : layers.stop - first, blocks] += 1

    def _planes(self, layers: range) -> list[npt.NDArray[np.uint8]]:
        """Views [layers, num_blocks, K and V, block_tokens, bytes of one token]: of values, and of scales."""
        first, contract = self.layers.start, self.contract
        data = self.data[layers.start - first : layers.stop - first]
        shape = (len(layers), self.num_blocks, 2, contract.block_tokens, -1)
        if contract.dtype == "fp16":
            return [data.reshape(shape, copy=False)]
        split = 2 * contract.values_per_block
        return [data[:, :, :split].reshape(shape, copy=False), data[:, :, split:].reshape(shape, copy=False)]
