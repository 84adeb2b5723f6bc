"""A tiny Llama-like model in the reference engine, and an orchestrator played by the test over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import msgspec
import numpy as np
import pytest

from edgellm.builder.partition import cut_stages
from edgellm.engines.base import Batch, Engine
from edgellm.engines.bundle import SCHEMA_VERSION, Bundle, ModelInfo, Plan, file_sha256
from edgellm.engines.cpu.compiler import compile_engine
from edgellm.engines.cpu.engine import BACKEND_VERSION
from edgellm.engines.graph import (
    TOKENS,
    Activation,
    Add,
    Attention,
    Embed,
    Graph,
    Half,
    Linear,
    Norm,
    Op,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
)
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine
from edgellm.engines.spec import EngineFile, EngineLimits, EngineSpec, Phase
from edgellm.engines.weights import FloatArray
from edgellm.runtime.config import JoinConfig, NodeConfig
from edgellm.runtime.kv.types import NodeId
from edgellm.runtime.loading import NodeEngines
from edgellm.runtime.rpc import cluster_pb2, cluster_pb2_grpc, inference_pb2
from edgellm.runtime.server import NodeServer
from edgellm.runtime.stages.engines import StageEngines

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, MAX_SEQ_LEN = 3, 4, 2, 8, 96, 384
HIDDEN_SIZE, INNER = HEADS * HEAD_DIM, 48
CONTRACT = KvContract(num_layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def _layer(index: int, x: TensorName) -> tuple[list[Op], TensorName]:
    def name(suffix: str) -> TensorName:
        return TensorName(f"{index}.{suffix}")

    def linear(out: str, source: TensorName, width_in: int, width_out: int) -> Linear:
        return Linear(
            out=name(out), x=source, weight=WeightName(f"{index}.w{out}"), bias=None,
            in_features=width_in, out_features=width_out, precision=Half(),
        )  # fmt: skip

    def norm(out: str, source: TensorName) -> Norm:
        weight = WeightName(f"{index}.w{out}")
        return Norm(out=name(out), x=source, kind="rms", weight=weight, bias=None, size=HIDDEN_SIZE, eps=1e-5)

    def rope(out: str, source: TensorName, heads: int) -> Rope:
        inv_freq = tuple(10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2))
        return Rope(out=name(out), x=source, num_heads=heads, head_dim=HEAD_DIM, inv_freq=inv_freq)

    kv_width = KV_HEADS * HEAD_DIM
    ops: list[Op] = [
        norm("norm1", x),
        linear("q", name("norm1"), HIDDEN_SIZE, HIDDEN_SIZE),
        linear("k", name("norm1"), HIDDEN_SIZE, kv_width),
        linear("v", name("norm1"), HIDDEN_SIZE, kv_width),
        rope("q_rope", name("q"), HEADS),
        rope("k_rope", name("k"), KV_HEADS),
        Attention(
            out=name("attention"), q=name("q_rope"), k=name("k_rope"), v=name("v"), layer=index,
            num_heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5,
        ),
        linear("o", name("attention"), HIDDEN_SIZE, HIDDEN_SIZE),
        Add(out=name("mid"), a=x, b=name("o"), size=HIDDEN_SIZE),
        norm("norm2", name("mid")),
        linear("gate", name("norm2"), HIDDEN_SIZE, INNER),
        linear("up", name("norm2"), HIDDEN_SIZE, INNER),
        Activation(out=name("act"), x=name("gate"), up=name("up"), kind="silu", size=INNER),
        linear("down", name("act"), INNER, HIDDEN_SIZE),
        Add(out=name("out"), a=name("mid"), b=name("down"), size=HIDDEN_SIZE),
    ]  # fmt: skip
    return ops, name("out")


def tiny_graph() -> Graph:
    x = TensorName("embedded")
    ops: list[Op] = [
        Embed(out=x, tokens=TOKENS, weight=WeightName("embed"), vocab_size=VOCAB, hidden_size=HIDDEN_SIZE,
              precision=Half())
    ]  # fmt: skip
    for index in range(LAYERS):
        layer, x = _layer(index, x)
        ops += layer
    ops += [
        SelectRows(out=TensorName("selected"), x=x, size=HIDDEN_SIZE),
        Norm(out=TensorName("normed"), x=TensorName("selected"), kind="rms", weight=WeightName("wfinal"), bias=None,
             size=HIDDEN_SIZE, eps=1e-5),
        Linear(out=TensorName("logits"), x=TensorName("normed"), weight=WeightName("head"), bias=None,
               in_features=HIDDEN_SIZE, out_features=VOCAB, precision=Half()),
    ]  # fmt: skip
    return Graph(
        ops=tuple(ops), input=TOKENS, output=TensorName("logits"), hidden_size=HIDDEN_SIZE, vocab_size=VOCAB,
        num_layers=LAYERS,
    )  # fmt: skip


def tiny_weights(graph: Graph) -> dict[WeightName, FloatArray]:
    rng = np.random.default_rng(5)
    weights: dict[WeightName, FloatArray] = {}
    for op in graph.ops:
        match op:
            case Embed():
                weights[op.weight] = rng.normal(0, 1, (op.vocab_size, op.hidden_size)).astype(np.float32)
            case Norm():
                weights[op.weight] = np.ones(op.size, np.float32)
            case Linear():
                scale = 1.5 * op.in_features**-0.5
                weights[op.weight] = rng.normal(0, scale, (op.out_features, op.in_features)).astype(np.float32)
    return weights


def tiny_engine(phase: Phase, pool: HostKvPool, *, max_rows: int = 64, max_sequences: int = 8) -> ReferenceEngine:
    limits = EngineLimits(max_rows=max_rows, max_sequences=max_sequences, max_seq_len=MAX_SEQ_LEN)
    return _reference_engine(phase, tiny_graph(), 0, 0, 1, pool, limits)


def tiny_stages(
    pool: HostKvPool, counts: Sequence[int] = (LAYERS,), *, max_rows: int = 64, max_sequences: int = 8
) -> StageEngines:
    """The decode engine, cut into stages of so many layers."""
    limits = EngineLimits(max_rows=max_rows, max_sequences=max_sequences, max_seq_len=MAX_SEQ_LEN)
    engines = [
        _reference_engine("decode", graph, sum(counts[:stage]), stage, len(counts), pool, limits)
        for stage, graph in enumerate(cut_stages(tiny_graph(), counts))
    ]
    return StageEngines(engines, pool)


def _reference_engine(phase, graph, first_layer, rank, world, pool, limits) -> ReferenceEngine:
    spec = EngineSpec(
        name=f"{phase}-tiny{rank}of{world}", phase=phase, backend="reference", backend_version="0",
        device_class="cpu-local", first_layer=first_layer, num_layers=graph.num_layers, rank=rank, world=world,
        precision="float32", hidden_size=HIDDEN_SIZE, vocab_size=VOCAB, files=(), limits=limits,
    )  # fmt: skip
    return ReferenceEngine(graph, tiny_weights(tiny_graph()), spec=spec, pool=pool)


def tiny_pool(blocks: int = 64) -> HostKvPool:
    return HostKvPool(CONTRACT, range(LAYERS), blocks)


def one_by_one(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy answer of the model, alone: the prompt in one step, then a token per step."""
    return greedy_answer(tiny_engine("decode", tiny_pool(16), max_rows=MAX_SEQ_LEN), prompt, max_tokens)


