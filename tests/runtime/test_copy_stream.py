"""Copies over real gRPC streams and shared memory: everything arrives, or the source is told and goes on."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio
import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.queue import CopyConfig
from edgellm.runtime.kv.copying.replicator import CopyHooks, Replicator
from edgellm.runtime.kv.inbox import KvInbox
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.links import KvLinks, LinkConfig
from edgellm.runtime.kv.servicer import ExchangeConfig, KvExchangeServicer
from edgellm.runtime.kv.types import KvCopy, KvTarget, NodeId
from edgellm.runtime.rpc import kv_pb2, kv_pb2_grpc
from tests.runtime.conftest import CONTRACT, eventually, tiny_pool
from tests.runtime.copies import CAPACITY, LAYER_RANGE, Holder, attempt, row

HOST = "this host"
PATIENT = CopyConfig(message_bytes=3000, window_bytes=8000, patience_s=20.0)


class Source:
    """A node that computes rows and keeps copies of them."""

    def __init__(self, config: CopyConfig = PATIENT, *, allow_shm: bool = False) -> None:
        self.ledger = BlockLedger(tiny_pool(64))
        self.holdings = Holdings(self.ledger)
        self.lost: dict[tuple, str] = {}
        self.crashed: list[BaseException] = []
        self.links = KvLinks(
            LinkConfig(node_id=NodeId("s"), host_id=HOST, allow_shm=allow_shm, ring_bytes=9000), CONTRACT
        )
        self.copies = Replicator(
            holdings=self.holdings, links=self.links, config=config,
            hooks=CopyHooks(on_lost=self._lose, on_crash=self.crashed.append),
        )  # fmt: skip

    def begin(self, one, address, *, tokens, from_token=0):
        self.holdings.reserve(one, CAPACITY)
        self.compute(one, tokens)
        self.keep(one, address, from_token)

    def keep(self, one, address, from_token=0):
        target = KvTarget(
            node_id=NodeId(f"holder at {address}"), address=address, host_id=HOST, first_layer=LAYER_RANGE.start,
            num_layers=len(LAYER_RANGE), backup=True,
        )  # fmt: skip
        self.copies.start(one, [KvCopy(source=NodeId("s"), target=target, from_token=from_token)])

    def compute(self, one, until):
        write_rows(
            self.ledger.pool, self.holdings.blocks(one), range(self.holdings.reach(one, LAYER_RANGE), until), one
        )
        self.holdings.computed(one, LAYER_RANGE, until)
        self.copies.advance(one, LAYER_RANGE, until)

    def drop(self, one):
        self.copies.stop(one)
        self.holdings.drop(one)
        self.ledger.drop(one)

    async def close(self):
        await self.copies.close()
        await self.links.close()
        assert self.crashed == []

    def _lose(self, one, layers, error):
        assert layers == LAYER_RANGE
        self.lost[one, error.peer.removeprefix("holder at ")] = f"{error.kind}: {error}"


def write_rows(pool: HostKvPool, blocks, tokens, one):
    for position in tokens:
        where = np.array([blocks[position // 32]]), np.array([position % 32])
        pool.write_rows(*where, LAYER_RANGE, row(hash((one, position)) % 2**32))


def holds(holder: Holder, one, tokens) -> bool:
    """Whether the copy is complete, byte for byte."""
    if holder.holdings.reach(one, LAYER_RANGE) < tokens:
        return False
    positions, blocks = np.arange(tokens), np.array(holder.ledger.blocks(one))
    got = holder.ledger.pool.read_rows(blocks[positions // 32], positions % 32, LAYER_RANGE)
    assert all(np.array_equal(got[position], row(hash((one, position)) % 2**32)[0]) for position in positions)
    return True


def servicer(holder: Holder, crashed: list[BaseException] | None = None) -> KvExchangeServicer:
    inbox = KvInbox(ledger=holder.ledger, admit=lambda _: True, on_complete=lambda *_: None, on_lost=lambda *_: None)
    return KvExchangeServicer(
        node_id=NodeId("h"), contract=CONTRACT, inbox=inbox, copies=holder.copies, config=ExchangeConfig(),
        welcomed=lambda: asyncio.sleep(0), on_crash=lambda error: None if crashed is None else crashed.append(error),
    )  # fmt: skip


@asynccontextmanager
async def serving(one: kv_pb2_grpc.KvExchangeServicer, port: int = 0):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)])
    kv_pb2_grpc.add_KvExchangeServicer_to_server(one, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(grace=None)


def copying(test, *servicers, **options):
    """Run `test(source, *addresses)` against holders."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            addresses = [await stack.enter_async_context(serving(one)) for one in servicers]
            source = Source(**options)
            stack.push_async_callback(source.close)
            async with asyncio.timeout(60):
                await test(source, *addresses)

    asyncio.run(run())


