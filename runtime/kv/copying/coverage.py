"""Which positions of which layers of one attempt are in the pool."""

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np

Origin: TypeAlias = Literal["own", "copy"]
"""Who writes a layer's KV: this node as a stage, or another that keeps a copy here."""


class Coverage:
    """Positions come in any order and more than once; what counts is the first that is missing, layer by layer."""

    def __init__(self, layers: range, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self._layers = layers
        self._origins: list[Origin | None] = [None] * len(layers)
        self._reach = np.zeros(len(layers), np.int64)
        """[layers]: the first missing position."""
        self._ahead: list[tuple[slice, range]] = []
        """Columns of layers and positions beyond a missing one; those of the same columns do not touch."""

    def add(self, layers: range, tokens: range, origin: Origin) -> None:
        """Raises IndexError for layers or positions outside of what was reserved."""
        inside = layers and self._has(layers) and 0 <= tokens.start <= tokens.stop <= self.capacity_tokens
        if not inside:
            raise IndexError(f"{layers}, {tokens} are outside of {self._layers}, {self.capacity_tokens} tokens")
        columns = self._columns(layers)
        self._origins[columns] = [origin] * len(layers)
        if (self._reach[columns] < tokens.start).any():
            self._add_ahead(columns, tokens)
        else:
            np.maximum(self._reach[columns], tokens.stop, out=self._reach[columns])
        while any(self._join(*part) for part in self._ahead):
            pass
        self._ahead = [(where, part) for where, part in self._ahead if self._reach[where].min() < part.stop]

    def pass_on(self, tokens: int) -> None:
        """To another attempt: everything from this position on counts as missing, and nobody computes here yet."""
        self._origins = [origin and "copy" for origin in self._origins]
        np.minimum(self._reach, tokens, out=self._reach)
        cut = [(columns, range(part.start, min(part.stop, tokens))) for columns, part in self._ahead]
        self._ahead = [(columns, part) for columns, part in cut if part]

    def reach(self, layers: range) -> int:
        """The first position that is missing in one of the layers; 0 for layers that this node has no room for."""
        return int(self._reach[self._columns(layers)].min()) if layers and self._has(layers) else 0

    def is_own(self, layers: range) -> bool:
        """Whether this node writes one of the layers itself."""
        return "own" in self._origins[self._columns(layers)]

    def runs(self) -> Iterator[tuple[range, int, Origin]]:
        """Layers of which something was added, as runs of equal reach and origin: layers, reach, origin."""
        columns = list(zip(self._layers, self._reach.tolist(), self._origins, strict=True))
        for (reach, origin), run in groupby(columns, key=lambda column: column[1:]):
            layers = [layer for layer, _, _ in run]
            if origin is not None:
                yield range(layers[0], layers[-1] + 1), reach, origin

    def _has(self, layers: range) -> bool:
        return self._layers.start <= layers.start and layers.stop <= self._layers.stop

    def _columns(self, layers: range) -> slice:
        return slice(layers.start - self._layers.start, layers.stop - self._layers.start)

    def _add_ahead(self, columns: slice, tokens: range) -> None:
        """Together with the parts of the same columns that it touches."""
        apart = []
        for where, part in self._ahead:
            if where == columns and part.start <= tokens.stop and tokens.start <= part.stop:
                tokens = range(min(part.start, tokens.start), max(part.stop, tokens.stop))
            else:
                apart.append((where, part))
        self._ahead = [*apart, (columns, tokens)]

    def _join(self, columns: slice, tokens: range) -> bool:
        """Move layers on that have reached this part; whether one has moved."""
        reach = self._reach[columns]
        moved = (reach >= tokens.start) & (reach < tokens.stop)
        reach[moved] = tokens.stop
        return bool(moved.any())
