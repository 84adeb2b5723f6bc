"""Small random models of every architecture, and engines over their networks that run in NumPy."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.builder.models import build_graph, read_config, weight_shapes
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.base import Batch, Engine, SumOverRanks
from edgellm.engines.graph import Attention, Embed, Graph, Int4, Int8, Linear, WeightName
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine, reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.tensorrt.api import Api, find_api
from edgellm.engines.tensorrt.engine import TensorRtEngine
from edgellm.engines.tensorrt.evaluate import NetworkEvaluator
from edgellm.engines.tensorrt.evaluated import EvaluatedNetworks
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.manifest import EngineManifest, describe
from edgellm.engines.tensorrt.network import EmittedNetwork, emit, segments_of
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight, WeightStore

Precision: TypeAlias = Literal["half", "int4"]
LIMITS = EngineLimits(max_rows=128, max_sequences=4, max_seq_len=192)
NUM_BLOCKS = 24
PREFILL = Bounds(max_batch=4, max_chunk=32, max_seq_len=192, max_selected=16)
DECODE = dataclasses.replace(PREFILL, max_chunk=1)

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
_LLAMA = _COMMON | {"model_type": "llama", "num_key_value_heads": 2}
_NEOX = _COMMON | {"model_type": "gpt_neox", "rotary_pct": 0.5}
CONFIGS = {
    "llama with biases": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama, tied": _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2": _COMMON | {"model_type": "qwen2", "num_key_value_heads": 1},
    "mistral": _COMMON | {"model_type": "mistral", "num_key_value_heads": 2},
    "gpt_neox": _NEOX,
    "gpt_neox, sequential": _NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"},
}


@pytest.fixture(scope="session")
def api() -> Api:
    """NVIDIA's module."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("tensorrt_rtx_bindings is not installed (pip install 'edgellm[tensorrt]')")
    return find_api(["tensorrt_rtx"])


@pytest.fixture(params=["fused", "fused, masked", "primitive"])
def form(request: pytest.FixtureRequest, api: Api) -> Api:
    """The module as it is, as if its attention took no lengths, and as if it had none of the attention layers."""
    return offering(api, attention=request.param != "primitive", lengths=request.param == "fused")


def offering(api: Api, **features: bool) -> Api:
    """The module as if it offered other layers."""
    return dataclasses.replace(api, features=dataclasses.replace(api.features, **features))


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A graph, and weights that half precision holds exactly, so that only arithmetic can differ."""

    graph: Graph
    weights: dict[WeightName, Weight]

    @property
    def contract(self) -> KvContract:
        attention = next(op for op in self.graph.ops if isinstance(op, Attention))
        return KvContract(num_layers=self.graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim)

    def reference(self, *, float32_kv: bool = True) -> ReferenceEngine:
        """float32 throughout, KV too unless asked otherwise."""
        pool = HostKvPool(self.contract, range(self.graph.num_layers), NUM_BLOCKS)
        spec = reference_spec(self.graph, LIMITS)
        return ReferenceEngine(self.graph, self.weights, spec=spec, pool=pool, float32_kv=float32_kv)


def make_model(kind: str, precision: Precision, seed: int = 0, *, act_bits: Literal[4, 8, 16] = 16) -> Model:
    """`kind` is one of CONFIGS."""
    graph = build_graph(read_config(CONFIGS[kind]))
    if precision == "int4":
        graph = quantized_graph(graph, QuantizeOptions(group_size=32, act_bits=act_bits, outliers=4))
    random = np.random.default_rng(seed)
    shapes = sorted(weight_shapes(graph).items())
    return quantize(graph, {name: _half(random.normal(0, 0.2, shape)) for name, shape in shapes})


def quantize(graph: Graph, dense: Mapping[WeightName, FloatArray]) -> Model:
    """Weights rounded to nearest, in the forms that the graph's ops ask for."""
    weights: dict[WeightName, Weight] = dict(dense)
    for op in graph.ops:
        if isinstance(op, Linear | Embed) and isinstance(op.precision, Int8):
            weights[op.weight] = _int8(dense[op.weight])
        elif isinstance(op, Linear) and isinstance(op.precision, Int4):
            weights[op.weight] = _int4(dense[op.weight], op.precision)
    return Model(graph=graph, weights=weights)


def _half(values: npt.NDArray[np.floating]) -> FloatArray:
    return values.astype(np.float16).astype(np.float32)


def _int8(dense: FloatArray) -> Int8Weight:
    scale = _half(np.abs(dense).max(axis=1) / 127)
    return Int8Weight(q=np.clip(np.rint(dense / scale[:, None]), -127, 127).astype(np.int8), scale=scale)


