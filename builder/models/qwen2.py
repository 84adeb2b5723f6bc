"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from edgellm.builder.models import llama
from edgellm.builder.models.config import ModelConfig, RawConfig, flag
from edgellm.builder.models.errors import UnsupportedModelError

build_graph = llama.build_graph


def read_config(raw: RawConfig) -> ModelConfig:
    """A Qwen2's config.json. The published ones carry sliding-window fields that are switched off."""
    layer_types = raw.get("layer_types") or []
    if "sliding_attention" in layer_types or (not layer_types and _slides(raw)):
        raise UnsupportedModelError(
            f"sliding-window attention is not supported (sliding_window {raw['sliding_window']})"
        )
    return llama.read_llama_like(raw, "qwen2", qkv_bias=True, output_bias=False, default_eps=1e-6)


def _slides(raw: RawConfig) -> bool:
    """Layers from `max_window_layers` up slide, where the window is on at all."""
    if not flag(raw, "use_sliding_window", False) or raw.get("sliding_window") is None:
        return False
    return bool(raw.get("max_window_layers", 28) < raw["num_hidden_layers"])
