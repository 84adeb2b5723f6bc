"""Architectures by name: how each reads its config, writes its graph, and finds its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgellm.builder.models import gpt_neox, llama, mistral, qwen2
from edgellm.builder.models.config import ModelConfig, RawConfig
from edgellm.builder.models.errors import UnsupportedModelError
from edgellm.calib.recipe import LinearSource
from edgellm.engines.graph import Embed, Graph, Linear, Norm, WeightName

__all__ = ["ARCHITECTURES", "ModelConfig", "UnsupportedModelError", "build_graph", "read_config", "source_of"]


def _one_to_one(_config: ModelConfig, weight: WeightName) -> LinearSource:
    return LinearSource(module=weight.rsplit(".", 1)[0])


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one architecture's file provides."""

    read_config: Callable[[RawConfig], ModelConfig]
    build_graph: Callable[[ModelConfig], Graph]
    source_of: Callable[[ModelConfig, WeightName], LinearSource] = _one_to_one
    former_modules: Mapping[str, str] = field(default_factory=dict)
    """Module names of today, and what checkpoint files call them."""


ARCHITECTURES = {
    "gpt_neox": Architecture(
        read_config=gpt_neox.read_config,
        build_graph=gpt_neox.build_graph,
        source_of=gpt_neox.source_of,
        former_modules=gpt_neox.FORMER_MODULES,
    ),
    "llama": Architecture(read_config=llama.read_config, build_graph=llama.build_graph),
    "mistral": Architecture(read_config=mistral.read_config, build_graph=mistral.build_graph),
    "qwen2": Architecture(read_config=qwen2.read_config, build_graph=qwen2.build_graph),
}
"""By `model_type` of config.json."""


def read_config(raw: RawConfig) -> ModelConfig:
    """A parsed config.json in our terms. Raises UnsupportedModelError, by name, for what we do not compute."""
    name = raw.get("model_type")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method")
        raise UnsupportedModelError(
            f"weights already quantised by {method!r} are not supported; use the original model"
        )
    return ARCHITECTURES[name].read_config(raw)


def build_graph(config: ModelConfig) -> Graph:
    """The whole model, all linears in half precision."""
    return ARCHITECTURES[config.architecture].build_graph(config)


def source_of(config: ModelConfig, weight: WeightName) -> LinearSource:
    """Which Hugging Face module, and which of its output rows, a weight or bias of ours is."""
    return ARCHITECTURES[config.architecture].source_of(config, weight)


def weight_shapes(graph: Graph) -> dict[WeightName, tuple[int, ...]]:
    """The shape of every weight that the graph names."""
    shapes: dict[WeightName, tuple[int, ...]] = {}
    for op in graph.ops:
        match op:
            case Embed():
                shapes[op.weight] = (op.vocab_size, op.hidden_size)
            case Norm():
                shapes |= {name: (op.size,) for name in (op.weight, op.bias) if name is not None}
            case Linear():
                shapes[op.weight] = (op.out_features, op.in_features)
                shapes |= {} if op.bias is None else {op.bias: (op.out_features,)}
            case _:
                pass
    return shapes