def _int4(dense: FloatArray, precision: Int4) -> Int4Weight:
    """Input scale and outlier columns depend on K alone, as of linears that share their input."""
    n, k = dense.shape
    shared = np.random.default_rng(k)
    columns = np.sort(shared.choice(k, precision.outliers, replace=False)).astype(np.int32)
    rest = dense.copy()
    rest[:, columns] = 0
    groups = rest.reshape(n, -1, precision.group_size)
    scale = _half(np.abs(groups).max(axis=2) / 7)
    return Int4Weight(
        q=np.clip(np.rint(groups / scale[..., None]), -8, 7).astype(np.int8).reshape(n, k),
        scale=scale,
        group_size=precision.group_size,
        input_scale=_half(shared.uniform(0.5, 2, k)),
        outlier_columns=columns,
        outlier_weight=dense[:, columns],
    )


def emit_whole(api: Api, graph: Graph, weights: WeightStore, bounds: Bounds) -> list[EmittedNetwork]:
    """Every network of a graph."""
    return [emit(segment, weights, bounds=bounds, api=api) for segment in segments_of(graph, api)]


def evaluated(
    api: Api,
    model: Model,
    bounds: Bounds,
    *,
    graph: Graph | None = None,
    rounds: bool = False,
    networks: Sequence[EmittedNetwork] = (),
    all_reduce: Callable[[FloatArray], FloatArray] | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> TensorRtEngine:
    """An engine over `networks`, or over those of `graph`, which is the model's whole unless given."""
    graph = graph or model.graph
    networks = networks or emit_whole(api, graph, model.weights, bounds)
    manifest = EngineManifest(
        version=api.version,
        compute_capability="8.6",
        form="fused" if api.features.attention else "primitive",
        bounds=bounds,
        networks=tuple(describe(network, "", 0) for network in networks),
    )
    layers, contract = range(graph.first_layer, graph.first_layer + graph.num_layers), model.contract
    heads = next(op.kv_heads for op in graph.ops if isinstance(op, Attention))
    contract = dataclasses.replace(contract, kv_heads=heads)
    evaluators = [NetworkEvaluator(network.layers, rounds=rounds, all_reduce=all_reduce) for network in networks]
    executor = EvaluatedNetworks(manifest, evaluators, num_slots=bounds.max_batch, sum_over_ranks=sum_over_ranks)
    pool = HostKvPool(contract, layers, NUM_BLOCKS)
    return TensorRtEngine(reference_spec(graph, LIMITS), manifest, pool=pool, executor=executor)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one sequence in one step."""

    tokens: npt.NDArray[np.int32]
    first_position: int
    blocks: Sequence[int]


def batch_of(chunks: Sequence[Chunk], hidden: FloatArray | None = None) -> Batch:
    """All rows of all chunks, logits wanted of all."""
    counts = [len(chunk.tokens) for chunk in chunks]
    tables = np.full((len(chunks), max(len(chunk.blocks) for chunk in chunks)), -1, np.int32)
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


def conversation() -> list[Batch]:
    """Two prompts that start together, go on in chunks of other sizes, and then a token at a time, across blocks."""
    tokens = np.random.default_rng(7).integers(0, _COMMON["vocab_size"], 200).astype(np.int32)
    long, short = [3, 9], [4, 7]
    steps = [((0, 36, long), (0, 11, short)), ((36, 5, long), (11, 18, short))]
    steps += [((41 + step, 1, long), (29 + step, 1, short)) for step in range(6)]
    return [
        batch_of(
            [
                Chunk(tokens=tokens[position + 100 * index :][:count], first_position=position, blocks=blocks)
                for index, (position, count, blocks) in enumerate(step)
            ]
        )
        for step in steps
    ]


def logits(engine: Engine, batches: Sequence[Batch]) -> FloatArray:
    """Of all rows of all steps."""
    results = [engine.forward(batch).logits for batch in batches]
    return np.concatenate([result.copy() for result in results if result is not None])


def error(found: FloatArray, expected: FloatArray) -> float:
    """Largest difference, relative to the largest expected value; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(found - expected).max() / np.abs(expected).max(), nan=np.inf))


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What the tests of this folder build with."""

    kinds: tuple[str, ...] = tuple(CONFIGS)
    prefill: Bounds = PREFILL
    decode: Bounds = DECODE
    limits: EngineLimits = LIMITS
    model: Callable[..., Model] = make_model
    quantized: Callable[..., Model] = quantize
    emit: Callable[..., list[EmittedNetwork]] = emit_whole
    evaluated: Callable[..., TensorRtEngine] = evaluated
    offering: Callable[..., Api] = offering
    conversation: Callable[[], list[Batch]] = conversation
    chunk: type[Chunk] = Chunk
    batch_of: Callable[..., Batch] = batch_of
    logits: Callable[[Engine, Sequence[Batch]], FloatArray] = logits
    error: Callable[[FloatArray, FloatArray], float] = error


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture(params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    """Every architecture."""
    return str(request.param)
