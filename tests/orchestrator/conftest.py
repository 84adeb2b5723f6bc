"""A small served bundle, and a whole live cluster of nodes with toy engines, on real streams and a real clock."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest

from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.server import Orchestrator, core_config, run_orchestrator
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.machines import NodePlan, node_config, toy_bundle, toy_engines
from edgellm.runtime.rpc import inference_pb2_grpc
from edgellm.runtime.server import NodeServer

LAYERS = 4
FAST = DeviceModel(read_token_s=2e-5, step_s=0.001, row_s=5e-5, overhead_s=0.0)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ServedBundle:
    return toy_bundle(tmp_path_factory.mktemp("bundle"), LAYERS)


def pass_time(seconds: float, effect: Callable[[], None]) -> None:
    """On an engine's thread."""
    time.sleep(seconds)
    effect()


@dataclasses.dataclass
class LiveCluster:
    """The orchestrator, and its nodes as tasks that a test may kill."""

    orchestrator: Orchestrator
    stub: inference_pb2_grpc.InferenceStub
    bundle: ServedBundle
    nodes: dict[str, NodeServer] = dataclasses.field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = dataclasses.field(default_factory=dict)

    def add_node(self, plan: NodePlan, **changes: object) -> asyncio.Task[None]:
        """`changes`: fields of NodeEngines."""
        engines = dataclasses.replace(toy_engines(plan, self.bundle, pass_time), **changes)
        config = node_config(plan, self.bundle, self.orchestrator.address)
        self.nodes[plan.name] = NodeServer(config, engines)
        self.tasks[plan.name] = asyncio.ensure_future(self.nodes[plan.name].run())
        return self.tasks[plan.name]

    async def joined(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.orchestrator.driver.core.state.nodes.alive()) < count:  # noqa: ASYNC110  # as below
                await asyncio.sleep(0.01)

    async def quiet(self) -> None:
        """Until no node holds anything and the core knows it. Raises TimeoutError if that does not happen."""
        async with asyncio.timeout(10):
            while not self._is_quiet():  # noqa: ASYNC110  # an event would have to come from the parts under test
                await asyncio.sleep(0.02)
        self.orchestrator.driver.core.check_integrity()

    def _is_quiet(self) -> bool:
        state = self.orchestrator.driver.core.state
        leases = any(node.leases for node in state.nodes)
        held = any(node.ledger.attempts() for node in self.nodes.values())
        return not (state.requests or leases or held)


@pytest.fixture(scope="session")
def make_node() -> Callable[..., NodePlan]:
    def make(name: str, role: str, *, blocks: int = 256, half: bool = True, device: DeviceModel = FAST) -> NodePlan:
        engine = "prefill-tp0of1" if role == "prefill" else "decode-pp0of1"
        return NodePlan(name=name, engine=engine, kv_blocks=blocks, half=half, device=device, max_sequences=256)

    return make


@pytest.fixture(scope="session")
def cluster_of(bundle: ServedBundle) -> Callable[..., LiveCluster]:
    """Nodes for an orchestrator that the test itself runs."""
    return lambda orchestrator, stub: LiveCluster(orchestrator=orchestrator, stub=stub, bundle=bundle)


@pytest.fixture(scope="session")
def live_cluster(
    bundle: ServedBundle, make_node: Callable[..., NodePlan]
) -> Callable[..., contextlib.AbstractAsyncContextManager[LiveCluster]]:
    """Context manager: `async with live_cluster(*nodes)`; by default one prefill and one decode node."""

    @contextlib.asynccontextmanager
    async def run(*nodes: NodePlan, **bounds: float) -> AsyncIterator[LiveCluster]:
        nodes = nodes or (make_node("p0", "prefill"), make_node("d0", "decode"))
        config: CoreConfig = dataclasses.replace(core_config(bundle), **bounds)
        async with (
            run_orchestrator(bundle, config, DualPool(), "127.0.0.1:0") as orchestrator,
            grpc.aio.insecure_channel(orchestrator.address) as channel,
        ):
            stub = inference_pb2_grpc.InferenceStub(channel)
            cluster = LiveCluster(orchestrator=orchestrator, stub=stub, bundle=bundle)
            for node in nodes:
                cluster.add_node(node)
            await cluster.joined(len(nodes))
            try:
                yield cluster
            finally:
                for task in cluster.tasks.values():
                    task.cancel()
                await asyncio.gather(*cluster.tasks.values(), return_exceptions=True)

    return run
