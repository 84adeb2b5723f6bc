"""What this node has in its pool of every attempt: computed here, sent by a prefill node, or kept as a copy."""

from collections.abc import Iterable

from edgellm.engines.kv import BlockId, KvPool
from edgellm.runtime.kv.copying.coverage import Coverage, Origin
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, HeldKv


class Holdings:
    """The one place that says which KV exists; blocks belong to the ledger, one entry per attempt.

    Nothing here may overstate: a position is added after its bytes are in the pool.
    """

    def __init__(self, ledger: BlockLedger) -> None:
        self._ledger = ledger
        self._coverage: dict[Attempt, Coverage] = {}
        self._unreported: set[Attempt] = set()
        """Those whose copies have changed."""
        self._fed: set[Attempt] = set()

    @property
    def pool(self) -> KvPool:
        return self._ledger.pool

    def blocks(self, attempt: Attempt) -> list[BlockId]:
        """The attempt's blocks, in token order. Raises KeyError if it holds none."""
        return self._ledger.blocks(attempt)

    def reserve(self, attempt: Attempt, capacity_tokens: int) -> list[BlockId]:
        """The attempt's blocks, taken now where there are none. Raises KvPoolExhaustedError."""
        if attempt not in self._ledger:
            return self._ledger.reserve(attempt, capacity_tokens)
        return self._ledger.blocks(attempt)

    def computed(self, attempt: Attempt, layers: range, tokens: int) -> None:
        """This node has computed the KV of the first `tokens` positions, or of those after what it had."""
        self.add(attempt, layers, range(tokens), "own")

    def add(self, attempt: Attempt, layers: range, tokens: range, origin: Origin) -> None:
        """These positions are in the pool. Raises KeyError if the attempt has no blocks, IndexError outside of them."""
        coverage = self._coverage.get(attempt)
        if coverage is None:
            pool = self._ledger.pool
            capacity_tokens = len(self._ledger.blocks(attempt)) * pool.contract.block_tokens
            coverage = self._coverage[attempt] = Coverage(pool.layers, capacity_tokens)
        coverage.add(layers, tokens, origin)
        if origin == "copy":
            self._changed(attempt)

    def reach(self, attempt: Attempt, layers: range) -> int:
        """The first position that is missing in one of the layers; 0 if nothing is held."""
        coverage = self._coverage.get(attempt)
        return 0 if coverage is None else coverage.reach(layers)

    def computes(self, attempt: Attempt, layers: range) -> bool:
        """Whether one of the layers is written by this node itself, not kept as a copy."""
        coverage = self._coverage.get(attempt)
        return coverage is not None and coverage.is_own(layers)

    def rename(self, old: Attempt, new: Attempt, tokens: int) -> None:
        """What was the old attempt's is the new one's, up to this position; the rest counts as missing.

        Raises KeyError if the old attempt holds no blocks, ValueError if the new one does.
        """
        self._ledger.rename(old, new)
        coverage = self._coverage.pop(old, None)
        self.drop(old)
        if coverage is not None:
            coverage.pass_on(tokens)
            self._coverage[new] = coverage
            self._changed(new)

    def drop(self, attempt: Attempt) -> None:
        """Forget the attempt; who asks frees the blocks."""
        self._coverage.pop(attempt, None)
        self._unreported.discard(attempt)
        self._fed.discard(attempt)

    def held(self) -> list[HeldKv]:
        """All KV, by attempt and run of layers."""
        return [held for attempt in self._coverage for held in self._runs(attempt, ("own", "copy"))]

    def copies_changed(self, attempts: Iterable[Attempt] | None = None) -> list[HeldKv]:
        """Copies that have changed since this was last asked about them; of these attempts, or of all."""
        changed = self._unreported if attempts is None else self._unreported.intersection(attempts)
        self._unreported = self._unreported - changed
        return [held for attempt in changed for held in self._runs(attempt, ("copy",))]

    def take_fed(self) -> set[Attempt]:
        """Whose copies have grown, or were taken over, since the last call."""
        fed, self._fed = self._fed, set()
        return fed

    def _changed(self, attempt: Attempt) -> None:
        self._unreported.add(attempt)
        self._fed.add(attempt)

    def _runs(self, attempt: Attempt, origins: tuple[Origin, ...]) -> list[HeldKv]:
        return [
            HeldKv(attempt=attempt, first_layer=layers.start, num_layers=len(layers), tokens=reach)
            for layers, reach, origin in self._coverage[attempt].runs()
            if origin in origins
        ]