def staged_answer(counts: Sequence[int], prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy answer of one node: the prompt by the whole engine, then the decode stages, one after the other."""
    pool = tiny_pool(16)
    stages = tiny_stages(pool, counts).whole
    assert stages is not None
    return greedy_answer(tiny_engine("prefill", pool, max_rows=MAX_SEQ_LEN), prompt, max_tokens, stages)


def greedy_answer(engine: Engine, prompt: Sequence[int], max_tokens: int, writer: Engine | None = None) -> list[int]:
    """`writer`: the engine after the prompt, on the same pool; None: the same one."""
    table = np.array([engine.kv.allocate(12)], np.int32)
    answer: list[int] = []
    rows, position = list(prompt), 0
    while len(answer) < max_tokens:
        batch = Batch(
            tokens=np.array(rows, np.int32), hidden=None, row_starts=np.array([0, len(rows)], np.int32),
            first_positions=np.array([position], np.int32), block_tables=table,
            logit_rows=np.array([len(rows) - 1], np.int32),
        )  # fmt: skip
        logits = (engine if not answer or writer is None else writer).forward(batch).logits
        assert logits is not None
        answer.append(int(np.argmax(logits[0])))
        position, rows = position + len(rows), [answer[-1]]
    return answer


@dataclass
class Joined:
    """One node's Join stream, as the orchestrator sees it."""

    hello: cluster_pb2.Hello
    commands: asyncio.Queue[cluster_pb2.Command] = field(default_factory=asyncio.Queue)
    events: list[cluster_pb2.NodeMessage] = field(default_factory=list)
    heartbeat: cluster_pb2.Heartbeat = field(default_factory=cluster_pb2.Heartbeat)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def send(self, **command: object) -> None:
        self.commands.put_nowait(cluster_pb2.Command(**command))  # type: ignore[arg-type]

    async def wait_for(self, kind: str, request_id: str, count: int = 1) -> list[object]:
        """The events of one kind about one request, once there are `count`."""

        def found() -> list[object]:
            return [event for event in events_about(self.events, request_id) if type(event).__name__ == kind]

        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(lambda: len(found()) >= count)
            return found()


def events_about(events: Sequence[cluster_pb2.NodeMessage], request_id: str) -> Iterator[object]:
    for message in events:
        event = getattr(message, message.WhichOneof("message") or "")
        if isinstance(event, cluster_pb2.Tokens):
            yield from (token for token in event.tokens if token.attempt.request_id == request_id)
        elif hasattr(event, "attempt") and event.attempt.request_id == request_id:
            yield event


class Orchestrator(cluster_pb2_grpc.ClusterServicer):
    """Accepts nodes and lets the test speak."""

    def __init__(self) -> None:
        self.nodes: dict[str, Joined] = {}
        self.address = ""
        self.joined = asyncio.Condition()
        self.refuse_with: str | None = None
        self.server: grpc.aio.Server | None = None

    async def Join(self, request_iterator, context):  # noqa: N802
        hello = (await context.read()).hello
        if self.refuse_with is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuse_with)
        node = Joined(hello=hello)
        welcome = cluster_pb2.Welcome(incarnation=1, heartbeat_interval_ms=20)
        await context.write(cluster_pb2.Command(welcome=welcome))
        async with self.joined:
            self.nodes[hello.node_id] = node
            self.joined.notify_all()
        reading = asyncio.create_task(self._read(node, context))
        try:
            while True:
                await context.write(await node.commands.get())
        finally:
            reading.cancel()

    async def _read(self, node, context) -> None:
        while isinstance(message := await context.read(), cluster_pb2.NodeMessage):
            async with node.changed:
                if message.WhichOneof("message") == "heartbeat":
                    node.heartbeat = message.heartbeat
                else:
                    node.events.append(message)
                node.changed.notify_all()

    async def node(self, node_id: str) -> Joined:
        async with asyncio.timeout(20), self.joined:
            await self.joined.wait_for(lambda: node_id in self.nodes)
            return self.nodes[node_id]


