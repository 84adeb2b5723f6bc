"""One prefill engine over two ranks: the logits of one rank, the text of one rank, and no loss when a rank dies."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.builder.partition import shard
from edgellm.engines.base import Batch, SumOverRanks
from edgellm.engines.cpu import isa as isas
from edgellm.engines.cpu.compiler import compile_engine
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.graph import Attention, Graph
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import FloatArray, WeightStore
from edgellm.orchestrator.local_cluster import LocalCluster, serve
from edgellm.runtime.rpc import inference_pb2 as api
from edgellm.runtime.tensor_parallel.patience import Patience
from tests.system.conftest import build
from tests.system.test_answers import PROMPTS, story

LIMITS = EngineLimits(max_rows=256, max_sequences=4, max_seq_len=512)
BLOCKS = 16
LOOPBACK = "127.0.0.1:1"
REQUEST = api.GenerateRequest(token_ids=api.TokenIds(ids=[1, *range(3, 400)]), max_tokens=32, ignore_eos=True)
RANKS_THAT_JUST_FIT = """
[devices.nx0]
class = "cpu-local"
memory_gib = 0.5014
[devices.nx1]
class = "cpu-local"
memory_gib = 0.5014
[devices.nano]
class = "cpu-local"
[pools]
prefill = ["nx0", "nx1"]
decode = ["nano"]
"""
"""Of stories260K: a little more than what the system itself needs."""


# Two engines in this process, summed over loopback


def engine(
    graph: Graph, weights: WeightStore, folder: Path, isa: str, sum_over_ranks: SumOverRanks | None = None
) -> CpuEngine:
    folder.mkdir(exist_ok=True)
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    contract = KvContract(num_layers=graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    compile_engine(graph, weights, contract=contract, limits=LIMITS, folder=folder)
    pool = HostKvPool(contract, range(graph.num_layers), BLOCKS)
    spec = reference_spec(graph, LIMITS)
    return CpuEngine(folder, spec, pool=pool, threads=1, isa=isa, sum_over_ranks=sum_over_ranks)


def step(one: CpuEngine, tokens: list[int], first_position: int) -> FloatArray:
    """Logits of consecutive rows of the only sequence."""
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.arange(BLOCKS, dtype=np.int32)[None],
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )
    logits = one.forward(batch).logits
    assert logits is not None
    return logits.copy()


class TwoRanks:
    """Both ranks of a model; a step runs on both."""

    def __init__(self, graph: Graph, weights: WeightStore, folder: Path, isa: str) -> None:
        from edgellm.runtime.tensor_parallel.sums import connect, join_store, open_store

        patience = Patience()
        store = open_store(LOOPBACK, patience)

        def load(rank: int) -> CpuEngine:
            spec = replace(reference_spec(graph, LIMITS), rank=rank, world=2)
            own = store if rank == 0 else join_store(LOOPBACK, store.port, patience)
            sums = connect(own, spec, LOOPBACK, patience)
            return engine(*shard(graph, weights, rank, 2), folder / str(rank), isa, sums)

        self._threads = ThreadPoolExecutor(2)
        self._engines = list(self._threads.map(load, range(2)))

    def step(self, tokens: list[int], first_position: int) -> FloatArray:
        first, second = self._threads.map(lambda rank: step(rank, tokens, first_position), self._engines)
        assert first.tobytes() == second.tobytes()
        return first

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture(scope="module", params=["stories260k", "gptneox_stories"])
def model(request: pytest.FixtureRequest) -> tuple[Path, Graph, WeightStore]:
    pytest.importorskip("torch", reason="ranks need torch, the extra `tp`")
    folder: Path = request.getfixturevalue(request.param)
    checkpoint = open_checkpoint(str(folder))
    return folder, build_graph(checkpoint.config), checkpoint.weights


@pytest.fixture(scope="module", params=dict.fromkeys((isas.available()[0], "portable")))
def engines(
    request: pytest.FixtureRequest, model: tuple[Path, Graph, WeightStore], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CpuEngine, TwoRanks]]:
    """The whole model and its two ranks, on the best instruction set and on the one without 16-bit arithmetic."""
    _, graph, weights = model
    folder = tmp_path_factory.mktemp("ranks")
    ranks = TwoRanks(graph, weights, folder, request.param)
    yield engine(graph, weights, folder / "whole", request.param), ranks
    ranks.close()


def test_two_ranks_have_the_logits_of_one(engines: tuple[CpuEngine, TwoRanks]) -> None:
    whole, ranks = engines
    for seed in range(3):
        tokens = [int(token) for token in np.random.default_rng(seed).integers(3, 512, 200)]
        expected, found = step(whole, tokens, 0), ranks.step(tokens, 0)
        scale, distance = float(np.abs(expected).max()), np.abs(found - expected)
        # Halves of a sum differ from the sum in the last bit of float32. Where activations are rounded to bf16, now and
        # then one of them then rounds to its neighbour, half a per cent away.
        assert distance.mean() < 1e-3 * scale
        assert distance.max() < (1e-3 if whole.isa == "portable" else 1e-2) * scale


def test_two_ranks_write_the_text_of_one(
    engines: tuple[CpuEngine, TwoRanks], model: tuple[Path, Graph, WeightStore]
) -> None:
    tokenizer = Tokenizer.from_file(str(model[0] / "tokenizer.json"))
    whole, ranks = engines
    for text in PROMPTS:
        prompt = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
        expected = greedy(lambda tokens, at: step(whole, tokens, at), prompt)
        assert greedy(ranks.step, prompt) == expected


def greedy(run: Callable[[list[int], int], FloatArray], prompt: list[int], count: int = 64) -> list[int]:
    answer = [int(run(prompt, 0)[-1].argmax())]
    while len(answer) < count:
        answer.append(int(run(answer[-1:], len(prompt) + len(answer) - 1)[-1].argmax()))
    return answer


# A cluster of processes


@pytest.fixture(scope="module")
def ranked_bundle(stories260k: Path, stories_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with a prefill engine of two ranks; what is quantised is quantised already."""
    pytest.importorskip("torch", reason="ranks need torch, the extra `tp`")
    folder = tmp_path_factory.mktemp("ranked")
    cluster = folder / "cluster.toml"
    cluster.write_text(RANKS_THAT_JUST_FIT)
    cache = stories_bundle.parent / "cache"
    bundle = build(stories260k, folder, "--cache-dir", str(cache), "--cluster", str(cluster))
    assert (bundle / "prefill-tp1of2").is_dir()
    return bundle


