"""The receiving end of the KV exchange, over gRPC: handshake, then a Push stream per request and sender, and one Copy
stream per sender."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never

import grpc
import grpc.aio

from edgellm.engines.kv import KvContract
from edgellm.runtime.kv.chunks import KvRange
from edgellm.runtime.kv.codecs import codec_names
from edgellm.runtime.kv.copying.holder import CopyHolder
from edgellm.runtime.kv.copying.receiver import CopyContext, receive_copies
from edgellm.runtime.kv.inbox import Chunk, Corrupt, Installed, KvInbox, NoCapacity, Opened, PromptPart, Stale
from edgellm.runtime.kv.sessions import Session, Sessions, SessionsFullError, session_name
from edgellm.runtime.kv.types import NodeId
from edgellm.runtime.rpc import kv_pb2, kv_pb2_grpc
from edgellm.runtime.streams import OpenStreams
from edgellm.runtime.transports.base import Incoming, TransportError
from edgellm.runtime.transports.grpc import GrpcIncoming
from edgellm.runtime.transports.shm import ShmIncoming
from edgellm.runtime.wire import attempt_from_proto

SENDER_METADATA: Final = "edgellm-sender"
"""Metadata of a Push: which handshake it belongs to, as `node id/ring name`."""

_PushContext: TypeAlias = grpc.aio.ServicerContext[kv_pb2.KvMessage, kv_pb2.KvAck]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How much a receiver takes at a time."""

    chunk_bytes: int = 1 << 20
    """Payload asked of senders per message; gRPC streams are fastest near 1 MiB."""
    window_bytes: int = 8 << 20
    """Credit of one stream: encoded bytes it may have in flight."""
    idle_timeout_s: float = 60.0
    """A stream on which nothing arrives for this long is given up."""
    max_sessions: int = 64
    """Senders that may be connected: each may have its ring mapped here."""


