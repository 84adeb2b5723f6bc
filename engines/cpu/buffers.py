"""Where each buffer of a plan lies in the arena: buffers that are never alive together may share bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edgellm.engines.cpu.plan import Buffer

_ALIGNMENT: Final = 64


@dataclass(kw_only=True)
class _Life:
    row_bytes: int
    first_op: int
    last_op: int


class BufferPlanner:
    """Records which op touches which buffer; `place` packs them. Buffer numbers are given out in order."""

    def __init__(self) -> None:
        self._lives: list[_Life] = []

    def new(self, row_bytes: int, op: int) -> int:
        """A buffer that op number `op` writes first."""
        padded = -(-row_bytes // _ALIGNMENT) * _ALIGNMENT
        self._lives.append(_Life(row_bytes=padded, first_op=op, last_op=op))
        return len(self._lives) - 1

    def touch(self, buffer: int, op: int) -> None:
        """Op number `op` reads or writes the buffer."""
        self._lives[buffer].last_op = max(op, self._lives[buffer].last_op)

    def row_bytes(self, buffer: int) -> int:
        return self._lives[buffer].row_bytes

    def place(self, rounds: Sequence[int]) -> tuple[Buffer, ...]:
        """First fit, in order of creation. `rounds`: of each op; what ops of one round touch does not overlap."""
        placed: list[tuple[_Life, int]] = []
        for life in self._lives:
            rivals = sorted((offset, other.row_bytes) for other, offset in placed if _overlap(life, other, rounds))
            placed.append((life, _first_gap(rivals, life.row_bytes)))
        return tuple(Buffer(row_bytes=life.row_bytes, row_offset=offset) for life, offset in placed)


def _overlap(a: _Life, b: _Life, rounds: Sequence[int]) -> bool:
    return rounds[a.first_op] <= rounds[b.last_op] and rounds[b.first_op] <= rounds[a.last_op]


def _first_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Lowest offset with `size` free bytes; `taken` holds (offset, bytes), ascending."""
    offset = 0
    for start, length in taken:
        if offset + size <= start:
            return offset
        offset = max(offset, start + length)
    return offset
