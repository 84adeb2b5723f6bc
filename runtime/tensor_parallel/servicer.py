"""The streams of the other ranks, at rank 0."""

import asyncio
import logging
from typing import TypeAlias

import grpc
import grpc.aio

from edgellm.runtime.config import NodeError
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.rpc import tensor_parallel_pb2_grpc
from edgellm.runtime.tasks import race
from edgellm.runtime.tensor_parallel.group import Peer, RankGroup

_Context: TypeAlias = grpc.aio.ServicerContext[pb.RankMessage, pb.LeaderMessage]

_log = logging.getLogger(__name__)


class TensorParallelServicer(tensor_parallel_pb2_grpc.TensorParallelServicer):
    """Shell around a RankGroup, which is told what nobody expected."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    async def Follow(  # type: ignore[override]  # noqa: N802  # the generated base declares a generator
        self, request_iterator: object, context: _Context
    ) -> None:
        peer = await self._welcome(context)
        _log.info("rank joined rank=%d", peer.rank)
        try:
            await race(self._read(peer, context), self._write(peer, context))
        except (grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            _log.info("rank lost rank=%d error=%r", peer.rank, error)
        except Exception as error:
            self._group.crashed(error)
            raise
        finally:
            self._group.leave(peer.rank)

    async def _welcome(self, context: _Context) -> Peer:
        first = await context.read()
        if not isinstance(first, pb.RankMessage) or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a rank starts with `hello`")
        refusal = self._group.refusal(first.hello)
        if refusal is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        peer = self._group.join(first.hello.rank)
        if peer is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"rank {first.hello.rank} is still here")
        return peer

    async def _read(self, peer: Peer, context: _Context) -> None:
        while isinstance(message := await context.read(), pb.RankMessage):
            peer.handle(message)

    async def _write(self, peer: Peer, context: _Context) -> None:
        while True:
            message = await peer.outgoing.get()
            await context.write(message)
            peer.outgoing.task_done()


def listen(server: grpc.aio.Server, address: str) -> None:
    """Raises NodeError if the address cannot be had."""
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise NodeError(f"cannot listen on {address} for the other ranks; name a free port of this host") from error