@pytest.fixture(scope="module")
def ranked_cluster(ranked_bundle: Path) -> Iterator[LocalCluster]:
    """An orchestrator, a prefill node of two ranks, and a decode node. Ranks that a test kills start again."""
    with serve(ranked_bundle, ready_timeout_s=120) as running:
        yield running


def ranks(cluster: LocalCluster) -> list[psutil.Process]:
    """Rank 0 and rank 1, when their node has joined, again if need be."""
    deadline_s = time.monotonic() + 60
    with cluster.client() as stub:
        while True:
            nodes = stub.GetCluster(api.GetClusterRequest(), timeout=10).nodes
            ready = {node.pid for node in nodes if node.state == "ready"}
            children = psutil.Process(cluster.process.pid).children(recursive=True)
            found = [child for number in range(2) for child in children if is_rank(child, number)]
            if len(found) == 2 and found[0].pid in ready:
                return found
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def is_rank(process: psutil.Process, number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"prefill-tp{number}of2" in process.cmdline()
    return False


def test_a_cluster_with_two_ranks_answers_like_one_with_one(
    cluster: LocalCluster, ranked_cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    with cluster.client() as stub:
        expected = [ask(stub, story(text)) for text in PROMPTS]
    with ranked_cluster.client() as stub, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: ask(stub, story(text)), PROMPTS))
        for one, other in zip(found, expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finished.prefill_path == api.PREFILL_PATH_REMOTE
            assert one.finished.kv.bytes == other.finished.kv.bytes
            assert one.finished.kv.chunks == 2 * other.finished.kv.chunks
        everything_is_free(stub)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_in_the_middle_of_a_prompt_changes_no_token(
    killed: int, ranked_cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    with ranked_cluster.client() as stub, ThreadPoolExecutor(1) as threads:
        expected = ask(stub, REQUEST).token_ids
        both = ranks(ranked_cluster)
        both[1].send_signal(signal.SIGSTOP)  # rank 0 comes to the first sum of the prompt, and waits
        answer = threads.submit(ask, stub, REQUEST)
        deadline_s = time.monotonic() + 30
        while not stub.GetCluster(api.GetClusterRequest(), timeout=10).prefilling:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        time.sleep(0.1)
        both[killed].kill()
        assert answer.result(timeout=120).token_ids == expected
        everything_is_free(stub)
    _, left = psutil.wait_procs(both, timeout=30)
    assert left == []


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_left_by_the_others(
    stopped: int, ranked_cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    """Rank 0 does not wait in its sum until that gives up, which takes longer than this test lets it."""
    with ranked_cluster.client() as stub, ThreadPoolExecutor(1) as threads:
        both = ranks(ranked_cluster)
        expected = ask(stub, REQUEST).token_ids
        said = ranked_cluster.log.stat().st_size
        both[stopped].send_signal(signal.SIGSTOP)
        answer = threads.submit(ask, stub, REQUEST)
        _, left = psutil.wait_procs([both[1 - stopped]], timeout=Patience().sum_s / 2)
        assert left == []
        lines = ranked_cluster.log.read_bytes()[said:].decode()
        assert f"edgellm-node: tensor-parallel rank {stopped} has said nothing for 0.6 s" in lines
        assert answer.result(timeout=120).token_ids == expected
        everything_is_free(stub)
    _, left = psutil.wait_procs(both, timeout=30)
    assert left == []


def test_a_rank_that_is_slow_is_not_left(
    ranked_cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    """It stands still for most of the time, and never for as long as one that is stopped."""
    with ranked_cluster.client() as stub, ThreadPoolExecutor(1) as threads:
        both = ranks(ranked_cluster)
        expected = ask(stub, REQUEST).token_ids
        answer = threads.submit(ask, stub, REQUEST)
        for _ in range(12):
            both[1].send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            both[1].send_signal(signal.SIGCONT)
            time.sleep(0.03)
        assert answer.result(timeout=120).token_ids == expected
        everything_is_free(stub)
    assert all(one.is_running() for one in both)