@asynccontextmanager
async def orchestrating(address: str = "127.0.0.1:0") -> AsyncIterator[Orchestrator]:
    orchestrator = Orchestrator()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)])
    cluster_pb2_grpc.add_ClusterServicer_to_server(orchestrator, server)
    orchestrator.server = server
    orchestrator.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield orchestrator
    finally:
        await server.stop(grace=None)


@dataclass
class Running:
    server: NodeServer
    joined: Joined
    task: asyncio.Task[None]


def node_server(
    orchestrator: str,
    node_id: str,
    phase: Phase,
    *,
    blocks: int = 64,
    contract: KvContract = CONTRACT,
    lease_s: float = 5,
    stage_layers: Sequence[int] = (LAYERS,),
    **options: object,
) -> NodeServer:
    """On a tiny engine, not started."""
    pool = tiny_pool(blocks)
    stages = tiny_stages(pool, stage_layers) if phase == "decode" else StageEngines((), pool)
    engines = NodeEngines(
        bundle_sha256="tiny", contract=contract, role=phase, planned=f"{phase}-tiny", half=tiny_engine("prefill", pool),
        stages=stages,
    )  # fmt: skip
    config = NodeConfig(
        node_id=NodeId(node_id), bundle=Path("tiny"), engine=f"{phase}-tiny",
        join=JoinConfig(orchestrator=orchestrator, join_timeout_s=5, lease_s=lease_s), **options,
    )  # type: ignore[arg-type]  # fmt: skip
    return NodeServer(config, engines)


@asynccontextmanager
async def node(orchestrator: Orchestrator, node_id: str, phase: Phase, **options: object) -> AsyncIterator[Running]:
    """A node server, joined; its blocks are all free again when it ends."""
    server = node_server(orchestrator.address, node_id, phase, **options)  # type: ignore[arg-type]
    pool = server.ledger.pool
    task = asyncio.create_task(server.run())
    try:
        yield Running(server=server, joined=await orchestrator.node(node_id), task=task)
    finally:
        server.stop()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
    server.ledger.check_integrity()
    assert pool.free_blocks == pool.num_blocks


def attempt(request_id: str, epoch: int = 0) -> cluster_pb2.Attempt:
    return cluster_pb2.Attempt(request_id=request_id, epoch=epoch)


def generation(max_tokens: int, **sampling: object) -> cluster_pb2.Generation:
    params = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 1}
    resolved = inference_pb2.SamplingParams(**(params | sampling))  # type: ignore[arg-type]
    return cluster_pb2.Generation(sampling=resolved, max_tokens=max_tokens)


