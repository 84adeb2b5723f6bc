"""Random small models of each architecture: our graph, interpreted, computes what transformers computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from edgellm.builder.checkpoint import open_checkpoint
from edgellm.builder.models import build_graph
from edgellm.engines.graph import WeightName
from edgellm.engines.reference import float32_oracle

TOLERANCE = 1e-4
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def llama(**options: Any) -> PreTrainedConfig:
    return LlamaConfig(**SMALL | options)


def qwen2(**options: Any) -> PreTrainedConfig:
    return Qwen2Config(**SMALL | {"num_key_value_heads": 2} | options)


def neox(**options: Any) -> PreTrainedConfig:
    return GPTNeoXConfig(**SMALL | {"num_attention_heads": 3} | options)


CONFIGS = {
    "llama": llama(),
    "llama, grouped queries": llama(num_key_value_heads=2),
    "llama, one kv head, tied": llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama, all biases": llama(attention_bias=True, mlp_bias=True),
    "llama, heads wider than hidden": llama(head_dim=16, num_key_value_heads=3),
    "llama, gelu": llama(hidden_act="gelu_pytorch_tanh"),
    "llama, linear rope": llama(rope_parameters=LINEAR),
    "llama, llama3 rope": llama(rope_parameters=LLAMA3),
    "llama, yarn rope": llama(rope_parameters=YARN),
    "mistral": MistralConfig(**SMALL | {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": qwen2(),
    "qwen2, tied": qwen2(tie_word_embeddings=True),
    "qwen2, yarn rope": qwen2(rope_parameters=YARN),
    "gpt_neox": neox(),
    "gpt_neox, sequential residual": neox(use_parallel_residual=False),
    "gpt_neox, no attention bias, tied": neox(attention_bias=False, tie_word_embeddings=True),
    "gpt_neox, whole head rotary": neox(rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0}),
    "gpt_neox, half head linear rope": neox(rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}),
    "gpt_neox, fast gelu": neox(hidden_act="gelu_fast"),
}


def save_random_model(config: PreTrainedConfig, folder: Path, **options: Any) -> None:
    """Weights ten times larger than a fresh model's, biases and norms too, so that nothing is nearly the identity."""
    torch.manual_seed(len(str(config)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(
    name: str, tmp_path: Path, run_sequence: Callable[..., Any], torch_logits: Callable[..., Any]
) -> None:
    save_random_model(CONFIGS[name], tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.architecture == CONFIGS[name].model_type
    oracle = float32_oracle(build_graph(checkpoint.config), checkpoint.weights, kv_blocks=4)
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], 75).astype(np.int32)
    expected = torch_logits(checkpoint.load_torch(), tokens)
    assert np.ptp(expected) > 1
    for chunks in ([75], [33, 1, 7, 34], [70, 1, 1, 1, 1, 1]):
        np.testing.assert_allclose(run_sequence(oracle, tokens, chunks), expected, rtol=0, atol=TOLERANCE)


def test_sharded_bfloat16_files(
    tmp_path: Path, run_sequence: Callable[..., Any], torch_logits: Callable[..., Any]
) -> None:
    """Shards, and 16-bit tensors of both kinds, load like one float32 file."""
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        save_random_model(llama(), folder)
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(
            folder / "sharded", max_shard_size="40KB"
        )
        checkpoint = open_checkpoint(str(folder / "sharded"))
        assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
        tokens = np.arange(20, dtype=np.int32)
        oracle = float32_oracle(build_graph(checkpoint.config), checkpoint.weights, kv_blocks=1)
        expected = torch_logits(checkpoint.load_torch(), tokens)
        np.testing.assert_allclose(run_sequence(oracle, tokens, [20]), expected, rtol=0, atol=TOLERANCE)


def test_fused_projection_says_which_rows_it_is(tmp_path: Path) -> None:
    save_random_model(neox(), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    module = checkpoint.load_torch().get_submodule("gpt_neox.layers.1.attention.query_key_value")
    for part in "qkv":
        name = f"gpt_neox.layers.1.attention.query_key_value.{part}"
        weight, bias = WeightName(f"{name}.weight"), WeightName(f"{name}.bias")
        source = checkpoint.source_of(weight)
        assert source.module == "gpt_neox.layers.1.attention.query_key_value"
        assert source.rows is not None
        np.testing.assert_array_equal(checkpoint.weights[weight], module.weight.detach()[source.rows])
        np.testing.assert_array_equal(checkpoint.weights[bias], module.bias.detach()[source.rows])


def test_every_weight_names_its_torch_module(tmp_path: Path) -> None:
    for name in ("llama, all biases", "qwen2, tied", "gpt_neox"):
        save_random_model(CONFIGS[name], tmp_path / name)
        checkpoint = open_checkpoint(str(tmp_path / name))
        model = checkpoint.load_torch()
        for weight in checkpoint.weights:
            source = checkpoint.source_of(weight)
            parameter = getattr(model.get_submodule(source.module), weight.rpartition(".")[2]).detach().numpy()
            expected = parameter if source.rows is None else parameter[source.rows]
            np.testing.assert_array_equal(checkpoint.weights[weight], expected)
