"""Mistral 7B and its like: Llama, as long as the attention window does not slide."""

from edgellm.builder.models import llama
from edgellm.builder.models.config import ModelConfig, RawConfig
from edgellm.builder.models.errors import UnsupportedModelError

build_graph = llama.build_graph


def read_config(raw: RawConfig) -> ModelConfig:
    """A Mistral's config.json; `sliding_window` null is what the versions since 0.2 have."""
    window = raw.get("sliding_window")
    if window is not None:
        raise UnsupportedModelError(f"sliding-window attention is not supported (sliding_window {window})")
    grouped = {"num_key_value_heads": 8} | dict(raw)
    return llama.read_llama_like(grouped, "mistral", qkv_bias=False, output_bias=False, default_eps=1e-6)
