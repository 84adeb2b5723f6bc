"""The inputs of one step that say where its rows are, and the tensors that follow from them; each made when needed."""

from functools import cached_property

import numpy as np

from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.layers import Layers, Tensor


class Step:
    """Rows are [batch, chunk] outside, [batch * chunk, width] in between, and [batch, heads, chunk, head_dim] around
    attention."""

    def __init__(self, layers: Layers, bounds: Bounds) -> None:
        self.layers = layers
        self.bounds = bounds
        self._chunk = 1 if bounds.is_decode else -1
        self._sizes: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def positions(self) -> Tensor:
        """int32 [batch, chunk]."""
        return self.layers.input(interface.POSITIONS, "INT32", (-1, self._chunk))

    @cached_property
    def write_at(self) -> Tensor:
        """int32 [batch]."""
        return self.layers.input(interface.WRITE_AT, "INT32", (-1,))

    @cached_property
    def lengths(self) -> Tensor:
        """int32 [batch]."""
        return self.layers.input(interface.LENGTHS, "INT32", (-1,))

    @cached_property
    def visible(self) -> Tensor:
        """int32 [longest]."""
        return self.layers.input(interface.VISIBLE, "INT32", (-1,))

    @cached_property
    def selected(self) -> Tensor:
        """int32 [selected]."""
        return self.layers.input(interface.SELECTED, "INT32", (-1,))

    def tokens(self) -> Tensor:
        """int32 [rows]."""
        return self.layers.reshape(self.layers.input(interface.TOKENS, "INT32", (-1, self._chunk)), (-1,))

    def hidden(self, name: str, width: int) -> Tensor:
        """An input of float32 rows [rows, width]."""
        return self.layers.reshape(self.layers.input(name, "FLOAT", (-1, self._chunk, width)), (-1, width))

    def padded(self, rows: Tensor, width: int) -> Tensor:
        """[rows, width] -> [batch, chunk, width]."""
        if self.bounds.is_decode:
            return self.layers.reshape(rows, (-1, 1, width))
        return self.layers.shuffle(rows, shape=self._known_sizes(width))

    def heads(self, rows: Tensor, num_heads: int, head_dim: int) -> Tensor:
        """[rows, num_heads * head_dim] -> [batch, num_heads, chunk, head_dim]."""
        if self.bounds.is_decode:
            return self.layers.reshape(rows, (-1, num_heads, 1, head_dim))
        return self.layers.shuffle(rows, shape=self._known_sizes(num_heads, head_dim), second=(0, 2, 1, 3))

    def rows(self, heads: Tensor, width: int) -> Tensor:
        """[batch, num_heads, chunk, head_dim] -> [rows, width]."""
        if self.bounds.is_decode:
            return self.layers.reshape(heads, (-1, width))
        return self.layers.shuffle(heads, first=(0, 2, 1, 3), shape=(-1, width))

    def first_tokens(self, cache: Tensor) -> Tensor:
        """[batch, kv_heads, capacity, head_dim] -> the first `longest` tokens of it."""
        _, kv_heads, _, head_dim = cache.shape
        sizes = self._cached((kv_heads, head_dim, -1), self._batch, kv_heads, self._longest, head_dim)
        return self.layers.slice(cache, (0, 0, 0, 0), sizes)

    @cached_property
    def is_visible(self) -> Tensor:
        """bool [batch, 1, chunk, longest]: whether a row may attend to a token of its slot."""
        tokens = self.layers.shuffle(self.visible, shape=self.layers.sizes(1, 1, 1, self._longest))
        return self.layers.elementwise(tokens, self.layers.reshape(self.after, (0, 1, -1, 1)), "LESS")

    @cached_property
    def after(self) -> Tensor:
        """int32 [batch, chunk]: the first position that a row does not see."""
        one = self.layers.constant("one", np.ones((1, 1), np.int32))
        return self.layers.elementwise(self.positions, one, "SUM")

    @cached_property
    def _longest(self) -> Tensor:
        """int64 [1]."""
        return self.layers.shape(self.visible)

    @cached_property
    def _batch(self) -> Tensor:
        """int64 [1]."""
        return self.layers.shape(self.write_at)

    @cached_property
    def _batch_and_chunk(self) -> Tensor:
        """int64 [2]."""
        return self.layers.shape(self.positions)

    def _known_sizes(self, *sizes: int) -> Tensor:
        """int64: batch, chunk, and these."""
        return self._cached(sizes, self._batch_and_chunk, *sizes)

    def _cached(self, key: tuple[int, ...], *parts: Tensor | int) -> Tensor:
        if key not in self._sizes:
            self._sizes[key] = self.layers.sizes(*parts)
        return self._sizes[key]
