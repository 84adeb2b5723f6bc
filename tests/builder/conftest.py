"""Small random models, one per kind of architecture, for tests that need graphs and weights but no checkpoint."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest

from edgellm.builder.models import build_graph, read_config, weight_shapes
from edgellm.engines.graph import Graph
from edgellm.engines.weights import WeightStore

RandomModel: TypeAlias = Callable[[str, int, int], tuple[Graph, WeightStore]]

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_LLAMA = _COMMON | {"model_type": "llama"}
_NEOX = _COMMON | {"model_type": "gpt_neox", "rotary_pct": 0.5}
CONFIGS = {
    "llama with biases": _LLAMA | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama, tied": _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2": _COMMON | {"model_type": "qwen2", "num_key_value_heads": 2},
    "gpt_neox": _NEOX,
    "gpt_neox, sequential": _NEOX | {"use_parallel_residual": False},
}


@pytest.fixture(params=list(CONFIGS), scope="session")
def model_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def random_model() -> RandomModel:
    """random_model(kind, num_layers, seed): a graph, and float32 weights that keep its activations near 1."""

    def make(kind: str, num_layers: int, seed: int) -> tuple[Graph, WeightStore]:
        graph = build_graph(read_config(CONFIGS[kind] | {"num_hidden_layers": num_layers}))
        random = np.random.default_rng(seed)
        shapes = sorted(weight_shapes(graph).items())
        return graph, {name: random.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes}

    return make
