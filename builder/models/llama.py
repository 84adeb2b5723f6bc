"""Llama, and what the models derived from it share: pre-norm, RMSNorm, rotary GQA, gated MLP."""

from edgellm.builder.models.config import ModelConfig, RawConfig, activation, flag, head_counts, integer, number
from edgellm.builder.models.errors import UnsupportedModelError
from edgellm.builder.models.rope import read_rope
from edgellm.builder.models.writer import GraphWriter
from edgellm.engines.graph import Graph, TensorName


def read_config(raw: RawConfig) -> ModelConfig:
    """A Llama's config.json, old or new."""
    bias = flag(raw, "attention_bias", False)
    return read_llama_like(raw, "llama", qkv_bias=bias, output_bias=bias, default_eps=1e-6)


def read_llama_like(
    raw: RawConfig, architecture: str, *, qkv_bias: bool, output_bias: bool, default_eps: float
) -> ModelConfig:
    """A config whose fields have Llama's names and meanings."""
    num_heads, kv_heads, head_dim = head_counts(raw)
    rope = read_rope(raw, head_dim=head_dim)
    if rope.rotary_dim != head_dim:
        raise UnsupportedModelError(
            f"{architecture} with partial_rotary_factor {rope.rotary_dim / head_dim} is not known"
        )
    return ModelConfig(
        architecture=architecture,
        hidden_size=integer(raw, "hidden_size"),
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=integer(raw, "vocab_size"),
        max_seq_len=integer(raw, "max_position_embeddings", 2048),
        norm_eps=number(raw, "rms_norm_eps", default_eps),
        activation=activation(raw, "silu"),
        rope=rope,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=flag(raw, "mlp_bias", False),
        tied_embeddings=flag(raw, "tie_word_embeddings", False),
        parallel_residual=False,
    )


def build_graph(config: ModelConfig) -> Graph:
    """The whole model in half precision."""
    writer = GraphWriter(config)
    x = writer.embed("model.embed_tokens")
    for layer in range(config.num_layers):
        x = _attention_block(writer, config, layer, x)
        x = _mlp_block(writer, config, layer, x)
    x = writer.rms_norm("final_norm", "model.norm", writer.select_rows(x))
    return writer.graph(writer.head("model.embed_tokens" if config.tied_embeddings else "lm_head", x))


def _attention_block(writer: GraphWriter, config: ModelConfig, layer: int, x: TensorName) -> TensorName:
    name, module = f"layers.{layer}", f"model.layers.{layer}.self_attn"
    heads_size, kv_size = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    normed = writer.rms_norm(f"{name}.attn_norm", f"model.layers.{layer}.input_layernorm", x)

    def project(part: str, size: int) -> TensorName:
        sizes = (config.hidden_size, size)
        return writer.linear(f"{name}.{part}", f"{module}.{part}_proj", normed, sizes=sizes, bias=config.qkv_bias)

    q, k, v = project("q", heads_size), project("k", kv_size), project("v", kv_size)
    attended = writer.attention(f"{name}.attention", layer, q, k, v)
    sizes = (heads_size, config.hidden_size)
    out = writer.linear(f"{name}.attn_out", f"{module}.o_proj", attended, sizes=sizes, bias=config.output_bias)
    return writer.add(f"{name}.attn_residual", x, out)


def _mlp_block(writer: GraphWriter, config: ModelConfig, layer: int, x: TensorName) -> TensorName:
    name, module = f"layers.{layer}", f"model.layers.{layer}.mlp"
    normed = writer.rms_norm(f"{name}.mlp_norm", f"model.layers.{layer}.post_attention_layernorm", x)

    def project(part: str) -> TensorName:
        sizes = (config.hidden_size, config.intermediate_size)
        return writer.linear(f"{name}.{part}", f"{module}.{part}_proj", normed, sizes=sizes, bias=config.mlp_bias)

    gate, up = project("gate"), project("up")
    gated = writer.activation(f"{name}.gated", gate, up=up)
    sizes = (config.intermediate_size, config.hidden_size)
    down = writer.linear(f"{name}.down", f"{module}.down_proj", gated, sizes=sizes, bias=config.mlp_bias)
    return writer.add(f"{name}.out", x, down)
