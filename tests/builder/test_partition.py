"""Stages composed are the whole bit for bit; ranks summed are the whole within rounding."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.builder.partition import PartitionError, cut_stages, layer_ops, shard
from edgellm.engines.base import Batch, SumOverRanks
from edgellm.engines.graph import AllReduce, Attention, Graph, Int4, Linear, check, linears
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine, reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import FloatArray, WeightStore

KINDS = ("llama with biases", "llama, tied", "qwen2", "gpt_neox", "gpt_neox, sequential")
LIMITS = EngineLimits(max_rows=64, max_sequences=4, max_seq_len=64)


def engine(graph: Graph, weights: WeightStore, **options: Any) -> ReferenceEngine:
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    layers = range(graph.first_layer, graph.first_layer + graph.num_layers)
    contract = KvContract(num_layers=layers.stop, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    pool = HostKvPool(contract, layers, 4)
    return ReferenceEngine(graph, weights, spec=reference_spec(graph, LIMITS), pool=pool, **options)


def prompt(tokens: Sequence[int]) -> Batch:
    """One sequence from position 0 in blocks 0 and 1, logits of all rows."""
    return Batch(
        tokens=np.array(tokens, np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.zeros(1, np.int32),
        block_tables=np.array([[0, 1]], np.int32),
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )


def logits_of_stages(stages: Sequence[ReferenceEngine], batch: Batch) -> FloatArray:
    for stage in stages[:-1]:
        batch = replace(batch, tokens=None, hidden=stage.forward(batch).hidden)
    logits = stages[-1].forward(batch).logits
    assert logits is not None
    return logits


layer_counts = st.lists(st.integers(1, 3), min_size=1, max_size=4)
token_lists = st.lists(st.integers(0, 47), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), counts=layer_counts, tokens=token_lists, seed=st.integers(0, 9))
def test_stages_composed_are_the_whole(
    random_model: Callable[..., tuple[Graph, WeightStore]], kind: str, counts: list[int], tokens: list[int], seed: int
) -> None:
    graph, weights = random_model(kind, sum(counts), seed)
    stages = cut_stages(graph, counts)
    for stage in stages:
        check(stage)
    assert [stage.first_layer for stage in stages] == [sum(counts[:index]) for index in range(len(counts))]
    assert sum(len(stage.ops) for stage in stages) == len(graph.ops)
    whole = engine(graph, weights).forward(prompt(tokens)).logits
    composed = logits_of_stages([engine(stage, weights) for stage in stages], prompt(tokens))
    assert whole is not None
    assert composed.tobytes() == whole.tobytes()


def sum_in_rank_order(world: int) -> list[SumOverRanks]:
    """One per rank, for engines that run in threads of their own."""
    barrier = threading.Barrier(world, timeout=30)
    parts: list[FloatArray | None] = [None] * world

    def reduce_for(rank: int) -> SumOverRanks:
        def reduce(x: FloatArray) -> None:
            parts[rank] = x.copy()
            barrier.wait()
            x[...] = np.sum([part for part in parts if part is not None], axis=0, dtype=np.float32)
            barrier.wait()

        return reduce

    return [reduce_for(rank) for rank in range(world)]


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), tokens=token_lists, seed=st.integers(0, 9))
def test_ranks_summed_are_the_whole(
    random_model: Callable[..., tuple[Graph, WeightStore]], kind: str, tokens: list[int], seed: int
) -> None:
    graph, weights = random_model(kind, 2, seed)
    whole = engine(graph, weights).forward(prompt(tokens)).logits
    assert whole is not None
    shards = [shard(graph, weights, rank, 2) for rank in range(2)]
    ranks = [
        engine(part, part_weights, sum_over_ranks=sum_over_ranks)
        for (part, part_weights), sum_over_ranks in zip(shards, sum_in_rank_order(2), strict=True)
    ]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(lambda rank: rank.forward(prompt(tokens)).logits, ranks))
    for logits in outputs:
        assert logits is not None
        # Halves of a sum round differently, and each norm after them magnifies it; a wrong split is off by far more.
        np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-3 * float(np.abs(whole).max()))


def test_a_rank_holds_its_share_and_no_more(
    random_model: Callable[..., tuple[Graph, WeightStore]], model_kind: str
) -> None:
    graph, weights = random_model(model_kind, 2, 0)
    parts = [shard(graph, weights, rank, 2) for rank in range(2)]
    for part, part_weights in parts:
        check(part)
        assert sum(isinstance(op, AllReduce) for op in part.ops) == 4
        for linear in linears(part):
            assert part_weights[linear.weight].shape == (linear.out_features, linear.in_features)
    inner = [linear.weight for linear in linears(graph) if linear.out != graph.output]
    for name in inner:
        assert sum(part_weights[name].size for _, part_weights in parts) == weights[name].size


def test_a_bias_after_a_sum_is_added_once(random_model: Callable[..., tuple[Graph, WeightStore]]) -> None:
    graph, weights = random_model("llama with biases", 1, 0)
    biased = [[op.bias for op in linears(shard(graph, weights, rank, 2)[0])] for rank in range(2)]
    assert sum(bias is not None for bias in biased[0]) == 7
    assert sum(bias is not None for bias in biased[1]) == 5


def test_layers_partition_the_ops(random_model: Callable[..., tuple[Graph, WeightStore]], model_kind: str) -> None:
    graph, _ = random_model(model_kind, 3, 0)
    layers = layer_ops(graph)
    assert [op for layer in layers for op in layer] == list(graph.ops)
    assert [sum(isinstance(op, Attention) for op in layer) for layer in layers] == [1, 1, 1]


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [3, 0], [4, -1]])
def test_stages_must_make_up_the_model(
    random_model: Callable[..., tuple[Graph, WeightStore]], counts: list[int]
) -> None:
    graph, _ = random_model("qwen2", 3, 0)
    with pytest.raises(PartitionError, match="3"):
        cut_stages(graph, counts)


def test_heads_that_cannot_be_shared_are_refused(random_model: Callable[..., tuple[Graph, WeightStore]]) -> None:
    graph, weights = random_model("qwen2", 1, 0)
    with pytest.raises(PartitionError, match=r"2 KV heads|output rows of .* cannot be shared by 4 ranks|cannot be"):
        shard(graph, weights, 0, 4)


def test_columns_that_split_a_group_are_refused(random_model: Callable[..., tuple[Graph, WeightStore]]) -> None:
    graph, weights = random_model("qwen2", 1, 0)
    ops = tuple(replace(op, precision=Int4(group_size=32)) if isinstance(op, Linear) else op for op in graph.ops)
    with pytest.raises(PartitionError, match="group size 32"):
        shard(replace(graph, ops=ops), weights, 0, 2)
