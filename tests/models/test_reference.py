"""What each op means, against sums written out element by element; and what the engine refuses."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.engines import reference_ops
from edgellm.engines.base import Batch
from edgellm.engines.graph import Graph, Int4, Linear
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.kv_rows import PoolKvRows
from edgellm.engines.reference import ReferenceEngine, float32_oracle, reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import FloatArray, Int4Weight, WeightStore

RNG = np.random.default_rng(5)


def floats(*shape: int) -> FloatArray:
    return RNG.normal(size=shape).astype(np.float32)


def int4_weight(rows: int, columns: int, group_size: int, *, scaled: bool) -> Int4Weight:
    outliers = np.array([1, columns - 2], np.int32)
    q = RNG.integers(-8, 8, (rows, columns)).astype(np.int8)
    q[:, outliers] = 0
    return Int4Weight(
        q=q,
        scale=np.abs(floats(rows, columns // group_size)) + np.float32(0.1),
        group_size=group_size,
        input_scale=np.exp(floats(columns)) if scaled else None,
        outlier_columns=outliers,
        outlier_weight=floats(rows, len(outliers)),
    )


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_int4_linear_element_by_element(act_bits: int, scaled: bool) -> None:
    weight, x = int4_weight(5, 32, 16, scaled=scaled), floats(3, 32)
    expected = np.array([[int4_dot(weight, row, x[m], act_bits) for row in range(5)] for m in range(3)])
    out = reference_ops.linear(weight, reference_ops.grid_values(weight), x, act_bits)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def int4_dot(weight: Int4Weight, row: int, x: FloatArray, act_bits: int) -> float:
    """One output of one token, in Python's arithmetic."""
    outliers = weight.outlier_columns.tolist()
    inner = [k for k in range(len(x)) if k not in outliers]
    factors = np.ones(len(x)) if weight.input_scale is None else weight.input_scale
    scaled = {k: float(x[k]) * float(factors[k]) for k in inner}
    step = max(abs(value) for value in scaled.values()) / (2 ** (act_bits - 1) - 1)
    seen = scaled if act_bits == 16 else {k: round(scaled[k] / step) * step for k in inner}
    grid = sum(seen[k] * int(weight.q[row, k]) * float(weight.scale[row, k // weight.group_size]) for k in inner)
    return grid + sum(float(x[k]) * float(weight.outlier_weight[row, o]) for o, k in enumerate(outliers))


def test_rows_are_quantised_on_their_own_and_ties_go_to_even() -> None:
    x = np.array([[127, 0.5, 1.5, -2.5, 0.4], [0, 0, 0, 0, 0], [-12.7, 1.26, 0, 0, 0]], np.float32)
    expected = [[127, 0, 2, -2, 0], [0, 0, 0, 0, 0], [-12.7, 1.3, 0, 0, 0]]
    np.testing.assert_allclose(reference_ops.quantize_rows(x, 8), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_kv_bytes_lie_as_the_contract_says(dtype: Literal["fp16", "int8"]) -> None:
    contract = KvContract(num_layers=3, kv_heads=2, head_dim=8, dtype=dtype)
    pool = HostKvPool(contract, range(1, 3), 4)
    k, v = floats(2, 2, 8), floats(2, 2, 8)
    k[1, 1] = 0
    PoolKvRows(pool).write(2, np.array([3, 1], np.int32), np.array([31, 4], np.int32), k, v)
    for row, (block, token) in enumerate([(3, 31), (1, 4)]):
        for part, x in enumerate([k, v]):
            for head in range(2):
                stored, scale = stored_head(contract, pool.data[1, block], part, token, head)
                np.testing.assert_allclose(stored * scale, x[row, head], atol=float(scale) * 0.51 + 2e-3)
    assert not pool.data[0].any()
    read_k, read_v = PoolKvRows(pool).read(2, np.array([3], np.int32), 32)
    np.testing.assert_allclose([read_k[31], read_v[31]], [k[0], v[0]], atol=2e-2)
    assert read_k.shape == (32, 2, 8)


def stored_head(contract: KvContract, block: Any, part: int, token: int, head: int) -> tuple[FloatArray, np.float32]:
    """One head of one token straight from a block's bytes: values and scale."""
    slot = (part * contract.block_tokens + token) * contract.kv_heads + head
    if contract.dtype == "fp16":
        values = block[2 * slot * 8 : 2 * (slot + 1) * 8].view(np.float16)
        return values.astype(np.float32), np.float32(1)
    first_scale = 2 * contract.values_per_block
    scale = block[first_scale + 2 * slot : first_scale + 2 * slot + 2].view(np.float16)[0]
    return block[slot * 8 : (slot + 1) * 8].view(np.int8).astype(np.float32), np.float32(scale)


@pytest.fixture(scope="module")
def stories(shared_models: Path) -> tuple[Graph, WeightStore]:
    checkpoint = open_checkpoint(str(shared_models / "stories260K"))
    return build_graph(checkpoint.config), checkpoint.weights


def pooled_engine(stories: tuple[Graph, WeightStore], dtype: Literal["fp16", "int8"] = "fp16") -> ReferenceEngine:
    graph, weights = stories
    pool = HostKvPool(KvContract(num_layers=5, kv_heads=4, head_dim=8, dtype=dtype), range(5), 8)
    limits = EngineLimits(max_rows=64, max_sequences=3, max_seq_len=100)
    return ReferenceEngine(graph, weights, spec=reference_spec(graph, limits), pool=pool)


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2e-3), ("int8", 0.1)])
def test_rounded_kv_stays_near_the_oracle(
    dtype: Literal["fp16", "int8"],
    error: float,
    stories: tuple[Graph, WeightStore],
    run_sequence: Callable[..., Any],
) -> None:
    tokens = np.random.default_rng(1).integers(3, 512, 60).astype(np.int32)
    exact = run_sequence(float32_oracle(*stories, kv_blocks=2), tokens, [60])
    rounded = run_sequence(pooled_engine(stories, dtype), tokens, [20, 40])
    assert 0 < np.abs(rounded - exact).mean() < error


def ragged_batch() -> Batch:
    """Two sequences, of 3 and 2 rows."""
    return Batch(
        tokens=np.array([5, 6, 7, 8, 9], np.int32),
        hidden=None,
        row_starts=np.array([0, 3, 5], np.int32),
        first_positions=np.array([0, 0], np.int32),
        block_tables=np.array([[2, -1], [6, 7]], np.int32),
        logit_rows=np.array([4, 0], np.int32),
    )


def test_sequences_of_a_batch_do_not_see_each_other(
    stories: tuple[Graph, WeightStore], run_sequence: Callable[..., Any]
) -> None:
    together = pooled_engine(stories).forward(ragged_batch()).logits
    assert together is not None
    first = run_sequence(pooled_engine(stories), np.array([5, 6, 7], np.int32), [3])
    second = run_sequence(pooled_engine(stories), np.array([8, 9], np.int32), [2])
    np.testing.assert_allclose(together, [second[1], first[0]], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": np.array([5, 6, 512, 8, 9], np.int32)}, "token id 512"),
        ({"tokens": np.array([5, 6, -1, 8, 9], np.int32)}, "token id -1"),
        ({"tokens": np.array([5, 6], np.int32)}, "row_starts name 5 rows"),
        ({"tokens": None}, "exactly one"),
        ({"row_starts": np.array([0, 3, 3], np.int32)}, "row_starts"),
        ({"row_starts": np.array([1, 3, 5], np.int32)}, "row_starts"),
        ({"row_starts": np.array([0, 5], np.int32)}, "one entry per sequence"),
        ({"first_positions": np.array([0, 99], np.int32)}, "101 tokens"),
        ({"first_positions": np.array([0, -1], np.int32)}, "negative"),
        ({"first_positions": np.array([30, 0], np.int32)}, "block -1"),
        ({"block_tables": np.array([[2, -1], [8, 7]], np.int32)}, "block 8"),
        ({"first_positions": np.array([0, 70], np.int32)}, "only 2 blocks"),
        ({"logit_rows": np.array([5], np.int32)}, "logit_rows"),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], named: str, stories: tuple[Graph, WeightStore]) -> None:
    engine = pooled_engine(stories)
    with pytest.raises(ValueError, match=named):
        engine.forward(dataclasses.replace(ragged_batch(), **change))
    assert not engine.kv.data.any()  # type: ignore[attr-defined]


