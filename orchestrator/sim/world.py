"""The whole cluster in simulated time: the live core, processes of nodes, links, clients, and the invariants."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgellm.orchestrator.core.commands import (
    AcceptRequest,
    Command,
    EmitToken,
    FinishRequest,
    NoteNode,
    NoteRequest,
    RejectRequest,
)
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import Event, HeartbeatReceived, NodeJoined, RequestEnded, RequestSubmitted, Tick
from edgellm.orchestrator.core.values import ConnectionId, NodeId, NodeProfile, RequestId, RequestSpec
from edgellm.orchestrator.sim.clients import Clients
from edgellm.orchestrator.sim.device import DeviceModel, LinkModel
from edgellm.orchestrator.sim.node import SimulationError
from edgellm.orchestrator.sim.process import Process
from edgellm.orchestrator.sim.timeline import Timeline

TICK_S = 0.05


@dataclass(kw_only=True)
class Trouble:
    """What is wrong with the network at the moment."""

    extra_delay_s: dict[NodeId, float] = field(default_factory=dict)
    silent: set[NodeId] = field(default_factory=set)
    """Nodes whose heartbeats are lost."""
    deaf: set[NodeId] = field(default_factory=set)
    """Nodes that no KV reaches."""


class World:
    """Drives one core. Invariants are recounted after every event the core takes, where `check` is on."""

    def __init__(self, core: Core, rng: random.Random, link: LinkModel, *, check: bool = True) -> None:
        self.core = core
        self.timeline = Timeline()
        self.link = link
        self.block_tokens = core.state.config.block_tokens
        self.clients = Clients()
        self.trouble = Trouble()
        self.processes: dict[NodeId, Process] = {}
        self.story: list[str] = []
        """What happened, one line each: states of requests and nodes, and faults."""
        self._rng = rng
        self._check = check
        self._connections: dict[ConnectionId, Process] = {}
        self._heard_s: dict[ConnectionId, float] = {}
        self._tick()

    def add_node(self, profile: NodeProfile, device: DeviceModel) -> None:
        process = Process(profile, device, self)
        self.processes[profile.node_id] = process
        process.start()

    def submit_at(self, time_s: float, spec: RequestSpec) -> None:
        self.clients.submit(spec)
        self.timeline.at(time_s, lambda: self.to_core(RequestSubmitted(spec=spec)))

    def cancel(self, request_id: RequestId) -> None:
        self.clients.requests[request_id].cancelled = True
        self.to_core(RequestEnded(request_id=request_id, reason="cancelled"))

    def run(self, until_s: float) -> None:
        """Until every request has ended and every node is empty. Raises SimulationError if that takes too long."""
        while not self._is_over():
            if self.timeline.now_s > until_s:
                raise SimulationError(f"after {until_s:.0f} s these go on: {self._what_goes_on()}")
            self.timeline.step()

    def tell(self, line: str) -> None:
        self.story.append(f"{self.timeline.now_s:9.4f} {line}")

    # Surroundings of the processes

    def connect(self, process: Process) -> ConnectionId:
        connection = ConnectionId(len(self._connections) + 1)
        self._connections[connection] = process
        return connection

    def delay_s(self, name: NodeId) -> float:
        return self.link.latency_s * self._rng.uniform(0.5, 2.0) + self.trouble.extra_delay_s.get(name, 0.0)

    def beats_get_through(self, name: NodeId) -> bool:
        return name not in self.trouble.silent

    def kv_gets_through(self, source: NodeId, target: NodeId) -> bool:
        return source not in self.trouble.deaf and target not in self.trouble.deaf

    def find(self, name: NodeId) -> Process:
        return self.processes[name]

    def to_core(self, event: Event) -> None:
        if isinstance(event, HeartbeatReceived | NodeJoined):
            self._heard_s[event.connection] = self.timeline.now_s
        for command in self.core.handle(self.timeline.now_s, event):
            self._carry_out(command)
        if self._check:
            self.core.check_integrity()
            self._check_nodes()

    def _carry_out(self, command: Command) -> None:
        match command:
            case AcceptRequest() | RejectRequest() | EmitToken() | FinishRequest():
                self.clients.take(self.timeline.now_s, command)
            case NoteRequest():
                self.tell(f"{command.request_id} epoch {command.epoch} {command.state}: {command.detail}")
            case NoteNode():
                self.tell(f"{command.node_id} #{command.incarnation} {command.state}: {command.detail}")
            case _:
                self._connections[command.connection].command(command)

    def _check_nodes(self) -> None:
        """What a node holds, the core counts as used there; who is silent for too long is not trusted."""
        longest_s = self.core.state.config.dead_after_s + 3 * TICK_S
        for process in self.processes.values():
            node = process.node
            counted = self.core.state.nodes.get(node.connection) if node is not None else None
            if node is None or counted is None:
                continue
            silence_s = self.timeline.now_s - self._heard_s[node.connection]
            if silence_s > longest_s:
                raise SimulationError(f"{process.name} is silent for {silence_s:.2f} s and still counted as alive")
            for attempt in node.held_attempts():
                if attempt not in counted.leases:
                    raise SimulationError(f"{process.name} holds {attempt}, which the core counts as free")

    def _tick(self) -> None:
        self.to_core(Tick())
        self.timeline.after(TICK_S, self._tick)

    def _is_over(self) -> bool:
        leases = any(node.leases for node in self.core.state.nodes)
        held = any(p.node is not None and p.node.held_attempts() for p in self.processes.values())
        return not (self.clients.open_requests() or leases or held)

    def _what_goes_on(self) -> Sequence[str]:
        held = [f"{p.name} holds {a}" for p in self.processes.values() if p.node for a in p.node.held_attempts()]
        leases = [f"{n.profile.node_id} leases {a}" for n in self.core.state.nodes for a in n.leases]
        return [*map(str, self.clients.open_requests()), *held, *leases]
