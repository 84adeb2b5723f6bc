"""Engines really built by NVIDIA's compiler, and what is written down of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph, read_config, weight_shapes
from edgellm.builder.partition import cut_stages, shard
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.graph import Attention
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits
from edgellm.engines.tensorrt.compiler import compile_engine
from edgellm.engines.tensorrt.manifest import read_manifest

LIMITS = EngineLimits(max_rows=64, max_sequences=4, max_seq_len=128)


def compiled(api, graph, weights, folder, **changes):
    attention = next(op for op in graph.ops if isinstance(op, Attention))
    contract = KvContract(
        num_layers=graph.first_layer + graph.num_layers, kv_heads=attention.kv_heads, head_dim=attention.head_dim
    )
    options = {"phase": "prefill", "device_class": "sm86", "world": 1} | changes
    return compile_engine(graph, weights, contract=contract, limits=LIMITS, folder=folder, api=api, **options)


@pytest.mark.parametrize("name", ["stories260k", "gptneox_stories"])
def test_shared_models_build(kit, api, name, request, tmp_path):
    """A prefill engine of the whole model in half precision."""
    checkpoint = open_checkpoint(str(request.getfixturevalue(name)))
    manifest = compiled(api, build_graph(checkpoint.config), checkpoint.weights, tmp_path)
    (network,) = manifest.networks
    assert (tmp_path / network.file).stat().st_size == network.engine_bytes > 100_000
    assert manifest == read_manifest(tmp_path)
    assert network.layers["kv_cache_update"] == 2 * checkpoint.config.num_layers
    assert (manifest.version, manifest.compute_capability) == (api.version, "8.6")


@pytest.mark.parametrize("stage", [0, 1])
def test_int4_stages_build(kit, form, stage, tmp_path):
    model = kit.model("llama, tied", "int4")
    graph = cut_stages(model.graph, [1, 1])[stage]
    steps = []
    manifest = compiled(
        form,
        graph,
        model.weights,
        tmp_path,
        phase="decode",
        device_class="orin-nano-8gb",
        progress=lambda done, total: steps.append((done, total)),
    )
    assert manifest.is_first_stage == (stage == 0)
    assert manifest.is_last_stage == (stage == 1)
    assert manifest.networks[0].constant_bytes["int4"] == manifest.networks[0].int4_weights / 2
    assert steps[-1][0] == steps[-1][1] > 0


def test_ranks_build_as_one_network_or_as_segments(kit, api, tmp_path):
    model = kit.model("llama with biases", "half")
    graph, weights = shard(dataclasses.replace(model.graph), model.weights, 0, 2)
    contract = dataclasses.replace(model.contract, kv_heads=1)
    for collective, networks in ((True, 1), (False, 5)):
        folder = tmp_path / str(networks)
        folder.mkdir()
        manifest = compile_engine(
            graph,
            weights,
            contract=contract,
            limits=LIMITS,
            folder=folder,
            api=kit.offering(api, collective=collective),
            phase="prefill",
            device_class="sm86",
            world=2,
        )
        assert len(manifest.networks) == networks
        assert sum(network.sum_output is not None for network in manifest.networks) == networks - 1


SMOLLM2_LAYER = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def test_int4_linears_take_at_most_4_6_bits(kit, api):
    """SmolLM2-135M's shapes and the outliers that edgellm-build takes for this backend; input scales counted too."""
    graph = quantized_graph(build_graph(read_config(SMOLLM2_LAYER)), QuantizeOptions(act_bits=16, outliers=8))
    weights = {name: np.ones(shape, np.float32) for name, shape in weight_shapes(graph).items()}
    model = kit.quantized(graph, weights)
    (network,) = kit.emit(api, graph, model.weights, kit.decode)
    assert network.int4_weights == 3_538_944
    assert 4.0 < 8 * network.int4_bytes / network.int4_weights <= 4.6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_decodes_in_int4(kit, api, smollm2: Path, tmp_path):
    """All 30 layers; an engine that unpacked its int4 weights would be twice as large."""
    checkpoint = open_checkpoint(str(smollm2))
    graph = quantized_graph(build_graph(checkpoint.config), QuantizeOptions(act_bits=16, outliers=8))
    model = kit.quantized(graph, {name: checkpoint.weights[name] for name in weight_shapes(graph)})
    (network,) = compiled(api, graph, model.weights, tmp_path, phase="decode").networks
    assert 8 * network.int4_bytes / network.int4_weights <= 4.6
    assert network.engine_bytes < 150e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_builds(api, smollm2: Path, tmp_path):
    """The prefill engine of a real model, all 30 layers."""
    checkpoint = open_checkpoint(str(smollm2))
    manifest = compiled(api, build_graph(checkpoint.config), checkpoint.weights, tmp_path)
    assert 260e6 < manifest.networks[0].engine_bytes < 400e6
