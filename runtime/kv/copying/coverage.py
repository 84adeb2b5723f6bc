"""Which positions of which layers of one attempt are in the pool."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeAlias

Origin: TypeAlias = Literal["own", "copy"]
"""Who writes a layer's KV: this node as a stage, or another that keeps a copy here."""


@dataclass(kw_only=True, eq=False)
class _Section:
    """Layers that have always been added to together."""

    layers: range
    origin: Origin | None = None
    reach: int = 0
    """The first missing position."""
    ahead: tuple[range, ...] = ()
    """Positions beyond it, in order, apart from each other."""

    def add(self, tokens: range) -> None:
        if not self.ahead and tokens.start <= self.reach:
            self.reach = max(self.reach, tokens.stop)
        elif tokens:
            self._join(sorted((*self.ahead, tokens), key=lambda part: part.start))

    def cut(self, tokens: int) -> None:
        self.reach = min(self.reach, tokens)
        self.ahead = tuple(range(part.start, min(part.stop, tokens)) for part in self.ahead if part.start < tokens)

    def _join(self, parts: list[range]) -> None:
        ahead: list[range] = []
        for part in parts:
            if part.start <= self.reach:
                self.reach = max(self.reach, part.stop)
            elif ahead and part.start <= ahead[-1].stop:
                ahead[-1] = range(ahead[-1].start, max(ahead[-1].stop, part.stop))
            else:
                ahead.append(part)
        self.ahead = tuple(ahead)


class Coverage:
    """Positions come in any order and more than once; what counts is the first that is missing, layer by layer."""

    def __init__(self, layers: range, capacity_tokens: int) -> None:
        self._layers = layers
        self._capacity_tokens = capacity_tokens
        self._sections = [_Section(layers=layers)]

    def add(self, layers: range, tokens: range, origin: Origin) -> None:
        """Raises IndexError for layers or positions outside of what was reserved."""
        if not self._has(layers) or not 0 <= tokens.start <= tokens.stop <= self._capacity_tokens:
            raise IndexError(f"{layers}, {tokens} are outside of {self._layers}, {self._capacity_tokens} tokens")
        self._split(layers.start)
        self._split(layers.stop)
        for section in self._touching(layers):
            section.origin = origin
            section.add(tokens)

    def pass_on(self, tokens: int) -> None:
        """To another attempt: everything from this position on counts as missing, and nobody computes here yet."""
        for section in self._sections:
            section.origin = section.origin and "copy"
            section.cut(tokens)

    def reach(self, layers: range) -> int:
        """The first position that is missing in one of the layers; 0 for layers that this node has no room for."""
        return min(section.reach for section in self._touching(layers)) if self._has(layers) else 0

    def is_own(self, layers: range) -> bool:
        """Whether this node writes one of the layers itself."""
        return any(section.origin == "own" for section in self._touching(layers))

    def runs(self) -> Iterator[tuple[range, int, Origin]]:
        """Layers of which something was added, as runs of equal reach and origin: layers, reach, origin."""
        for (reach, origin), run in groupby(self._sections, key=lambda section: (section.reach, section.origin)):
            sections = list(run)
            if origin is not None:
                yield range(sections[0].layers.start, sections[-1].layers.stop), reach, origin

    def _has(self, layers: range) -> bool:
        return self._layers.start <= layers.start < layers.stop <= self._layers.stop

    def _touching(self, layers: range) -> list[_Section]:
        sections = self._sections
        return [one for one in sections if one.layers.start < layers.stop and layers.start < one.layers.stop]

    def _split(self, layer: int) -> None:
        """A section begins at this layer, or after the last."""
        for index, section in enumerate(self._sections):
            if section.layers.start < layer < section.layers.stop:
                first = replace(section, layers=range(section.layers.start, layer))
                section.layers = range(layer, section.layers.stop)
                self._sections.insert(index, first)
                return
