"""GGUF metadata as a Hugging Face config."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeAlias

from edgellm.builder.checkpoint.errors import CheckpointError

Metadata: TypeAlias = Mapping[str, Any]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_USE_FOLDER = "pass the folder of the original Hugging Face model instead"


def read_gguf_config(path: Path, metadata: Metadata, tensor_names: Set[str]) -> dict[str, Any]:
    """The config.json of the model that the file was converted from.

    Raises CheckpointError, by name, for what a file can ask for and our graph would not compute.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(path, f"GGUF architecture {architecture!r} is not supported, only {known}", _USE_FOLDER)
    prefix = f"{architecture}."
    model = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    _refuse_unsupported(path, model, tensor_names)
    config = _hugging_face_config(architecture, model, metadata, tensor_names)
    return {name: value for name, value in config.items() if value is not None}


def _refuse_unsupported(path: Path, model: Metadata, tensor_names: Set[str]) -> None:
    scaling = model.get("rope.scaling.type", "none")
    if scaling == "none" and "rope_freqs.weight" in tensor_names:
        scaling = "rope_freqs.weight"
    rotary_dim, head_dim = model.get("rope.dimension_count"), model.get("attention.key_length")
    refused = {
        f"rope scaling in a GGUF file ({scaling})": scaling != "none",
        f"rotating {rotary_dim} of {head_dim} channels": None not in (rotary_dim, head_dim) and rotary_dim != head_dim,
        f"a mixture of {model.get('expert_count')} experts": model.get("expert_count"),
        "sliding-window attention": model.get("attention.sliding_window"),
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise CheckpointError(path, f"{what} is not supported", _USE_FOLDER)


def _hugging_face_config(
    architecture: str, model: Metadata, metadata: Metadata, tensor_names: Set[str]
) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return {
        "model_type": architecture,
        "architectures": [_ARCHITECTURES[architecture]],
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "hidden_size": model.get("embedding_length"),
        "intermediate_size": model.get("feed_forward_length"),
        "num_hidden_layers": model.get("block_count"),
        "num_attention_heads": model.get("attention.head_count"),
        "num_key_value_heads": model.get("attention.head_count_kv"),
        "head_dim": model.get("attention.key_length") or model.get("rope.dimension_count"),
        "vocab_size": model.get("vocab_size") or (None if tokens is None else len(tokens)),
        "max_position_embeddings": model.get("context_length"),
        "rms_norm_eps": model.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": model.get("rope.freq_base"),
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "tie_word_embeddings": "output.weight" not in tensor_names,
    }
