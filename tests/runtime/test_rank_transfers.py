"""Tensor-parallel ranks each send their heads to one receiver, in any order, and only all of them are the prompt."""

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool
from edgellm.runtime.kv.inbox import Opened, PromptPart
from edgellm.runtime.kv.links import KvLinks, LinkConfig
from edgellm.runtime.kv.sender import KvSender, Ranks, SenderHooks
from edgellm.runtime.kv.types import NodeId, TransferStats
from tests.runtime.conftest import CONTRACT, KV_HEADS, LAYERS
from tests.runtime.test_exchange import HOST, PROMPT, Outcome, Receiver, Sender, attempt, serving

WORLD = 2
BLOCKS = (4, 2, 7, 0, 9)


def rank_pool(whole: HostKvPool, rank: int) -> HostKvPool:
    """What one rank has of a pool."""
    heads = KV_HEADS // WORLD
    pool = HostKvPool(replace(CONTRACT, kv_heads=heads), whole.layers, whole.num_blocks, first_head=rank * heads)
    shape = (LAYERS, whole.num_blocks, 2, 32, KV_HEADS, 2 * CONTRACT.head_dim)
    share = whole.data.reshape(shape)[:, :, :, :, pool.heads.start : pool.heads.stop]
    pool.data[...] = np.ascontiguousarray(share).reshape(pool.data.shape)
    return pool


class RankSender(Sender):
    """A KvSender of one rank, on its share of a pool full of noise."""

    def __init__(self, rank: int) -> None:
        super().__init__(allow_shm=False)
        self.whole, self.pool = self.pool, rank_pool(self.pool, rank)
        self.outcome = Outcome()
        self.links = KvLinks(LinkConfig(node_id=NodeId(f"rank{rank}"), host_id=HOST, allow_shm=False), CONTRACT)
        self.kv = KvSender(
            pool=self.pool,
            links=self.links,
            codec="raw",
            prefill_tokens_per_s=lambda: 0.0,
            hooks=SenderHooks(
                on_sent=self.outcome.sent.__setitem__,
                on_backup_lost=lambda *lost: self.outcome.backups_lost.append(lost),
                on_over=self.outcome.over.append,
                on_failed=self.outcome.failed.__setitem__,
                on_crash=self.outcome.crashed.append,
            ),
            now_s=time.monotonic,
            ranks=Ranks(world=WORLD, join=lambda push, _: push),
        )


def with_ranks(test, receiver):
    """Run `test(senders, address)` against one receiver."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving(receiver.servicer()))
            senders = [RankSender(rank) for rank in range(WORLD)]
            for sender in senders:
                stack.push_async_callback(sender.close)
            await test(senders, address)

    asyncio.run(run())
    assert receiver.crashed == []


def test_two_ranks_make_up_a_prompt():
    receiver = Receiver()

    async def test(senders, address):
        for sender in senders:
            sender.start(attempt(), address)
        for computed in (33, 64, 149, PROMPT):
            for sender in senders:
                sender.kv.advance(attempt(), computed)
            await asyncio.sleep(0.01)
        for sender in senders:
            await sender.outcome.wait(attempt())
            stats: TransferStats = sender.outcome.sent[attempt()]
            assert stats.bytes == PROMPT * CONTRACT.bytes_per_token // WORLD
        assert receiver.complete == [attempt()]
        assert receiver.holds(senders[0].whole, attempt())

    with_ranks(test, receiver)


def test_a_rank_may_be_done_before_the_other_has_begun():
    receiver = Receiver()

    async def test(senders, address):
        for sender in reversed(senders):
            assert receiver.complete == []
            sender.start(attempt(), address)
            sender.kv.advance(attempt(), PROMPT)
            await sender.outcome.wait(attempt())
            assert attempt() in sender.outcome.sent
        assert receiver.complete == [attempt()]
        assert receiver.holds(senders[0].whole, attempt())

    with_ranks(test, receiver)


def test_a_cancelled_rank_reads_no_block_any_more(monkeypatch: pytest.MonkeyPatch):
    receiver = Receiver()

    async def test(senders, address):
        sender = senders[0]
        sender.start(attempt(), address)
        sender.kv.advance(attempt(), 64)
        async with asyncio.timeout(5):
            while not receiver.inbox.counters.chunks:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        sender.kv.advance(attempt(), PROMPT)
        sender.kv.cancel(attempt())
        monkeypatch.setattr(sender.pool, "read", lambda *_: pytest.fail("a block was read"))
        await asyncio.sleep(0.1)
        assert sender.outcome.crashed == []

    with_ranks(test, receiver)


def test_a_prompt_is_lost_when_the_last_rank_has_gone():
    receiver = Receiver()
    part = PromptPart(layers=range(LAYERS), tokens=PROMPT, backup=False, senders=WORLD)
    lost = []
    receiver.inbox.on_lost = lambda one, _: lost.append(one)
    for ranks_gone in range(WORLD):
        assert receiver.inbox.open(attempt(), part, capacity_tokens=PROMPT) == Opened()
        assert lost == []
        assert receiver.ledger.attempts() == [attempt()], ranks_gone
        receiver.inbox.close(attempt(), part)
    assert lost == [attempt()]
