"""Engines on a GPU: they execute, their logits are the interpreter's within rounding, and text is the CPU engine's."""

from contextlib import closing

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.base import Batch
from edgellm.engines.cpu.compiler import compile_engine as compile_cpu
from edgellm.engines.cpu.engine import CpuEngine
from edgellm.engines.graph import Attention, Embed, Int4, Int8, Linear
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.reference import ReferenceEngine, reference_spec
from edgellm.engines.spec import EngineLimits
from edgellm.engines.tensorrt.compiler import compile_engine
from edgellm.engines.tensorrt.load import load_engine
from edgellm.engines.weights import Int4Weight, Int8Weight

pytestmark = pytest.mark.gpu

LIMITS = EngineLimits(max_rows=64, max_sequences=4, max_seq_len=128)
NUM_BLOCKS = 16
PROMPTS = ("Once upon a time", "The little dog was", "Lily wanted to")
NEAR_TIE = 0.05
"""Logits closer than this may change places: half precision and 8-bit activations round differently."""


@pytest.fixture(scope="module", params=["stories260k", "gptneox_stories"])
def checkpoint(request):
    return open_checkpoint(str(request.getfixturevalue(request.param)))


def contract_of(graph):
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    return KvContract(num_layers=graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim)


def pool_of(graph):
    return HostKvPool(contract_of(graph), range(graph.num_layers), NUM_BLOCKS)


def on_gpu(graph, weights, phase, target, folder, pool):
    compile_engine(
        graph,
        weights,
        phase=phase,
        device_class=target,
        contract=contract_of(graph),
        limits=LIMITS,
        world=1,
        folder=folder,
    )
    return load_engine(folder, reference_spec(graph, LIMITS), pool, None)


def rounded(graph, weights):
    """Nearest int4 and int8, without calibration."""
    found = dict(weights)
    for op in graph.ops:
        if isinstance(op, Linear | Embed) and isinstance(op.precision, Int8):
            scale = np.maximum(np.abs(weights[op.weight]).max(axis=1) / 127, 1e-8).astype(np.float32)
            q = np.rint(weights[op.weight] / scale[:, None]).astype(np.int8)
            found[op.weight] = Int8Weight(q=q, scale=scale)
        elif isinstance(op, Linear) and isinstance(op.precision, Int4):
            found[op.weight] = int4(weights[op.weight], op.precision.group_size)
    return found


def int4(dense, group_size):
    groups = dense.reshape(len(dense), -1, group_size)
    scale = np.maximum(np.abs(groups).max(axis=2) / 7, 1e-8).astype(np.float16).astype(np.float32)
    return Int4Weight(
        q=np.rint(groups / scale[..., None]).astype(np.int8).reshape(dense.shape),
        scale=scale,
        group_size=group_size,
        input_scale=None,
        outlier_columns=np.zeros(0, np.int32),
        outlier_weight=np.zeros((len(dense), 0), np.float32),
    )


def batch(tokens, first_position, blocks):
    return Batch(
        tokens=np.asarray(tokens, np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.array([blocks], np.int32),
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )


@pytest.mark.parametrize("precision", ["half", "int4"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_logits_are_the_interpreters(checkpoint, target, precision, phase, tmp_path):
    graph, weights = build_graph(checkpoint.config), checkpoint.weights
    if precision == "int4":
        graph = quantized_graph(graph, QuantizeOptions(group_size=32, act_bits=16, outliers=0))
        weights = rounded(graph, weights)
    reference = ReferenceEngine(graph, weights, spec=reference_spec(graph, LIMITS), pool=pool_of(graph))
    tokens = np.random.default_rng(3).integers(0, graph.vocab_size, 60)
    steps = [batch(tokens[:40], 0, [2, 5]), batch(tokens[40:41], 40, [2, 5]), batch(tokens[41:60], 41, [2, 5])]
    with closing(on_gpu(graph, weights, phase, target, tmp_path, pool_of(graph))) as engine:
        for step in steps:
            found, expected = engine.forward(step).logits, reference.forward(step).logits
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_hybrid_text_is_the_cpu_engines(checkpoint, target, prompt, tmp_path):
    """Half-precision prefill hands its KV to int4 decode, greedily, with activations in half on both backends."""
    half = build_graph(checkpoint.config)
    graph = quantized_graph(half, QuantizeOptions(group_size=32, act_bits=16, outliers=0))
    weights = rounded(graph, checkpoint.weights)
    gpu_pool, cpu_pool = pool_of(half), pool_of(half)
    folders = [tmp_path / name for name in ("gpu-half", "gpu-int4", "cpu-half", "cpu-int4")]
    for folder in folders:
        folder.mkdir()
    gpu = [
        on_gpu(half, checkpoint.weights, "prefill", target, folders[0], gpu_pool),
        on_gpu(graph, weights, "decode", target, folders[1], gpu_pool),
    ]
    cpu = [
        on_cpu(half, checkpoint.weights, folders[2], cpu_pool),
        on_cpu(graph, weights, folders[3], cpu_pool),
    ]
    assert_same_text(gpu, cpu, encode(checkpoint, prompt))


def encode(checkpoint, text):
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    return tokenizer.encode(text, add_special_tokens=False).ids


def on_cpu(graph, weights, folder, pool):
    compile_cpu(graph, weights, contract=contract_of(graph), limits=LIMITS, folder=folder)
    return CpuEngine(folder, reference_spec(graph, LIMITS), pool=pool)


def assert_same_text(gpu, cpu, prompt, count=32):
    """Token by token on both; where the choice differs, the two candidates are near to a tie, and the text ends."""
    history = list(prompt)
    blocks = [0, 1, 2]
    logits = [engines[0].forward(batch(history, 0, blocks)).logits[-1].copy() for engines in (gpu, cpu)]
    for _ in range(count):
        mine, theirs = (int(values.argmax()) for values in logits)
        if mine != theirs:
            assert logits[1][theirs] - logits[1][mine] < NEAR_TIE * np.abs(logits[1]).max()
            return
        step = batch([mine], len(history), blocks)
        history.append(mine)
        logits = [engines[1].forward(step).logits[0].copy() for engines in (gpu, cpu)]
