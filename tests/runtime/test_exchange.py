"""The sending end against a real receiver over real sockets, and against one that misbehaves on purpose."""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool
from edgellm.runtime.kv.copying.holder import CopyHolder
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.inbox import KvInbox
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.links import KvLink, KvLinks, LinkConfig
from edgellm.runtime.kv.push import MAX_RESENDS
from edgellm.runtime.kv.sender import KvSender, SenderHooks, choose_codec
from edgellm.runtime.kv.servicer import ExchangeConfig, KvExchangeServicer
from edgellm.runtime.kv.transfer import TransferError, TransferJob
from edgellm.runtime.kv.types import Attempt, KvTarget, NodeId, RequestId, TransferStats
from edgellm.runtime.rpc import kv_pb2, kv_pb2_grpc
from edgellm.runtime.transports.grpc import GrpcOutgoing
from edgellm.runtime.transports.shm import ShmOutgoing
from tests.runtime.conftest import CONTRACT, LAYERS, eventually, tiny_pool

PROMPT = 150
HOST = "here"


def attempt(name: str = "r") -> Attempt:
    return Attempt(request_id=RequestId(name), epoch=0)


@dataclass
class Outcome:
    """What a sender was told, and what crashed."""

    sent: dict[Attempt, TransferStats] = field(default_factory=dict)
    failed: dict[Attempt, TransferError] = field(default_factory=dict)
    backups_lost: list[tuple[Attempt, KvTarget, TransferError]] = field(default_factory=list)
    over: list[Attempt] = field(default_factory=list)
    crashed: list[BaseException] = field(default_factory=list)

    async def wait(self, one: Attempt) -> None:
        async with asyncio.timeout(10):
            while one not in self.sent and one not in self.failed and not self.crashed:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert self.crashed == []


