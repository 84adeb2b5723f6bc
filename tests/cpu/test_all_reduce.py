"""A tensor-parallel rank on the CPU engine: the native executor stops where ranks are summed, and goes on."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.builder.partition import shard
from edgellm.engines.cpu.compiler import compile_engine
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.cpu.plan import AddOp, AllReduceOp, View
from edgellm.engines.cpu.replay import Run, native_runs
from edgellm.engines.graph import Half
from edgellm.engines.kv import HostKvPool
from edgellm.engines.reference import reference_spec

WORLD = 2
BLOCKS = 40


@pytest.fixture(scope="module", params=["llama", "qwen2", "neox"])
def model(request, kit):
    """A hidden size that leaves rows padded."""
    return kit.model(request.param, Half(), kit.sizes(hidden=72))


class Ranks:
    """Engines of all ranks; a step runs on each in a thread of its own."""

    def __init__(self, kit, model, folder, isa):
        self._barrier = threading.Barrier(WORLD, timeout=60)
        self._parts = [np.empty(0, np.float32)] * WORLD
        self._threads = ThreadPoolExecutor(WORLD)
        self._engines = [self._rank(kit, model, folder / str(rank), isa, rank) for rank in range(WORLD)]

    def logits(self, kit, batch):
        return list(self._threads.map(lambda engine: kit.logits(engine, batch), self._engines))

    def close(self):
        self._threads.shutdown()

    def _rank(self, kit, model, folder, isa, rank):
        folder.mkdir()
        graph, weights = shard(model.graph, model.weights, rank, WORLD)
        contract = replace(kit.contract_of(model), kv_heads=kit.contract_of(model).kv_heads // WORLD)
        compile_engine(graph, weights, contract=contract, limits=kit.limits, folder=folder)
        pool = HostKvPool(contract, range(graph.num_layers), BLOCKS)
        spec = reference_spec(graph, kit.limits)
        return CpuEngine(folder, spec, pool=pool, threads=1, isa=isa, sum_over_ranks=lambda x: self._sum(rank, x))

    def _sum(self, rank, x):
        self._parts[rank] = x.copy()
        self._barrier.wait()
        x[...] = self._parts[0] + self._parts[1]
        self._barrier.wait()


@pytest.fixture(scope="module")
def ranks(kit, model, isa, tmp_path_factory):
    ranks = Ranks(kit, model, tmp_path_factory.mktemp("ranks"), isa)
    yield ranks
    ranks.close()


def test_ranks_summed_are_the_whole(kit, loader, model, isa, ranks):
    tokens = np.random.default_rng(0).integers(0, 101, 70).astype(np.int32)
    batch = kit.batch_of([kit.chunk(tokens=tokens, first_position=0, blocks=[4, 0, 7])])
    whole = kit.logits(loader.cpu(model, isa=isa), batch)
    first, second = ranks.logits(kit, batch)
    assert first.tobytes() == second.tobytes()
    # Halves of a sum may round to another bf16 than the sum; a wrong split is off by far more.
    np.testing.assert_allclose(first, whole, rtol=0, atol=0.02 * float(np.abs(whole).max()))


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3), cut=st.integers(1, 49), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_its_company(kit, ranks, lengths, cut, seed):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 101, length).astype(np.int32) for length in lengths]
    together = [
        kit.chunk(tokens=tokens, first_position=0, blocks=[2 * i, 2 * i + 1]) for i, tokens in enumerate(sequences)
    ]
    in_company, _ = ranks.logits(kit, kit.batch_of(together))
    alone = []
    for tokens in sequences:
        for at, part in ((0, tokens[:cut]), (cut, tokens[cut:])):
            if len(part):
                chunk = kit.chunk(tokens=part, first_position=at, blocks=[30, 31])
                alone.append(ranks.logits(kit, kit.batch_of([chunk]))[0])
    assert np.concatenate(alone).tobytes() == in_company.tobytes()


def test_runs_of_a_plan():
    view = View(buffer=0, column=0, width=1)
    native, summed = AddOp(a=view, b=view, out=view), AllReduceOp(x=view)
    assert native_runs([native] * 3) == (Run(begin=0, end=3, summed=None),)
    assert native_runs([native, summed, native, native, summed]) == (
        Run(begin=0, end=1, summed=view),
        Run(begin=1, end=3, summed=view),
        Run(begin=3, end=3, summed=None),
    )
