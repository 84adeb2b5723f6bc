"""What tests of copies share: KV that tells where it belongs, and a holder with a node's rules of admission."""

import numpy as np

from edgellm.runtime.kv.copying.holder import CopyHolder
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, RequestId
from tests.runtime.conftest import CONTRACT, LAYERS, tiny_pool

LAYER_RANGE = range(1, LAYERS)
CAPACITY = 90


def attempt(name: str = "r", epoch: int = 0) -> Attempt:
    return Attempt(request_id=RequestId(name), epoch=epoch)


def row(seed: int) -> np.ndarray:
    """uint8 [1, layers, row_bytes]: the KV of a position, by what it was computed from."""
    shape = (1, len(LAYER_RANGE), CONTRACT.row_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


class Holder:
    """A holder with the admission rules of a node."""

    def __init__(self, blocks: int = 12) -> None:
        self.ledger = BlockLedger(tiny_pool(blocks))
        self.holdings = Holdings(self.ledger)
        self.fence = EpochFence()
        self.live: dict[RequestId, Attempt] = {}
        self.copies = CopyHolder(holdings=self.holdings, admit=self.admit)

    def admit(self, one):
        if not self.fence.admits(one):
            return "stale"
        if self.live.setdefault(one.request_id, one) != one:
            return "early"
        self.fence.enter(one)
        return "admitted"

    def hold(self, old, new, tokens):
        if self.live.get(old.request_id) == old and self.fence.admits(new):
            self.fence.enter(new)
            self.live[new.request_id] = new
            if old in self.ledger:
                self.holdings.rename(old, new, tokens)

    def drop(self, one):
        self.fence.close(one)
        live = self.live.get(one.request_id)
        if live is not None and live.epoch <= one.epoch:
            del self.live[one.request_id]
            self.holdings.drop(live)
            self.ledger.drop(live)
