"""The plain twin of the native sampler, and the definition of what it computes.

Every choice is made on integers, so that it is the same on every machine: logits become weights
`round(exp((logit - max) / temperature) * 2^30)` by one fixed float32 polynomial, sums of weights are exact, and the
random draw is a 64-bit number scaled to the sum.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgellm.engines.sampling_params import SamplingError, SamplingParams
from edgellm.engines.weights import FloatArray

WEIGHT_ONE = 1 << 30
"""Weight of the likeliest token."""

_F = np.float32
_LOG2_E = _F(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
_EXP_POLYNOMIAL = [
    _F(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
]
_ROUNDER = _F(12582912.0)
_SMALLEST_EXPONENT = _F(-87.0)

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_MASK_32 = 0xFFFFFFFF


def sample_reference(
    logits: FloatArray,
    params: Sequence[SamplingParams],
    histories: Sequence[npt.NDArray[np.int32]],
    indices: Sequence[int],
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Same contract as `sampling.sample`. Logits may be so far apart that their difference is -infinity."""
    with np.errstate(over="ignore"):
        rows = [_sample_row(*row) for row in zip(logits, params, histories, indices, strict=True)]
    tokens, logprobs = zip(*rows, strict=True)
    return np.array(tokens, np.int32), np.array(logprobs, np.float32)


def _sample_row(
    logits: FloatArray, params: SamplingParams, history: npt.NDArray[np.int32], index: int
) -> tuple[int, float]:
    adjusted = _adjust(logits, params, history)
    if np.isnan(logits).any() or not np.isfinite(logits.max()) or not np.isfinite(adjusted.max()):
        raise SamplingError("logits hold NaN or +infinity, or are all -infinity: the model's output is broken")
    token = int(np.argmax(adjusted)) if params.temperature == 0 else _draw(adjusted, params, index)
    total = int(weights(logits, 1.0).sum(dtype=np.int64))
    logprob = float(logits[token] - logits.max()) - float(np.log(total / WEIGHT_ONE))
    return token, logprob


def _adjust(logits: FloatArray, params: SamplingParams, history: npt.NDArray[np.int32]) -> FloatArray:
    adjusted = logits.copy()
    if params.repetition_penalty != 1:
        penalty, seen = _F(params.repetition_penalty), np.unique(history)
        adjusted[seen] = np.where(adjusted[seen] > 0, adjusted[seen] / penalty, adjusted[seen] * penalty)
    for token, bias in params.logit_bias.items():
        adjusted[token] += _F(bias)
    return adjusted


def _draw(logits: FloatArray, params: SamplingParams, index: int) -> int:
    kept = weights(logits, params.temperature)
    if 0 < params.top_k < len(logits):
        order = np.lexsort((np.arange(len(logits)), -logits))
        kept[order[params.top_k :]] = 0
    if params.top_p < 1:
        order = np.lexsort((np.arange(len(kept)), -kept))
        cumulative = np.cumsum(kept[order])
        enough = int(np.argmax(cumulative >= params.top_p * float(cumulative[-1])))
        kept[order[enough + 1 :]] = 0
    kept[kept < params.min_p * WEIGHT_ONE] = 0
    cumulative = np.cumsum(kept)
    target = random_u64(params.seed, index) * int(cumulative[-1]) >> 64
    return int(np.searchsorted(cumulative, target, side="right"))


def weights(logits: FloatArray, temperature: float) -> npt.NDArray[np.int64]:
    """round(exp((logits - max) / temperature) * 2^30), the exponential as in Cephes' expf."""
    x = np.maximum((logits - logits.max()) * _F(1 / temperature), _SMALLEST_EXPONENT)
    power = (x * _LOG2_E + _ROUNDER) - _ROUNDER
    r = x - power * _LN2_HIGH
    r = r - power * _LN2_LOW
    y = _EXP_POLYNOMIAL[0]
    for coefficient in _EXP_POLYNOMIAL[1:]:
        y = y * r + coefficient
    y = y * (r * r) + r + _F(1)
    scaled: FloatArray = np.ldexp(y, power.astype(np.int32) + 30)
    return (scaled + _F(0.5)).astype(np.int64)


def random_u64(seed: int, index: int) -> int:
    """Philox4x32-10 (Salmon et al., SC'11): the first two words of counter `index` under key `seed`."""
    counter = (index & _MASK_32, index >> 32, 0, 0)
    key = (seed & _MASK_32, seed >> 32)
    word0, word1, _, _ = philox(counter, key)
    return word0 | word1 << 32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block: four 32-bit words."""
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = _PHILOX_MULTIPLIERS[0] * counter[0], _PHILOX_MULTIPLIERS[1] * counter[2]
        counter = (
            product1 >> 32 ^ counter[1] ^ key[0],
            product1 & _MASK_32,
            product0 >> 32 ^ counter[3] ^ key[1],
            product0 & _MASK_32,
        )
        key = ((key[0] + _PHILOX_KEY_STEPS[0]) & _MASK_32, (key[1] + _PHILOX_KEY_STEPS[1]) & _MASK_32)
    return counter
