"""GPT-NeoX (Pythia): LayerNorm, partial rotary, plain MLP, parallel or sequential residual, fused q, k and v."""

import numpy as np

from edgellm.builder.models.config import ModelConfig, RawConfig, activation, flag, head_counts, integer, number
from edgellm.builder.models.rope import read_rope
from edgellm.builder.models.writer import GraphWriter
from edgellm.calib.recipe import LinearSource
from edgellm.engines.graph import Graph, TensorName, WeightName

_FUSED = "query_key_value"
_PARTS = ("q", "k", "v")
FORMER_MODULES = {"lm_head": "embed_out"}
"""transformers renamed the head in version 5, in memory only."""


def read_config(raw: RawConfig) -> ModelConfig:
    """A GPT-NeoX's config.json, old (`rotary_pct`, `rotary_emb_base`) or new (`rope_parameters`)."""
    num_heads, _, head_dim = head_counts(raw)
    bias = flag(raw, "attention_bias", True)
    return ModelConfig(
        architecture="gpt_neox",
        hidden_size=integer(raw, "hidden_size"),
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        kv_heads=num_heads,
        head_dim=head_dim,
        vocab_size=integer(raw, "vocab_size"),
        max_seq_len=integer(raw, "max_position_embeddings", 2048),
        norm_eps=number(raw, "layer_norm_eps", 1e-5),
        activation=activation(raw, "gelu"),
        rope=read_rope(raw, head_dim=head_dim, partial=0.25),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tied_embeddings=flag(raw, "tie_word_embeddings", False),
        parallel_residual=flag(raw, "use_parallel_residual", True),
    )


def build_graph(config: ModelConfig) -> Graph:
    """The whole model in half precision."""
    writer = GraphWriter(config)
    x = writer.embed("gpt_neox.embed_in")
    for layer in range(config.num_layers):
        x = _layer(writer, config, layer, x)
    x = writer.layer_norm("final_norm", "gpt_neox.final_layer_norm", writer.select_rows(x))
    return writer.graph(writer.head("gpt_neox.embed_in" if config.tied_embeddings else "lm_head", x))


def _layer(writer: GraphWriter, config: ModelConfig, layer: int, x: TensorName) -> TensorName:
    name = f"layers.{layer}"
    attended = _attention(writer, config, layer, x)
    if config.parallel_residual:
        both = writer.add(f"{name}.both", _mlp(writer, config, layer, x), attended)
        return writer.add(f"{name}.out", both, x)
    x = writer.add(f"{name}.attn_residual", attended, x)
    return writer.add(f"{name}.out", _mlp(writer, config, layer, x), x)


def _attention(writer: GraphWriter, config: ModelConfig, layer: int, x: TensorName) -> TensorName:
    name, module = f"layers.{layer}", f"gpt_neox.layers.{layer}"
    sizes = (config.hidden_size, config.hidden_size)
    normed = writer.layer_norm(f"{name}.attn_norm", f"{module}.input_layernorm", x)

    def project(part: str) -> TensorName:
        fused = f"{module}.attention.{_FUSED}.{part}"
        return writer.linear(f"{name}.{part}", fused, normed, sizes=sizes, bias=config.qkv_bias)

    attended = writer.attention(f"{name}.attention", layer, project("q"), project("k"), project("v"))
    out_module = f"{module}.attention.dense"
    return writer.linear(f"{name}.attn_out", out_module, attended, sizes=sizes, bias=config.output_bias)


def _mlp(writer: GraphWriter, config: ModelConfig, layer: int, x: TensorName) -> TensorName:
    name, module = f"layers.{layer}", f"gpt_neox.layers.{layer}"
    normed = writer.layer_norm(f"{name}.mlp_norm", f"{module}.post_attention_layernorm", x)
    wider, narrower = (config.hidden_size, config.intermediate_size), (config.intermediate_size, config.hidden_size)
    up = writer.linear(f"{name}.up", f"{module}.mlp.dense_h_to_4h", normed, sizes=wider, bias=True)
    activated = writer.activation(f"{name}.activated", up, up=None)
    return writer.linear(f"{name}.down", f"{module}.mlp.dense_4h_to_h", activated, sizes=narrower, bias=True)


def source_of(config: ModelConfig, weight: WeightName) -> LinearSource:
    """The fused module's rows are q, k and v of head 0, then of head 1, and so on; all others map one to one."""
    module, _ = weight.rsplit(".", 1)
    fused, _, part = module.rpartition(".")
    if not fused.endswith(_FUSED):
        return LinearSource(module=module)
    rows = np.arange(3 * config.hidden_size).reshape(config.num_heads, 3, config.head_dim)
    return LinearSource(module=fused, rows=rows[:, _PARTS.index(part)].ravel())
