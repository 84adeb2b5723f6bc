"""How one request wants its tokens chosen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-3, 100.0
_MAX_PENALTY = 100.0
_MAX_BIAS = 1000.0


class SamplingError(ValueError):
    """Logits or parameters that nothing can be sampled from; the message names the value."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Applied in this order: repetition penalty, logit bias, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """0: greedy, the first of the largest logits; the filters after it then have no effect."""
    top_k: int = 0
    """Keep the k largest logits; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have at least this probability."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of earlier tokens are divided by it where positive, multiplied where negative (arXiv 1909.05858)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int
    """With the token's index in the answer, the only source of randomness."""

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise SamplingError for the first field that is NaN or out of range; biased tokens against `vocab_size`."""
        if self.temperature != 0:
            _check_range("temperature", self.temperature, _MIN_TEMPERATURE, _MAX_TEMPERATURE, "0 for greedy, or ")
        _check_range("top_k", self.top_k, 0, math.inf)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise SamplingError("top_p is 0, which keeps no token; use temperature 0 for greedy")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1 / _MAX_PENALTY, _MAX_PENALTY)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        for token, bias in self.logit_bias.items():
            _check_range("logit_bias token id", token, 0, math.inf if vocab_size is None else vocab_size - 1)
            _check_range(f"logit_bias of token {token}", bias, -_MAX_BIAS, _MAX_BIAS)


def _check_range(name: str, value: float, low: float, high: float, extra: str = "") -> None:
    if not low <= value <= high:
        raise SamplingError(f"{name} is {value}; it must be {extra}between {low} and {high}")