class Sender:
    """A KvSender on a pool full of noise."""

    def __init__(self, *, allow_shm: bool, codec: str = "raw") -> None:
        self.pool = tiny_pool(16)
        halves = np.random.default_rng(1).normal(0, 2, self.pool.data.size // 2).astype(np.float16)
        self.pool.data[...] = halves.view(np.uint8).reshape(self.pool.data.shape)
        self.outcome = Outcome()
        self.links = KvLinks(
            LinkConfig(node_id=NodeId("s"), host_id=HOST, ring_bytes=4096, allow_shm=allow_shm), CONTRACT
        )
        self.kv = KvSender(
            pool=self.pool,
            links=self.links,
            codec=codec,
            prefill_tokens_per_s=lambda: 0.0,
            hooks=SenderHooks(
                on_sent=self.outcome.sent.__setitem__,
                on_backup_lost=lambda *lost: self.outcome.backups_lost.append(lost),
                on_over=self.outcome.over.append,
                on_failed=self.outcome.failed.__setitem__,
                on_crash=self.outcome.crashed.append,
            ),
            now_s=time.monotonic,
        )

    async def close(self) -> None:
        await self.kv.close()
        await self.links.close()

    def start(self, one: Attempt, *addresses: str, timeout_s: float = 5.0, blocks=(4, 2, 7, 0, 9)) -> None:
        targets = tuple(
            KvTarget(node_id=NodeId(address), address=address, host_id=HOST, first_layer=0, num_layers=LAYERS)
            for address in addresses
        )
        self.kv.start(
            TransferJob(
                attempt=one,
                prompt_tokens=PROMPT,
                capacity_tokens=PROMPT + 20,
                blocks=blocks,
                targets=targets,
                timeout_s=timeout_s,
            )
        )


class Receiver:
    """A real exchange whose inbox admits everyone."""

    def __init__(self, blocks: int = 32) -> None:
        self.ledger = BlockLedger(tiny_pool(blocks))
        self.complete: list[Attempt] = []
        self.crashed: list[BaseException] = []
        self.asked = False
        """Whether a prompt has come."""
        self.inbox = KvInbox(
            ledger=self.ledger,
            admit=lambda _: True,
            on_complete=lambda one, _: self.complete.append(one),
            on_lost=lambda one, _: self.ledger.drop(one),
        )

        self.holder = CopyHolder(holdings=Holdings(self.ledger), admit=lambda _: "admitted")

    def servicer(self, max_sessions: int = 8, welcomed=lambda: asyncio.sleep(0)) -> KvExchangeServicer:
        return KvExchangeServicer(
            node_id=NodeId("d"), contract=CONTRACT, inbox=self.inbox, on_crash=self.crashed.append, copies=self.holder,
            welcomed=welcomed,
            config=ExchangeConfig(chunk_bytes=1500, window_bytes=4000, max_sessions=max_sessions),
        )  # fmt: skip

    def holds(self, source: HostKvPool, one: Attempt, blocks=(4, 2, 7, 0, 9)) -> bool:
        got = self.ledger.pool.data[:, self.ledger.blocks(one)[: len(blocks)]].copy()
        expected = source.data[:, list(blocks)].copy()
        for pool in (got, expected):
            # [layers, blocks, K or V, tokens, rest]: what lies after the prompt's end is nobody's.
            pool.reshape(LAYERS, len(blocks), 2, 32, -1)[:, -1, :, PROMPT % 32 :] = 0
        return np.array_equal(got, expected)


@asynccontextmanager
async def serving(servicer):
    server = grpc.aio.server()
    kv_pb2_grpc.add_KvExchangeServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


def exchange(test, *servicers, allow_shm=False):
    """Run `test(sender, *addresses)` against receivers."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            addresses = [await stack.enter_async_context(serving(servicer)) for servicer in servicers]
            sender = Sender(allow_shm=allow_shm)
            stack.push_async_callback(sender.close)
            await test(sender, *addresses)

    asyncio.run(run())


@pytest.mark.parametrize("allow_shm", [True, False])
def test_many_transfers_share_a_small_ring_and_small_credit(allow_shm):
    receiver = Receiver(64)

    async def test(sender, address):
        attempts = [attempt(f"r{number}") for number in range(8)]
        for one in attempts:
            sender.start(one, address)
        for computed in (33, 64, 149, PROMPT):
            for one in attempts:
                sender.kv.advance(one, computed)
            await asyncio.sleep(0.01)
        for one in attempts:
            await sender.outcome.wait(one)
            assert sender.outcome.sent[one].transport == ("shm" if allow_shm else "grpc")
            assert sender.outcome.sent[one].bytes == PROMPT * CONTRACT.bytes_per_token
            assert receiver.holds(sender.pool, one)
        assert sorted(receiver.complete, key=str) == attempts

    exchange(test, receiver.servicer(), allow_shm=allow_shm)
    assert receiver.crashed == []


def test_a_prompt_waits_for_the_orchestrator_that_counts_its_blocks():
    receiver, welcomed = Receiver(), asyncio.Event()

    async def test(sender, address):
        sender.start(attempt(), address)
        sender.kv.advance(attempt(), PROMPT)
        await eventually(lambda: receiver.asked)
        assert list(receiver.ledger.attempts()) == []
        welcomed.set()
        await sender.outcome.wait(attempt())
        assert receiver.holds(sender.pool, attempt())

    def wait():
        receiver.asked = True
        return welcomed.wait()

    exchange(test, receiver.servicer(welcomed=wait))


def test_copies_go_to_all_targets():
    receivers = [Receiver(), Receiver()]

    async def test(sender, *addresses):
        sender.start(attempt(), *addresses)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert all(receiver.holds(sender.pool, attempt()) for receiver in receivers)
        assert sender.outcome.sent[attempt()].bytes == 2 * PROMPT * CONTRACT.bytes_per_token

    exchange(test, *(receiver.servicer() for receiver in receivers))


def test_one_full_target_fails_the_transfer_and_frees_the_other():
    full, roomy = Receiver(3), Receiver()

    async def test(sender, full_address, roomy_address):
        sender.start(attempt(), full_address, roomy_address)
        await sender.outcome.wait(attempt())
        error = sender.outcome.failed[attempt()]
        assert (error.kind, error.peer) == ("capacity", full_address)
        async with asyncio.timeout(5):
            while roomy.ledger.attempts():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    exchange(test, full.servicer(), roomy.servicer())


class Scripted(kv_pb2_grpc.KvExchangeServicer):
    """A receiver that keeps acknowledgements back, claims damage, or falls silent."""

    def __init__(self, *, credit: int = 4000, damage: int = 0, status: int | None = None, silent: bool = False,
                 renumber: int = 0) -> None:  # fmt: skip
        self.credit, self.damage, self.status, self.silent = credit, damage, status, silent
        self.renumber = renumber
        self.most_in_flight = 0
        self.arrivals: list[tuple[int, int]] = []

    async def Handshake(self, request, context):  # noqa: N802
        return kv_pb2.KvWelcome(node_id="x", transport="grpc", codecs=["raw"], chunk_bytes=1500)

    async def Push(self, request_iterator, context):  # noqa: N802
        await context.read()
        opened = kv_pb2.KvAck(status=self.status or kv_pb2.KV_ACK_STATUS_OK, credit_bytes=self.credit)
        await context.write(opened)
        waiting, claims = [], self.damage
        total = PROMPT * CONTRACT.bytes_per_token
        while True:
            # Read until nothing more comes: that is all the credit allows.
            try:
                chunk = (
                    await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(context.read())), 0.1)
                ).chunk
            except TimeoutError:
                if self.silent:
                    await asyncio.sleep(60)
                for one in reversed(waiting):
                    corrupt, claims = claims > 0, claims - 1
                    total -= 0 if corrupt else len(one.inline_payload)
                    status = kv_pb2.KV_ACK_STATUS_CORRUPT if corrupt else kv_pb2.KV_ACK_STATUS_OK
                    await context.write(
                        kv_pb2.KvAck(
                            status=status,
                            sequence_number=one.sequence_number + self.renumber,
                            credit_bytes=len(one.inline_payload),
                            complete=total == 0,
                        )
                    )
                waiting.clear()
                message = await reading
                if not isinstance(message, kv_pb2.KvMessage):
                    return
                chunk = message.chunk
            waiting.append(chunk)
            self.arrivals.append((chunk.first_layer, chunk.first_token))
            self.most_in_flight = max(self.most_in_flight, sum(len(one.inline_payload) for one in waiting))


def test_no_more_than_the_credit_is_ever_in_flight():
    receiver = Scripted(credit=4000)

    async def test(sender, address):
        sender.start(attempt(), address)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert attempt() in sender.outcome.sent
        assert 2500 < receiver.most_in_flight <= 4000

    exchange(test, receiver)


def test_damaged_chunks_are_sent_again():
    receiver = Scripted(credit=4000, damage=3)

    async def test(sender, address):
        sender.start(attempt(), address)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert attempt() in sender.outcome.sent
        assert len(receiver.arrivals) == len(set(receiver.arrivals)) + 3

    exchange(test, receiver)


def test_a_chunk_that_is_always_damaged_fails_the_transfer():
    receiver = Scripted(damage=10**6)

    async def test(sender, address):
        sender.start(attempt(), address)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert f"{MAX_RESENDS + 1} times" in str(sender.outcome.failed[attempt()])

    exchange(test, receiver)


@pytest.mark.parametrize(
    ("receiver", "says"),
    [
        (Scripted(silent=True), "no progress"),
        (Scripted(status=kv_pb2.KV_ACK_STATUS_STALE), "released"),
        (Scripted(credit=100), "takes 100 at a time"),
        (Scripted(renumber=1000), "which is not in flight"),
    ],
)
def test_receivers_that_do_not_go_on_fail_the_transfer(receiver, says):
    async def test(sender, address):
        sender.start(attempt(), address, timeout_s=0.3)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert says in str(sender.outcome.failed[attempt()])

    exchange(test, receiver)


def test_waiting_for_the_prompt_is_not_a_stalled_transfer():
    receiver = Receiver()

    async def test(sender, address):
        sender.start(attempt(), address, timeout_s=0.2)
        sender.kv.advance(attempt(), 64)
        await asyncio.sleep(0.5)
        sender.kv.advance(attempt(), PROMPT)
        await sender.outcome.wait(attempt())
        assert receiver.holds(sender.pool, attempt())

    exchange(test, receiver.servicer())


def test_one_sender_too_many_is_refused():
    async def test(sender, address):
        sender.start(attempt("first"), address)
        sender.kv.advance(attempt("first"), 64)
        another = Sender(allow_shm=True)
        async with asyncio.timeout(5):
            while attempt("first") not in receiver.ledger:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        another.start(attempt("second"), address)
        await another.outcome.wait(attempt("second"))
        assert "1 senders are sending" in str(another.outcome.failed[attempt("second")])
        await another.close()
        sender.kv.advance(attempt("first"), PROMPT)
        await sender.outcome.wait(attempt("first"))
        assert receiver.complete == [attempt("first")]

    receiver = Receiver()
    exchange(test, receiver.servicer(max_sessions=1), allow_shm=True)


def test_a_push_without_a_handshake_is_refused():
    async def run() -> None:
        async with serving(Receiver().servicer()) as address, grpc.aio.insecure_channel(address) as channel:
            call = kv_pb2_grpc.KvExchangeStub(channel).Push()
            with pytest.raises(grpc.aio.AioRpcError, match="shake hands"):
                await call.read()

    asyncio.run(run())


def test_auto_compresses_only_on_links_slower_than_the_engine():
    fast, slow = 1e9, 1e6
    ring = ShmOutgoing(4096)
    cases = (
        (GrpcOutgoing(), None, "raw"),
        (GrpcOutgoing(), fast, "raw"),
        (GrpcOutgoing(), slow, "int8"),
        (ring, slow, "raw"),
    )
    for outgoing, speed, expected in cases:
        link = KvLink(channel=None, outgoing=outgoing, session="", codecs=("raw", "int8"), chunk_bytes=1)
        link.bytes_per_s = speed
        assert choose_codec("auto", CONTRACT, link, prefill_tokens_per_s=100_000) == expected
        assert choose_codec("int8+zstd", CONTRACT, link, prefill_tokens_per_s=0) == "raw"
    ring.close()
