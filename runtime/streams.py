"""What grpc.aio leaves to its users."""

import asyncio
from typing import TypeVar

import grpc.aio

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


async def write(call: grpc.aio.StreamStreamCall[_Request, _Response], message: _Request) -> None:
    """Write to a call that may have ended: then raise why it ended, an AioRpcError, and not just that it did."""
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        await call.read()
        raise
