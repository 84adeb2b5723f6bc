"""What nodes say of themselves to Prometheus, and what their steps took between two readings."""

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

Page: TypeAlias = Mapping[str, float]
"""Each sample by its name with labels, as it is written there."""

_STEP: Final = "edgellm_step_seconds"
_ROUND_TRIP: Final = "edgellm_stage_round_trip_seconds"
_WRITING: Final = ('{kind="decode"}', '{kind="stage"}')
"""Steps of answers that begin on the node, and of those that begin on an earlier stage."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Means of one node over one reading, in milliseconds; None where there was nothing of the kind."""

    step_ms: float | None
    """Of the engine, for steps that write."""
    round_trip_ms: float | None
    """From sending a step to the next stage to its result."""


def read_page(port: int) -> Page:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return parse_page(answer.read().decode())


def parse_page(text: str) -> Page:
    """The text format of Prometheus, without timestamps."""
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def step_times(before: Page, after: Page) -> StepTimes:
    """Of one node, from its counters."""
    return StepTimes(
        step_ms=_mean_ms(before, after, _STEP, _WRITING), round_trip_ms=_mean_ms(before, after, _ROUND_TRIP, ("",))
    )


def _mean_ms(before: Page, after: Page, name: str, labels: tuple[str, ...]) -> float | None:
    seconds, count = (
        sum(after.get(key, 0.0) - before.get(key, 0.0) for key in (f"{name}_{part}{label}" for label in labels))
        for part in ("sum", "count")
    )
    return 1e3 * seconds / count if count else None
