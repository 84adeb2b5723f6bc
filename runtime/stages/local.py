"""The stage exchange between nodes of one host: the same messages over a Unix socket.

gRPC passes each message through three threads and two tasks. On one host, where nobody else uses the cores meanwhile,
that takes longer than the way itself.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError

from edgellm.runtime.kv.links import MAX_MESSAGE_BYTES
from edgellm.runtime.rpc import stage_pb2
from edgellm.runtime.stages.messages import StageResult, StageStep
from edgellm.runtime.stages.servicer import ServicerHooks
from edgellm.runtime.stages.wire import result_to_proto, step_from_proto

_LENGTH: Final = struct.Struct("<I")
_CREDENTIALS: Final = struct.Struct("3i")
"""Of a process: its id, its user's and its group's."""
_END_TIMEOUT_S: Final = 1.0

Message = TypeVar("Message")

_log = logging.getLogger(__name__)


def socket_name(address: str) -> str:
    """Of the node that listens there, host:port. An abstract name: it has no file, and is known to whoever is in the
    same network namespace."""
    return f"\0edgellm-stages/{address}"


class Frames(asyncio.Protocol, Generic[Message]):
    """Messages over one connection, each after its length in bytes (u32, little endian).

    Only between processes of one user: anybody may listen under an abstract name, and dial it.
    """

    def __init__(self, decode: Callable[[bytes], Message], deliver: Callable[[Message], None]) -> None:
        """`decode` raises ValueError or DecodeError for what arrived damaged, which ends the connection."""
        self._decode = decode
        self._deliver = deliver
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._is_over = False
        self.is_trusted = False
        self.ended: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended; raises what nobody expected."""

    def send(self, message: bytes) -> None:
        """No effect if the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_LENGTH.pack(len(message)) + message)

    def abort(self) -> None:
        """Also of a connection that is only just being made."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()

    async def has_ended(self, within_s: float) -> bool:
        """Raises what nobody expected."""
        await asyncio.wait([self.ended], timeout=within_s)
        if self.ended.done():
            self.ended.result()
        return self.ended.done()

    def connection_made(  # type: ignore[override]  # of a socket
        self, transport: asyncio.Transport
    ) -> None:
        self._transport = transport
        self.is_trusted = _user_of(transport.get_extra_info("socket")) == os.getuid()
        if self._is_over or not self.is_trusted:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (message := self._next_message()) is not None:
            self._deliver(message)

    def connection_lost(self, error: Exception | None) -> None:
        if error is None or isinstance(error, OSError):
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def _next_message(self) -> Message | None:
        """None where there is no whole one, and where what arrived is damaged."""
        try:
            data = self._take()
            return None if data is None else self._decode(data)
        except (ValueError, DecodeError) as error:
            _log.warning("local stage stream given up reason=%s", error)
            self._received.clear()
            self.abort()
            return None

    def _take(self) -> bytes | None:
        """The next message's bytes, once they are here. Raises ValueError for one that nobody sends."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes was announced; at most {MAX_MESSAGE_BYTES} are sent")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message


def _user_of(peer: socket.socket) -> int:
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


async def connect_locally(
    address: str, decode: Callable[[bytes], Message], deliver: Callable[[Message], None]
) -> Frames[Message] | None:
    """To the node that listens at this address; None unless it is one of this user's on this host."""
    loop = asyncio.get_running_loop()
    try:
        _, frames = await loop.create_unix_connection(lambda: Frames(decode, deliver), socket_name(address))
    except OSError:
        return None
    if not frames.is_trusted:
        _log.warning("local stage stream refused address=%s: another user listens under its name", address)
        return None
    return frames


@contextlib.asynccontextmanager
async def serving_locally(address: str, hooks: ServicerHooks) -> AsyncIterator[None]:
    """Take steps from nodes of this host that dial `address`. Where that cannot be, they come over gRPC."""
    taken: set[Frames[StageStep]] = set()
    is_closing = False

    def accept() -> Frames[StageStep]:
        frames = _Source(hooks).frames
        taken.add(frames)
        frames.ended.add_done_callback(lambda _: taken.discard(frames))
        if is_closing:
            frames.abort()
        return frames

    try:
        server = await asyncio.get_running_loop().create_unix_server(accept, socket_name(address))
    except OSError as error:
        _log.warning("no local stage streams address=%s reason=%s", address, error)
        yield
        return
    try:
        yield
    finally:
        is_closing = True
        server.close()
        for frames in taken:
            frames.abort()
        if taken:
            await asyncio.wait([frames.ended for frames in taken], timeout=_END_TIMEOUT_S)


class _Source:
    """One connection's way back."""

    def __init__(self, hooks: ServicerHooks) -> None:
        self._hooks = hooks
        self.frames = Frames(_step, self._take)
        self.frames.ended.add_done_callback(self._gone)

    def answer(self, result: StageResult) -> None:
        self.frames.send(result_to_proto(result).SerializeToString())

    def _take(self, step: StageStep) -> None:
        self._hooks.on_step(step, self)

    def _gone(self, ended: asyncio.Future[None]) -> None:
        self._hooks.on_gone(self)
        if (error := ended.exception()) is not None:
            self._hooks.on_crash(error)


def _step(data: bytes) -> StageStep:
    return step_from_proto(stage_pb2.StageStep.FromString(data))
