"""All copies that one node keeps on another, over one Copy stream."""

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final, TypeAlias

import grpc
import grpc.aio
import numpy as np

from edgellm.engines.kv import BlockId, KvPool
from edgellm.runtime.kv.copying.queue import CopyConfig, CopyKey, CopyQueue, Refusal, Rows
from edgellm.runtime.kv.copying.rows import Span, carried_as, read_spans, wire_row_bytes
from edgellm.runtime.kv.links import KvLink, KvLinks
from edgellm.runtime.kv.servicer import SENDER_METADATA
from edgellm.runtime.kv.transfer import TransferError, TransferFailure
from edgellm.runtime.kv.types import KvTarget
from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.streams import write
from edgellm.runtime.tasks import race
from edgellm.runtime.wire import attempt_to_proto

_SEND_AGAIN: Final = (kv_pb2.KV_ACK_STATUS_CORRUPT, kv_pb2.KV_ACK_STATUS_EARLY)
_KINDS: Final[dict[kv_pb2.KvAckStatus.ValueType, TransferFailure]] = {
    kv_pb2.KV_ACK_STATUS_STALE: "stale",
    kv_pb2.KV_ACK_STATUS_EARLY: "stale",
    kv_pb2.KV_ACK_STATUS_NO_CAPACITY: "capacity",
}

_Call: TypeAlias = grpc.aio.StreamStreamCall[kv_pb2.KvCopyMessage, kv_pb2.KvCopyAck]


class CopyStreamError(Exception):
    """The holder cannot be reached, or does not answer."""