def test_limits_of_rows_and_sequences(stories: tuple[Graph, WeightStore]) -> None:
    engine = pooled_engine(stories)
    long = Batch(
        tokens=np.full(65, 5, np.int32),
        hidden=None,
        row_starts=np.array([0, 65], np.int32),
        first_positions=np.zeros(1, np.int32),
        block_tables=np.array([[0, 1, 2]], np.int32),
        logit_rows=np.zeros(0, np.int32),
    )
    with pytest.raises(ValueError, match="65 rows"):
        engine.forward(long)
    many = dataclasses.replace(
        long,
        tokens=np.full(4, 5, np.int32),
        row_starts=np.arange(5, dtype=np.int32),
        first_positions=np.zeros(4, np.int32),
        block_tables=np.arange(4, dtype=np.int32)[:, None],
    )
    with pytest.raises(ValueError, match="4 sequences"):
        engine.forward(many)


def test_a_weight_of_another_form_than_its_op_asks_for(stories: tuple[Graph, WeightStore]) -> None:
    graph, weights = stories
    ops = tuple(
        dataclasses.replace(op, precision=Int4(group_size=32)) if isinstance(op, Linear) else op for op in graph.ops
    )
    with pytest.raises(ValueError, match=r"q_proj\.weight is a ndarray.*Int4"):
        float32_oracle(dataclasses.replace(graph, ops=ops), weights, kv_blocks=1)