def test_a_holder_that_came_back_elsewhere_leaves_no_ring_behind():
    async def test(source, *addresses):
        before, after = (
            KvTarget(node_id=NodeId("h"), address=address, host_id=HOST, first_layer=0, num_layers=1, backup=True)
            for address in addresses
        )
        async with source.links.use(before) as old:
            async with source.links.use(after) as new:
                assert not old.outgoing._memory.closed
            assert not old.outgoing._memory.closed
        assert old.outgoing._memory.closed
        assert not new.outgoing._memory.closed

    copying(test, servicer(Holder(64)), servicer(Holder(64)), allow_shm=True)


@pytest.mark.parametrize("allow_shm", [True, False])
def test_many_requests_share_a_stream_and_a_small_ring(allow_shm):
    holder, crashed = Holder(64), []

    async def test(source, address):
        attempts = [attempt(f"r{number}") for number in range(8)]
        for number, one in enumerate(attempts):
            source.begin(one, address, tokens=1 + 9 * number)
        for step in range(1, 20):
            for number, one in enumerate(attempts):
                source.compute(one, 1 + 9 * number + step)
            await asyncio.sleep(0.001)
        for number, one in enumerate(attempts):
            await eventually(lambda one=one, number=number: holds(holder, one, 20 + 9 * number))
        await eventually(lambda: source.copies.lag_tokens == 0)
        assert holder.copies.counters.messages < 8 * 20
        for one in attempts:
            source.drop(one)
        source.ledger.check_integrity()
        assert source.ledger.attempts() == []

    copying(test, servicer(holder, crashed), allow_shm=allow_shm)
    assert crashed == []


def test_a_full_holder_costs_only_the_copy_that_does_not_fit():
    holder = Holder(blocks=4)

    async def test(source, address):
        source.begin(attempt("a"), address, tokens=5)
        await eventually(lambda: holds(holder, attempt("a"), 5))
        source.begin(attempt("b"), address, tokens=5)
        await eventually(lambda: source.lost)
        assert list(source.lost) == [(attempt("b"), address)]
        assert source.lost[attempt("b"), address].startswith("capacity: ")
        assert "4" in source.lost[attempt("b"), address]
        source.compute(attempt("a"), 20)
        await eventually(lambda: holds(holder, attempt("a"), 20))

    copying(test, servicer(holder))


def test_an_older_epoch_is_refused_for_good_and_a_newer_one_waits_for_the_takeover():
    holder = Holder()

    async def test(source, address):
        source.begin(attempt(epoch=1), address, tokens=40)
        await eventually(lambda: holds(holder, attempt(epoch=1), 40))
        source.begin(attempt(epoch=0), address, tokens=5)
        await eventually(lambda: source.lost)
        assert list(source.lost) == [(attempt(epoch=0), address)]
        assert source.lost[attempt(epoch=0), address].startswith("stale: ")
        source.holdings.rename(attempt(epoch=1), attempt(epoch=2), 40)
        source.copies.stop(attempt(epoch=1))
        source.keep(attempt(epoch=2), address, from_token=38)
        await eventually(lambda: holder.copies.counters.refused >= 3)
        holder.hold(attempt(epoch=1), attempt(epoch=2), 38)
        await eventually(lambda: holder.holdings.reach(attempt(epoch=2), LAYER_RANGE) == 40)

    copying(test, servicer(holder))


