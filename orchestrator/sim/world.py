"""The whole cluster in simulated time: the orchestrator, the nodes, the network, the clients, and the invariants."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.core.commands import Command
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import Event, Tick
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.core.values import AttemptId, RequestId
from edgellm.orchestrator.server import Orchestrator
from edgellm.orchestrator.sim.clients import Ask, Client
from edgellm.orchestrator.sim.loop import Process, SimulationError
from edgellm.orchestrator.sim.machines import Machine, NodePlan, SimulatedNode, SimulatedOrchestrator
from edgellm.orchestrator.sim.network import LinkModel, Scale
from edgellm.orchestrator.sim.outside import Outside, simulated_outside
from edgellm.orchestrator.sim.story import Story

_UNSCALED = Scale()
LOOK_S = 0.05
"""How often it is asked whether all is over."""


class WatchedCore(Core):
    """A core after each of whose events the invariants are recounted."""

    def __init__(self, core: Core, watch: Callable[[Event], None]) -> None:
        vars(self).update(vars(core))
        self._watch = watch

    def handle(self, now_s: float, event: Event) -> list[Command]:
        commands = super().handle(now_s, event)
        self.check_integrity()
        self._watch(event)
        return commands


class World:
    """Made, filled and run inside of `simulated_world`."""

    def __init__(
        self,
        bundle: ServedBundle,
        policy: Callable[[], Policy],
        bounds: Mapping[str, float],
        outside: Outside,
        story: Story,
        *,
        check: bool,
    ) -> None:
        loop, network = outside.loop, outside.network
        self.loop = loop
        self.network = network
        self.story = story
        self.nodes: dict[str, SimulatedNode] = {}
        self.clients: list[Client] = []
        self.orchestrator = SimulatedOrchestrator(loop, network, bundle, policy, bounds, self._orchestrator_started)
        self.busy_until_s = 0.0
        """Not over before; the end of the last fault."""
        self._bundle = bundle
        self._check = check
        self._core: Core | None = None
        self._customers = Process(name="clients", pid=1)
        self._is_over = False

    @property
    def machines(self) -> dict[str, Machine]:
        return {"orchestrator": self.orchestrator, **self.nodes}

    def add_node(self, plan: NodePlan) -> None:
        self.nodes[plan.name] = SimulatedNode(self.loop, self.network, plan, self._bundle, self.orchestrator.address)

    def add_client(self, ask: Ask) -> None:
        num_layers = self._bundle.index.model.num_layers
        self.clients.append(Client(ask=ask, num_layers=num_layers, now_s=self.loop.time, check=self._check))

    def run(self, until_s: float) -> None:
        """Until every request has ended and every node is empty. Raises SimulationError if that takes too long."""
        for machine in self.machines.values():
            machine.start()
        for client in self.clients:
            task = self.loop.spawn(self._customers, client.run(self.orchestrator.address))
            task.add_done_callback(self._client_ended, context=self._customers.context)
        self._look()
        if not self.loop.run_until(lambda: self._is_over, until_s):
            raise SimulationError(f"after {until_s:.0f} s these go on: {', '.join(self._what_goes_on())}")

    def tear_down(self) -> None:
        self.story.end()
        self.network.close()
        processes = [process for machine in self.machines.values() for process in machine.history]
        self.loop.tear_down([self._customers, *processes])

    # Invariants

    def _orchestrator_started(self, running: Orchestrator) -> None:
        self._core = running.driver.core
        if self._check:
            running.driver.core = self._core = WatchedCore(self._core, self._check_nodes)

    def _check_nodes(self, event: Event) -> None:
        """What a node holds, the core counts as used there; at a takeover under the new epoch before the node does."""
        assert self._core is not None
        nodes = self._core.state.nodes
        connection = getattr(event, "connection", None)
        for counted in nodes.alive():
            if connection == counted.connection or isinstance(event, Tick):
                self._check_node(counted.profile.node_id, counted.profile.pid, counted.leases)

    def _check_node(self, name: str, pid: int, leases: Mapping[AttemptId, object]) -> None:
        node = self.nodes[name]
        if node.process is None or node.process.pid != pid or node.server is None:
            return
        node.server.ledger.check_integrity()
        counted = {lease.request_id: lease.epoch for lease in sorted(leases, key=lambda lease: lease.epoch)}
        for held in node.server.ledger.attempts():
            if held.epoch > counted.get(RequestId(held.request_id), -1):
                raise SimulationError(f"{name} holds {held}, which the core counts as free")

    def _client_ended(self, task: "asyncio.Task[None]") -> None:
        error = task.exception()
        if error is not None:
            self.loop.errors.append(str(error) if isinstance(error, SimulationError) else repr(error))

    def _look(self) -> None:
        idle = self.loop.time() >= self.busy_until_s and self._core is not None
        self._is_over = idle and not any(self._what_goes_on())
        self.loop.call_later(LOOK_S, self._look)

    def _what_goes_on(self) -> Iterator[str]:
        for client in self.clients:
            if not client.is_over:
                yield f"{client.ask.name} waits"
        for node in self.nodes.values():
            if node.server is not None:
                for attempt in node.server.ledger.attempts():
                    yield f"{node.name} holds {attempt}"
        if self._core is not None:
            for counted in self._core.state.nodes:
                for lease in counted.leases:
                    yield f"{counted.profile.node_id} leases {lease}"


@contextmanager
def simulated_world(
    bundle: ServedBundle,
    policy: Callable[[], Policy],
    bounds: Mapping[str, float],
    *,
    seed: int,
    link: LinkModel,
    story: Story,
    scale: Scale = _UNSCALED,
    check: bool = True,
) -> Iterator[World]:
    """Inside, clocks, processes and gRPC are simulated."""
    with simulated_outside(seed, link, scale) as outside, story.told_by(outside.loop):
        world = World(bundle, policy, bounds, outside, story, check=check)
        try:
            yield world
        finally:
            world.tear_down()
