"""The node side of the orchestrator: one Join stream per node, messages up, commands down."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.events import NodeJoined, NodeLost
from edgellm.orchestrator.core.values import ConnectionId, NodeProfile
from edgellm.orchestrator.driver import Driver, NodeOutbox
from edgellm.orchestrator.wire_in import WireError, events_from_proto, held_from_proto, profile_from_proto
from edgellm.orchestrator.wire_out import command_to_proto
from edgellm.runtime.rpc import cluster_pb2, cluster_pb2_grpc

HELLO_TIMEOUT_S = 10.0

JoinContext = grpc.aio.ServicerContext[cluster_pb2.NodeMessage, cluster_pb2.Command]


class ClusterServicer(cluster_pb2_grpc.ClusterServicer):
    """Each call is one incarnation of a node; the end of the call is the end of the node."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def Join(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[cluster_pb2.NodeMessage], context: JoinContext
    ) -> None:
        profile, hello = await _hello(request_iterator, context)
        connection, outbox = self._driver.open_connection()
        refusal = None
        try:
            held = held_from_proto(hello.held)
            self._driver.post(
                NodeJoined(connection=connection, profile=profile, held=held, highest_epoch=hello.highest_epoch)
            )
            refusal = await self._serve(connection, outbox, request_iterator, context)
        finally:
            self._driver.post(NodeLost(connection=connection, reason=refusal or "its stream ended"))
            self._driver.close_connection(connection)
        if refusal is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)

    async def _serve(
        self,
        connection: ConnectionId,
        outbox: NodeOutbox,
        messages: AsyncIterator[cluster_pb2.NodeMessage],
        context: JoinContext,
    ) -> str | None:
        """Carry both directions until one of them ends; returns why the node was refused or dropped, if it was."""
        async with asyncio.TaskGroup() as tasks:
            directions = [
                tasks.create_task(self._carry_up(connection, messages)),
                tasks.create_task(self._carry_down(outbox, context)),
            ]
            done, pending = await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in pending:
                direction.cancel()
        return next(iter(done)).result()

    async def _carry_up(self, connection: ConnectionId, messages: AsyncIterator[cluster_pb2.NodeMessage]) -> str | None:
        try:
            async for message in messages:
                for event in events_from_proto(connection, message):
                    self._driver.post(event)
        except WireError as error:
            return str(error)
        return None

    async def _carry_down(self, outbox: NodeOutbox, context: JoinContext) -> str:
        """Returns the reason when the core refuses or drops the node."""
        interval_s = self._driver.core.state.config.heartbeat_interval_s
        while True:
            match await outbox.get():
                case commands.RefuseNode(reason=reason) | commands.DropNode(reason=reason):
                    return reason
                case command:
                    await context.write(command_to_proto(command, interval_s))


async def _hello(
    messages: AsyncIterator[cluster_pb2.NodeMessage], context: JoinContext
) -> tuple[NodeProfile, cluster_pb2.Hello]:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = (await anext(messages)).hello
            return profile_from_proto(hello), hello
    except (TimeoutError, StopAsyncIteration, WireError) as error:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION, f"a node must first send a valid hello: {error or 'none came'}"
        )
