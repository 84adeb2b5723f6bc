"""Which sequence's KV lies in which slot of the device's caches, and what of it is out of date. Pure bookkeeping.

The host's pool has the truth: every new row is written through to it, since others are sent it anyway. Slots are a copy
of the sequences that run. A copy is known by its blocks and their versions in the pool, which go up when anyone else
writes or frees a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

Blocks: TypeAlias = tuple[tuple[int, int], ...]
"""(block, version) of a sequence, in token order."""
_EMPTY: Final[Blocks] = ()


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A sequence's slot, and the first token that has to be copied into it from the pool."""

    slot: int
    first_token: int


@dataclass(kw_only=True, eq=False)
class SlotTable:
    """The device's slots; the sequence that ran longest ago gives way."""

    num_slots: int
    block_tokens: int
    _contents: dict[int, Blocks] = field(default_factory=dict)
    """Of each slot, as they were when the slot had all of it."""
    _recent: list[int] = field(default_factory=list)
    """All slots, the one used longest ago first."""

    def __post_init__(self) -> None:
        self._recent = list(range(self.num_slots))

    def arrange(self, sequences: Sequence[Blocks]) -> list[Loading]:
        """A slot for each sequence; it should hold these blocks before the step. Sequences that have none yet are
        given as their first block.

        Raises ValueError, and changes nothing, for more sequences than slots, or a block that two of them name.
        """
        self._check(sequences)
        owners = {self._contents[slot][0][0]: slot for slot in self._contents if self._contents[slot]}
        known = [owners.get(blocks[0][0]) for blocks in sequences]
        idle = iter([slot for slot in self._recent if slot not in known])
        loadings = []
        for blocks, slot in zip(sequences, known, strict=True):
            slot = next(idle) if slot is None else slot
            loadings.append(Loading(slot=slot, first_token=self._valid(slot, blocks)))
            self._contents[slot] = _EMPTY
            self._recent.remove(slot)
            self._recent.append(slot)
        return loadings

    def commit(self, slot: int, blocks: Blocks) -> None:
        """After the step: the slot holds all tokens that these blocks hold. A step that failed commits nothing, and
        its slots are loaded anew."""
        self._contents[slot] = blocks

    def _valid(self, slot: int, blocks: Blocks) -> int:
        """Tokens of the leading blocks that the slot has as they are."""
        same = 0
        for kept, wanted in zip(self._contents.get(slot, _EMPTY), blocks, strict=False):
            if kept != wanted:
                break
            same += 1
        return same * self.block_tokens

    def _check(self, sequences: Sequence[Blocks]) -> None:
        if len(sequences) > self.num_slots:
            raise ValueError(f"{len(sequences)} sequences in one step; this engine has {self.num_slots} slots")
        named = [block for blocks in sequences for block, _ in blocks]
        if len(set(named)) != len(named):
            raise ValueError("a KV block is named twice in one step; on this backend sequences share no blocks")
