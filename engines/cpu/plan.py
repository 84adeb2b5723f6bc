"""`plan.json`: what the native executor runs, in order, and where its memory and weights lie.

Buffers hold float32 rows or a linear's prepared input, `row_bytes` per row. A buffer's rows start at
`row_offset * max_rows` of the arena, so one plan serves any limit on rows. Two buffers share memory where their lives
do not overlap. Weights are segments of `weights.bin`.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from edgellm.engines.kv import KvContract

BACKEND_VERSION: Final = "cpu-6"
"""Of the plan, the packed layouts and the arithmetic: engines of another version are refused."""
SEGMENT_ALIGNMENT: Final = 64
PANEL_COLUMNS: Final = 16


class Buffer(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of scratch memory: both in bytes per row, multiples of 64."""

    row_bytes: int
    row_offset: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights.bin."""

    offset: int
    bytes: int


class View(msgspec.Struct, frozen=True, kw_only=True):
    """float32 [rows, width]: columns `column : column + width` of a buffer."""

    buffer: int
    column: int
    width: int


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """A prepared input: per row `channels` values, then the int32 sum of each group, the outlier values, the scale."""

    buffer: int
    channels: int
    padded_channels: int
    outliers: int
    padded_outliers: int
    group_size: int
    sums_at: int
    outliers_at: int
    scale_at: int


class InputOp(msgspec.Struct, frozen=True, kw_only=True, tag="InputOp"):
    """Hidden states of the stage before."""

    out: View


class EmbedOp(msgspec.Struct, frozen=True, kw_only=True, tag="EmbedOp"):
    """Rows of a packed [vocab, channels] table."""

    out: View
    form: Literal["half", "int8"]
    table: Segment
    scale: Segment | None
    channels: int
    padded_channels: int


class NormOp(msgspec.Struct, frozen=True, kw_only=True, tag="NormOp"):
    """RMSNorm or LayerNorm over whole rows."""

    kind: Literal["rms", "layer"]
    x: View
    out: View
    weight: Segment
    bias: Segment | None
    eps: float


class PrepareOp(msgspec.Struct, frozen=True, kw_only=True, tag="PrepareOp"):
    """Convert a linear's input once for all that read it."""

    form: Literal["half", "float", "int8", "int16"]
    x: View
    out: Records
    input_scale: Segment | None
    """float32 [channels], zero at outlier columns."""
    outlier_columns: Segment | None
    quant_max: int


class LinearOp(msgspec.Struct, frozen=True, kw_only=True, tag="LinearOp"):
    """One or several linears of the same input, their output columns side by side."""

    form: Literal["half", "int8", "int8x16", "int4", "int4_float"]
    x: Records
    out: View
    weight: Segment
    group_scale: Segment | None
    column_scale: Segment | None
    outlier_weight: Segment | None
    bias: Segment | None
    residual: View | None


class StoreKvOp(msgspec.Struct, frozen=True, kw_only=True, tag="StoreKvOp"):
    """Rotate q and k in place, then write k and v into the paged cache. `layer` counts from this engine's first."""

    layer: int
    q: View
    k: View
    v: View
    num_heads: int
    q_rotation: Segment | None
    """float32 [max_seq_len, rotary_dim]: cosines, then sines."""
    q_rotary_dim: int
    k_rotation: Segment | None
    k_rotary_dim: int


class AttendOp(msgspec.Struct, frozen=True, kw_only=True, tag="AttendOp"):
    """Causal attention over the paged cache."""

    layer: int
    q: View
    out: View
    num_heads: int
    scale: float


class ActivateOp(msgspec.Struct, frozen=True, kw_only=True, tag="ActivateOp"):
    """act(x), or act(x) * up."""

    kind: Literal["silu", "gelu", "gelu_tanh"]
    x: View
    up: View | None
    out: View


class AddOp(msgspec.Struct, frozen=True, kw_only=True, tag="AddOp"):
    """a + b."""

    a: View
    b: View
    out: View


class SelectOp(msgspec.Struct, frozen=True, kw_only=True, tag="SelectOp"):
    """Keep the rows whose logits are wanted."""

    x: View
    out: View


class AllReduceOp(msgspec.Struct, frozen=True, kw_only=True, tag="AllReduceOp"):
    """Add x up over the tensor-parallel ranks, in place. The native executor stops before it, and goes on after."""

    x: View


PlanOp: TypeAlias = (
    InputOp
    | EmbedOp
    | NormOp
    | PrepareOp
    | LinearOp
    | StoreKvOp
    | AttendOp
    | ActivateOp
    | AddOp
    | SelectOp
    | AllReduceOp
)


RowOp: TypeAlias = NormOp | PrepareOp | ActivateOp | AddOp
"""Row r of what it writes depends on row r of what it reads."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """plan.json."""

    backend_version: str
    weights_bytes: int
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_seq_len: int
    """Rows of the rotation tables."""
    contract: KvContract
    group: int
    """Query heads per KV head."""
    buffers: tuple[Buffer, ...]
    ops: tuple[PlanOp, ...]
    output: View
    is_first_stage: bool
    is_last_stage: bool


def rounds(ops: Sequence[PlanOp]) -> tuple[int, ...]:
    """Of each op, and of what reads the output: row ops in a row are one round, as they run some rows at a time."""
    numbers = [0]
    for before, op in zip(ops, [*ops[1:], None], strict=True):
        numbers.append(numbers[-1] + (not (isinstance(before, RowOp) and isinstance(op, RowOp))))
    return tuple(numbers)


def segments(plan: Plan) -> Iterator[Segment]:
    """All segments that the plan's ops name."""
    for op in plan.ops:
        yield from (value for name in op.__struct_fields__ if isinstance(value := getattr(op, name), Segment))
