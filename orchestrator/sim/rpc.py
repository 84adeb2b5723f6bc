"""One RPC over the simulated network, as both of its sides see it."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import grpc
import grpc.aio

from edgellm.orchestrator.sim.loop import Process, current_process
from edgellm.orchestrator.sim.network import Lane, Network
from edgellm.runtime.rpc import kv_pb2, stage_pb2

Serializer: TypeAlias = Callable[[Any], bytes]
Deserializer: TypeAlias = Callable[[bytes], Any]
Metadata: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How an RPC ended."""

    code: grpc.StatusCode
    details: str = ""
    trailing: Metadata = ()


EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
OK: Final = Status(code=grpc.StatusCode.OK)
RESET: Final = Status(code=grpc.StatusCode.UNAVAILABLE, details="connection reset by peer")
REFUSED: Final = Status(code=grpc.StatusCode.UNAVAILABLE, details="connection refused")
CANCELLED: Final = Status(code=grpc.StatusCode.CANCELLED, details="cancelled by the caller")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A message as it arrived."""

    data: bytes
    damaged: bool

    def parse(self, deserialize: Deserializer) -> Any:
        message = deserialize(self.data)
        return _damaged(message) if self.damaged else message


class Received:
    """Messages that arrived on one side, and how the other side ended."""

    def __init__(self) -> None:
        self._messages: deque[Frame] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self.status: Status | None = None

    def put(self, message: Frame) -> None:
        if self.status is None:
            self._messages.append(message)
            self._wake()

    def end(self, status: Status, *, at_once: bool = False) -> None:
        """Nothing more comes. What is here can still be read, unless it ends `at_once`."""
        if self.status is None:
            self.status = status
        if at_once:
            self._messages.clear()
        self._wake()

    async def get(self) -> Frame | Status:
        """The next message; after the last one the status."""
        while not self._messages:
            if self.status is not None:
                return self.status
            await self._change()
        return self._messages.popleft()

    async def ended(self) -> Status:
        while self.status is None:
            await self._change()
        return self.status

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Listener(Protocol):
    """Who takes the RPCs that arrive at a port."""

    process: Process

    def accept(self, rpc: "Rpc") -> None:
        """Start to serve it, and set its `handler`."""


class Rpc:
    """One call. The client's side exists at once, the server's when the call has got there."""

    def __init__(
        self,
        network: Network,
        listeners: dict[int, Listener],
        method: str,
        port: int,
        metadata: Metadata,
        *,
        is_stream: bool,
    ) -> None:
        self.client = current_process()
        self.server: Process | None = None
        self.handler: asyncio.Task[None] | None = None
        self.method = method
        self.metadata = metadata
        self.to_client, self.to_server = Received(), Received()
        self._is_stream = is_stream
        self._network = network
        self._listeners = listeners
        self._port = port
        self._up = Lane(source=self.client.name, target=network.name_at(port))
        self._down = Lane(source=self._up.target, target=self._up.source)
        network.connections[self] = None
        network.send(self._up, 0, self._opened)

    # The client

    def send_request(self, data: bytes) -> float:
        """Returns when it has left."""
        return self._send(self._up, self.to_server, data)

    def half_close(self) -> None:
        self._network.send(self._up, 0, lambda: self.to_server.end(OK))

    def give_up(self, status: Status) -> None:
        """The client does not want it any more."""
        if self.to_client.status is None:
            self.to_client.end(status, at_once=True)
            self._network.connections.pop(self, None)
            self._network.send(self._up, 0, self.server_reset)

    # The server

    def send_response(self, data: bytes) -> float:
        """Returns when it has left."""
        return self._send(self._down, self.to_client, data)

    def finish(self, status: Status) -> None:
        self._network.connections.pop(self, None)
        self._network.send(self._down, 0, lambda: self.to_client.end(status))

    # The network

    def client_reset(self) -> None:
        self.to_client.end(RESET)

    def server_reset(self) -> None:
        self.to_server.end(RESET, at_once=True)
        if self.handler is not None:
            self.handler.cancel()

    def _opened(self) -> None:
        listener = self._listeners.get(self._port)
        if listener is None or not listener.process.alive or self.to_server.status is not None:
            self.finish(REFUSED)
        else:
            self.server = listener.process
            listener.accept(self)

    def _send(self, lane: Lane, received: Received, data: bytes) -> float:
        mishap = self._network.mishap(lane.source, self.method) if self._is_stream else None
        frame = Frame(data=data, damaged=mishap == "corrupt")
        size = len(data) * self._network.scale.of(self.method)
        if mishap == "drop":
            return 0.0
        if mishap == "duplicate":
            self._network.send(lane, size, lambda: received.put(frame))
        return self._network.send(lane, size, lambda: received.put(frame), overtakes=mishap == "reorder")


def _damaged(message: Any) -> Any:
    """The same with a little of its KV, hidden states or tokens changed; what carries none is left as it is."""
    match message.chunk if isinstance(message, kv_pb2.KvMessage) else message:
        case kv_pb2.KvChunk() | kv_pb2.KvCopyMessage() as carrier if carrier.inline_payload:
            carrier.inline_payload = _with_another_byte(carrier.inline_payload, 0xFF)
        case stage_pb2.StageStep():
            message.hidden = _with_another_byte(message.hidden, 0x01)  # stays a number
        case stage_pb2.StageResult(samples=[sample, *_]):
            sample.token.token_id ^= 1  # stays in the vocabulary
    return message


def _with_another_byte(data: bytes, change: int) -> bytes:
    """An even one near the middle: the lower half of a half-precision number."""
    changed = bytearray(data)
    changed[len(data) // 4 * 2] ^= change
    return bytes(changed)
