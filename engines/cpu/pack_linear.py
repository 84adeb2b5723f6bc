"""The weights of one fused linear, checked against their ops and packed into weights.bin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.cpu import pack
from edgellm.engines.cpu.fuse import FusedLinear
from edgellm.engines.cpu.plan import Segment
from edgellm.engines.cpu.weights_file import CountedWeights, WeightsFile
from edgellm.engines.graph import Half, Int4, Int8, Linear
from edgellm.engines.weights import FloatArray, Int4Weight, Int8Weight, Weight

LinearForm: TypeAlias = Literal["half", "int8", "int8x16", "int4", "int4_float"]
MAX_INT8_CHANNELS = 65536
"""A sum of u8 * s8 over more channels could leave int32."""
INT16_MAX = 127 * 128
"""Largest magnitude of an int16 input: its high part, rounded, is still an int8."""


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """Segments of a fused linear, and the shape its input must be prepared in."""

    form: LinearForm
    columns: int
    channels: int
    padded_channels: int
    group_size: int
    """Channels per activation sum."""
    weight: Segment
    column_scale: Segment | None = None
    group_scale: Segment | None = None
    outliers: int = 0
    outlier_weight: Segment | None = None
    outlier_columns: Segment | None = None
    input_scale: Segment | None = None
    quant_max: int = 127


@dataclass(frozen=True, kw_only=True)
class PackedTable:
    """A half or int8 matrix; the embedding and a tied head read the same one."""

    weight: Segment
    scale: Segment | None
    padded_channels: int


Tables: TypeAlias = dict[str, PackedTable]
"""By the weight's name, or the names of weights side by side."""


def pack_linear(op: FusedLinear, weights: CountedWeights, file: WeightsFile, tables: Tables) -> PackedLinear:
    """Take and pack the weights of all parts. ValueError names a weight whose form or shape is not its op's.

    A matrix that is already among `tables` is used as it lies there, and added to them otherwise.
    """
    match op.precision:
        case Half():
            return _dense(op, _table(op, weights, file, tables), "half")
        case Int8(act_bits=act_bits):
            return _dense(op, _table(op, weights, file, tables), "int8" if act_bits == 8 else "int8x16")
        case Int4():
            return _pack_int4(op, op.precision, _int4_parts(op, weights), file)


def pack_bias(op: FusedLinear, weights: CountedWeights, file: WeightsFile) -> Segment | None:
    """The parts' biases side by side, zeros where a part has none; None if no part has one."""
    if all(part.bias is None for part in op.parts):
        return None
    biases = [
        np.zeros(part.out_features, np.float32) if part.bias is None else weights.vector(part.bias, part.out_features)
        for part in op.parts
    ]
    return file.append(pack.pad_columns(np.concatenate(biases)))


def pack_table(parts: Sequence[Weight], file: WeightsFile) -> PackedTable:
    """Pack half or int8 matrices, stacked along N."""
    if isinstance(parts[0], Int8Weight):
        q = np.concatenate([part.q for part in parts if isinstance(part, Int8Weight)])
        scale = np.concatenate([part.scale for part in parts if isinstance(part, Int8Weight)])
        padded = pack.round_up(q.shape[1], pack.INT8_CHANNELS)
        weight = file.append(pack.pack_int8(q, padded))
        return PackedTable(weight=weight, scale=file.append(pack.pad_columns(scale)), padded_channels=padded)
    dense = np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
    padded = pack.round_up(dense.shape[1], pack.HALF_CHANNELS)
    return PackedTable(weight=file.append(pack.pack_half(dense, padded)), scale=None, padded_channels=padded)


def check_matrix(name: str, weight: Weight, shape: tuple[int, int], precision: Half | Int8 | Int4) -> None:
    """Raise ValueError unless the weight has the form its op's precision says, and its shape."""
    forms = {Half: np.ndarray, Int8: Int8Weight, Int4: Int4Weight}
    if not isinstance(weight, forms[type(precision)]):
        raise ValueError(f"weight {name!r} is a {type(weight).__name__}, its op asks for {precision}")
    found = weight.shape if isinstance(weight, np.ndarray) else weight.q.shape
    if found != shape:
        raise ValueError(f"weight {name!r} has shape {list(found)}, its op needs {list(shape)}")


