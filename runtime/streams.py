"""What grpc.aio leaves to its users."""

import asyncio
from typing import Any, Final, TypeVar

import grpc.aio

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


_ABORT_PATIENCE_S: Final = 1.0


class OpenStreams:
    """The handlers of a server's streams. A stopped server aborts them, and does not wait until they have ended."""

    def __init__(self) -> None:
        self._handlers: set[asyncio.Task[Any]] = set()

    def enter(self) -> None:
        """Called by a handler; it is known until it ends."""
        handler = asyncio.current_task()
        if handler is None:
            raise RuntimeError("a stream is handled by a task")
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)

    async def ended(self) -> None:
        """After the server was stopped: wait, for a moment, for its handlers."""
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=_ABORT_PATIENCE_S)


async def write(call: grpc.aio.StreamStreamCall[_Request, _Response], message: _Request) -> None:
    """Write to a call that may have ended: then raise why it ended, an AioRpcError, and not just that it did."""
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        await call.read()
        raise
