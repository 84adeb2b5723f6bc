"""The facts of a model that its graph depends on, read from a Hugging Face config of any age."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from edgellm.builder.models.errors import UnsupportedModelError
from edgellm.builder.models.rope import RopeConfig

RawConfig: TypeAlias = Mapping[str, Any]
"""A parsed config.json."""
ActivationKind: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's shape and options, in one vocabulary for all architectures."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    """Positions the model was made for."""
    norm_eps: float
    activation: ActivationKind
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    tied_embeddings: bool
    parallel_residual: bool
    """Attention and MLP both read the layer's input, and both are added to it."""


def integer(raw: RawConfig, name: str, default: int | None = None) -> int:
    """`raw[name]` as a positive int, or the default where the field is absent or null."""
    value = _present(raw, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(f"config field {name!r} is {value!r}; a positive integer is needed")
    return value


def number(raw: RawConfig, name: str, default: float | None = None) -> float:
    """`raw[name]` as a float, or the default where the field is absent or null."""
    value = _present(raw, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedModelError(f"config field {name!r} is {value!r}; a number is needed")
    return float(value)


def flag(raw: RawConfig, name: str, default: bool) -> bool:
    """`raw[name]` as a bool, or the default where the field is absent or null."""
    value = _present(raw, name, default)
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"config field {name!r} is {value!r}; true or false is needed")
    return value


def _present(raw: RawConfig, name: str, default: Any) -> Any:
    value = raw.get(name)
    if value is None and default is None:
        raise UnsupportedModelError(f"config field {name!r} is missing")
    return default if value is None else value


def activation(raw: RawConfig, default: str) -> ActivationKind:
    """The graph's name of `hidden_act`."""
    name = raw.get("hidden_act") or default
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; supported: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


def head_counts(raw: RawConfig) -> tuple[int, int, int]:
    """(num_heads, kv_heads, head_dim), checked against each other."""
    num_heads = integer(raw, "num_attention_heads")
    kv_heads = integer(raw, "num_key_value_heads", num_heads)
    hidden_size = integer(raw, "hidden_size")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise UnsupportedModelError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    if num_heads % kv_heads:
        raise UnsupportedModelError(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {kv_heads}")
    return num_heads, kv_heads, integer(raw, "head_dim", hidden_size // num_heads)