def _take(part: Linear, weights: CountedWeights) -> Weight:
    weight = weights.take(part.weight)
    check_matrix(part.weight, weight, (part.out_features, part.in_features), part.precision)
    return weight


def _table(op: FusedLinear, weights: CountedWeights, file: WeightsFile, tables: Tables) -> PackedTable:
    name = "+".join(part.weight for part in op.parts)
    if name not in tables:
        tables[name] = pack_table([_take(part, weights) for part in op.parts], file)
    return tables[name]


def _dense(op: FusedLinear, table: PackedTable, form: Literal["half", "int8", "int8x16"]) -> PackedLinear:
    channels = op.parts[0].in_features
    if channels > MAX_INT8_CHANNELS and form != "half":
        raise ValueError(f"linear {op.outs[0]!r} sums {channels} int8 channels; at most {MAX_INT8_CHANNELS} fit int32")
    return PackedLinear(
        form=form,
        columns=_columns(op),
        channels=channels,
        padded_channels=table.padded_channels,
        group_size=table.padded_channels,
        weight=table.weight,
        column_scale=table.scale,
        quant_max=INT16_MAX if form == "int8x16" else 127,
    )


def _int4_parts(op: FusedLinear, weights: CountedWeights) -> list[Int4Weight]:
    parts = [weight for part in op.parts if isinstance(weight := _take(part, weights), Int4Weight)]
    first = parts[0]
    for weight, part in zip(parts, op.parts, strict=True):
        if not np.array_equal(_input_scale(weight), _input_scale(first)):
            raise ValueError(f"weight {part.weight!r} has another input_scale than {op.parts[0].weight!r}")
        if not np.array_equal(weight.outlier_columns, first.outlier_columns):
            raise ValueError(f"weight {part.weight!r} has other outlier columns than {op.parts[0].weight!r}")
    return parts


def _pack_int4(op: FusedLinear, precision: Int4, parts: list[Int4Weight], file: WeightsFile) -> PackedLinear:
    channels, group = op.parts[0].in_features, precision.group_size
    if channels % group or group % pack.INT4_LINE_CHANNELS:
        raise ValueError(f"linear {op.outs[0]!r}: group size {group} must be a multiple of 8 that divides {channels}")
    group_scales, column_scale = pack.pack_group_scales(np.concatenate([part.scale for part in parts]))
    outliers = parts[0].outlier_columns
    scale = _input_scale(parts[0])
    scale[outliers] = 0
    return PackedLinear(
        form="int4_float" if precision.act_bits == 16 else "int4",
        columns=_columns(op),
        channels=channels,
        padded_channels=channels,
        group_size=group,
        weight=file.append(pack.pack_int4(np.concatenate([part.q for part in parts]))),
        column_scale=file.append(column_scale),
        group_scale=file.append(group_scales),
        outliers=len(outliers),
        outlier_weight=file.append(_outlier_panels(parts)) if len(outliers) else None,
        outlier_columns=file.append(outliers.astype(np.int32)) if len(outliers) else None,
        input_scale=None if (scale == 1).all() else file.append(scale),
        quant_max=7 if precision.act_bits == 4 else 127,
    )


def _outlier_panels(parts: list[Int4Weight]) -> npt.NDArray[np.uint16]:
    dense = np.concatenate([part.outlier_weight for part in parts])
    return pack.pack_half(dense, pack.round_up(dense.shape[1], 2))


def _input_scale(weight: Int4Weight) -> FloatArray:
    """A copy; all ones where the weight has none."""
    if weight.input_scale is None:
        return np.ones(weight.q.shape[1], np.float32)
    return weight.input_scale.astype(np.float32)


def _columns(op: FusedLinear) -> int:
    return sum(part.out_features for part in op.parts)
