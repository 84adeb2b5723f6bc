"""Who holds which KV blocks of this node, and when they may be given back."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from edgellm.engines.kv import BlockId, KvPool
from edgellm.runtime.kv.types import Attempt


@dataclass(kw_only=True, eq=False)
class _Holding:
    attempt: Attempt
    blocks: list[BlockId]
    pins: int = 0
    """Running steps that read or write the blocks."""
    dropped: bool = False


class BlockLedger:
    """Blocks by attempt. Blocks of a step that is running are pinned: dropping them frees them when the step ends.

    A takeover gives an attempt's blocks to the next attempt. Steps that run meanwhile still know them by the old one.
    """

    def __init__(self, pool: KvPool) -> None:
        self.pool = pool
        self._holdings: dict[Attempt, _Holding] = {}
        self._pinned: defaultdict[Attempt, list[_Holding]] = defaultdict(list)
        """By the attempt under which a step knows them."""

    def __contains__(self, attempt: Attempt) -> bool:
        """Whether the attempt holds blocks, dropped or not."""
        return attempt in self._holdings

    def fits(self, tokens: int) -> bool:
        """Whether blocks for `tokens` tokens are free now."""
        return self.pool.contract.blocks_for(tokens) <= self.pool.free_blocks

    def ever_fits(self, tokens: int) -> bool:
        """Whether an empty pool could hold `tokens` tokens."""
        return self.pool.contract.blocks_for(tokens) <= self.pool.num_blocks

    def reserve(self, attempt: Attempt, tokens: int) -> list[BlockId]:
        """Take blocks for `tokens` tokens. Raises KvPoolExhaustedError, or ValueError if the attempt holds some."""
        if attempt in self._holdings:
            raise ValueError(f"{attempt} already holds KV blocks")
        blocks = self.pool.allocate(self.pool.contract.blocks_for(tokens))
        self._holdings[attempt] = _Holding(attempt=attempt, blocks=blocks)
        return blocks

    def rename(self, old: Attempt, new: Attempt) -> None:
        """Give the blocks of one attempt to another, pinned or not. Nothing is reserved under the old one again.

        Raises KeyError if there are none, or they were dropped; ValueError if the other attempt holds some.
        """
        if new in self._holdings:
            raise ValueError(f"{new} already holds KV blocks")
        if self._holdings[old].dropped:
            raise KeyError(old)
        holding = self._holdings.pop(old)
        holding.attempt = new
        self._holdings[new] = holding

    def blocks(self, attempt: Attempt) -> list[BlockId]:
        """Blocks of an attempt in token order. Raises KeyError if it holds none."""
        return self._holdings[attempt].blocks

    def pin(self, attempts: Iterable[Attempt]) -> None:
        """A step is about to read and write these attempts' blocks."""
        for attempt in attempts:
            holding = self._holdings[attempt]
            holding.pins += 1
            self._pinned[attempt].append(holding)

    def unpin(self, attempts: Iterable[Attempt]) -> None:
        """The step has ended: what was dropped meanwhile is freed."""
        for attempt in attempts:
            holding = self._pinned[attempt].pop()
            if not self._pinned[attempt]:
                del self._pinned[attempt]
            holding.pins -= 1
            self._free_unused(holding)

    def drop(self, attempt: Attempt) -> None:
        """Free the attempt's blocks, at once or when the running step ends. No effect if it holds none."""
        holding = self._holdings.get(attempt)
        if holding is None:
            return
        holding.dropped = True
        self._free_unused(holding)

    def attempts(self) -> list[Attempt]:
        """Everyone who holds blocks."""
        return list(self._holdings)

    def check_integrity(self) -> None:
        """Raise AssertionError unless held + free = total and no block has two holders."""
        held = [block for holding in self._holdings.values() for block in holding.blocks]
        if len(set(held)) != len(held) or len(held) + self.pool.free_blocks != self.pool.num_blocks:
            raise AssertionError(
                f"{len(held)} blocks held ({len(set(held))} different) + {self.pool.free_blocks} free "
                f"is not {self.pool.num_blocks}"
            )

    def _free_unused(self, holding: _Holding) -> None:
        if holding.dropped and not holding.pins:
            del self._holdings[holding.attempt]
            self.pool.free(holding.blocks)
