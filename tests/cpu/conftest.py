"""Small random models written directly in ops, and the engines over them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.engines.base import Batch, Engine
from edgellm.engines.cpu import isa as isas
from edgellm.engines.cpu.compiler import compile_engine
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.graph import (
    HIDDEN,
    TOKENS,
    Activation,
    Add,
    Attention,
    Embed,
    Graph,
    Half,
    Int4,
    Int8,
    Linear,
    Norm,
    Op,
    Precision,
    Rope,
    SelectRows,
    TensorName,
    WeightName,
    op_weights,
)
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine, reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight

Architecture: TypeAlias = Literal["llama", "qwen2", "neox"]
LIMITS = EngineLimits(max_rows=160, max_sequences=6, max_seq_len=192)
NUM_BLOCKS = 40


def _bf16_exact(values: npt.NDArray[np.float64]) -> FloatArray:
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    exact: FloatArray = bits.view(np.float32)
    return exact


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a small model; odd on purpose."""

    hidden: int = 64
    intermediate: int = 172
    num_heads: int = 8
    kv_heads: int = 4
    head_dim: int = 8
    rotary_dim: int = 8
    layers: int = 2
    vocab: int = 101


class RandomModel:
    """A graph and weights that every form of the CPU backend stores exactly, so that only its arithmetic can differ."""

    def __init__(self, architecture: Architecture, precision: Precision, sizes: Sizes, seed: int = 0) -> None:
        self.sizes = sizes
        self.weights: dict[WeightName, Weight] = {}
        self._rng = np.random.default_rng(seed)
        self._precision = precision
        self._table_precision: Half | Int8 = Half() if isinstance(precision, Half) else Int8()
        self._architecture = architecture
        self._ops: list[Op] = []
        self._layer_ends: list[int] = []
        self.graph = self._build()

    def stages(self, cut: int) -> tuple[Graph, Graph]:
        """The graph cut after `cut` layers."""
        whole, end = self.graph, self._layer_ends[cut - 1]
        boundary = whole.ops[end - 1].out
        first = replace(whole, ops=whole.ops[:end], output=boundary, num_layers=cut)
        rename = {boundary: HIDDEN}
        later = tuple(_renamed(op, rename) for op in whole.ops[end:])
        rest = whole.num_layers - cut
        return first, replace(whole, ops=later, input=HIDDEN, num_layers=rest, first_layer=cut)

    def weights_of(self, graph: Graph) -> dict[WeightName, Weight]:
        return {name: self.weights[name] for op in graph.ops for name in op_weights(op)}

    def _build(self) -> Graph:
        sizes = self.sizes
        self.weights[WeightName("embed")] = self._matrix(sizes.vocab, sizes.hidden, self._table_precision)
        x = self._emit(
            Embed(
                out=TensorName("x"),
                tokens=TOKENS,
                weight=WeightName("embed"),
                vocab_size=sizes.vocab,
                hidden_size=sizes.hidden,
                precision=self._table_precision,
            )
        )
        for layer in range(sizes.layers):
            x = self._parallel_layer(layer, x) if self._architecture == "neox" else self._layer(layer, x)
            self._layer_ends.append(len(self._ops))
        x = self._emit(SelectRows(out=TensorName("selected"), x=x, size=sizes.hidden))
        x = self._norm("final", x)
        head = WeightName("embed") if self._architecture != "neox" else None
        self._linear("logits", x, sizes.hidden, sizes.vocab, weight=head, precision=self._table_precision)
        return Graph(
            ops=tuple(self._ops),
            input=TOKENS,
            output=TensorName("logits"),
            hidden_size=sizes.hidden,
            vocab_size=sizes.vocab,
            num_layers=sizes.layers,
        )

    def _layer(self, layer: int, x: TensorName) -> TensorName:
        sizes, name = self.sizes, f"layer{layer}"
        attended = self._attention(layer, self._norm(f"{name}.norm1", x))
        width = sizes.num_heads * sizes.head_dim
        out = self._linear(f"{name}.o", attended, width, sizes.hidden)
        x = self._emit(Add(out=TensorName(f"{name}.mid"), a=x, b=out, size=sizes.hidden))
        normed = self._norm(f"{name}.norm2", x)
        gate = self._linear(f"{name}.gate", normed, sizes.hidden, sizes.intermediate)
        up = self._linear(f"{name}.up", normed, sizes.hidden, sizes.intermediate)
        gated = self._emit(
            Activation(out=TensorName(f"{name}.act"), x=gate, up=up, kind="silu", size=sizes.intermediate)
        )
        down = self._linear(f"{name}.down", gated, sizes.intermediate, sizes.hidden)
        return self._emit(Add(out=TensorName(f"{name}.out"), a=x, b=down, size=sizes.hidden))

    def _parallel_layer(self, layer: int, x: TensorName) -> TensorName:
        sizes, name = self.sizes, f"layer{layer}"
        attended = self._attention(layer, self._norm(f"{name}.norm1", x))
        width = sizes.num_heads * sizes.head_dim
        out = self._linear(f"{name}.o", attended, width, sizes.hidden)
        inner = self._linear(f"{name}.in", self._norm(f"{name}.norm2", x), sizes.hidden, sizes.intermediate)
        act = self._emit(
            Activation(out=TensorName(f"{name}.act"), x=inner, up=None, kind="gelu", size=sizes.intermediate)
        )
        down = self._linear(f"{name}.down", act, sizes.intermediate, sizes.hidden)
        both = self._emit(Add(out=TensorName(f"{name}.both"), a=out, b=down, size=sizes.hidden))
        return self._emit(Add(out=TensorName(f"{name}.out"), a=both, b=x, size=sizes.hidden))

    def _attention(self, layer: int, x: TensorName) -> TensorName:
        sizes, name = self.sizes, f"layer{layer}"
        q = self._linear(f"{name}.q", x, sizes.hidden, sizes.num_heads * sizes.head_dim)
        k = self._linear(f"{name}.k", x, sizes.hidden, sizes.kv_heads * sizes.head_dim)
        v = self._linear(f"{name}.v", x, sizes.hidden, sizes.kv_heads * sizes.head_dim)
        return self._emit(
            Attention(
                out=TensorName(f"{name}.attention"),
                q=self._rope(q, sizes.num_heads),
                k=self._rope(k, sizes.kv_heads),
                v=v,
                layer=layer,
                num_heads=sizes.num_heads,
                kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                scale=sizes.head_dim**-0.5,
            )
        )

    def _rope(self, x: TensorName, heads: int) -> TensorName:
        sizes = self.sizes
        inv_freq = tuple(10000.0 ** (-i / sizes.rotary_dim) for i in range(0, sizes.rotary_dim, 2))
        out = TensorName(f"{x}.rotated")
        return self._emit(Rope(out=out, x=x, num_heads=heads, head_dim=sizes.head_dim, inv_freq=inv_freq))

    def _norm(self, name: str, x: TensorName) -> TensorName:
        size, is_layer = self.sizes.hidden, self._architecture == "neox"
        weight, bias = WeightName(f"{name}.weight"), WeightName(f"{name}.bias")
        self.weights[weight] = self._rng.uniform(0.5, 1.5, size).astype(np.float32)
        if is_layer:
            self.weights[bias] = self._rng.standard_normal(size).astype(np.float32)
        return self._emit(
            Norm(
                out=TensorName(name),
                x=x,
                kind="layer" if is_layer else "rms",
                weight=weight,
                bias=bias if is_layer else None,
                size=size,
                eps=1e-5,
            )
        )

    def _linear(
        self,
        name: str,
        x: TensorName,
        in_features: int,
        out_features: int,
        *,
        weight: WeightName | None = None,
        precision: Precision | None = None,
    ) -> TensorName:
        precision = precision or self._precision
        if weight is None:
            weight = WeightName(f"{name}.weight")
            self.weights[weight] = self._matrix(out_features, in_features, precision)
        bias = WeightName(f"{name}.bias") if self._has_bias(name) else None
        if bias is not None:
            self.weights[bias] = self._rng.standard_normal(out_features).astype(np.float32)
        return self._emit(
            Linear(
                out=TensorName(name),
                x=x,
                weight=weight,
                bias=bias,
                in_features=in_features,
                out_features=out_features,
                precision=precision,
            )
        )

    def _has_bias(self, name: str) -> bool:
        if name == "logits":
            return False
        return self._architecture == "neox" or (self._architecture == "qwen2" and name.endswith((".q", ".k", ".v")))

    def _matrix(self, n: int, k: int, precision: Precision) -> Weight:
        dense = self._rng.standard_normal((n, k)) / np.sqrt(k)
        match precision:
            case Half():
                return _bf16_exact(dense)
            case Int8():
                scale = (np.abs(dense).max(axis=1) / 127).astype(np.float32)
                return Int8Weight(q=np.rint(dense / scale[:, None]).astype(np.int8), scale=scale)
            case Int4(group_size=group_size, outliers=outliers):
                return _int4_weight(dense, group_size, outliers)

    def _emit(self, op: Op) -> TensorName:
        self._ops.append(op)
        return op.out


