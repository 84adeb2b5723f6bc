"""Tensors of a GGUF file under their Hugging Face names, dequantised, with llama.cpp's row order undone."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.builder.checkpoint.gguf_format import GgufContainer
from edgellm.engines.weights import FloatArray

_MODEL_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GgufTensors:
    """TensorFile over a GGUF container."""

    def __init__(self, container: GgufContainer, raw_config: Mapping[str, Any]) -> None:
        self._container = container
        self._rotary_heads = _permuted_heads(raw_config)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape, or None if there is no such tensor."""
        tensor = self._container.tensors.get(_gguf_name(name))
        return None if tensor is None else tensor.shape

    def read(self, name: str) -> FloatArray:
        """The tensor as float32."""
        gguf_name = _gguf_name(name)
        values = self._container.read(gguf_name)
        heads = self._rotary_heads.get(gguf_name.split(".")[-2])
        return values if heads is None else _to_half_split(values, heads)


def _permuted_heads(raw_config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of the tensors whose rows llama.cpp interleaves for its rope: q and k of Llama only."""
    if raw_config["model_type"] != "llama":
        return {}
    num_heads = raw_config.get("num_attention_heads", 1)
    return {"attn_q": num_heads, "attn_k": raw_config.get("num_key_value_heads", num_heads)}


def _to_half_split(values: FloatArray, heads: int) -> FloatArray:
    """Rows of each head from pairs (0, 1), (2, 3), ... to pairs (i, i + head_dim / 2). [heads * head_dim, ...]"""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`; unknown names stay as they are."""
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, module, kind = match.groups()
        return f"blk.{layer}.{_LAYER_MODULES.get(module, module)}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_MODEL_MODULES.get(module, module)}.{kind}"
