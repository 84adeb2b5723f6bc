"""A small served bundle, and a whole live cluster of simulated nodes on real streams."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio
import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgellm.orchestrator.bundle import ServedBundle, open_bundle
from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.values import ConnectionId, EngineProfile, NodeId, NodeProfile, Role
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.server import Orchestrator, core_config, run_orchestrator
from edgellm.orchestrator.sim.device import DeviceModel, LinkModel
from edgellm.orchestrator.sim.live import LiveNode
from edgellm.orchestrator.sim.node import SimNode
from edgellm.runtime.rpc import inference_pb2_grpc

BLOCK_TOKENS = 32
LAYERS = 4
FAST = DeviceModel(read_token_s=2e-5, step_s=0.001, row_s=5e-5, overhead_s=0.0)
LINK = LinkModel(latency_s=0.001, bytes_per_s=1e9)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ServedBundle:
    """A bundle without engines: a byte-level tokenizer with one token per byte, and an end token."""
    folder = tmp_path_factory.mktemp("bundle")
    index = {
        "schema_version": 1,
        "model": {
            "id": "toy",
            "architecture": "llama",
            "vocab_size": 257,
            "max_seq_len": 2048,
            "num_layers": LAYERS,
            "bos_token_id": None,
            "eos_token_ids": [256],
        },
        "kv": {"num_layers": LAYERS, "kv_heads": 1, "head_dim": 8, "dtype": "fp16", "block_tokens": BLOCK_TOKENS},
        "engines": [],
        "plan": {"placements": [], "predicted_ttft_ms": 1.0, "predicted_tpot_ms": 1.0},
        "quality": None,
    }
    (folder / "bundle.json").write_bytes(msgspec.json.encode(index))
    _write_tokenizer(folder / "tokenizer")
    return open_bundle(folder)


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token_id": None, "eos_token_ids": [256], "bos_token": "", "eos_token": "<end>"}
    (folder / "generation.json").write_bytes(msgspec.json.encode(defaults))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@dataclasses.dataclass
class LiveCluster:
    """The orchestrator, and its nodes as tasks that a test may kill."""

    orchestrator: Orchestrator
    stub: inference_pb2_grpc.InferenceStub
    nodes: dict[str, LiveNode]
    tasks: dict[str, asyncio.Task[None]]
    add_node: Callable[[SimNode], asyncio.Task[None]]

    async def quiet(self) -> None:
        """Until no node holds anything and the core knows it. Raises TimeoutError if that does not happen."""
        async with asyncio.timeout(10):
            while not self._is_quiet():  # noqa: ASYNC110  # an event would have to come from the parts under test
                await asyncio.sleep(0.02)
        self.orchestrator.driver.core.check_integrity()

    def _is_quiet(self) -> bool:
        state = self.orchestrator.driver.core.state
        leases = any(node.leases for node in state.nodes)
        held = any(node.node.free_blocks != node.node.profile.kv_blocks for node in self.nodes.values())
        return not (state.requests or leases or held)


@pytest.fixture(scope="session")
def make_node(bundle: ServedBundle) -> Callable[..., SimNode]:
    def make(
        name: str, role: Role, *, blocks: int = 256, half: bool = True, pid: int = 1, device: DeviceModel = FAST
    ) -> SimNode:
        phases: list[Role] = ["prefill"] if role == "prefill" else ["decode"] + ["prefill"] * half
        engines = [
            EngineProfile(
                name=f"{phase}-0",
                phase=phase,
                first_layer=0,
                num_layers=LAYERS,
                precision="toy",
                max_sequences=256,
                max_seq_len=2048,
            )
            for phase in phases
        ]
        profile = NodeProfile(
            node_id=NodeId(name),
            pid=pid,
            role=role,
            device_class="cpu-local",
            bundle_sha256=bundle.sha256,
            kv_contract_sha256=bundle.index.kv.sha256,
            engines=tuple(engines),
            kv_blocks=blocks,
            exchange_address=f"{name}:1",
            host_id=name,
            kv_bytes_per_token=1024,
        )
        return SimNode(profile=profile, device=device, block_tokens=BLOCK_TOKENS, connection=ConnectionId(0))

    return make


@pytest.fixture(scope="session")
def live_cluster(
    bundle: ServedBundle, make_node: Callable[..., SimNode]
) -> Callable[..., contextlib.AbstractAsyncContextManager[LiveCluster]]:
    """Context manager: `async with live_cluster(*nodes)`; by default one prefill and one decode node."""

    @contextlib.asynccontextmanager
    async def run(*nodes: SimNode, **bounds: float) -> AsyncIterator[LiveCluster]:
        nodes = nodes or (make_node("p0", "prefill"), make_node("d0", "decode"))
        config: CoreConfig = dataclasses.replace(core_config(bundle), **bounds)
        async with (
            run_orchestrator(bundle, config, DualPool(), "127.0.0.1:0") as orchestrator,
            grpc.aio.insecure_channel(orchestrator.address) as channel,
        ):
            cluster = _cluster(orchestrator, inference_pb2_grpc.InferenceStub(channel))
            for node in nodes:
                cluster.add_node(node)
            await asyncio.gather(*(node.joined.wait() for node in cluster.nodes.values()))
            try:
                yield cluster
            finally:
                for task in cluster.tasks.values():
                    task.cancel()
                await asyncio.gather(*cluster.tasks.values(), return_exceptions=True)

    return run


def _cluster(orchestrator: Orchestrator, stub: inference_pb2_grpc.InferenceStub) -> LiveCluster:
    nodes: dict[str, LiveNode] = {}
    tasks: dict[str, asyncio.Task[None]] = {}
    fleet: dict[NodeId, LiveNode] = {}

    def add_node(node: SimNode) -> asyncio.Task[None]:
        name = node.profile.node_id
        nodes[name] = LiveNode(node, fleet, LINK)
        tasks[name] = asyncio.ensure_future(nodes[name].run(orchestrator.address))
        return tasks[name]

    return LiveCluster(orchestrator=orchestrator, stub=stub, nodes=nodes, tasks=tasks, add_node=add_node)
