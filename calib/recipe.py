"""What to quantise, and to what: the options of a run, and the precision each linear of a graph gets."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.graph import Embed, Graph, Int4, Int8, Linear, Op, Precision, linears

GROUP_SIZES: Final = (128, 64, 32)

Progress: TypeAlias = Callable[[str, int, int], None]
"""progress(step, done, total): called with done = 0 when a step starts and with done = total when it is finished."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSource:
    """Where in the Hugging Face model a weight of ours came from."""

    module: str
    """Name of the `torch.nn.Linear`, as in `model.named_modules()`."""
    rows: npt.NDArray[np.intp] | None = None
    """The output rows of that module that are ours, in our order; None: all of them, in its order."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Options of the decode recipe: INT4-AWQ linears with outlier channels, int8 embedding and head."""

    group_size: int | None = None
    """Input channels that share a scale: 128, 64 or 32. None, or one that does not divide K: the largest that does."""
    act_bits: Literal[4, 8, 16] = 8
    outliers: int = 32
    """Input channels of each group of linears that stay in half precision; even."""
    seed: int = 0
    """For sampling calibration text."""

    def __post_init__(self) -> None:
        if self.group_size not in (None, *GROUP_SIZES):
            raise ValueError(f"group size {self.group_size}: must be one of {', '.join(map(str, GROUP_SIZES))}")
        if self.act_bits not in (4, 8, 16):
            raise ValueError(f"activation bits {self.act_bits}: must be 4, 8 or 16")
        if self.outliers < 0 or self.outliers % 2:
            raise ValueError(f"{self.outliers} outlier channels: must be an even number, 0 or more")


def quantized_graph(graph: Graph, options: QuantizeOptions) -> Graph:
    """An all-half graph with the precisions that decode engines have; known before anything is calibrated."""

    def lower(op: Op) -> Op:
        match op:
            case Embed():
                return dataclasses.replace(op, precision=Int8())
            case Linear():
                return dataclasses.replace(op, precision=decode_precision(op, graph, options))
            case _:
                return op

    return dataclasses.replace(graph, ops=tuple(map(lower, graph.ops)))


def decode_precision(linear: Linear, graph: Graph, options: QuantizeOptions) -> Precision:
    """Int4, or int8 where no group size divides the input. The head is int8 with activations in half precision: its
    input has outlier channels, which int8 weights cannot set apart."""
    if linear.out == graph.output:
        return Int8(act_bits=16)
    group_size = largest_group_size(linear.in_features, options.group_size)
    if group_size is None:
        return Int8()
    outliers = min(options.outliers, linear.in_features // 4 * 2)
    return Int4(group_size=group_size, act_bits=options.act_bits, outliers=outliers)


def largest_group_size(in_features: int, limit: int | None) -> int | None:
    """The largest of 128, 64, 32 that divides `in_features` and is at most `limit`; None if none does."""
    return next((g for g in GROUP_SIZES if in_features % g == 0 and g <= (limit or g)), None)


def kept_at_int8(graph: Graph) -> Iterator[str]:
    """One sentence for each linear of a quantised graph, the head excepted, that could not be made int4."""
    for linear in linears(graph):
        if isinstance(linear.precision, Int8) and linear.out != graph.output:
            sizes = ", ".join(map(str, GROUP_SIZES))
            yield f"{linear.weight} stays int8: none of the group sizes {sizes} divides its {linear.in_features} inputs"
