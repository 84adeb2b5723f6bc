"""One group of linears, all reading the same input, to int4 with shared input scale and outlier channels."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from edgellm.calib.rounding import CompensatedRounding, round_to_levels, search_scales
from edgellm.engines.graph import Int4
from edgellm.engines.weights import Int4Weight

DAMPING: Final = 0.01
"""Added to the diagonal of the second moments, as a fraction of its mean: keeps them invertible, limits overfitting."""
AWQ_ERROR_RATIO: Final = 0.8
"""AWQ's scale must save a fifth of the output error: small savings are those of a few tokens with massive activations,
and the text's other tokens pay for them."""
_SAMPLE_STEP: Final = 8
"""Every eighth output row decides whether AWQ's input scale helps."""


def quantize_group(
    weights: list[torch.Tensor], moments: torch.Tensor, awq_scale: torch.Tensor, precision: Int4
) -> list[Int4Weight]:
    """weights [N_i, K], moments [K, K] = E[x x^T] over calibration tokens, awq_scale [K] > 0, all float32.

    A sample of the rows is rounded with AWQ's input scale and without; AWQ's is taken if the outputs err much less. It
    is chosen for rounding to nearest, and compensated rounding often does better on the weights as they are.
    """
    weight = torch.cat(weights)
    ways = [_way(weight, moments, scale, precision) for scale in (None, awq_scale)]
    sample = slice(None, None, _SAMPLE_STEP)
    plain_error, awq_error = (way.round(sample).output_error(weight[sample], moments) for way in ways)
    best = ways[1] if awq_error < AWQ_ERROR_RATIO * plain_error else ways[0]
    return best.round(slice(None)).split([len(part) for part in weights], precision.group_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rounded:
    """All linears of a group, stacked."""

    levels: torch.Tensor
    """float32 [N, K]."""
    scale: torch.Tensor
    """[N, K / group_size]."""
    input_scale: torch.Tensor | None
    """[K]."""
    outliers: torch.Tensor
    """int64 [O]."""
    outlier_weight: torch.Tensor
    """[N, O], for the unscaled input."""

    def output_error(self, weight: torch.Tensor, moments: torch.Tensor) -> float:
        """E |(w' - w) x|^2, summed over outputs."""
        rounded = self.levels * self.scale.repeat_interleave(weight.shape[1] // self.scale.shape[1], dim=1)
        if self.input_scale is not None:
            rounded *= self.input_scale
        rounded[:, self.outliers] = self.outlier_weight
        difference = rounded - weight
        return float((difference @ moments * difference).sum())

    def split(self, sizes: list[int], group_size: int) -> list[Int4Weight]:
        """The parts again, by their numbers of outputs."""
        parts = (torch.split(rows, sizes) for rows in (self.levels, self.scale, self.outlier_weight))
        return [
            Int4Weight(
                q=levels.to(torch.int8).numpy(),
                scale=scale.numpy(),
                group_size=group_size,
                input_scale=None if self.input_scale is None else self.input_scale.numpy(),
                outlier_columns=self.outliers.numpy().astype(np.int32),
                outlier_weight=outlier_weight.numpy(),
            )
            for levels, scale, outlier_weight in zip(*parts, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Way:
    """How to round a group, for one input scale."""

    weight: torch.Tensor
    """[N, K], divided by the input scale."""
    importance: torch.Tensor
    """[K], E[x_k^2] of the scaled input."""
    input_scale: torch.Tensor | None
    outliers: torch.Tensor
    group_size: int
    rounding: CompensatedRounding

    def round(self, rows: slice) -> _Rounded:
        """Some of the rows."""
        weight = self.weight[rows]
        scale = search_scales(weight.index_fill(1, self.outliers, 0), self.importance, self.group_size)
        levels, kept = self.rounding.round(weight, scale)
        if self.input_scale is not None:
            kept *= self.input_scale[self.outliers]
        return _Rounded(
            levels=levels, scale=scale, input_scale=self.input_scale, outliers=self.outliers, outlier_weight=kept
        )


def _way(weight: torch.Tensor, moments: torch.Tensor, input_scale: torch.Tensor | None, precision: Int4) -> _Way:
    if input_scale is not None:
        weight, moments = weight / input_scale, moments * torch.outer(input_scale, input_scale)
    importance = moments.diagonal()
    outliers = choose_outliers(weight, importance, precision)
    damped = moments + DAMPING * importance.mean() * torch.eye(len(moments))
    return _Way(
        weight=weight,
        importance=importance,
        input_scale=input_scale,
        outliers=outliers,
        group_size=precision.group_size,
        rounding=CompensatedRounding(damped, outliers),
    )


def choose_outliers(weight: torch.Tensor, importance: torch.Tensor, precision: Int4) -> torch.Tensor:
    """Ascending int64 [precision.outliers]: the channels whose rounding would cost most, E[x_k^2] |w_k - round(w_k)|^2.

    weight [N, K], importance [K] = E[x_k^2]. MixQ (SC'24) takes the largest |x_k|; that misses channels whose weights
    are hard to round.
    """
    groups = weight.view(len(weight), -1, precision.group_size)
    step = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 7
    error = (round_to_levels(groups, step) * step - groups).square().sum(0).flatten()
    return torch.topk(error * importance, precision.outliers).indices.sort().values
