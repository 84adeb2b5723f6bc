"""GGUF metadata as a Hugging Face config."""

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeAlias

from edgellm.builder.checkpoint.errors import CheckpointError

Field: TypeAlias = Callable[[str], Any]
"""A metadata value by its key, or None."""

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_USE_FOLDER = "pass the folder of the original Hugging Face model instead"


def read_gguf_config(path: Path, field: Field, tensor_names: Set[str]) -> dict[str, Any]:
    """The config.json of the model that the file was converted from. Raises CheckpointError, by name, for what a
    file can ask for and our graph would not compute."""
    architecture = field("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            path, f"GGUF architecture {architecture!r} is not supported, only {', '.join(_ARCHITECTURES)}", _USE_FOLDER
        )
    _refuse_unsupported(path, lambda name: field(f"{architecture}.{name}"), tensor_names)
    return _hugging_face_config(architecture, field, tensor_names)


def _refuse_unsupported(path: Path, model_field: Field, tensor_names: Set[str]) -> None:
    scaling = model_field("rope.scaling.type") or "none"
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        kind = scaling if scaling != "none" else "rope_freqs.weight"
        raise CheckpointError(path, f"rope scaling in a GGUF file ({kind}) is not supported", _USE_FOLDER)
    if model_field("expert_count"):
        raise CheckpointError(
            path, f"mixture of {model_field('expert_count')} experts is not supported", "choose another"
        )
    if model_field("attention.sliding_window"):
        raise CheckpointError(path, "sliding-window attention is not supported", "choose another model")


def _hugging_face_config(architecture: str, field: Field, tensor_names: Set[str]) -> dict[str, Any]:
    def model_field(name: str) -> Any:
        return field(f"{architecture}.{name}")

    tokens = field("tokenizer.ggml.tokens")
    config = {
        "model_type": architecture,
        "architectures": [_ARCHITECTURES[architecture]],
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "hidden_size": model_field("embedding_length"),
        "intermediate_size": model_field("feed_forward_length"),
        "num_hidden_layers": model_field("block_count"),
        "num_attention_heads": model_field("attention.head_count"),
        "num_key_value_heads": model_field("attention.head_count_kv"),
        "head_dim": model_field("attention.key_length") or model_field("rope.dimension_count"),
        "vocab_size": model_field("vocab_size") or (None if tokens is None else len(tokens)),
        "max_position_embeddings": model_field("context_length"),
        "rms_norm_eps": model_field("attention.layer_norm_rms_epsilon"),
        "rope_theta": model_field("rope.freq_base"),
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "tie_word_embeddings": "output.weight" not in tensor_names,
    }
    return {name: value for name, value in config.items() if value is not None}