class KvExchangeServicer(kv_pb2_grpc.KvExchangeServicer):
    """Shell around a KvInbox and a CopyHolder. What nobody expected is given to `on_crash` and ends the stream."""

    def __init__(
        self,
        *,
        node_id: NodeId,
        contract: KvContract,
        inbox: KvInbox,
        copies: CopyHolder,
        config: ExchangeConfig,
        welcomed: Callable[[], Awaitable[object]],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        """`welcomed`: wait until there is an orchestrator, to which the blocks of a prompt are accounted for."""
        self._node_id = node_id
        self._contract = contract
        self._inbox = inbox
        self._copies = copies
        self._config = config
        self._welcomed = welcomed
        self._on_crash = on_crash
        self._sessions = Sessions(config.max_sessions)
        self.streams = OpenStreams()

    async def Handshake(  # noqa: N802  # named by the proto file
        self, request: kv_pb2.KvHello, context: grpc.aio.ServicerContext[kv_pb2.KvHello, kv_pb2.KvWelcome]
    ) -> kv_pb2.KvWelcome:
        if request.kv_contract_sha256 != self._contract.sha256:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self._other_contract(request))
        incoming = _choose(request)
        session = Session(node_id=request.node_id, incoming=incoming)
        try:
            self._sessions.open(session_name(request.node_id, request.shm_name), session)
        except SessionsFullError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        _log.info("kv session opened sender=%s transport=%s", request.node_id, incoming.name)
        return kv_pb2.KvWelcome(
            node_id=self._node_id,
            transport=incoming.name,
            codecs=codec_names(self._contract),
            chunk_bytes=self._config.chunk_bytes,
        )

    async def Push(  # type: ignore[override]  # noqa: N802  # the generated base declares a generator
        self, request_iterator: object, context: _PushContext
    ) -> None:
        await self._serve(context, lambda session: self._receive(session, context))

    async def Copy(  # type: ignore[override]  # noqa: N802  # as above
        self, request_iterator: object, context: CopyContext
    ) -> None:
        idle_timeout_s = self._config.idle_timeout_s
        await self._serve(
            context,
            lambda session: receive_copies(self._copies, session.incoming, context, idle_timeout_s=idle_timeout_s),
        )

    async def _serve(self, context: _PushContext | CopyContext, receive: Callable[[Session], Awaitable[None]]) -> None:
        """Receive in the session of the handshake that a stream belongs to. A stream that breaks ends quietly."""
        try:
            self.streams.enter()
            async with self._joined_session(context) as session:
                await receive(session)
        except grpc.aio.AbortError:
            raise
        except (grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            _log.info("kv stream lost error=%r", error)
        except Exception as error:
            self._on_crash(error)
            raise

    @asynccontextmanager
    async def _joined_session(self, context: _PushContext | CopyContext) -> AsyncIterator[Session]:
        name = str(dict(context.invocation_metadata() or ()).get(SENDER_METADATA, ""))
        session = self._sessions.get(name)
        if session is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no handshake with this node; shake hands first")
        with self._sessions.stream(name, session):
            yield session

    async def _receive(self, session: Session, context: _PushContext) -> None:
        first = await self._read(context)
        if first is None or first.WhichOneof("message") != "open":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a Push stream starts with `open`")
        attempt = attempt_from_proto(first.open.attempt)
        part = PromptPart(
            layers=range(first.open.first_layer, first.open.first_layer + first.open.num_layers),
            tokens=first.open.prompt_tokens,
            backup=first.open.backup,
            senders=max(1, first.open.senders),
        )
        await self._welcomed()
        outcome = self._inbox.open(attempt, part, capacity_tokens=first.open.capacity_tokens)
        answer = _ack(outcome, sequence_number=0, credit_bytes=self._config.window_bytes)
        if not isinstance(outcome, Opened):
            await context.write(answer)
            return
        try:
            await context.write(answer)
            while (message := await self._read(context)) is not None:
                await context.write(self._install(session.incoming, message.chunk))
        finally:
            self._inbox.close(attempt, part)

    async def _read(self, context: _PushContext) -> kv_pb2.KvMessage | None:
        """The next message, or None when the sender has half-closed."""
        try:
            async with asyncio.timeout(self._config.idle_timeout_s):
                message = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"silent for {self._config.idle_timeout_s} s")
        return message if isinstance(message, kv_pb2.KvMessage) else None

    def _install(self, incoming: Incoming, chunk: kv_pb2.KvChunk) -> kv_pb2.KvAck:
        try:
            payload = incoming.fetch(chunk)
        except TransportError as error:
            return _ack(Corrupt(message=str(error)), sequence_number=chunk.sequence_number, credit_bytes=0)
        outcome = self._inbox.install(
            Chunk(
                attempt=attempt_from_proto(chunk.attempt),
                where=range_from_proto(chunk),
                codec=chunk.codec,
                checksum=chunk.checksum,
                payload=payload,
            )
        )
        return _ack(outcome, sequence_number=chunk.sequence_number, credit_bytes=len(payload))

    def _other_contract(self, hello: kv_pb2.KvHello) -> str:
        return (
            f"node {hello.node_id} has KV contract {hello.kv_contract_sha256[:12]}, "
            f"node {self._node_id} has {self._contract.sha256[:12]}; start both from the same bundle"
        )


def range_from_proto(chunk: kv_pb2.KvChunk) -> KvRange:
    return KvRange(
        layers=range(chunk.first_layer, chunk.first_layer + chunk.num_layers),
        heads=range(chunk.first_head, chunk.first_head + chunk.num_heads),
        tokens=range(chunk.first_token, chunk.first_token + chunk.num_tokens),
    )


def _choose(hello: kv_pb2.KvHello) -> Incoming:
    """The first of the sender's transports that works from here."""
    if "shm" in hello.transports:
        try:
            return ShmIncoming(hello.shm_name, hello.shm_bytes)
        except TransportError as error:
            _log.warning("kv transport shm refused sender=%s reason=%s", hello.node_id, error)
    return GrpcIncoming()


def _ack(
    outcome: Opened | Installed | Stale | NoCapacity | Corrupt, *, sequence_number: int, credit_bytes: int
) -> kv_pb2.KvAck:
    ack = kv_pb2.KvAck(sequence_number=sequence_number, credit_bytes=credit_bytes)
    match outcome:
        case Opened():
            ack.status = kv_pb2.KV_ACK_STATUS_OK
        case Installed(complete=complete):
            ack.status, ack.complete = kv_pb2.KV_ACK_STATUS_OK, complete
        case Stale():
            ack.status = kv_pb2.KV_ACK_STATUS_STALE
        case NoCapacity(message=message):
            ack.status, ack.message = kv_pb2.KV_ACK_STATUS_NO_CAPACITY, message
        case Corrupt(message=message):
            ack.status, ack.message = kv_pb2.KV_ACK_STATUS_CORRUPT, message
        case _:
            assert_never(outcome)
    return ack
