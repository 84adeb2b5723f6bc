"""A model, written once: a list of about ten typed operations over named tensors and named weights.

A tensor is `float32 [rows, width]` unless an op says otherwise; rows are ragged (all tokens of all sequences of a
step, one after the other). Every tensor name is assigned exactly once. Every backend consumes this one form.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NewType, TypeAlias

TensorName = NewType("TensorName", str)
WeightName = NewType("WeightName", str)

TOKENS = TensorName("tokens")
"""Graph input of a first stage: int32 [rows] token ids."""
HIDDEN = TensorName("hidden")
"""Graph input of a later stage: float32 [rows, hidden_size], the residual stream of the stage before."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """Weights and activations in 16 bits (bf16 or IEEE half, the backend's choice), sums in float32."""

    kind: Literal["half"] = "half"


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Weights int8 with one scale per output row; activations int8 per token, or at least as fine as half where
    `act_bits` is 16."""

    kind: Literal["int8"] = "int8"
    act_bits: Literal[8, 16] = 8


@dataclass(frozen=True, kw_only=True)
class Int4:
    """Weights int4 in [-8, 7] with one scale per output row and `group_size` input channels.

    `outliers` input channels stay in half precision on both sides (MixQ, SC'24); the other activations are
    quantised per token to `act_bits` (16: left in half).
    """

    kind: Literal["int4"] = "int4"
    group_size: int = 128
    act_bits: Literal[4, 8, 16] = 8
    outliers: int = 0


Precision: TypeAlias = Half | Int8 | Int4


@dataclass(frozen=True, kw_only=True)
class Embed:
    """out[r] = weight[tokens[r]]; weight [vocab_size, hidden_size]. Precision `half` or `int8` (per-row scale)."""

    out: TensorName
    tokens: TensorName
    weight: WeightName
    vocab_size: int
    hidden_size: int
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm `x / sqrt(mean(x^2) + eps) * weight` or LayerNorm `(x - mean) / sqrt(var + eps) * weight + bias`."""

    out: TensorName
    x: TensorName
    kind: Literal["rms", "layer"]
    weight: WeightName
    bias: WeightName | None
    size: int
    eps: float


@dataclass(frozen=True, kw_only=True)
class Linear:
    """out = x @ weight.T + bias; x [rows, in_features], weight [out_features, in_features]."""

    out: TensorName
    x: TensorName
    weight: WeightName
    bias: WeightName | None
    in_features: int
    out_features: int
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding, half-split pairs (i, i + rotary_dim/2), on the first `rotary_dim` of each head.

    x [rows, num_heads * head_dim]; angle of pair i at position p is `p * inv_freq[i]`; cos and sin are multiplied by
    `attention_factor` (yarn). All kinds of rope scaling are already inside `inv_freq` [rotary_dim / 2].
    """

    out: TensorName
    x: TensorName
    num_heads: int
    head_dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal grouped-query attention of layer `layer`, through the paged KV cache.

    q [rows, num_heads * head_dim] and k, v [rows, kv_heads * head_dim], k after RoPE. Writes k and v of every row
    into the sequence's blocks first, then lets row at position p attend to positions 0..p as read back from the
    cache (so what was rounded on writing is what is attended to). out [rows, num_heads * head_dim].
    """

    out: TensorName
    q: TensorName
    k: TensorName
    v: TensorName
    layer: int
    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Elementwise `silu`, `gelu` (exact, erf) or `gelu_tanh`; with `up`, gated: act(x) * up."""

    out: TensorName
    x: TensorName
    up: TensorName | None
    kind: Literal["silu", "gelu", "gelu_tanh"]
    size: int


@dataclass(frozen=True, kw_only=True)
class Add:
    """out = a + b."""

    out: TensorName
    a: TensorName
    b: TensorName
    size: int


@dataclass(frozen=True, kw_only=True)
class SelectRows:
    """out = x[logit_rows]: only the rows whose logits the step asked for go on. [rows, size] -> [selected, size]."""

    out: TensorName
    x: TensorName
    size: int


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """out = sum of x over the tensor-parallel ranks, in rank order."""

    out: TensorName
    x: TensorName
    size: int


Op: TypeAlias = Embed | Norm | Linear | Rope | Attention | Activation | Add | SelectRows | AllReduce


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One engine's computation: ops in execution order, from `input` to `output`.

    `first_layer` is the model layer of this graph's first `Attention`; `Attention.layer` counts from the start of
    the whole model. The output is logits [selected, vocab_size] on a last stage, else the residual stream
    [rows, hidden_size].
    """

    ops: tuple[Op, ...]
    input: TensorName
    output: TensorName
    hidden_size: int
    vocab_size: int
    num_layers: int
    first_layer: int = 0

    @property
    def is_first_stage(self) -> bool:
        return self.input == TOKENS

    @property
    def is_last_stage(self) -> bool:
        return any(isinstance(op, SelectRows) for op in self.ops)


def op_inputs(op: Op) -> tuple[TensorName, ...]:
    """The tensors an op reads, in argument order."""
    match op:
        case Embed():
            return (op.tokens,)
        case Attention():
            return (op.q, op.k, op.v)
        case Activation(up=up) if up is not None:
            return (op.x, up)
        case Add():
            return (op.a, op.b)
        case _:
            return (op.x,)


def op_weights(op: Op) -> tuple[WeightName, ...]:
    """The weights an op needs."""
    match op:
        case Embed():
            return (op.weight,)
        case Norm() | Linear():
            return (op.weight,) if op.bias is None else (op.weight, op.bias)
        case _:
            return ()


def linears(graph: Graph) -> Iterator[Linear]:
    """All linear ops in execution order."""
    return (op for op in graph.ops if isinstance(op, Linear))


def check(graph: Graph) -> None:
    """Raise ValueError if a tensor is read before it is written, written twice, or the output is missing."""
    known = {graph.input}
    for op in graph.ops:
        missing = [name for name in op_inputs(op) if name not in known]
        if missing:
            raise ValueError(f"{type(op).__name__} reads {missing[0]!r} before any op wrote it")
        if op.out in known:
            raise ValueError(f"{type(op).__name__} writes {op.out!r} a second time")
        known.add(op.out)
    if graph.output not in known:
        raise ValueError(f"no op writes the graph's output {graph.output!r}")
