"""Two things measured by turns: rounds of a reading of the memory and a run of each, until enough were undisturbed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench import busy
from bench.loading import Loaded
from bench.machine_limits import MachineLimits
from bench.pairs import Round, Scenario, clean, steps_per_run
from bench.real_time import real_time

_PAUSE_S: Final = 0.05
"""Before each run, so that threads of the run before stop waiting actively."""
_PATIENCE: Final = 4
"""At most so many times as many rounds as are wanted: on a virtual machine the host takes processors for seconds."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two; `run` returns seconds."""

    pid: int
    run: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How to measure."""

    limits: MachineLimits
    rounds: int
    real_time: bool
    even_if_busy: bool

    def take(self, ours: Side, other: Side) -> tuple[tuple[Round, ...], str]:
        """None, and the reason, if too many rounds were disturbed."""
        rounds = list[Round]()
        for number in range(_PATIENCE * self.rounds):
            rounds.append(self._round(ours, other, ours_first=number % 2 == 0))
            kept = tuple(rounds) if self.even_if_busy else clean(rounds)
            if len(kept) == self.rounds:
                return kept, ""
        others = max(r.shares.others + r.shares.stolen for r in rounds)
        return (), f"others used up to {others:.0%} of the processors"

    def _round(self, ours: Side, other: Side, *, ours_first: bool) -> Round:
        pids = list({ours.pid, other.pid})
        before = busy.read_times(pids)
        time.sleep(_PAUSE_S)
        with real_time(wanted=self.real_time):
            reads = [self.limits.read_gb_per_s(threads) for threads in (1, self.limits.threads)]
        if ours_first:
            ours_s, other_s = _run(ours), _run(other)
        else:
            other_s, ours_s = _run(other), _run(ours)
        return Round(
            ours_s=ours_s,
            peer_s=other_s,
            read_1_gb_per_s=reads[0],
            read_2_gb_per_s=reads[1],
            shares=busy.shares(before, busy.read_times(pids), busy.core_count()),
        )


def side(loaded: Loaded, scenario: Scenario, steps: int) -> Side:
    """Runs of so many steps."""
    return Side(pid=loaded.process.pid, run=lambda: loaded.run(scenario, steps))


def warm_up(scenario: Scenario, *sides: Loaded) -> int:
    """One run of each that does not count; the steps that runs will have."""
    if scenario.phase == "prefill":
        for one in sides:
            one.run(scenario, 1)
        return 1
    few = 2
    for one in sides:
        one.run(scenario, few)
    return steps_per_run(max(one.run(scenario, few) for one in sides) / few)


def _run(one: Side) -> float:
    time.sleep(_PAUSE_S)
    return one.run()