def test_one_holder_dies_and_the_other_copies_go_on():
    dying, living = Holder(), Holder()

    async def test(source, address):
        async with serving(servicer(dying)) as other:
            source.begin(attempt("a"), other, tokens=5)
            source.begin(attempt("b"), address, tokens=5)
            await eventually(lambda: holds(dying, attempt("a"), 5))
        source.compute(attempt("a"), 30)
        source.compute(attempt("b"), 30)
        await eventually(lambda: source.lost)
        assert list(source.lost) == [(attempt("a"), other)]
        await eventually(lambda: holds(living, attempt("b"), 30))
        source.keep(attempt("a"), address)
        await eventually(lambda: holds(living, attempt("a"), 30))

    copying(test, servicer(living))


def test_a_holder_that_comes_back_empty_is_given_everything():
    first, second = Holder(), Holder()

    async def test(source):
        async with serving(servicer(first)) as address:
            source.begin(attempt(), address, tokens=5)
            await eventually(lambda: holds(first, attempt(), 5))
        await eventually(lambda: source.lost)
        async with serving(servicer(second), int(address.rpartition(":")[2])):
            source.keep(attempt(), address)
            await eventually(lambda: holds(second, attempt(), 5))
            await source.copies.close()

    copying(test)


class Silent(kv_pb2_grpc.KvExchangeServicer):
    """Takes messages and never answers."""

    async def Handshake(self, request, context):  # noqa: N802
        return kv_pb2.KvWelcome(node_id="h", transport="grpc", codecs=["raw"], chunk_bytes=1 << 20)

    async def Copy(self, request_iterator, context):  # noqa: N802
        while isinstance(await context.read(), kv_pb2.KvCopyMessage):
            pass


def test_a_holder_that_does_not_answer_is_given_up():
    async def test(source, address):
        source.begin(attempt("a"), address, tokens=5)
        source.begin(attempt("b"), address, tokens=5)
        await eventually(lambda: len(source.lost) == 2)
        assert all("no answer" in message for message in source.lost.values())
        source.compute(attempt("a"), 50)

    copying(test, Silent(), config=CopyConfig(patience_s=0.3))


def test_an_address_where_nobody_listens_is_given_up():
    async def test(source):
        source.begin(attempt(), "127.0.0.1:1", tokens=5)
        await eventually(lambda: source.lost)
        assert "transfer: UNAVAILABLE" in source.lost[attempt(), "127.0.0.1:1"]

    copying(test)


def test_a_stopped_copy_is_not_read_and_not_reported():
    holder = Holder()

    async def test(source, address):
        source.begin(attempt("a"), address, tokens=80)
        source.drop(attempt("a"))
        source.begin(attempt("b"), address, tokens=80)
        await eventually(lambda: holds(holder, attempt("b"), 80))
        assert attempt("a") not in holder.ledger
        assert source.lost == {}

    copying(test, servicer(holder))


class Counting(kv_pb2_grpc.KvExchangeServicer):
    """A real holder that knows how many streams are open, and were opened."""

    def __init__(self, holder: Holder) -> None:
        self.inner = servicer(holder)
        self.open = self.opened = 0

    async def Handshake(self, request, context):  # noqa: N802
        return await self.inner.Handshake(request, context)

    async def Copy(self, request_iterator, context):  # noqa: N802
        self.open, self.opened = self.open + 1, self.opened + 1
        try:
            await self.inner.Copy(request_iterator, context)
        finally:
            self.open -= 1


def test_a_stream_without_copies_closes_and_opens_again():
    holder = Holder()
    counting = Counting(holder)

    async def test(source, address):
        for number in range(2):
            one = attempt(f"r{number}")
            source.begin(one, address, tokens=5)
            await eventually(lambda one=one: holds(holder, one, 5))
            assert counting.open == 1
            source.drop(one)
            await eventually(lambda: counting.open == 0)
        assert counting.opened == 2
        assert source.lost == {}

    copying(test, counting, config=CopyConfig(linger_s=0.1, patience_s=20.0))
