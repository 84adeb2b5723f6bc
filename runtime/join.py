"""The node's end of the Join stream: events and heartbeats up, commands down, and coming back after a loss."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import grpc
import grpc.aio

from edgellm.runtime.config import JoinConfig, NodeError
from edgellm.runtime.messages import Command, Shutdown, Welcome
from edgellm.runtime.rpc import cluster_pb2, cluster_pb2_grpc
from edgellm.runtime.streams import write
from edgellm.runtime.tasks import race
from edgellm.runtime.wire import command_from_proto

_FIRST_BACKOFF_S: Final = 0.05
_LAST_BACKOFF_S: Final = 1.0
_WELCOME_TIMEOUT_S: Final = 5.0
_REFUSALS: Final = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)

_CHANNEL_OPTIONS: Final = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Nobody says goodbye when the orchestrator's host loses power. A process that is only stopped for a moment is not yet
lost: rejoining costs every answer a pause."""

_Call: TypeAlias = grpc.aio.StreamStreamCall[cluster_pb2.NodeMessage, cluster_pb2.Command]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinHooks:
    """What the stream needs of the node."""

    hello: Callable[[], cluster_pb2.Hello]
    heartbeat: Callable[[], cluster_pb2.Heartbeat]
    handle: Callable[[Command], None]
    """Called for every command but Welcome and Shutdown."""
    welcomed: Callable[[Welcome], None]
    """Called before any command of an orchestrator."""
    lost: Callable[[], None]
    """Called when the orchestrator has gone: nothing more can be told to it."""
    settle: Callable[[], Awaitable[None]]
    """Called before each `hello`: wait until what it says is true."""


class JoinClient:
    """Keeps the node joined; `send` queues what happens meanwhile."""

    def __init__(self, config: JoinConfig, hooks: JoinHooks) -> None:
        self._config = config
        self._hooks = hooks
        self._outgoing: asyncio.Queue[cluster_pb2.NodeMessage] = asyncio.Queue()
        self._joined = False

    def send(self, message: cluster_pb2.NodeMessage) -> None:
        """Queue a message for the orchestrator; dropped while there is none."""
        if self._joined:
            self._outgoing.put_nowait(message)

    async def run(self) -> None:
        """Until the orchestrator commands a shutdown. Raises NodeError when refused, or not reached in time."""
        lost_s, patience_s, backoff_s = time.monotonic(), self._config.join_timeout_s, _FIRST_BACKOFF_S
        has_joined = False
        while True:
            try:
                if await self._session():
                    return
                reason = "it closed the stream"
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                reason = self._reason(error, may_retry_refusal=has_joined or self._joined)
            if self._joined:
                has_joined, self._joined = True, False
                self._hooks.lost()
                lost_s, patience_s, backoff_s = time.monotonic(), self._config.lease_s, _FIRST_BACKOFF_S
                _log.warning("orchestrator lost address=%s reason=%s", self._config.orchestrator, reason)
            if time.monotonic() - lost_s + backoff_s > patience_s:
                raise NodeError(
                    f"no orchestrator at {self._config.orchestrator} for {patience_s:g} s ({reason}); "
                    "check the address and that edgellm-serve runs"
                )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _session(self) -> bool:
        """One stream, from hello to its end; True if the orchestrator commanded a shutdown."""
        await self._hooks.settle()
        async with grpc.aio.insecure_channel(self._config.orchestrator, options=_CHANNEL_OPTIONS) as channel:
            call = cluster_pb2_grpc.ClusterStub(channel).Join(None)
            try:
                welcome = await self._say_hello(call)
                if welcome is None:
                    return False
                commands = asyncio.create_task(self._read_commands(call))
                await race(_until(commands), self._write(call), self._beat(welcome.heartbeat_interval_s))
                return commands.result()
            finally:
                call.cancel()

    async def _say_hello(self, call: _Call) -> Welcome | None:
        async with asyncio.timeout(_WELCOME_TIMEOUT_S):
            await write(call, cluster_pb2.NodeMessage(hello=self._hooks.hello()))
            answer = await call.read()
        if not isinstance(answer, cluster_pb2.Command):
            return None
        welcome = command_from_proto(answer)
        if not isinstance(welcome, Welcome):
            raise NodeError(
                f"the orchestrator at {self._config.orchestrator} did not say welcome; is it another version?"
            )
        self._outgoing = asyncio.Queue()
        self._joined = True
        self._hooks.welcomed(welcome)
        _log.info("joined orchestrator=%s incarnation=%d", self._config.orchestrator, welcome.incarnation)
        return welcome

    async def _read_commands(self, call: _Call) -> bool:
        while isinstance(message := await call.read(), cluster_pb2.Command):
            match command_from_proto(message):
                case Shutdown():
                    return True
                case Welcome():
                    _log.warning("second welcome ignored")
                case command:
                    self._hooks.handle(command)
        return False

    async def _write(self, call: _Call) -> None:
        while True:
            await write(call, await self._outgoing.get())

    async def _beat(self, interval_s: float) -> None:
        while True:
            self.send(cluster_pb2.NodeMessage(heartbeat=self._hooks.heartbeat()))
            await asyncio.sleep(interval_s)

    def _reason(self, error: grpc.aio.AioRpcError | TimeoutError, *, may_retry_refusal: bool) -> str:
        """Raises NodeError for a refusal, but not after a first join: our loss may not have been noticed yet."""
        if isinstance(error, TimeoutError):
            return f"no welcome within {_WELCOME_TIMEOUT_S:g} s"
        if error.code() in _REFUSALS and not may_retry_refusal:
            raise NodeError(f"the orchestrator at {self._config.orchestrator} refused: {error.details()}") from error
        return f"{error.code().name}: {error.details()}"


async def _until(task: asyncio.Task[bool]) -> None:
    await task
