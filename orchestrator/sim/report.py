"""What a simulated run was like, in the figures that serving systems are compared by."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.runtime.rpc import inference_pb2

_PATHS = {
    inference_pb2.PREFILL_PATH_REMOTE: "remote",
    inference_pb2.PREFILL_PATH_LOCAL: "local",
    inference_pb2.PREFILL_PATH_DEGRADED: "degraded",
}


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


def report(ends: Sequence[inference_pb2.Finished | None], duration_s: float) -> Report:
    """`ends`: of all requests, None for those that were refused."""
    answered = [end for end in ends if end is not None and end.generated_tokens]
    paths = [_PATHS[end.prefill_path] for end in answered if end.prefill_path in _PATHS]
    return Report(
        requests=len(ends),
        failed=len(ends) - len(answered),
        tokens_per_s=sum(end.generated_tokens for end in answered) / duration_s if duration_s else 0.0,
        ttft_ms=percentiles([end.timing.ttft_ms for end in answered]),
        tpot_ms=percentiles([end.timing.tpot_ms for end in answered if end.generated_tokens > 1]),
        paths={path: paths.count(path) for path in sorted(set(paths))},
    )
