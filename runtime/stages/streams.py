"""The sending end of the stage exchange: one stream per node of a later stage, opened when first needed."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import grpc.aio

from edgellm.runtime.kv.links import CHANNEL_OPTIONS
from edgellm.runtime.kv.types import NodeId
from edgellm.runtime.rpc import stage_pb2, stage_pb2_grpc
from edgellm.runtime.stages.local import Frames, connect_locally
from edgellm.runtime.stages.messages import StageResult, StageStep
from edgellm.runtime.stages.pipelines import STEP_PATIENCE_S
from edgellm.runtime.stages.routes import Leg
from edgellm.runtime.stages.wire import result_from_proto, step_to_proto
from edgellm.runtime.streams import write
from edgellm.runtime.tasks import race

_Peer: TypeAlias = tuple[NodeId, str]
_Call: TypeAlias = grpc.aio.StreamStreamCall[stage_pb2.StageStep, stage_pb2.StageResult]

_CHANNEL_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), *CHANNEL_OPTIONS)
"""A new stream tries to connect at once, whatever became of earlier ones to the same address."""

_LOOK_S: Final = 1.0
_PATIENCE_S: Final = 2 * STEP_PATIENCE_S
"""A step that a process of this host has for so long is lost: it stands still. gRPC's pings tell that of others."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamHooks:
    """Who is told what comes back."""

    on_result: Callable[[StageResult], None]
    on_broken: Callable[[NodeId], None]
    """Nothing more will come back of what was sent."""
    on_crash: Callable[[BaseException], None]
    """Given what nobody expected."""
    on_round_trip: Callable[[float], None]
    """Seconds from sending a step to its result, with all that the later stages did."""


@dataclass(kw_only=True, eq=False)
class _Stream:
    outgoing: asyncio.Queue[StageStep] = field(default_factory=asyncio.Queue)
    sent_s: dict[int, float] = field(default_factory=dict)
    """When each step was sent that has no result yet."""
    task: asyncio.Task[None] | None = None
    local: Frames[StageResult] | None = None
    """The connection, where the peer is on this host."""

    def is_overdue(self) -> bool:
        """The oldest step without a result comes first: those with one have left."""
        return time.monotonic() - next(iter(self.sent_s.values()), math.inf) > _PATIENCE_S

    def send(self, step: StageStep) -> None:
        if self.local is None:
            self.outgoing.put_nowait(step)
        else:
            self.local.send(step_to_proto(step).SerializeToString())


class StageStreams:
    """Owns the streams' tasks until `close`. A stream that broke is opened again by the next step."""

    def __init__(self, hooks: StreamHooks) -> None:
        self._hooks = hooks
        self._streams: dict[_Peer, _Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, leg: Leg, step: StageStep) -> None:
        """Results and breaks are told later."""
        peer = (leg.node_id, leg.address)
        stream = self._streams.get(peer)
        if stream is None:
            stream = self._streams[peer] = _Stream()
            stream.task = asyncio.create_task(self._run(peer, stream))
            self._tasks.add(stream.task)
            stream.task.add_done_callback(self._task_ended)
        stream.sent_s[step.step_id] = time.monotonic()
        stream.send(step)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, peer: _Peer, stream: _Stream) -> None:
        node_id, address = peer
        try:
            if not await self._run_locally(address, stream):
                await self._run_over_grpc(address, stream)
        except grpc.aio.AioRpcError as error:
            _log.warning("stage stream lost peer=%s reason=%s: %s", node_id, error.code().name, error.details())
        del self._streams[peer]
        self._hooks.on_broken(node_id)

    async def _run_locally(self, address: str, stream: _Stream) -> bool:
        """Until the connection has ended; False if there is none, as the peer is on another host."""
        local = await connect_locally(address, _result, lambda result: self._take(result, stream))
        if local is None:
            return False
        stream.local = local
        try:
            while not stream.outgoing.empty():
                stream.send(stream.outgoing.get_nowait())
            while not await local.has_ended(_LOOK_S) and not stream.is_overdue():
                pass
        finally:
            local.abort()
        return True

    async def _run_over_grpc(self, address: str, stream: _Stream) -> None:
        async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
            call = stage_pb2_grpc.StageExchangeStub(channel).Steps(None)
            try:
                await race(self._write(call, stream), self._read(call, stream))
            finally:
                call.cancel()

    async def _write(self, call: _Call, stream: _Stream) -> None:
        while True:
            await write(call, step_to_proto(await stream.outgoing.get()))

    async def _read(self, call: _Call, stream: _Stream) -> None:
        while isinstance(message := await call.read(), stage_pb2.StageResult):
            try:
                result = result_from_proto(message)
            except ValueError as error:
                _log.warning("stage stream given up reason=%s", error)
                return
            self._take(result, stream)

    def _take(self, result: StageResult, stream: _Stream) -> None:
        sent_s = stream.sent_s.pop(result.step_id, None)
        if sent_s is not None:
            self._hooks.on_round_trip(time.monotonic() - sent_s)
        self._hooks.on_result(result)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._hooks.on_crash(error)


def _result(data: bytes) -> StageResult:
    return result_from_proto(stage_pb2.StageResult.FromString(data))
