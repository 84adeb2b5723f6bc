"""One group of linears, all reading the same input, to int4 with shared outlier channels."""

from typing import Final

import numpy as np
import torch

from edgellm.calib.rounding import round_compensated, round_to_levels, search_scales
from edgellm.engines.graph import Int4
from edgellm.engines.weights import Int4Weight

DAMPING: Final = 0.01
"""Added to the diagonal of the second moments, as a fraction of its mean: keeps them invertible, limits overfitting."""


def quantize_group(
    weights: list[torch.Tensor], moments: torch.Tensor, input_scale: torch.Tensor, precision: Int4
) -> list[Int4Weight]:
    """weights [N_i, K], moments [K, K] = sum of x x^T over calibration tokens, input_scale [K] > 0, all float32."""
    scaled = torch.cat(weights) / input_scale
    moments = _damped(moments * torch.outer(input_scale, input_scale))
    importance = moments.diagonal()
    outliers = choose_outliers(scaled, importance, precision)
    quantised_part = scaled.index_fill(1, outliers, 0)
    scale = search_scales(quantised_part, importance, precision.group_size)
    levels, kept = round_compensated(scaled, scale, moments, outliers)
    kept *= input_scale[outliers]
    sizes = [len(weight) for weight in weights]
    return [
        Int4Weight(
            q=part_levels.to(torch.int8).numpy(),
            scale=part_scale.numpy(),
            group_size=precision.group_size,
            input_scale=input_scale.numpy(),
            outlier_columns=outliers.numpy().astype(np.int32),
            outlier_weight=part_kept.numpy(),
        )
        for part_levels, part_scale, part_kept in zip(
            *(torch.split(rows, sizes) for rows in (levels, scale, kept)), strict=True
        )
    ]


def choose_outliers(scaled: torch.Tensor, importance: torch.Tensor, precision: Int4) -> torch.Tensor:
    """Ascending int64 [precision.outliers]: the channels whose rounding would cost most, E[x_k^2] |w_k - round(w_k)|^2.

    scaled [N, K] weights, importance [K] = E[x_k^2]. MixQ (SC'24) takes the largest |x_k|; that misses channels whose
    weights are hard to round.
    """
    groups = scaled.view(len(scaled), -1, precision.group_size)
    step = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 7
    error = (round_to_levels(groups, step) * step - groups).square().sum(0).flatten()
    return torch.topk(error * importance, precision.outliers).indices.sort().values


def _damped(moments: torch.Tensor) -> torch.Tensor:
    mean = moments.diagonal().mean()
    return moments + DAMPING * mean * torch.eye(len(moments))
