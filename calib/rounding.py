"""Rounding weights to int4: scales searched per group, errors made good in the channels not rounded yet."""

from typing import Final

import torch

QMIN: Final = -8
QMAX: Final = 7
_BLOCK: Final = 32
_TINY: Final = 1e-8
_STEPS: Final = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


def search_scales(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K / group_size] float32 scales that minimise sum_k importance[k] * (round(w / s) * s - w)^2 per group.

    weight [N, K], importance [K] >= 0. A scale's sign is free, so that either end of a group can use the level -8
    that has no counterpart: candidates are +-m / 8 * step for the group's largest magnitude m.
    """
    groups = weight.view(len(weight), -1, group_size)
    largest = groups.abs().amax(-1).clamp_min(_TINY) / -QMIN
    best_error = torch.full_like(largest, torch.inf)
    best = largest.clone()
    for candidate in [sign * step * largest for step in _STEPS for sign in (1, -1)]:
        rounded = round_to_levels(groups, candidate[..., None]) * candidate[..., None]
        error = ((rounded - groups).square() * importance.view(-1, group_size)).sum(-1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, candidate, best)
    return best


def round_to_levels(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Integer levels in [-8, 7], as floats."""
    levels: torch.Tensor = (weight / scale).round().clamp(QMIN, QMAX)
    return levels


class CompensatedRounding:
    """GPTQ (arXiv 2210.17323): channels are rounded in descending order of the moments' diagonal, and what each gets
    wrong is made good in all that follow. Kept channels come last and are never rounded, so they end at the
    least-squares optimum.
    """

    def __init__(self, moments: torch.Tensor, kept: torch.Tensor) -> None:
        """moments [K, K] of the input, positive definite; kept [O] int64. Factorises the moments, in O(K^3)."""
        self._kept = kept
        self._order, self._rounded = _rounding_order(moments, kept)
        self._upper = _inverse_factor(moments[self._order][:, self._order])

    def round(self, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight [N, K], scale [N, K / group_size] -> levels [N, K] (0 in kept channels), kept weights [N, O]."""
        # Transposed, so that one input channel of all outputs is contiguous. [K, N]
        rest = weight.T[self._order].contiguous()
        steps = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1).T[self._order].contiguous()
        levels = torch.zeros_like(rest)
        for start in range(0, self._rounded, _BLOCK):
            _round_block(rest, levels, steps, self._upper, range(start, min(start + _BLOCK, self._rounded)))
        natural = torch.argsort(self._order)
        return levels[natural].T.contiguous(), rest[natural][self._kept].T.contiguous()


def _rounding_order(moments: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All channels, kept ones last; and how many are not kept."""
    key = moments.diagonal().clone()
    key[kept] = -torch.inf
    return torch.argsort(key, descending=True, stable=True), len(key) - len(kept)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with moments^-1 = U^T U, computed in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.double()))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return upper


def _round_block(
    rest: torch.Tensor, levels: torch.Tensor, steps: torch.Tensor, upper: torch.Tensor, block: range
) -> None:
    """Round the channels of one block of `rest` into `levels`; later channels of `rest` take over the errors."""
    errors = torch.empty(len(block), rest.shape[1])
    for i, channel in enumerate(block):
        levels[channel] = round_to_levels(rest[channel], steps[channel])
        errors[i] = (rest[channel] - levels[channel] * steps[channel]) / upper[channel, channel]
        later = slice(channel + 1, block.stop)
        rest[later] -= upper[channel, later, None] * errors[i]
    rest[block.stop :] -= upper[block.start : block.stop, block.stop :].T @ errors