def _int4_weight(dense: npt.NDArray[np.float64], group_size: int, outliers: int) -> Int4Weight:
    """Input scale and outlier columns depend on K alone, so that linears of one input share them."""
    n, k = dense.shape
    shared = np.random.default_rng(k)
    columns = np.sort(shared.choice(k, outliers, replace=False)).astype(np.int32)
    outlier_weight = _bf16_exact(dense[:, columns])
    rest = dense.copy()
    rest[:, columns] = 0
    groups = rest.reshape(n, k // group_size, group_size)
    scale = (np.abs(groups).max(axis=2) / 7).astype(np.float16).astype(np.float32)
    return Int4Weight(
        q=np.clip(np.rint(groups / scale[..., None]), -8, 7).astype(np.int8).reshape(n, k),
        scale=scale,
        group_size=group_size,
        input_scale=shared.uniform(0.5, 2, k).astype(np.float32),
        outlier_columns=columns,
        outlier_weight=outlier_weight,
    )


def _renamed(op: Op, names: dict[TensorName, TensorName]) -> Op:
    fields = {name: names[value] for name, value in vars(op).items() if isinstance(value, str) and value in names}
    return replace(op, **fields)


def contract_of(model: RandomModel, dtype: Literal["fp16", "int8"] = "fp16") -> KvContract:
    sizes = model.sizes
    return KvContract(num_layers=sizes.layers, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, dtype=dtype)


class Loader:
    """Compiles graphs into folders of their own, and loads engines from them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count()
        self._folders: dict[tuple[int, int, str], Path] = {}
        self._models: list[RandomModel] = []

    def compile(self, model: RandomModel, graph: Graph, dtype: Literal["fp16", "int8"] = "fp16") -> Path:
        key = (id(model), id(graph), dtype)
        if key not in self._folders:
            self._models.append(model)  # keeps the id from being used again
            folder = self._root / str(next(self._numbers))
            folder.mkdir()
            compile_engine(
                graph, model.weights_of(graph), contract=contract_of(model, dtype), limits=LIMITS, folder=folder
            )
            self._folders[key] = folder
        return self._folders[key]

    def cpu(
        self,
        model: RandomModel,
        graph: Graph | None = None,
        *,
        isa: str,
        dtype: Literal["fp16", "int8"] = "fp16",
        threads: int = 1,
        pool: HostKvPool | None = None,
    ) -> CpuEngine:
        graph = graph or model.graph
        folder = self.compile(model, graph, dtype)
        pool = pool or self.pool(model, graph, dtype)
        return CpuEngine(folder, reference_spec(graph, LIMITS), pool=pool, threads=threads, isa=isa)

    def reference(self, model: RandomModel, *, dtype: Literal["fp16", "int8"] = "fp16") -> ReferenceEngine:
        pool = self.pool(model, model.graph, dtype)
        return ReferenceEngine(model.graph, model.weights, spec=reference_spec(model.graph, LIMITS), pool=pool)

    def pool(self, model: RandomModel, graph: Graph, dtype: Literal["fp16", "int8"] = "fp16") -> HostKvPool:
        layers = range(graph.first_layer, graph.first_layer + graph.num_layers)
        return HostKvPool(contract_of(model, dtype), layers, NUM_BLOCKS)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one sequence in one step."""

    tokens: npt.NDArray[np.int32]
    first_position: int
    blocks: Sequence[int]


def batch_of(chunks: Sequence[Chunk], hidden: FloatArray | None = None) -> Batch:
    """All rows of all chunks, logits wanted of all."""
    counts = [len(chunk.tokens) for chunk in chunks]
    width = max(len(chunk.blocks) for chunk in chunks)
    tables = np.full((len(chunks), width), -1, np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
    tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int32)
    return Batch(
        tokens=tokens if hidden is None else None,
        hidden=hidden,
        row_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        first_positions=np.array([chunk.first_position for chunk in chunks], np.int32),
        block_tables=tables,
        logit_rows=np.arange(sum(counts), dtype=np.int32),
    )


def logits(engine: Engine, batch: Batch) -> FloatArray:
    """A copy of the step's logits."""
    result = engine.forward(batch).logits
    assert result is not None
    return result.copy()


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What the tests of this folder build with."""

    model: type[RandomModel] = RandomModel
    sizes: type[Sizes] = Sizes
    chunk: type[Chunk] = Chunk
    batch_of: Callable[..., Batch] = batch_of
    logits: Callable[[Engine, Batch], FloatArray] = logits
    contract_of: Callable[..., KvContract] = contract_of
    limits: EngineLimits = LIMITS


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(scope="session")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    return Loader(tmp_path_factory.mktemp("cpu-engines"))


@pytest.fixture(scope="session", params=isas.available())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this machine in turn."""
    return request.param
