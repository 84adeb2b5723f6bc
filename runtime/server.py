"""One node process, put together: engines, requests, KV exchange, and the stream to the orchestrator."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Final, assert_never

import grpc
import grpc.aio

from edgellm.runtime import messages
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.engine_loop import EngineLoop
from edgellm.runtime.hello import introduce
from edgellm.runtime.host import address_towards, host_id, memory
from edgellm.runtime.join import JoinClient, JoinHooks
from edgellm.runtime.kv.copying.holder import CopyHolder
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.replicator import CopyHooks, Replicator
from edgellm.runtime.kv.inbox import KvInbox
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.links import CHANNEL_OPTIONS, KvLinks, LinkConfig
from edgellm.runtime.kv.sender import ALONE, KvSender, Ranks, SenderHooks
from edgellm.runtime.kv.servicer import KvExchangeServicer
from edgellm.runtime.lifecycle import Exchanges
from edgellm.runtime.loading import NodeEngines, make_lanes
from edgellm.runtime.metrics import NodeMetrics
from edgellm.runtime.node import Node
from edgellm.runtime.rpc import cluster_pb2, kv_pb2_grpc, stage_pb2_grpc
from edgellm.runtime.stages.local import serving_locally
from edgellm.runtime.stages.servicer import ServicerHooks, StageExchangeServicer
from edgellm.runtime.stages.streams import StageStreams, StreamHooks
from edgellm.runtime.tasks import race
from edgellm.runtime.wire import event_to_proto

_TICK_S: Final = 0.05

_log = logging.getLogger(__name__)


class NodeServer:
    """A node that serves until told to stop. Made and run on one event loop; `run` once."""

    def __init__(self, config: NodeConfig, engines: NodeEngines, ranks: Ranks = ALONE) -> None:
        """`ranks`: with which the half-precision engine is shared."""
        self._config = config
        self._ranks = ranks
        self._engines = engines
        self._host_id = host_id()
        self._stop = asyncio.Event()
        self._welcomed = asyncio.Event()
        self._crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listen_host, _, _ = config.listen.rpartition(":")
        self._exchange_address = ""
        self.ledger = BlockLedger(engines.pool)
        self.metrics = NodeMetrics(config.node_id)
        work = asyncio.Event()
        self.holdings = Holdings(self.ledger)
        self.node = Node(
            node_id=config.node_id,
            lanes=make_lanes(engines, config),
            ledger=self.ledger,
            holdings=self.holdings,
            emit=self._emit,
            wake=work.set,
            lease_s=config.join.lease_s,
        )
        self._engine_loop = EngineLoop(self.node, work, self.metrics.step_ended)
        self._inbox = KvInbox(
            ledger=self.ledger,
            admit=self.node.lifecycle.admit,
            on_complete=self.node.kv_complete,
            on_lost=self.node.kv_lost,
        )
        self._holder = CopyHolder(holdings=self.holdings, admit=self.node.lifecycle.admit_copy)
        self._links = self._make_links()
        self._sender, self._replicator = self._make_sender(), self._make_replicator()
        self._streams = self._make_streams()
        self.node.connect(
            Exchanges(transfers=self._sender, arrivals=self._inbox, copies=self._replicator, links=self._streams)
        )
        self._join = JoinClient(
            config.join,
            JoinHooks(
                hello=self._hello,
                heartbeat=self._heartbeat,
                handle=self._handle,
                welcomed=self._welcome,
                lost=self._lost,
                settle=self._engine_loop.between_steps,
            ),
        )

    async def run(self) -> None:
        """Serve until the orchestrator or `stop` says so, then close the engines. Raises NodeError."""
        try:
            async with self._exchange():
                self.metrics.serve(self._listen_host, self._config.metrics_port)
                await race(
                    self._join.run(),
                    self._engine_loop.run(),
                    self._tick(),
                    self._until_stopped(),
                    self._until_crashed(),
                )
        finally:
            self.node.lifecycle.drop_everything()
            await self._streams.close()
            await self._replicator.close()
            await self._sender.close()
            await self._links.close()
            # Not on the event loop, so that a rank's beats go out while its last step ends. Cancelled here, this leaves
            # the engines open: that step may still run.
            await asyncio.to_thread(self._engine_loop.close)
            self._engines.close()
            self.metrics.close()
            _log.info("stopped node=%s", self._config.node_id)

    def stop(self) -> None:
        """End `run`, finishing nothing."""
        self._stop.set()

    def stop_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def _make_links(self) -> KvLinks:
        config = LinkConfig(node_id=self._config.node_id, host_id=self._host_id, allow_shm=self._config.allow_shm)
        return KvLinks(config, self._engines.contract)

    def _make_sender(self) -> KvSender:
        return KvSender(
            pool=self._engines.pool,
            links=self._links,
            codec=self._config.kv_codec,
            prefill_tokens_per_s=lambda: self._engine_loop.progress.prefill_tokens_per_s,
            hooks=SenderHooks(
                on_sent=self.node.kv_sent,
                on_backup_lost=lambda attempt, target, error: self.node.copy_lost(attempt, target.layers, error),
                on_over=self.node.transfers_over,
                on_failed=self.node.kv_not_sent,
                on_crash=self._crashed,
            ),
            now_s=time.monotonic,
            ranks=self._ranks,
        )

    def _make_replicator(self) -> Replicator:
        return Replicator(
            holdings=self.holdings,
            links=self._links,
            config=self._config.copies,
            hooks=CopyHooks(on_lost=self.node.copy_lost, on_crash=self._crashed),
        )

    def _make_streams(self) -> StageStreams:
        return StageStreams(
            StreamHooks(
                on_result=lambda result: self.node.stage_result(result, time.monotonic()),
                on_broken=lambda peer: self.node.stage_broken(peer, time.monotonic()),
                on_crash=self._crashed,
                on_round_trip=self.metrics.stage_round_trip,
            )
        )

    @contextlib.asynccontextmanager
    async def _exchange(self) -> AsyncIterator[None]:
        """The KV and stage exchanges, listening. Raises NodeError if the address cannot be had."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0), *CHANNEL_OPTIONS))
        servicer = KvExchangeServicer(
            node_id=self._config.node_id,
            contract=self._engines.contract,
            inbox=self._inbox,
            copies=self._holder,
            config=self._config.exchange,
            welcomed=self._welcomed.wait,
            on_crash=self._crashed,
        )
        kv_pb2_grpc.add_KvExchangeServicer_to_server(servicer, server)
        step_hooks = ServicerHooks(
            on_step=lambda step, source: self.node.stage_step(step, source, time.monotonic()),
            on_gone=self.node.stage_source_gone,
            on_crash=self._crashed,
        )
        steps = StageExchangeServicer(step_hooks)
        stage_pb2_grpc.add_StageExchangeServicer_to_server(steps, server)
        try:
            bound = server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise NodeError(
                f"cannot listen on {self._config.listen}: in use? choose another port, or 0 for any"
            ) from error
        host = self._listen_host if self._config.advertise else self._reachable_host()
        self._exchange_address = self._config.advertise or f"{host}:{bound}"
        async with serving_locally(f"{host}:{bound}", step_hooks):
            await server.start()
            _log.info("listening node=%s exchange=%s", self._config.node_id, self._exchange_address)
            try:
                yield
            finally:
                await server.stop(grace=None)
                await servicer.streams.ended()
                await steps.streams.ended()

    def _reachable_host(self) -> str:
        """What others should dial: for a node that listens everywhere, where it reaches the orchestrator from."""
        if self._listen_host not in ("", "0.0.0.0", "[::]"):
            return self._listen_host
        orchestrator = self._config.join.orchestrator
        try:
            return address_towards(orchestrator)
        except OSError as error:
            raise NodeError(
                f"no way to {orchestrator} ({error.strerror}); name this node's address in --listen"
            ) from error

    def _emit(self, event: messages.Event) -> None:
        self.metrics.event(event)
        self._join.send(event_to_proto(event))

    def _handle(self, command: messages.Command) -> None:
        match command:
            case messages.Prefill():
                self.node.prefill(command)
            case messages.Decode():
                self.node.decode(command, time.monotonic())
            case messages.Hold():
                self.node.hold(command)
            case messages.Protect():
                self.node.protect(command)
            case messages.Release():
                self.node.release(command)
            case messages.Shutdown() | messages.Welcome():
                raise ValueError(f"{command} is for the join stream")
            case _:
                assert_never(command)

    def _welcome(self, welcome: messages.Welcome) -> None:
        self.node.welcome(welcome.first_epoch)
        self._welcomed.set()

    def _lost(self) -> None:
        self._welcomed.clear()
        self.node.lifecycle.orchestrator_lost(time.monotonic())

    async def _tick(self) -> None:
        while True:
            self.node.expire(time.monotonic())
            if self._config.parent_pid not in (None, os.getppid()):
                raise NodeError("the process that started this node has ended")
            await asyncio.sleep(_TICK_S)

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    async def _until_crashed(self) -> None:
        await self._crash

    def _crashed(self, error: BaseException) -> None:
        if not self._crash.done():
            self._crash.set_exception(error)

    def _hello(self) -> cluster_pb2.Hello:
        return introduce(
            self._config,
            self._engines,
            exchange_address=self._exchange_address,
            host_id=self._host_id,
            held=self.node.held,
            highest_epoch=self.node.highest_epoch,
        )

    def _heartbeat(self) -> cluster_pb2.Heartbeat:
        progress, resident = self._engine_loop.progress, memory()
        self.node.report_copies()
        self.metrics.observe(self.node, self._engines.pool, self._inbox.counters)
        self.metrics.observe_copies(self._replicator, self._holder.counters)
        return cluster_pb2.Heartbeat(
            steps=progress.steps,
            running=self.node.running,
            waiting=self.node.waiting,
            kv_blocks_free=self._engines.pool.free_blocks,
            rss_bytes=resident.rss_bytes,
            rss_shared_bytes=resident.shared_bytes,
            prefill_tokens_per_s=progress.prefill_tokens_per_s,
            decode_step_ms=progress.decode_step_ms,
        )
