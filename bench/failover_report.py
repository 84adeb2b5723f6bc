"""From pauses and throughputs to the rows and targets of the failover benchmark."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from bench.clusters import Steady, median_ratio, median_tokens_per_s
from bench.recovery import Pause
from bench.report import Target

KILLED: Final = "SIGKILL of a stage"
STOPPED: Final = "SIGSTOP of a stage"
RESTARTED: Final = "SIGKILL of the orchestrator"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over all clients of all rounds, and the 99th percentile of the pause; milliseconds."""

    event: str
    way: str
    context: int
    requests: int
    pause_ms: float = 0.0
    pause_p99_ms: float = 0.0
    detect_ms: float = 0.0
    fence_ms: float = 0.0
    restore_ms: float = 0.0
    first_token_ms: float = 0.0
    tokens_per_s: float = 0.0
    copied_bytes_per_token: float = 0.0
    of_no_copies: float = 0.0
    """Tokens per second over those without copies, the median of rounds."""
    lag_tokens: float = 0.0
    """Of the copy furthest behind, the median of moments."""
    lag_most_tokens: float = 0.0
    lag_ms: float = 0.0
    """The median lag at the pace at which a client's tokens came."""


def steady_row(way: str, context: int, clients: int, runs: Sequence[Steady], others: Sequence[Steady]) -> Row:
    lags = [lag for run in runs for lag in run.lag_tokens]
    tokens_per_s = median_tokens_per_s(runs)
    return Row(
        event="none",
        way=way,
        context=context,
        requests=clients * len(runs),
        tokens_per_s=tokens_per_s,
        copied_bytes_per_token=statistics.median(run.copied_bytes_per_token for run in runs),
        of_no_copies=median_ratio(runs, others),
        lag_tokens=statistics.median(lags),
        lag_most_tokens=max(lags),
        lag_ms=1e3 * statistics.median(lags) * clients / tokens_per_s,
    )


def row_of_pauses(event: str, way: str, context: int, pauses: Sequence[Pause]) -> Row:
    medians = {one.name: statistics.median(getattr(p, one.name) for p in pauses) for one in fields(Pause)}
    ranked = sorted(pause.pause_ms for pause in pauses)
    p99 = ranked[min(len(ranked) - 1, round(0.99 * len(ranked)))]
    return Row(event=event, way=way, context=context, requests=len(pauses), pause_p99_ms=p99, **medians)


def targets(rows: Sequence[Row], differing: int) -> list[Target]:
    """Of the events that were measured."""
    by_event = {(row.event, row.way): row for row in rows}
    found = _kill_targets(rows)
    if any(row.event != "none" for row in rows):
        found.append(_at_most("answers that differ from a calm run", differing, 0))
    if (stopped := by_event.get((STOPPED, "hot copy"))) is not None:
        found.append(_at_most("last pause after SIGSTOP of a stage, ms", stopped.pause_p99_ms, 1200))
    if (calm := by_event.get(("none", "hot copy"))) is not None:
        found.append(_at_most("share of tokens per second that hot copies cost", 1 - calm.of_no_copies, 0.05))
        found.append(_at_most("tokens that a copy lags, at any of the moments", calm.lag_most_tokens, 8))
    if (restarted := by_event.get((RESTARTED, "journal"))) is not None:
        found.append(_at_most("last pause after the orchestrator's restart, ms", restarted.pause_p99_ms, 3000))
    return found


def _kill_targets(rows: Sequence[Row]) -> list[Target]:
    ours = {row.context: row for row in rows if row.event == KILLED and row.way == "hot copy"}
    again = {row.context: row for row in rows if row.event == KILLED and row.way == "token replay"}
    found = []
    if ours:
        first = ours[min(ours)]
        found.append(_at_most(f"pause after SIGKILL of a stage, {first.context} tokens, ms", first.pause_ms, 300))
        found.append(_at_most(f"the same, 99th percentile, {first.context} tokens, ms", first.pause_p99_ms, 700))
    if both := ours.keys() & again.keys():
        long = max(both)
        sooner = again[long].pause_ms / ours[long].pause_ms
        name = f"times sooner than reading {long} tokens again"
        found.append(Target(name=name, value=sooner, target=5, met=sooner >= 5))
    return found


def _at_most(name: str, value: float, target: float) -> Target:
    return Target(name=name, value=value, target=target, met=value <= target)
