"""Rotary frequencies: every kind of rope scaling we support ends up as `inv_freq` and one attention factor.

Kinds that change with the length of the sequence (dynamic, longrope) cannot be written as constants of a graph and are
refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from edgellm.builder.models.errors import UnsupportedModelError

_DEFAULT_THETA = 10_000.0
_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class NoScaling:
    """Plain RoPE, arXiv 2104.09864."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation, arXiv 2306.15595: positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN, arXiv 2309.00071: a ramp from kept to interpolated frequencies, and sharper attention."""

    factor: float
    original_max_seq_len: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Round the ends of the ramp to whole dimensions."""


RopeScaling: TypeAlias = NoScaling | LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary settings of a model."""

    theta: float
    rotary_dim: int
    """Leading channels of each head that are rotated."""
    scaling: RopeScaling


def read_rope(raw: Mapping[str, Any], *, head_dim: int, partial: float = 1.0) -> RopeConfig:
    """Read `rope_parameters` (new) or `rope_theta`, `rope_scaling`, `rotary_emb_base`, `rotary_pct` (old).

    `partial` is the architecture's default share of a head that is rotated.
    """
    fields = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in fields.values()):
        raise UnsupportedModelError("rope_parameters that differ by layer type are not supported")
    theta = _first(fields.get("rope_theta"), raw.get("rope_theta"), raw.get("rotary_emb_base"), _DEFAULT_THETA)
    share = _first(
        fields.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), raw.get("rotary_pct"), partial
    )
    rotary_dim = int(head_dim * share)
    if rotary_dim <= 0 or rotary_dim % 2 or rotary_dim > head_dim:
        raise UnsupportedModelError(
            f"rotary share {share!r} of head_dim {head_dim} rotates {rotary_dim} channels: not even, or none"
        )
    return RopeConfig(theta=float(theta), rotary_dim=rotary_dim, scaling=_read_scaling(fields, raw))


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _read_scaling(fields: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScaling:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    match kind:
        case "default":
            return NoScaling()
        case "linear":
            return LinearScaling(factor=_number(fields, "factor", kind))
        case "llama3":
            return Llama3Scaling(
                factor=_number(fields, "factor", kind),
                low_freq_factor=_number(fields, "low_freq_factor", kind),
                high_freq_factor=_number(fields, "high_freq_factor", kind),
                original_max_seq_len=_original_max_seq_len(fields, raw),
            )
        case "yarn":
            return _read_yarn(fields, raw)
        case _:
            raise UnsupportedModelError(f"rope scaling {kind!r} is not supported; supported: {', '.join(_KINDS)}")


def _original_max_seq_len(fields: Mapping[str, Any], raw: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    value = _first(raw.get(name), fields.get(name), raw.get("max_position_embeddings"), 0)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModelError(f"rope scaling needs a positive {name!r}, got {value!r}")
    return value


def _read_yarn(fields: Mapping[str, Any], raw: Mapping[str, Any]) -> YarnScaling:
    original = _original_max_seq_len(fields, raw)
    factor = fields.get("factor") or raw["max_position_embeddings"] / original
    return YarnScaling(
        factor=float(factor),
        original_max_seq_len=original,
        attention_factor=_yarn_attention_factor(fields, float(factor)),
        beta_fast=float(fields.get("beta_fast") or 32),
        beta_slow=float(fields.get("beta_slow") or 1),
        truncate=bool(fields.get("truncate", True)),
    )


def _yarn_attention_factor(fields: Mapping[str, Any], factor: float) -> float:
    """The given factor, or 0.1 m ln(s) + 1 (YaRN, eq. 22) for the given or default m."""
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_sharpness(factor, mscale) / _yarn_sharpness(factor, mscale_all_dim)
    return _yarn_sharpness(factor, 1.0)


def _yarn_sharpness(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _number(fields: Mapping[str, Any], name: str, kind: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UnsupportedModelError(f"rope scaling {kind!r} needs a positive {name!r}, got {value!r}")
    return float(value)


def frequencies(rope: RopeConfig) -> tuple[tuple[float, ...], float]:
    """(inv_freq [rotary_dim / 2], attention factor); each frequency is a float32 value, so all backends agree on it."""
    plain = rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    match rope.scaling:
        case NoScaling():
            scaled, attention_factor = plain, 1.0
        case LinearScaling(factor=factor):
            scaled, attention_factor = plain / factor, 1.0
        case Llama3Scaling() as llama3:
            scaled, attention_factor = _llama3(plain, llama3), 1.0
        case YarnScaling() as yarn:
            scaled, attention_factor = _yarn(plain, rope, yarn), yarn.attention_factor
        case other:
            assert_never(other)
    return tuple(float(value) for value in scaled.astype(np.float32)), attention_factor


def _llama3(plain: npt.NDArray[np.float64], scaling: Llama3Scaling) -> npt.NDArray[np.float64]:
    """Blend by how many turns a pair makes over the original context (Llama 3.1 reference code)."""
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    blended: npt.NDArray[np.float64] = keep * plain + (1 - keep) * plain / scaling.factor
    return blended


def _yarn(plain: npt.NDArray[np.float64], rope: RopeConfig, scaling: YarnScaling) -> npt.NDArray[np.float64]:
    """YaRN eq. 17 to 21 in its "by parts" form."""
    low, high = _yarn_ramp(rope, scaling)
    interpolate = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    blended: npt.NDArray[np.float64] = (1 - interpolate) * plain + interpolate * plain / scaling.factor
    return blended


def _yarn_ramp(rope: RopeConfig, scaling: YarnScaling) -> tuple[float, float]:
    """First and last pair of the ramp: those that make beta_fast and beta_slow turns over the original context."""

    def pair_of(turns: float) -> float:
        wavelength_ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength_ratio) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, high if high != low else low + 0.001
