"""A tensor-parallel rank other than 0: it does what rank 0 says, and the orchestrator does not know it."""

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import grpc
import grpc.aio

from edgellm.engines.base import Engine
from edgellm.engines.bundle import bundle_sha256
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.loading import NodeEngines, load_engines
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.rpc import tensor_parallel_pb2_grpc
from edgellm.runtime.streams import write
from edgellm.runtime.tasks import race
from edgellm.runtime.tensor_parallel.ending import leave
from edgellm.runtime.tensor_parallel.outbox import Outbox
from edgellm.runtime.tensor_parallel.patience import Patience, Silence
from edgellm.runtime.tensor_parallel.sums import connect, join_store
from edgellm.runtime.tensor_parallel.wire import batch_from_proto

_RETRY_S: Final = 0.2
_TICK_S: Final = 0.2
_REFUSALS: Final = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)

_Call: TypeAlias = grpc.aio.StreamStreamCall[pb.RankMessage, pb.LeaderMessage]

_log = logging.getLogger(__name__)


async def follow(config: NodeConfig, spec: EngineSpec, leader: str, patience: Patience) -> None:
    """Until rank 0 or a signal says stop. Raises NodeError; when rank 0 has gone, the process ends here."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    async def until_stopped() -> None:
        await stopped.wait()

    async def serve() -> None:
        async with _joined(config, spec, leader) as (call, welcome):
            await Follower(config, spec, leader, call, patience).run(welcome)

    await race(serve(), until_stopped(), _until_orphaned(config.parent_pid))


class Follower:
    """One stream of orders, each begun when the one before was carried out."""

    def __init__(self, config: NodeConfig, spec: EngineSpec, leader: str, call: _Call, patience: Patience) -> None:
        self._config = config
        self._spec = spec
        self._leader = leader
        self._call = call
        self._patience = patience
        self._silence = Silence("tensor-parallel rank 0", patience)
        self._orders: asyncio.Queue[pb.LeaderMessage] = asyncio.Queue()
        self._answers: asyncio.Queue[pb.RankMessage] = asyncio.Queue()
        self._crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def run(self, welcome: pb.RankWelcome) -> None:
        """Until rank 0 says stop. What ends the group ends the process here."""
        try:
            await race(self._read(), self._write(), self._beat(), self._work(welcome), self._until_crashed())
        except grpc.aio.AioRpcError as error:
            leave(self._leader_gone(error.code().name))
        except NodeError as error:
            leave(error)
        finally:
            self._thread.shutdown(wait=True)

    async def _work(self, welcome: pb.RankWelcome) -> None:
        loop = asyncio.get_running_loop()
        engines = await loop.run_in_executor(self._thread, self._load, welcome)
        [engine] = engines.all
        outbox = Outbox(self._config, engine, engines.contract, answer=self._answers.put_nowait, on_crash=self._crashed)
        self._answers.put_nowait(pb.RankMessage(ready=pb.RankReady()))
        _log.info("following rank=%d leader=%s", self._spec.rank, self._leader)
        try:
            while (order := await self._orders.get()).WhichOneof("message") != "stop":
                await self._carry_out(order, engine, outbox)
        finally:
            await outbox.close()

    async def _carry_out(self, order: pb.LeaderMessage, engine: Engine, outbox: Outbox) -> None:
        match order.WhichOneof("message"):
            case "step":
                await self._step(order.step, engine, outbox)
            case "transfer":
                outbox.transfer(order.transfer)
            case "advance":
                outbox.advance(order.advance)
            case "cancel":
                outbox.cancel(order.cancel)
            case kind:
                raise NodeError(f"tensor-parallel rank 0 sent {kind!r}; is it another version?")

    async def _step(self, step: pb.RankStep, engine: Engine, outbox: Outbox) -> None:
        batch, started_s = batch_from_proto(step), time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, engine.forward, batch)
        except ValueError as error:
            raise NodeError(f"rank {self._spec.rank} refuses a step that rank 0 took: {error}") from error
        outbox.step_ended(int(batch.row_starts[-1]), time.monotonic() - started_s)

    def _load(self, welcome: pb.RankWelcome) -> NodeEngines:
        store = join_store(self._leader, welcome.store_port, self._patience)
        sums = connect(store, self._spec, self._leader, self._patience)
        return load_engines(dataclasses.replace(self._config, kv_blocks=welcome.kv_blocks), sums)

    async def _read(self) -> None:
        is_told_to_stop = False
        while isinstance(message := await self._call.read(), pb.LeaderMessage):
            self._silence.heard()
            is_told_to_stop = message.WhichOneof("message") == "stop"
            if message.WhichOneof("message") != "beat":
                self._silence.works()
                self._orders.put_nowait(message)
        if not is_told_to_stop:
            raise self._leader_gone("it closed the stream")

    async def _write(self) -> None:
        while True:
            await write(self._call, await self._answers.get())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._patience.beat_s)
            self._answers.put_nowait(pb.RankMessage(beat=pb.RankBeat()))
            self._silence.beat()

    async def _until_crashed(self) -> None:
        await self._crash

    def _crashed(self, error: BaseException) -> None:
        if not self._crash.done():
            self._crash.set_exception(error)

    def _leader_gone(self, reason: str) -> NodeError:
        return NodeError(f"tensor-parallel rank 0 at {self._leader} has gone ({reason}); all ranks must start again")


@asynccontextmanager
async def _joined(config: NodeConfig, spec: EngineSpec, leader: str) -> AsyncIterator[tuple[_Call, pb.RankWelcome]]:
    """A stream on which rank 0 has said welcome. Raises NodeError when refused, or not reached in time."""
    hello = pb.RankHello(rank=spec.rank, world=spec.world, bundle_sha256=bundle_sha256(config.bundle))
    async with grpc.aio.insecure_channel(leader) as channel:
        try:
            async with asyncio.timeout(config.join.join_timeout_s):
                call, welcome = await _join(channel, hello)
        except TimeoutError as error:
            raise NodeError(
                f"no rank 0 at {leader} for {config.join.join_timeout_s:g} s; "
                "check --tp-leader and that the node of rank 0 runs"
            ) from error
        try:
            yield call, welcome
        finally:
            call.cancel()


async def _join(channel: grpc.aio.Channel, hello: pb.RankHello) -> tuple[_Call, pb.RankWelcome]:
    """Tries until rank 0 is there, and has noticed that this rank's last process is not."""
    while True:
        call: _Call = tensor_parallel_pb2_grpc.TensorParallelStub(channel).Follow(None)
        try:
            await write(call, pb.RankMessage(hello=hello))
            answer = await call.read()
            if isinstance(answer, pb.LeaderMessage) and answer.WhichOneof("message") == "welcome":
                return call, answer.welcome
        except grpc.aio.AioRpcError as error:
            if error.code() in _REFUSALS:
                raise NodeError(f"rank 0 refused: {error.details()}") from error
        call.cancel()
        await asyncio.sleep(_RETRY_S)


async def _until_orphaned(parent_pid: int | None) -> None:
    """Raises NodeError when the process that started this one has ended; None: never."""
    while True:
        if parent_pid not in (None, os.getppid()):
            raise NodeError("the process that started this node has ended")
        await asyncio.sleep(_TICK_S)
