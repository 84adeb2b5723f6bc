"""From the half-precision graph and its weights to the decode graph and its quantised weights.

1. AWQ (modelopt) searches an input scale for every linear; linears with the same input take their geometric mean.
2. The model runs over the windows once, in float32; before each group of linears, the second moments of its input
   are summed.
3. Each group gets outlier channels, group scales and error-compensated rounding (`int4`).
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import numpy as np
import torch

from edgellm.calib.awq import search_input_scales
from edgellm.calib.forward import LinearGroup, TorchWeights, linear_groups, linear_inputs
from edgellm.calib.int4 import quantize_group
from edgellm.calib.recipe import LinearSource, Progress, QuantizeOptions, quantized_graph
from edgellm.engines.graph import Embed, Graph, Int4, Int8, Linear, TensorName, WeightName, op_weights
from edgellm.engines.weights import FloatArray, Int8Weight, Weight, WeightStore

SourceOf: TypeAlias = Callable[[WeightName], LinearSource]

AWQ_WINDOWS: Final = 1
"""Windows of the AWQ search, which quantises and runs every linear once per alpha; its few statistics need no more."""


class CalibrationError(ValueError):
    """The model, its weights and the calibration text do not fit together; the message says what to do."""


def quantize(
    graph: Graph,
    weights: WeightStore,
    model: torch.nn.Module,
    windows: torch.Tensor,
    source_of: SourceOf,
    options: QuantizeOptions,
    progress: Progress,
) -> tuple[Graph, dict[WeightName, Weight]]:
    """The decode graph and all of its weights; the same inputs give the same bytes.

    graph: the whole model, all half. model: the Hugging Face model that `weights` came from, float32; left as it is.
    windows: int64 [count, tokens] calibration text. `kept_at_int8` says of the result which linears could not be int4.

    Raises CalibrationError.
    """
    _check_windows(windows, graph.vocab_size)
    lowered = quantized_graph(graph, options)
    groups = [group for group in linear_groups(lowered) if isinstance(group.linears[0].precision, Int4)]
    _check_sources(groups, weights, model, source_of)
    with torch.inference_mode():
        input_scales = _input_scales(groups, model, windows[:AWQ_WINDOWS], source_of, progress)
        quantized: dict[WeightName, Weight] = {}
        for done, (group, x) in enumerate(linear_inputs(lowered, TorchWeights(weights), windows)):
            progress("rounding weights", done, len(groups))
            if group.x in input_scales:
                quantized |= _quantize_group(group, weights, x, input_scales[group.x])
    progress("rounding weights", len(groups), len(groups))
    return lowered, quantized | _other_weights(lowered, weights, quantized)


def quantize_int8(weight: FloatArray) -> Int8Weight:
    """weight [N, K], each row to the nearest of 255 levels."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return Int8Weight(q=np.rint(weight / scale[:, None]).astype(np.int8), scale=scale)


def _check_windows(windows: torch.Tensor, vocab_size: int) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise CalibrationError(
            f"calibration windows are {windows.dtype} {list(windows.shape)}; they must be int64 [count, tokens]"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"token id {wrong} in the calibration text is outside of the vocabulary of {vocab_size}: "
            "the tokenizer is not this model's"
        )


def _check_sources(
    groups: list[LinearGroup], weights: WeightStore, model: torch.nn.Module, source_of: SourceOf
) -> None:
    """Input scales found in the wrong module would do harm that nobody sees."""
    modules = dict(model.named_modules())
    for linear in (linear for group in groups for linear in group.linears):
        source = source_of(linear.weight)
        if source.module not in modules:
            raise CalibrationError(f"{linear.weight} comes from {source.module!r}, which the model does not have")
        theirs = modules[source.module].get_parameter("weight").detach().float().numpy()
        ours = np.asarray(weights[linear.weight], np.float32)
        if not np.array_equal(theirs if source.rows is None else theirs[source.rows], ours):
            raise CalibrationError(f"{linear.weight} differs from the model's {source.module}: not the same checkpoint")


def _input_scales(
    groups: list[LinearGroup],
    model: torch.nn.Module,
    windows: torch.Tensor,
    source_of: SourceOf,
    progress: Progress,
) -> dict[TensorName, torch.Tensor]:
    """One input scale [in_features] per group; as AWQ's, with largest times smallest value 1."""
    sizes = {source_of(op.weight).module: _int4(op).group_size for group in groups for op in group.linears}
    found = search_input_scales(model, sizes, windows, progress)
    scales = {}
    for group in groups:
        logs = torch.stack([found[source_of(op.weight).module].log() for op in group.linears]).mean(0)
        scales[group.x] = (logs - (logs.max() + logs.min()) / 2).exp()
    return scales


def _quantize_group(
    group: LinearGroup, weights: WeightStore, x: torch.Tensor, input_scale: torch.Tensor
) -> dict[WeightName, Weight]:
    """x [tokens, in_features]: the group's input."""
    matrices = [torch.from_numpy(np.asarray(weights[op.weight])) for op in group.linears]
    parts = quantize_group(matrices, x.T @ x / len(x), input_scale, _int4(group.linears[0]))
    return {op.weight: part for op, part in zip(group.linears, parts, strict=True)}


def _int4(linear: Linear) -> Int4:
    if not isinstance(linear.precision, Int4):
        raise TypeError(f"{linear.weight} is not int4")
    return linear.precision


def _other_weights(
    graph: Graph, weights: WeightStore, quantized: Mapping[WeightName, Weight]
) -> dict[WeightName, Weight]:
    """Int8 tables, and norms and biases as they are; a tied weight is read and quantised once."""
    others: dict[WeightName, Weight] = {}
    for op in graph.ops:
        is_table = isinstance(op, Embed | Linear) and isinstance(op.precision, Int8)
        for position, name in enumerate(op_weights(op)):
            if name not in others and name not in quantized:
                array = np.asarray(weights[name], np.float32)
                others[name] = quantize_int8(array) if is_table and position == 0 else array
    return others
