"""What a simulated run was like, in the figures that serving systems are compared by."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.orchestrator.sim.clients import ClientRequest


@dataclass(frozen=True, kw_only=True)
class Report:
    """Times in milliseconds; requests that ended without a token count only as `failed`."""

    requests: int
    failed: int
    tokens_per_s: float
    ttft_ms: dict[str, float]
    """By percentile: `p50`, `p90`, `p99`."""
    tpot_ms: dict[str, float]
    paths: dict[str, int]
    """Requests by how their prompt was read."""


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest rank; zeros where there are no values."""
    ranked = sorted(values) or [0.0]
    return {f"p{p}": ranked[min(len(ranked) - 1, round(p / 100 * (len(ranked) - 1)))] for p in (50, 90, 99)}


def report(requests: Sequence[ClientRequest], duration_s: float) -> Report:
    stats = [request.stats for request in requests if request.stats is not None and request.tokens]
    paths = [one.prefill_path for one in stats if one.prefill_path is not None]
    return Report(
        requests=len(requests),
        failed=len(requests) - len(stats),
        tokens_per_s=sum(one.generated_tokens for one in stats) / duration_s if duration_s else 0.0,
        ttft_ms=percentiles([one.ttft_ms for one in stats]),
        tpot_ms=percentiles([one.tpot_ms for one in stats if one.generated_tokens > 1]),
        paths={path: paths.count(path) for path in sorted(set(paths))},
    )
