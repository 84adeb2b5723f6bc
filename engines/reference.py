"""The oracle of all backends: every op of the graph in plain NumPy float32, whole rows at once, never optimised."""

from typing import assert_never

import numpy as np
import numpy.typing as npt

from edgellm.engines import reference_ops
from edgellm.engines.base import Batch, Output, SumOverRanks
from edgellm.engines.batch import check_batch, row_positions
from edgellm.engines.graph import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Graph,
    Half,
    Int4,
    Int8,
    Linear,
    Norm,
    Op,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
    op_weights,
)
from edgellm.engines.kv import HostKvPool, KvContract, KvPool
from edgellm.engines.kv_rows import Float32KvRows, KvRows, PoolKvRows
from edgellm.engines.spec import EngineLimits, EngineSpec
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight, WeightStore


def _refuse_to_sum(_x: FloatArray) -> None:
    raise ValueError("the graph sums over tensor-parallel ranks: give ReferenceEngine a sum_over_ranks")


class ReferenceEngine:
    """Engine that interprets a graph. Weights and activations stay float32 wherever an op's precision says `half`.

    Equal up to rounding, not bit for bit, when a batch is cut differently: NumPy's matmul promises no order of sums.
    """

    def __init__(
        self,
        graph: Graph,
        weights: WeightStore,
        *,
        spec: EngineSpec,
        pool: KvPool,
        float32_kv: bool = False,
        sum_over_ranks: SumOverRanks = _refuse_to_sum,
    ) -> None:
        """`float32_kv` keeps KV unrounded outside of the pool. A graph cut over tensor-parallel ranks needs
        `sum_over_ranks`. Raises ValueError for a weight whose form is not what its op's precision says."""
        self.spec = spec
        self.kv = pool
        self._graph = graph
        self._kv_rows: KvRows = Float32KvRows(pool) if float32_kv else PoolKvRows(pool)
        self._sum_over_ranks = sum_over_ranks
        self._weights = {name: weights[name] for op in graph.ops for name in op_weights(op)}
        self._dense = {name: reference_ops.grid_values(weight) for name, weight in self._weights.items()}
        for op in graph.ops:
            _check_weight_form(op, self._weights)

    def forward(self, batch: Batch) -> Output:
        """Run one step; see `Engine.forward`."""
        check_batch(batch, self.spec, self.kv)
        first = batch.tokens if self._graph.is_first_stage else batch.hidden
        if first is None:
            raise ValueError(f"this engine's input is {self._graph.input!r}, which the batch does not have")
        tensors: dict[TensorName, FloatArray] = {self._graph.input: np.asarray(first)}
        for op in self._graph.ops:
            tensors[op.out] = self._run(op, tensors, batch)
        result = tensors[self._graph.output]
        return Output(logits=result, hidden=None) if self._graph.is_last_stage else Output(logits=None, hidden=result)

    def close(self) -> None:
        """Drop the weights."""
        self._weights.clear()
        self._dense.clear()

    def _run(self, op: Op, tensors: dict[TensorName, FloatArray], batch: Batch) -> FloatArray:
        match op:
            case Embed():
                embedded: FloatArray = self._dense[op.weight][tensors[op.tokens]]
                return embedded
            case Norm():
                return reference_ops.norm(op, tensors[op.x], self._dense)
            case Linear():
                return self._linear(op, tensors[op.x])
            case Rope():
                return reference_ops.rope(op, tensors[op.x], row_positions(batch))
            case Attention():
                return self._attention(op, tensors, batch)
            case Activation():
                activated = reference_ops.activation(op, tensors[op.x])
                return activated if op.up is None else activated * tensors[op.up]
            case Add():
                return tensors[op.a] + tensors[op.b]
            case SelectRows():
                return tensors[op.x][batch.logit_rows]
            case AllReduce():
                total = tensors[op.x].copy()
                self._sum_over_ranks(total)
                return total
            case _:
                assert_never(op)

    def _linear(self, op: Linear, x: FloatArray) -> FloatArray:
        weight, dense = self._weights[op.weight], self._dense[op.weight]
        out = reference_ops.linear(weight, dense, x, _act_bits(op))
        return out if op.bias is None else out + self._dense[op.bias]

    def _attention(self, op: Attention, tensors: dict[TensorName, FloatArray], batch: Batch) -> FloatArray:
        rows, block_tokens = len(tensors[op.q]), self.kv.contract.block_tokens
        positions = row_positions(batch)
        sequences = np.repeat(np.arange(len(batch.first_positions)), np.diff(batch.row_starts))
        blocks = batch.block_tables[sequences, positions // block_tokens]
        k, v = (tensors[name].reshape(rows, op.kv_heads, op.head_dim) for name in (op.k, op.v))
        self._kv_rows.write(op.layer, blocks, positions % block_tokens, k, v)
        q = tensors[op.q].reshape(rows, op.num_heads, op.head_dim)
        starts = batch.row_starts
        parts = [
            self._attend(op, q[begin:end], positions[begin:end], table)
            for begin, end, table in zip(starts, starts[1:], batch.block_tables, strict=False)
        ]
        return np.concatenate(parts)

    def _attend(
        self, op: Attention, q: FloatArray, positions: npt.NDArray[np.int32], table: npt.NDArray[np.int32]
    ) -> FloatArray:
        """One sequence: q [rows, num_heads, head_dim] -> [rows, num_heads * head_dim]."""
        length = int(positions[-1]) + 1
        k, v = self._kv_rows.read(op.layer, table[: self.kv.contract.blocks_for(length)], length)
        k, v = (np.repeat(part, op.num_heads // op.kv_heads, axis=1).swapaxes(0, 1) for part in (k, v))
        scores = q.swapaxes(0, 1) @ k.swapaxes(1, 2) * np.float32(op.scale)
        future = np.arange(length) > positions[:, None]
        weights = reference_ops.softmax(np.where(future, np.float32(-np.inf), scores))
        attended: FloatArray = (weights @ v).swapaxes(0, 1).reshape(len(q), -1)
        return attended


def float32_oracle(graph: Graph, weights: WeightStore, *, kv_blocks: int) -> ReferenceEngine:
    """A reference engine with unrounded KV and a pool of its own, bounded only by its `kv_blocks` blocks."""
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    last_layer = graph.first_layer + graph.num_layers
    contract = KvContract(num_layers=last_layer, kv_heads=attention.kv_heads, head_dim=attention.head_dim)
    pool = HostKvPool(contract, range(graph.first_layer, last_layer), kv_blocks)
    tokens = kv_blocks * contract.block_tokens
    limits = EngineLimits(max_rows=tokens, max_sequences=kv_blocks, max_seq_len=tokens)
    return ReferenceEngine(graph, weights, spec=reference_spec(graph, limits), pool=pool, float32_kv=True)


def reference_spec(graph: Graph, limits: EngineLimits) -> EngineSpec:
    """The spec of an engine that was never compiled."""
    return EngineSpec(
        name="reference",
        phase="prefill",
        backend="reference",
        backend_version="1",
        device_class="any",
        first_layer=graph.first_layer,
        num_layers=graph.num_layers,
        rank=0,
        world=1,
        precision="float32",
        hidden_size=graph.hidden_size,
        vocab_size=graph.vocab_size,
        limits=limits,
        files=(),
    )


def _check_weight_form(op: Op, weights: dict[WeightName, Weight]) -> None:
    if not isinstance(op, Linear | Embed):
        return
    weight = weights[op.weight]
    match op.precision:
        case Half():
            fits = isinstance(weight, np.ndarray)
        case Int8():
            fits = isinstance(weight, Int8Weight)
        case Int4(group_size=group_size):
            fits = isinstance(weight, Int4Weight) and weight.group_size == group_size
    if not fits:
        raise ValueError(f"{op.weight} is a {type(weight).__name__}, its op asks for {op.precision}")


def _act_bits(op: Linear) -> int:
    return 16 if isinstance(op.precision, Half) else op.precision.act_bits
