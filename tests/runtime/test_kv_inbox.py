"""Receiving: any order, duplicates, damage, old epochs and lost senders leave either all of the KV or none of it."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edgellm.engines.kv import HostKvPool, KvPoolExhaustedError
from edgellm.runtime.kv.chunks import cut
from edgellm.runtime.kv.codecs import encode
from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.inbox import Chunk, Corrupt, Installed, KvInbox, NoCapacity, Opened, PromptPart, Stale
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.planes import gather
from edgellm.runtime.kv.types import Attempt, RequestId
from tests.runtime.conftest import CONTRACT, KV_HEADS, LAYERS, tiny_pool

PROMPT = 75
WHOLE = PromptPart(layers=range(LAYERS), tokens=PROMPT, backup=False)


def attempt(epoch: int = 0, name: str = "r") -> Attempt:
    return Attempt(request_id=RequestId(name), epoch=epoch)


class Receiver:
    """An inbox on a pool, with a fence, that records what it is told."""

    def __init__(self, blocks: int = 8) -> None:
        self.ledger = BlockLedger(tiny_pool(blocks))
        self.fence = EpochFence()
        self.complete: list[tuple[Attempt, PromptPart]] = []
        self.lost: list[tuple[Attempt, PromptPart]] = []
        self.inbox = KvInbox(
            ledger=self.ledger,
            admit=self._admit,
            on_complete=lambda one, part: self.complete.append((one, part)),
            on_lost=self._lose,
        )

    def _admit(self, one: Attempt) -> bool:
        admitted = self.fence.admits(one)
        if admitted:
            self.fence.enter(one)
        return admitted

    def _lose(self, one: Attempt, part: PromptPart) -> None:
        self.lost.append((one, part))
        self.ledger.drop(one)


def source() -> HostKvPool:
    pool = tiny_pool(3)
    pool.data[...] = np.random.default_rng(3).integers(0, 120, pool.data.shape, np.uint8)
    return pool


def chunks(pool: HostKvPool, one: Attempt, max_bytes: int = 3000, ranks: int = 1) -> list[Chunk]:
    result = []
    for rank in range(ranks):
        heads = range(rank * KV_HEADS // ranks, (rank + 1) * KV_HEADS // ranks)
        for where in cut(CONTRACT, range(PROMPT), range(LAYERS), heads, max_bytes=max_bytes):
            payload = encode("raw", CONTRACT, where, gather(pool, [0, 1, 2], where))
            result.append(Chunk(attempt=one, where=where, codec="raw", checksum=zlib.crc32(payload), payload=payload))
    return result


@given(st.data(), st.integers(500, 10_000), st.sampled_from([1, 2]))
def test_any_order_with_duplicates_and_damage_installs_the_same_bytes(data, max_bytes, ranks):
    receiver, pool = Receiver(), source()
    good = chunks(pool, attempt(), max_bytes, ranks)
    sent = data.draw(st.permutations(good + data.draw(st.lists(st.sampled_from(good), max_size=5))))
    assert receiver.inbox.open(attempt(), WHOLE, capacity_tokens=100) == Opened()
    missing = set(range(len(good)))
    for chunk in sent:
        if data.draw(st.booleans()):
            damaged = replace(chunk, payload=bytes([chunk.payload[0] ^ 1]) + chunk.payload[1:])
            assert isinstance(receiver.inbox.install(damaged), Corrupt)
        missing.discard(good.index(chunk))
        assert receiver.inbox.install(chunk) == Installed(complete=not missing)
    assert receiver.complete == [(attempt(), WHOLE)]
    blocks = receiver.ledger.blocks(attempt())
    whole = good[0].where.__class__(layers=range(LAYERS), heads=range(KV_HEADS), tokens=range(PROMPT))
    for sent_plane, plane in zip(
        gather(pool, [0, 1, 2], whole), gather(receiver.ledger.pool, blocks, whole), strict=True
    ):
        assert np.array_equal(sent_plane, plane)
    receiver.inbox.close(attempt(), WHOLE)
    assert receiver.lost == []
    assert receiver.inbox.counters.duplicate + receiver.inbox.counters.chunks == len(sent)


def test_ranges_outside_of_the_request_are_corrupt():
    receiver, pool = Receiver(), source()
    receiver.inbox.open(attempt(), WHOLE, capacity_tokens=100)
    [first, *_] = chunks(pool, attempt())
    for change in ({"layers": range(LAYERS + 1)}, {"tokens": range(96)}, {"tokens": range(16)}, {"heads": range(0)},
                   {"tokens": range(8, 32)}, {"heads": range(1, 9)}):  # fmt: skip
        where = replace(first.where, **change)
        assert isinstance(receiver.inbox.install(replace(first, where=where)), Corrupt)
    assert isinstance(receiver.inbox.install(replace(first, codec="int3")), Corrupt)
    receiver.inbox.close(attempt(), WHOLE)
    assert receiver.lost == [(attempt(), WHOLE)]


def test_old_epochs_are_dropped_and_counted():
    receiver, pool = Receiver(), source()
    receiver.inbox.open(attempt(1), WHOLE, capacity_tokens=100)
    assert receiver.inbox.open(attempt(0), WHOLE, capacity_tokens=100) == Stale()
    assert {receiver.inbox.install(chunk) == Stale() for chunk in chunks(pool, attempt(0))} == {True}
    receiver.inbox.forget(attempt(1))
    receiver.ledger.drop(attempt(1))
    assert receiver.inbox.install(chunks(pool, attempt(1))[0]) == Stale()
    assert receiver.inbox.counters.stale == 2 + len(chunks(pool, attempt(0)))
    assert receiver.ledger.pool.free_blocks == 8


def test_a_full_receiver_says_so_and_takes_nothing():
    receiver = Receiver(blocks=3)
    answer = receiver.inbox.open(attempt(), WHOLE, capacity_tokens=97)
    assert isinstance(answer, NoCapacity)
    assert "3" in answer.message
    assert receiver.ledger.pool.free_blocks == 3


def test_a_lost_sender_is_reported_when_the_last_one_has_gone():
    receiver, pool = Receiver(), source()
    for _ in range(2):
        receiver.inbox.open(attempt(), WHOLE, capacity_tokens=100)
    receiver.inbox.install(chunks(pool, attempt())[0])
    receiver.inbox.close(attempt(), WHOLE)
    assert receiver.lost == []
    receiver.inbox.close(attempt(), WHOLE)
    assert receiver.lost == [(attempt(), WHOLE)]
    assert receiver.ledger.pool.free_blocks == 8


def test_the_fence_forgets_only_the_oldest():
    fence = EpochFence(capacity=2)
    fence.close(attempt(3, "a"))
    fence.enter(attempt(3, "b"))
    assert not fence.admits(attempt(3, "a"))
    assert fence.admits(attempt(4, "a"))
    assert fence.admits(attempt(3, "b"))
    assert not fence.admits(attempt(2, "b"))
    fence.close(attempt(1, "b"))
    assert not fence.admits(attempt(2, "b"))
    fence.enter(attempt(0, "c"))
    assert fence.admits(attempt(0, "a"))


class LedgerMachine(RuleBasedStateMachine):
    """Blocks are neither lost nor given twice, never freed under a running step, and follow their attempt's name."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = BlockLedger(tiny_pool(10))
        self.held: dict[Attempt, list[int]] = {}
        self.steps: list[dict[Attempt, Attempt]] = []
        """Of each running step: the name it knows -> the name of today."""
        self.dropped: set[Attempt] = set()
        self.renamed: set[Attempt] = set()
        """Old epochs: fenced, so nothing reserves for them again."""

    @rule(number=st.integers(0, 6), tokens=st.integers(1, 200))
    def reserve(self, number, tokens):
        one, blocks = attempt(number), -(-tokens // 32)
        if one in self.renamed:
            return
        if one in self.held:
            with pytest.raises(ValueError, match="already"):
                self.ledger.reserve(one, tokens)
        elif blocks > 10 - sum(map(len, self.held.values())):
            assert not self.ledger.fits(tokens)
            with pytest.raises(KvPoolExhaustedError):
                self.ledger.reserve(one, tokens)
        else:
            self.held[one] = self.ledger.reserve(one, tokens)
            assert len(self.held[one]) == blocks

    @rule()
    def step_starts(self):
        step = {one: one for one in self.held if one not in self.dropped}
        self.ledger.pin(step)
        self.steps.append(step)

    @rule(data=st.data())
    def step_ends(self, data):
        if not self.steps:
            return
        step = self.steps.pop(data.draw(st.integers(0, len(self.steps) - 1)))
        self.ledger.unpin(step)
        for one in self.dropped & set(step.values()):
            self._gone_if_unused(one)

    @rule(number=st.integers(0, 6))
    def drop(self, number):
        one = attempt(number)
        self.ledger.drop(one)
        if one in self.held:
            self.dropped.add(one)
            self._gone_if_unused(one)

    @rule(old=st.integers(0, 6), new=st.integers(0, 6))
    def rename(self, old, new):
        one, other = attempt(old), attempt(new)
        if other in self.renamed:
            return
        if other in self.held:
            with pytest.raises(ValueError, match="already"):
                self.ledger.rename(one, other)
        elif one not in self.held or one in self.dropped:
            with pytest.raises(KeyError):
                self.ledger.rename(one, other)
        else:
            self.ledger.rename(one, other)
            self.held[other] = self.held.pop(one)
            self.renamed.add(one)
            self.steps = [{was: other if now == one else now for was, now in step.items()} for step in self.steps]

    def _gone_if_unused(self, one):
        if not any(one in step.values() for step in self.steps):
            del self.held[one]
            self.dropped.discard(one)

    @invariant()
    def free_and_held_are_all(self):
        self.ledger.check_integrity()
        assert self.ledger.pool.free_blocks == 10 - sum(map(len, self.held.values()))
        assert {one: self.ledger.blocks(one) for one in self.ledger.attempts()} == self.held


TestLedger = LedgerMachine.TestCase