def target(running: Running) -> cluster_pb2.KvTarget:
    hello = running.joined.hello
    return cluster_pb2.KvTarget(
        node_id=hello.node_id, address=hello.exchange_address, host_id=hello.host_id, first_layer=0, num_layers=LAYERS
    )


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that no message announces."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.005)


def random_prompt(tokens: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, tokens)]


def prefill(request_id, prompt, wish, *, epoch=0, targets=(), degraded=False, generated=(), timeout_ms=5000):
    return cluster_pb2.Prefill(
        attempt=attempt(request_id, epoch),
        prompt=prompt,
        generation=wish,
        targets=targets,
        degraded=degraded,
        generated=generated,
        transfer_timeout_ms=timeout_ms,
    )


def decode(request_id, prompt, wish, generated, *, epoch=0, timeout_ms=5000):
    return cluster_pb2.Decode(
        attempt=attempt(request_id, epoch),
        prompt=prompt,
        generated=generated,
        generation=wish,
        kv_timeout_ms=timeout_ms,
    )


async def answer(reader: Running, writer: Running, request_id, prompt, wish, **options) -> list[int]:
    """Run one request to its end, as an orchestrator would."""
    targets = [] if reader is writer else [target(writer)]
    reader.joined.send(prefill=prefill(request_id, prompt, wish, targets=targets, **options))
    [done] = await reader.joined.wait_for("PrefillDone", request_id)
    tokens = [done.first_token.token_id]
    if done.first_token.finish_reason == 0:
        writer.joined.send(decode=decode(request_id, prompt, wish, tokens))
        rest = await writer.joined.wait_for("AttemptToken", request_id, wish.max_tokens - 1)
        assert [one.token.index for one in rest] == list(range(1, wish.max_tokens))
        tokens += [one.token.token_id for one in rest]
    return tokens


def cluster(test, **options):
    """Run `test(orchestrator, prefill node, decode node)` on one event loop."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reader = await stack.enter_async_context(node(orchestrator, "reader", "prefill", **options))
            writer = await stack.enter_async_context(node(orchestrator, "writer", "decode"))
            await test(orchestrator, reader, writer)

    asyncio.run(run())


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model compiled for the native engine, twice: as a prefill and as a decode engine."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", [(LAYERS,)])


@pytest.fixture(scope="session")
def staged_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with a takeover engine of all layers and stages of one layer each."""
    return write_tiny_bundle(tmp_path_factory.mktemp("staged") / "bundle", [(LAYERS,), (1,) * LAYERS])


def write_tiny_bundle(folder: Path, cuts: Sequence[Sequence[int]]) -> Path:
    """One prefill engine, and decode stages of so many layers for each cut."""
    graph = tiny_graph()
    engines = [_compile(folder, "prefill", "prefill-tp0of1", graph, 0, 1)]
    for counts in cuts:
        for stage, part in enumerate(cut_stages(graph, counts)):
            name = f"decode-pp{stage}of{len(counts)}"
            engines.append(_compile(folder, "decode", name, part, stage, len(counts)))
    model = ModelInfo(
        id="tiny", architecture="llama", checkpoint_sha256="0", num_layers=LAYERS, hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB, max_seq_len=MAX_SEQ_LEN, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    bundle = Bundle(
        schema_version=SCHEMA_VERSION, model=model, kv=CONTRACT, engines=tuple(engines),
        plan=Plan(placements=(), predicted_ttft_ms=0, predicted_tpot_ms=0), quality=None,
    )  # fmt: skip
    (folder / "bundle.json").write_bytes(msgspec.json.encode(bundle))
    return folder


def _compile(bundle: Path, phase: Phase, name: str, graph: Graph, rank: int, world: int) -> str:
    limits, folder = EngineLimits(max_rows=64, max_sequences=8, max_seq_len=MAX_SEQ_LEN), bundle / name
    folder.mkdir(parents=True)
    compile_engine(graph, tiny_weights(tiny_graph()), contract=CONTRACT, limits=limits, folder=folder)
    files = tuple(
        EngineFile(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.iterdir())
    )
    spec = EngineSpec(
        name=name, phase=phase, backend="cpu", backend_version=BACKEND_VERSION, device_class="cpu-local",
        first_layer=graph.first_layer, num_layers=graph.num_layers, rank=rank, world=world, precision="half",
        hidden_size=HIDDEN_SIZE, vocab_size=VOCAB, limits=limits, files=files,
    )  # fmt: skip
    (folder / "engine.json").write_bytes(msgspec.json.encode(spec))
    return name
