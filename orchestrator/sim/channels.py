"""The client's side of simulated gRPC: channels and calls that behave as those of `grpc.aio`."""

import asyncio
from collections.abc import Callable, Generator
from typing import Any, Final

import grpc
import grpc.aio

from edgellm.orchestrator.sim.network import Network
from edgellm.orchestrator.sim.rpc import (
    CANCELLED,
    EOF,
    Deserializer,
    Frame,
    Listener,
    Metadata,
    Rpc,
    Serializer,
    Status,
)

_LATE: Final = Status(code=grpc.StatusCode.DEADLINE_EXCEEDED, details="Deadline Exceeded")


_BUFFER_S: Final = 0.001
"""Of sending: what is there already leaves without anybody waiting for it."""


async def until(time_s: float) -> None:
    """Wait while a message leaves."""
    wait_s = time_s - asyncio.get_running_loop().time()
    if wait_s > _BUFFER_S:
        await asyncio.sleep(wait_s)


class Call:
    """An RPC of any kind; unary ones are awaited."""

    def __init__(self, rpc: Rpc, serialize: Serializer, deserialize: Deserializer, timeout_s: float | None) -> None:
        self._rpc = rpc
        self._deserialize = deserialize
        self._serialize = serialize
        self._half_closed = False
        if timeout_s is not None:
            asyncio.get_running_loop().call_later(timeout_s, rpc.give_up, _LATE)

    async def write(self, request: Any) -> None:
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        if self._half_closed:
            raise asyncio.InvalidStateError("RPC is half closed after calling done_writing().")
        try:
            await until(self._rpc.send_request(self._serialize(request)))
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def done_writing(self) -> None:
        self.half_close()

    def half_close(self) -> None:
        if not self._half_closed and not self.done():
            self._half_closed = True
            self._rpc.half_close()

    async def read(self) -> Any:
        """The next message, EOF, or what grpc.aio raises for the end that the RPC came to."""
        try:
            message = await self._rpc.to_client.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(message, Frame):
            return message.parse(self._deserialize)
        if message.code is grpc.StatusCode.OK:
            return EOF
        if message is CANCELLED:
            raise asyncio.CancelledError
        trailing = grpc.aio.Metadata(*message.trailing)
        raise grpc.aio.AioRpcError(message.code, grpc.aio.Metadata(), trailing, message.details, None)

    def cancel(self) -> bool:
        was_done = self.done()
        self._rpc.give_up(CANCELLED)
        return not was_done

    def cancelled(self) -> bool:
        return self._rpc.to_client.status is CANCELLED

    def done(self) -> bool:
        return self._rpc.to_client.status is not None

    async def code(self) -> grpc.StatusCode:
        return (await self._rpc.to_client.ended()).code

    async def details(self) -> str:
        return (await self._rpc.to_client.ended()).details

    async def trailing_metadata(self) -> Metadata:
        return (await self._rpc.to_client.ended()).trailing

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is EOF:
            raise StopAsyncIteration
        return message

    def __await__(self) -> Generator[Any, None, Any]:
        return self.read().__await__()


class SimulatedChannel:
    """What `grpc.aio.insecure_channel` gives. It needs no connection of its own: each call makes one."""

    def __init__(self, network: Network, listeners: dict[int, Listener], target: str) -> None:
        self._network = network
        self._listeners = listeners
        self._port = int(target.rpartition(":")[2])

    async def __aenter__(self) -> "SimulatedChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Calls are cancelled by those who made them."""

    def stream_stream(
        self, method: str, request_serializer: Serializer, response_deserializer: Deserializer, **_: Any
    ) -> Callable[..., Call]:
        def call(requests: None = None, *, timeout: float | None = None, metadata: Metadata = ()) -> Call:
            return Call(self._rpc(method, metadata, is_stream=True), request_serializer, response_deserializer, timeout)

        return call

    def unary_stream(
        self, method: str, request_serializer: Serializer, response_deserializer: Deserializer, **_: Any
    ) -> Callable[..., Call]:
        def call(request: Any, *, timeout: float | None = None, metadata: Metadata = ()) -> Call:
            rpc = self._rpc(method, metadata, is_stream=False)
            rpc.send_request(request_serializer(request))
            made = Call(rpc, request_serializer, response_deserializer, timeout)
            made.half_close()
            return made

        return call

    unary_unary = unary_stream

    def _rpc(self, method: str, metadata: Metadata, *, is_stream: bool) -> Rpc:
        return Rpc(self._network, self._listeners, method, self._port, tuple(metadata), is_stream=is_stream)
