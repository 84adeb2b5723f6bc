"""A simulated process of a node: starts, crashes, stands still, loses its orchestrator and comes back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from edgellm.orchestrator.core.commands import (
    DropNode,
    NodeCommand,
    RefuseNode,
    ReleaseAttempt,
    StartDecode,
    StartPrefill,
    WelcomeNode,
)
from edgellm.orchestrator.core.events import Event, HeartbeatReceived, NodeEvent, NodeJoined, NodeLost
from edgellm.orchestrator.core.values import ConnectionId, KvTransfer, NodeId, NodeProfile
from edgellm.orchestrator.sim.device import DeviceModel, LinkModel
from edgellm.orchestrator.sim.lanes import StepPlan
from edgellm.orchestrator.sim.node import SendKv, SimNode
from edgellm.orchestrator.sim.timeline import Channel, Timeline

HEARTBEAT_S = 0.1
REJOIN_S = 0.2
TRANSFER_TIMEOUT_S = 1.0


class Surroundings(Protocol):
    """What a process needs of the world."""

    timeline: Timeline
    link: LinkModel
    block_tokens: int

    def connect(self, process: "Process") -> ConnectionId: ...

    def to_core(self, event: Event) -> None: ...

    def delay_s(self, name: NodeId) -> float: ...

    def beats_get_through(self, name: NodeId) -> bool: ...

    def find(self, name: NodeId) -> "Process": ...

    def kv_gets_through(self, source: NodeId, target: NodeId) -> bool: ...


class Process:
    """At most one `SimNode` at a time; `None` while it is down."""

    def __init__(self, profile: NodeProfile, device: DeviceModel, world: Surroundings) -> None:
        self.name = profile.node_id
        self.node: SimNode | None = None
        self._profile = profile
        self._device = device
        self._world = world
        self._up: Channel[Event] | None = None
        self._down: Channel[NodeCommand] | None = None
        self._running_step = False
        self._paused = False
        self._deferred: list[Callable[[], None]] = []

    # Life

    def start(self) -> None:
        """A new process: nothing of an earlier one is left."""
        if self.node is None:
            self._profile = replace(self._profile, pid=self._profile.pid + 1)
            self._join()

    def crash(self) -> None:
        """Gone at once; the orchestrator sees the stream end after what was sent before."""
        if self.node is None:
            return
        self._leave()
        self._paused = False
        self._deferred.clear()

    def pause(self) -> None:
        """Stands still, as under SIGSTOP: says nothing, does nothing, its streams stay open."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def _join(self) -> None:
        connection = self._world.connect(self)
        self.node = SimNode(
            profile=self._profile,
            device=self._device,
            block_tokens=self._world.block_tokens,
            connection=connection,
        )
        timeline, delay = self._world.timeline, lambda: self._world.delay_s(self.name)
        self._up = Channel(timeline, delay, self._world.to_core)
        self._down = Channel(timeline, delay, self._when_running(self.node, self._obey))
        self._running_step = False
        self._up.send(NodeJoined(connection=connection, profile=self._profile))
        self._beat(self.node)

    def _leave(self) -> None:
        assert self.node is not None
        assert self._up is not None
        assert self._down is not None
        self._down.cut()
        self._up.send(NodeLost(connection=self.node.connection, reason="its stream was reset"))
        self.node = None

    def _when_running(self, node: SimNode, action: Callable[[NodeCommand], None]) -> Callable[[NodeCommand], None]:
        return lambda command: self._do(node, lambda: action(command))

    def _do(self, node: SimNode, action: Callable[[], None]) -> None:
        """Run `action` as part of the process that has `node`, once it is not paused; never after its end."""
        if self.node is not node:
            return
        if self._paused:
            self._deferred.append(lambda: self._do(node, action))
        else:
            action()

    # The stream

    def command(self, command: NodeCommand) -> None:
        """The orchestrator sends a command; on a stream that is no more it goes nowhere."""
        if self._down is not None and self.node is not None and self.node.connection == command.connection:
            self._down.send(command)

    def _obey(self, command: NodeCommand) -> None:
        assert self.node is not None
        match command:
            case RefuseNode() | DropNode():
                self._leave()
                self._world.timeline.after(REJOIN_S, self._rejoin)
            case WelcomeNode():
                pass
            case StartPrefill() | StartDecode() | ReleaseAttempt():
                self.node.receive(self._world.timeline.now_s, command)
                self._spread()

    def _rejoin(self) -> None:
        if self.node is None:
            self._join()

    def _beat(self, node: SimNode) -> None:
        if self.node is not node:
            return
        self._do(node, self._say_beat)
        self._world.timeline.after(HEARTBEAT_S, lambda: self._beat(node))

    def _say_beat(self) -> None:
        assert self.node is not None
        self.node.expire(self._world.timeline.now_s)
        if self._world.beats_get_through(self.name):
            self._say(HeartbeatReceived(connection=self.node.connection, load=self.node.load()))
        self._spread()

    def _say(self, event: NodeEvent) -> None:
        assert self._up is not None
        self._up.send(event)

    # Work

    def _spread(self) -> None:
        """Send what the node has to say, and keep its device busy."""
        node = self.node
        assert node is not None
        for output in node.take_outputs():
            if isinstance(output, SendKv):
                self._send_kv(node, output)
            else:
                self._say(output)
        plan = None if self._running_step else node.plan_step()
        if plan is not None:
            self._running_step = True
            self._world.timeline.after(plan.seconds, lambda: self._do(node, lambda: self._end_step(node, plan)))

    def _end_step(self, node: SimNode, plan: StepPlan) -> None:
        self._running_step = False
        node.commit_step(plan)
        self._spread()

    def _send_kv(self, node: SimNode, delivery: SendKv) -> None:
        payload = delivery.prompt_tokens * self._profile.kv_bytes_per_token
        seconds = self._world.link.seconds(payload)
        transfer = KvTransfer(transport="grpc", codec="raw", chunks=1, bytes=payload, exposed_ms=1000 * seconds)
        self._world.timeline.after(seconds, lambda: self._arrive(node, delivery, transfer))

    def _arrive(self, node: SimNode, delivery: SendKv, transfer: KvTransfer) -> None:
        target = self._world.find(delivery.target.node_id)
        if self.node is not node:
            return
        if not self._world.kv_gets_through(self.name, target.name):
            self._world.timeline.after(
                TRANSFER_TIMEOUT_S, lambda: self._answer(node, lambda: node.kv_refused(delivery, "no progress"))
            )
        else:
            target.install(delivery, lambda why: self._installed(node, delivery, transfer, why))

    def install(self, delivery: SendKv, answer: Callable[[str], None]) -> None:
        """KV arrives here; `answer` gets why it was not taken, or nothing."""
        node = self.node
        if node is None:
            answer("the node is not there")
            return
        self._do(node, lambda: self._install(node, delivery, answer))

    def _install(self, node: SimNode, delivery: SendKv, answer: Callable[[str], None]) -> None:
        answer(node.kv_arrives(delivery))
        self._spread()

    def _installed(self, node: SimNode, delivery: SendKv, transfer: KvTransfer, why: str) -> None:
        def take() -> None:
            if why:
                node.kv_refused(delivery, why)
            else:
                node.kv_acknowledged(delivery.attempt, transfer)

        latency_s = self._world.link.latency_s
        self._world.timeline.after(latency_s, lambda: self._answer(node, take))

    def _answer(self, node: SimNode, action: Callable[[], None]) -> None:
        def act() -> None:
            action()
            self._spread()

        self._do(node, act)
