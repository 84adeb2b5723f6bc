"""What clients saw at one rate of requests, and whether it holds what was promised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

TTFT_P99_MS: Final = 300.0
TPOT_P99_MS: Final = 25.0


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One answer, in seconds since the request was sent."""

    first_token_s: float
    last_token_s: float
    tokens: int

    @property
    def ttft_ms(self) -> float:
        return 1e3 * self.first_token_s

    @property
    def tpot_ms(self) -> float:
        """Mean time per token after the first."""
        return 1e3 * (self.last_token_s - self.first_token_s) / max(self.tokens - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One server at one rate."""

    server: str
    weights: str
    rate_per_s: float
    requests: int
    unfinished: int
    """Not answered to the end when the time was up, or refused."""
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p50_ms: float | None
    tpot_p99_ms: float | None
    tokens_per_s: float
    others: float
    """Share of the processors that neither the server nor the clients used."""

    @property
    def holds(self) -> bool:
        """Both bounds, with every request answered."""
        if self.unfinished or self.ttft_p99_ms is None or self.tpot_p99_ms is None:
            return False
        return self.ttft_p99_ms < TTFT_P99_MS and self.tpot_p99_ms < TPOT_P99_MS


def summarise(
    server: str,
    weights: str,
    rate_per_s: float,
    requests: int,
    seen: Sequence[Observation],
    whole_s: float,
    others: float,
) -> Step:
    """`seen`: of the requests that were answered; `whole_s`: from the first request to the last token."""
    return Step(
        server=server,
        weights=weights,
        rate_per_s=rate_per_s,
        requests=requests,
        unfinished=requests - len(seen),
        ttft_p50_ms=percentile([o.ttft_ms for o in seen], 50),
        ttft_p99_ms=percentile([o.ttft_ms for o in seen], 99),
        tpot_p50_ms=percentile([o.tpot_ms for o in seen], 50),
        tpot_p99_ms=percentile([o.tpot_ms for o in seen], 99),
        tokens_per_s=sum(o.tokens for o in seen) / whole_s,
        others=others,
    )


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent of the values do not exceed; None of none."""
    if not values:
        return None
    rank = -(-percent * len(values) // 100)
    return sorted(values)[max(rank, 1) - 1]


def highest_rate(steps: Sequence[Step], server: str) -> float:
    """Of a server, below the first rate that it did not hold; 0 if it held none."""
    highest = 0.0
    for step in sorted((s for s in steps if s.server == server), key=lambda s: s.rate_per_s):
        if not step.holds:
            return highest
        highest = step.rate_per_s
    return highest
