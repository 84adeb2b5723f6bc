"""What a request asks of the sampler, and when its answer ends."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.engines.sampling import SamplingParams

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Resolved wishes of one request."""

    sampling: SamplingParams
    max_tokens: int
    """Tokens to generate at most, those of earlier attempts included."""
    stop_token_ids: frozenset[int]
    logprobs: bool = False

    def finish_reason(self, index: int, token_id: int) -> FinishReason | None:
        """Whether generated token number `index` (from 0) is the last, and why."""
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """One generated token."""

    index: int
    token_id: int
    logprob: float
    """Natural logarithm, before temperature."""
    finish: FinishReason | None