class CopyStream:
    """State of one stream; `run` until it returns or raises."""

    def __init__(
        self, target: KvTarget, *, pool: KvPool, config: CopyConfig, on_ended: Callable[[CopyKey, TransferError], None]
    ) -> None:
        """`on_ended` is told of copies that end while the stream goes on."""
        self._target = target
        self._pool = pool
        self._config = config
        self._on_ended = on_ended
        self._codec = carried_as(config.codec, pool.contract)
        self._row_bytes = wire_row_bytes(self._codec, pool.contract)
        self._blocks: dict[CopyKey, Sequence[BlockId]] = {}
        self._in_flight: deque[tuple[kv_pb2.KvCopyMessage, list[Rows]]] = deque()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.Handle | None = None
        self.queue = CopyQueue(config, bytes_per_layer=self._row_bytes)
        self.closing = False
        """Takes no more copies."""
        self.sent_bytes = 0

    def start(self, key: CopyKey, blocks: Sequence[BlockId], *, first_token: int, computed: int) -> None:
        """`blocks` are the attempt's; the holder is asked to reserve as many."""
        self._blocks[key] = blocks
        self.queue.start(key, first_token=first_token, computed=computed, now_s=_now_s())
        self._look_soon()

    def advance(self, key: CopyKey, computed: int) -> None:
        self.queue.advance(key, computed, _now_s())
        self._look_soon()

    def stop(self, key: CopyKey) -> None:
        """From now on its blocks are not read."""
        self.queue.stop(key)
        self._blocks.pop(key, None)
        if not self.queue:
            self._wake.set()

    async def run(self, links: KvLinks) -> None:
        """Until there has been nothing to copy for a while. Raises CopyStreamError."""
        try:
            async with asyncio.timeout(self._config.patience_s) as self._deadline:
                await self._run_with_handshake(links)
        except grpc.aio.AioRpcError as error:
            raise CopyStreamError(f"{error.code().name}: {error.details()}") from error
        except TimeoutError as error:
            raise CopyStreamError(f"no answer for {self._config.patience_s} s") from error
        finally:
            self.closing = True
            for handle in (self._timer, self._look):
                if handle is not None:
                    handle.cancel()

    async def _run_with_handshake(self, links: KvLinks) -> None:
        """A holder that was restarted since the handshake refuses the stream; shake hands again, once."""
        try:
            await self._run_once(links)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise
            self.queue.restart()
            await self._run_once(links)

    async def _run_once(self, links: KvLinks) -> None:
        async with links.use(self._target) as link:
            self._expect_answer()
            call = link.stub.Copy(None, metadata=((SENDER_METADATA, link.session),))
            try:
                await race(self._read_answers(call, link), self._send_messages(call, link))
            finally:
                call.cancel()
                for message, _ in self._in_flight:
                    link.outgoing.release(message)
                self._in_flight.clear()

    async def _read_answers(self, call: _Call, link: KvLink) -> None:
        while isinstance(ack := await call.read(), kv_pb2.KvCopyAck):
            if not self._in_flight:
                raise CopyStreamError("the holder answered a message that was not sent")
            message, rows = self._in_flight.popleft()
            link.outgoing.release(message)
            self._expect_answer()
            refused: dict[int, Refusal] = {
                one.entry: "again" if one.status in _SEND_AGAIN else "never" for one in ack.refusals
            }
            for key in self.queue.answered(rows, refused, _now_s()):
                self._end(key, *_reason(ack, rows, key))
            if (behind := self.queue.give_up(_now_s())) is not None:
                self._end(behind, "transfer", f"more than {self._config.max_lag_tokens} tokens behind, and not gaining")
            self._wake.set()
        if not self.closing:
            raise CopyStreamError("the holder closed the stream")

    async def _send_messages(self, call: _Call, link: KvLink) -> None:
        """Until there is nothing to copy; then half-close and let the holder close."""
        while await self._something_to_do():
            while rows := self.queue.take(_now_s()):
                await self._send(call, link, rows)
        self.closing = True
        self._deadline.reschedule(_now_s() + self._config.patience_s)
        await call.done_writing()
        await asyncio.Event().wait()

    def _look_soon(self) -> None:
        """Once for all copies that a step has moved on."""
        if self._look is None:
            self._look = asyncio.get_running_loop().call_soon(self._look_now)

    def _look_now(self) -> None:
        """Wake the sender, or see to it that it wakes when something is due."""
        self._look, when_s = None, self.queue.wake_s()
        if when_s is None:
            return
        if when_s <= _now_s():
            self._wake.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(when_s, self._timer_rang)

    async def _something_to_do(self) -> bool:
        """Wait for it; False when there has been no copy to keep for a while."""
        self._look_now()
        try:
            async with asyncio.timeout(None if self.queue or self._in_flight else self._config.linger_s):
                await self._wake.wait()
        except TimeoutError:
            return len(self.queue) > 0
        self._wake.clear()
        return True

    async def _send(self, call: _Call, link: KvLink, rows: list[Rows]) -> None:
        message, payload = self._encode(rows)
        await link.outgoing.place(message, payload)
        self._in_flight.append((message, rows))
        if len(self._in_flight) == 1:
            self._expect_answer()
        self.sent_bytes += len(payload)
        await write(call, message)

    def _encode(self, rows: list[Rows]) -> tuple[kv_pb2.KvCopyMessage, memoryview]:
        """One gather for all copies of the same layers; `rows` is brought into their order."""
        rows.sort(key=lambda one: (one.key.layers.start, one.key.layers.stop))
        parts = []
        for layers, group in groupby(rows, key=lambda one: one.key.layers):
            spans = [Span(blocks=self._blocks[one.key], tokens=one.tokens) for one in group]
            parts.append(read_spans(self._pool, layers, spans, self._codec).reshape(-1))
        payload = (parts[0] if len(parts) == 1 else np.concatenate(parts)).data
        entries = [self._entry(one) for one in rows]
        return kv_pb2.KvCopyMessage(checksum=zlib.crc32(payload), entries=entries), payload

    def _entry(self, rows: Rows) -> kv_pb2.KvCopyRows:
        layers, tokens = rows.key.layers, rows.tokens
        return kv_pb2.KvCopyRows(
            attempt=attempt_to_proto(rows.key.attempt),
            first_layer=layers.start,
            num_layers=len(layers),
            first_token=tokens.start,
            num_tokens=len(tokens),
            capacity_tokens=len(self._blocks[rows.key]) * self._pool.contract.block_tokens,
            codec=self._codec,
            length=len(tokens) * len(layers) * self._row_bytes,
        )

    def _end(self, key: CopyKey, kind: TransferFailure, message: str) -> None:
        self._blocks.pop(key, None)
        self._on_ended(key, TransferError(kind, self._target.node_id, message))

    def _timer_rang(self) -> None:
        self._timer = None
        self._wake.set()

    def _expect_answer(self) -> None:
        """Set the deadline of the oldest unanswered message, if there is one."""
        self._deadline.reschedule(_now_s() + self._config.patience_s if self._in_flight else None)


def _reason(ack: kv_pb2.KvCopyAck, rows: Sequence[Rows], key: CopyKey) -> tuple[TransferFailure, str]:
    indices = [index for index, one in enumerate(rows) if one.key == key]
    refusal = next(refusal for refusal in ack.refusals if refusal.entry in indices)
    return _KINDS.get(refusal.status, "transfer"), refusal.message


def _now_s() -> float:
    return asyncio.get_running_loop().time()
