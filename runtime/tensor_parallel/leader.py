"""Rank 0 of a tensor-parallel engine: a prefill node whose every step and transfer the other ranks do too."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import grpc.aio

from edgellm.engines.base import Batch, Engine, Output
from edgellm.engines.batch import check_batch
from edgellm.engines.bundle import bundle_sha256, open_bundle
from edgellm.engines.kv import KvPool
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.kv.sender import Ranks
from edgellm.runtime.loading import NodeEngines, load_engines, planned_kv_blocks
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.rpc import tensor_parallel_pb2_grpc
from edgellm.runtime.server import NodeServer
from edgellm.runtime.tasks import race
from edgellm.runtime.tensor_parallel.ending import leave
from edgellm.runtime.tensor_parallel.group import RankGroup
from edgellm.runtime.tensor_parallel.patience import Patience
from edgellm.runtime.tensor_parallel.servicer import TensorParallelServicer, listen
from edgellm.runtime.tensor_parallel.sums import connect, open_store


async def lead(config: NodeConfig, spec: EngineSpec, address: str, patience: Patience) -> None:
    """Serve until told to stop. Raises NodeError; when another rank has gone, the process ends here."""
    store = await asyncio.to_thread(open_store, address, patience)
    kv_blocks = config.kv_blocks or planned_kv_blocks(open_bundle(config.bundle), spec)
    welcome = pb.RankWelcome(kv_blocks=kv_blocks, store_port=store.port)
    group = RankGroup(spec, bundle_sha256(config.bundle), welcome, patience)

    async def serve() -> None:
        await group.wait_until_complete(config.join.join_timeout_s)
        sums = await asyncio.to_thread(connect, store, spec, address, patience)
        engines = await asyncio.to_thread(load_engines, dataclasses.replace(config, kv_blocks=kv_blocks), sums)
        await group.wait_until_ready()
        server = NodeServer(config, _led(engines, group), Ranks(world=spec.world, join=group.share))
        server.stop_on_signals()
        await server.run()

    async def watch() -> None:
        try:
            await group.watch()
        except NodeError as error:
            leave(error)

    async with _listening(group, address):
        await race(serve(), watch())


class LeadingEngine:
    """Rank 0's engine: every step is told to the other ranks, unless it would be refused."""

    def __init__(self, engine: Engine, group: RankGroup) -> None:
        self._engine = engine
        self._group = group
        self._loop = asyncio.get_running_loop()

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    @property
    def kv(self) -> KvPool:
        return self._engine.kv

    def forward(self, batch: Batch) -> Output:
        """Called on the engine's thread; see `Engine.forward`."""
        check_batch(batch, self.spec, self.kv)
        self._loop.call_soon_threadsafe(self._group.step, batch)
        return self._engine.forward(batch)

    def close(self) -> None:
        self._engine.close()


def _led(engines: NodeEngines, group: RankGroup) -> NodeEngines:
    """The same engines, of which the one that reads prompts leads the others."""
    half = None if engines.half is None else LeadingEngine(engines.half, group)
    return dataclasses.replace(engines, half=half)


@contextlib.asynccontextmanager
async def _listening(group: RankGroup, address: str) -> AsyncIterator[None]:
    """For the other ranks; left without an error, it tells them to stop. Raises NodeError if it cannot listen."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    servicer = TensorParallelServicer(group)
    tensor_parallel_pb2_grpc.add_TensorParallelServicer_to_server(servicer, server)
    listen(server, address)
    await server.start()
    try:
        yield
        await group.dismiss()
    finally:
        await server.stop(grace=None)
