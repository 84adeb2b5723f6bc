"""The stage exchange between nodes of one host: the same messages over a Unix socket.

gRPC passes each message through three threads and two tasks. On one host, where nobody else uses the cores meanwhile,
that takes longer than the way itself.
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Callable
from typing import Final

from google.protobuf.message import DecodeError

from edgellm.runtime.kv.links import MAX_MESSAGE_BYTES
from edgellm.runtime.rpc import stage_pb2
from edgellm.runtime.stages.messages import StageResult
from edgellm.runtime.stages.servicer import ServicerHooks
from edgellm.runtime.stages.wire import result_to_proto, step_from_proto

_LENGTH: Final = struct.Struct("<I")

_log = logging.getLogger(__name__)


def socket_name(address: str) -> str:
    """Of the node that listens there, host:port. An abstract name: it has no file, and is known to whoever could reach
    that address without leaving the host."""
    return f"\0edgellm-stages/{address}"


class Frames(asyncio.Protocol):
    """Messages over one connection, each after its length in bytes (u32, little endian)."""

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        """`on_message` raises ValueError or DecodeError for what arrived damaged, which ends the connection."""
        self._on_message = on_message
        self._received = bytearray()
        self.ended: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended; raises what nobody expected."""

    def send(self, message: bytes) -> None:
        """No effect if the connection has ended."""
        if not self._transport.is_closing():
            self._transport.write(_LENGTH.pack(len(message)) + message)

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(  # type: ignore[override]  # of a socket
        self, transport: asyncio.Transport
    ) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while (message := self._take()) is not None:
                self._on_message(message)
        except (ValueError, DecodeError) as error:
            _log.warning("local stage stream given up reason=%s", error)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if error is None or isinstance(error, OSError):
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def _take(self) -> bytes | None:
        """The next message, once it is whole. Raises ValueError for one that nobody sends."""
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


async def connect_locally(address: str, on_message: Callable[[bytes], None]) -> Frames | None:
    """To the node that listens at this address; None unless it is on this host."""
    loop = asyncio.get_running_loop()
    try:
        _, frames = await loop.create_unix_connection(lambda: Frames(on_message), socket_name(address))
    except OSError:
        return None
    return frames


@contextlib.asynccontextmanager
async def serving_locally(address: str, hooks: ServicerHooks) -> AsyncIterator[None]:
    """Take steps from nodes of this host that dial `address`."""
    taken: set[Frames] = set()

    def accept() -> Frames:
        frames = _Source(hooks).frames
        taken.add(frames)
        frames.ended.add_done_callback(lambda _: taken.discard(frames))
        return frames

    server = await asyncio.get_running_loop().create_unix_server(accept, socket_name(address))
    try:
        yield
    finally:
        server.close()
        for frames in taken:
            frames.abort()
        await asyncio.gather(*(frames.ended for frames in taken), return_exceptions=True)


class _Source:
    """One connection's way back."""

    def __init__(self, hooks: ServicerHooks) -> None:
        self._hooks = hooks
        self.frames = Frames(self._read)
        self.frames.ended.add_done_callback(self._gone)

    def answer(self, result: StageResult) -> None:
        self.frames.send(result_to_proto(result).SerializeToString())

    def _read(self, message: bytes) -> None:
        self._hooks.on_step(step_from_proto(stage_pb2.StageStep.FromString(message)), self)

    def _gone(self, ended: asyncio.Future[None]) -> None:
        self._hooks.on_gone(self)
        if (error := ended.exception()) is not None:
            self._hooks.on_crash(error)
