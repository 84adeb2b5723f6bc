"""One prompt's KV to one node: chunks go out as they are computed, within the receiver's credit."""

import asyncio
import zlib
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, TypeAlias

import grpc
import grpc.aio

from edgellm.engines.kv import KvPool
from edgellm.runtime.kv.chunks import KvRange, cut, sendable_tokens
from edgellm.runtime.kv.codecs import encode
from edgellm.runtime.kv.links import KvLink, KvLinks
from edgellm.runtime.kv.planes import gather
from edgellm.runtime.kv.sending_clock import SendingClock
from edgellm.runtime.kv.servicer import SENDER_METADATA
from edgellm.runtime.kv.transfer import TransferError, TransferJob
from edgellm.runtime.kv.types import KvTarget, TransferStats
from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.streams import write
from edgellm.runtime.tasks import race
from edgellm.runtime.wire import attempt_to_proto

MAX_RESENDS: Final = 3
"""Of one chunk that arrives damaged."""

_Call: TypeAlias = grpc.aio.StreamStreamCall[kv_pb2.KvMessage, kv_pb2.KvAck]


class KvPush:
    """State of one push; `run` until it returns or raises, `advance` whenever more of the prompt is computed."""

    def __init__(
        self,
        job: TransferJob,
        target: KvTarget,
        *,
        pool: KvPool,
        codec: Callable[[KvLink], str],
        clock: SendingClock,
        senders: int = 1,
    ) -> None:
        """`senders`: ranks that push to this target, each the heads that its pool has."""
        self._job = job
        self.target = target
        self._senders = senders
        self._pool = pool
        self._choose_codec = codec
        self._clock = clock
        self._computed = 0
        self._cut_tokens = 0
        self._to_send: deque[KvRange] = deque()
        self._in_flight: dict[int, tuple[KvRange, kv_pb2.KvChunk]] = {}
        self._resends: Counter[KvRange] = Counter()
        self._wake = asyncio.Event()
        self._credit_bytes = 0
        self._window_bytes = 0
        self._delivered = False
        self._stopped = False
        self._chunks = 0
        self._bytes = 0
        self._transport = ""
        self._codec = ""

    def advance(self, computed: int) -> None:
        """KV of the first `computed` prompt tokens is in the pool."""
        self._computed = computed
        if computed == self._job.prompt_tokens:
            self._clock.prompt_finished()
        self._wake.set()

    def stop(self) -> None:
        """From now on no block is read."""
        self._stopped = True

    @property
    def stats(self) -> TransferStats:
        return TransferStats(
            transport=self._transport,
            codec=self._codec,
            chunks=self._chunks,
            bytes=self._bytes,
            hidden_ms=self._clock.hidden_ms,
            exposed_ms=self._clock.exposed_ms,
        )

    async def run(self, links: KvLinks) -> None:
        """Send everything. Raises TransferError."""
        try:
            async with asyncio.timeout(self._job.timeout_s) as self._deadline:
                await self._run_with_handshake(links)
        except grpc.aio.AioRpcError as error:
            raise self._failure(f"{error.code().name}: {error.details()}") from error
        except TimeoutError as error:
            raise self._failure(f"no progress for {self._job.timeout_s} s") from error

    async def _run_with_handshake(self, links: KvLinks) -> None:
        """A receiver that was restarted since the handshake refuses the stream; shake hands again, once."""
        try:
            await self._run_once(links)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION or self._chunks:
                raise
            await self._run_once(links)

    async def _run_once(self, links: KvLinks) -> None:
        async with links.use(self.target) as link:
            await self._run_on(link)
            link.observe(self._bytes, self._clock.busy_s)

    async def _run_on(self, link: KvLink) -> None:
        self._transport, self._codec = link.outgoing.name, self._choose_codec(link)
        call = link.stub.Push(None, metadata=((SENDER_METADATA, link.session),))
        try:
            await self._open(call)
            await race(self._read_acks(call, link), self._send_chunks(call, link))
        finally:
            call.cancel()
            for _, chunk in self._in_flight.values():
                link.outgoing.release(chunk)
        if not self._delivered:
            raise self._failure("the receiver closed the stream before it had everything")

    async def _open(self, call: _Call) -> None:
        opening = kv_pb2.KvOpen(
            attempt=attempt_to_proto(self._job.attempt),
            prompt_tokens=self._job.prompt_tokens,
            capacity_tokens=self._job.capacity_tokens,
            backup=self.target.backup,
            first_layer=self.target.first_layer,
            num_layers=self.target.num_layers,
            senders=self._senders,
        )
        await write(call, kv_pb2.KvMessage(open=opening))
        ack = await call.read()
        if not isinstance(ack, kv_pb2.KvAck):
            raise self._failure("the receiver closed the stream at once")
        self._check(ack)
        self._credit_bytes = self._window_bytes = ack.credit_bytes

    async def _read_acks(self, call: _Call, link: KvLink) -> None:
        while isinstance(ack := await call.read(), kv_pb2.KvAck):
            sent = self._in_flight.pop(ack.sequence_number, None)
            if sent is None:
                raise self._failure(f"the receiver acknowledged chunk {ack.sequence_number}, which is not in flight")
            where, chunk = sent
            link.outgoing.release(chunk)
            self._credit_bytes += ack.credit_bytes
            if ack.status == kv_pb2.KV_ACK_STATUS_CORRUPT:
                self._resend(where, ack.message)
            else:
                self._check(ack)
            self._clock.acknowledged(outstanding=bool(self._in_flight))
            self._expect_progress()
            self._wake.set()

    async def _send_chunks(self, call: _Call, link: KvLink) -> None:
        """Until cancelled, when the receiver closes the stream in answer to our half-close."""
        while True:
            if (where := self._next(link)) is not None:
                await self._send(call, link, where)
                continue
            if self._is_all_acknowledged() and not self._delivered:
                self._delivered = True
                await call.done_writing()
            self._expect_progress(waiting_for_receiver=bool(self._in_flight) or self._delivered)
            await self._woken()

    def _next(self, link: KvLink) -> KvRange | None:
        if self._stopped:
            return None
        contract = self._pool.contract
        sendable = sendable_tokens(contract, computed=self._computed, prompt_tokens=self._job.prompt_tokens)
        if sendable > self._cut_tokens:
            tokens = range(self._cut_tokens, sendable)
            self._to_send.extend(cut(contract, tokens, self._layers, self._pool.heads, max_bytes=link.chunk_bytes))
            self._cut_tokens = sendable
        return self._to_send.popleft() if self._to_send else None

    def _is_all_acknowledged(self) -> bool:
        """Of this sender's chunks: the receiver may still lack those of other ranks."""
        return self._cut_tokens == self._job.prompt_tokens and not self._to_send and not self._in_flight

    async def _send(self, call: _Call, link: KvLink, where: KvRange) -> None:
        self._clock.chunk_started()
        self._expect_progress()
        payload = encode(self._codec, self._pool.contract, where, gather(self._pool, self._job.blocks, where))
        await self._take_credit(len(payload))
        self._chunks += 1
        self._bytes += len(payload)
        message = kv_pb2.KvMessage(chunk=self._header(where, payload))
        await link.outgoing.place(message.chunk, payload)
        self._in_flight[message.chunk.sequence_number] = (where, message.chunk)
        await write(call, message)

    async def _take_credit(self, count: int) -> None:
        if count > self._window_bytes:
            raise self._failure(f"a chunk has {count} bytes, the receiver takes {self._window_bytes} at a time")
        while self._credit_bytes < count:
            await self._woken()
        self._credit_bytes -= count

    def _header(self, where: KvRange, payload: bytes) -> kv_pb2.KvChunk:
        return kv_pb2.KvChunk(
            attempt=attempt_to_proto(self._job.attempt),
            first_layer=where.layers.start,
            num_layers=len(where.layers),
            first_head=where.heads.start,
            num_heads=len(where.heads),
            first_token=where.tokens.start,
            num_tokens=len(where.tokens),
            codec=self._codec,
            checksum=zlib.crc32(payload),
            sequence_number=self._chunks,
        )

    @property
    def _layers(self) -> range:
        """The target's layers that this node computes."""
        ours, theirs = self._pool.layers, self.target.layers
        return range(max(ours.start, theirs.start), min(ours.stop, theirs.stop))

    def _resend(self, where: KvRange, reason: str) -> None:
        self._resends[where] += 1
        if self._resends[where] > MAX_RESENDS:
            raise self._failure(f"a chunk arrived damaged {MAX_RESENDS + 1} times: {reason}")
        self._to_send.append(where)

    def _check(self, ack: kv_pb2.KvAck) -> None:
        if ack.status == kv_pb2.KV_ACK_STATUS_NO_CAPACITY:
            raise TransferError("capacity", self.target.node_id, ack.message)
        if ack.status == kv_pb2.KV_ACK_STATUS_STALE:
            raise TransferError("stale", self.target.node_id, f"{self.target.node_id} has released this attempt")

    def _expect_progress(self, *, waiting_for_receiver: bool = True) -> None:
        """Set the deadline of whatever is next; there is none while the prompt is being computed."""
        now_s = asyncio.get_running_loop().time()
        self._deadline.reschedule(now_s + self._job.timeout_s if waiting_for_receiver else None)

    async def _woken(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def _failure(self, message: str) -> TransferError:
        return TransferError("transfer", self.target.node_id, f"KV to {self.target.node_id}: {message}")
