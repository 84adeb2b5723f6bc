"""Shapes, and the forms that ours are compiled to."""

import dataclasses

import numpy as np
import pytest

from bench.peers.models import MODELS, Model
from bench.rounding import RoundedWeights
from edgellm.builder.models import build_graph, read_config
from edgellm.calib.recipe import QuantizeOptions, quantized_graph
from edgellm.engines.graph import Graph, WeightName, linears
from edgellm.engines.kv import KvContract
from edgellm.engines.weights import Int4Weight, Int8Weight


def graph_of(model: Model) -> Graph:
    return build_graph(
        read_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": model.hidden_size,
                "intermediate_size": model.intermediate_size,
                "num_hidden_layers": model.num_layers,
                "num_attention_heads": model.num_heads,
                "num_key_value_heads": model.kv_heads,
                "vocab_size": model.vocab_size,
                "tie_word_embeddings": model.tied_embeddings,
                "hidden_act": "silu",
            }
        )
    )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_models_sizes_are_those_of_its_graph(model: Model) -> None:
    graph = graph_of(model)
    layers = [op for op in linears(graph) if op.out != graph.output]
    assert model.linear_parameters == sum(op.in_features * op.out_features for op in layers)
    contract = KvContract(
        num_layers=model.num_layers, kv_heads=model.kv_heads, head_dim=model.hidden_size // model.num_heads
    )
    assert model.kv_bytes_per_token == contract.bytes_per_token


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_group_divides_every_linears_input(model: Model) -> None:
    assert all(op.in_features % model.group_size == 0 for op in linears(graph_of(model)))


def test_weights_are_rounded_to_what_their_op_asks_for() -> None:
    model = dataclasses.replace(
        MODELS["134m"], hidden_size=128, intermediate_size=256, num_layers=1, num_heads=2, kv_heads=1
    )
    graph = quantized_graph(graph_of(model), QuantizeOptions(outliers=4))
    chance = np.random.default_rng(0)
    shapes = {op.weight: (op.out_features, op.in_features) for op in linears(graph)}
    plain = {name: chance.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    norm = WeightName("some.norm")
    weights = RoundedWeights(graph, {**plain, norm: np.ones(3, np.float32)})
    assert weights[norm] is not None
    assert len(weights) == len(plain) + 1
    assert set(weights) == {*plain, norm}
    for op in linears(graph):
        rounded = weights[op.weight]
        assert isinstance(rounded, Int8Weight if op.out == graph.output else Int4Weight)
        assert isinstance(rounded, Int8Weight | Int4Weight)
        step = rounded.scale.max() / 2 + 1e-6
        assert np.abs(rounded.dequantize() - plain[op.weight]).max() <= step
