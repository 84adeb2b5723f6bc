"""Simulated nodes on real Join streams and a real clock: the orchestrator under load, without engines."""

import asyncio
from typing import TypeAlias

import grpc.aio

from edgellm.orchestrator.core.commands import WelcomeNode
from edgellm.orchestrator.core.events import HeartbeatReceived
from edgellm.orchestrator.core.values import KvTransfer, NodeId
from edgellm.orchestrator.sim.device import LinkModel
from edgellm.orchestrator.sim.node import SendKv, SimNode
from edgellm.orchestrator.sim.node_wire import command_from_proto, event_to_proto, hello_to_proto
from edgellm.runtime.rpc import cluster_pb2, cluster_pb2_grpc

HEARTBEAT_S = 0.1
JoinCall: TypeAlias = grpc.aio.StreamStreamCall[cluster_pb2.NodeMessage, cluster_pb2.Command]


class LiveNode:
    """One simulated node. `run` joins the orchestrator and returns when the stream ends."""

    def __init__(self, node: SimNode, fleet: "dict[NodeId, LiveNode]", link: LinkModel) -> None:
        self.node = node
        self._fleet = fleet
        """Where KV is delivered; this node is in it while it runs."""
        self._link = link
        self._outbox: asyncio.Queue[cluster_pb2.NodeMessage] = asyncio.Queue()
        self._work = asyncio.Event()
        self.joined = asyncio.Event()

    async def run(self, orchestrator: str) -> None:
        """Raises grpc.aio.AioRpcError if the orchestrator refuses or drops the node."""
        async with grpc.aio.insecure_channel(orchestrator) as channel:
            stream = cluster_pb2_grpc.ClusterStub(channel).Join()  # type: ignore[call-arg]
            await stream.write(hello_to_proto(self.node.profile, self.node.block_tokens))
            self._fleet[self.node.profile.node_id] = self
            try:
                await self._serve(stream)
            finally:
                del self._fleet[self.node.profile.node_id]

    async def _serve(self, stream: JoinCall) -> None:
        coroutines = (self._obey(stream), self._beat(), self._step(), self._report(stream))
        tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _obey(self, stream: JoinCall) -> None:
        async for message in stream:
            command = command_from_proto(self.node.connection, message)
            if command is None:
                return
            if isinstance(command, WelcomeNode):
                self.joined.set()
            else:
                self.node.receive(asyncio.get_running_loop().time(), command)
                self._spread()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.node.expire(asyncio.get_running_loop().time())
            beat = HeartbeatReceived(connection=self.node.connection, load=self.node.load())
            self._outbox.put_nowait(event_to_proto(beat))
            self._spread()

    async def _step(self) -> None:
        while True:
            plan = self.node.plan_step()
            if plan is None:
                self._work.clear()
                await self._work.wait()
                continue
            await asyncio.sleep(plan.seconds)
            self.node.commit_step(plan)
            self._spread()

    async def _report(self, stream: JoinCall) -> None:
        while True:
            await stream.write(await self._outbox.get())

    def _spread(self) -> None:
        self._work.set()
        for output in self.node.take_outputs():
            if isinstance(output, SendKv):
                seconds = self._link.seconds(output.prompt_tokens * self.node.profile.kv_bytes_per_token)
                asyncio.get_running_loop().call_later(seconds, self._deliver, output, seconds)
            else:
                self._outbox.put_nowait(event_to_proto(output))

    def _deliver(self, delivery: SendKv, seconds: float) -> None:
        target = self._fleet.get(delivery.target.node_id)
        why = target.node.kv_arrives(delivery) if target is not None else "the node is not there"
        if why:
            self.node.kv_refused(delivery, why)
        else:
            self.node.kv_acknowledged(delivery.attempt, self._transfer(delivery, seconds))
        self._spread()
        if target is not None:
            target._spread()

    def _transfer(self, delivery: SendKv, seconds: float) -> KvTransfer:
        payload = delivery.prompt_tokens * self.node.profile.kv_bytes_per_token
        return KvTransfer(transport="grpc", codec="raw", chunks=1, bytes=payload, exposed_ms=1000 * seconds)
