"""Figures from runs that took turns: of each round what ours took, what the peer took, and what the machine gave."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from bench.busy import CpuShares

Phase: TypeAlias = Literal["prefill", "decode"]

MIN_STEPS: Final = 4
MAX_STEPS: Final = 64
RUN_S: Final = 0.7
"""What one decoding run of the slower side should take."""
SECOND_THREAD_HELPS: Final = 1.4
"""Memory counts as fast where two threads read so many times faster than one."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is measured; `context`: tokens of each sequence before a decoding run, or of the prompt."""

    phase: Phase
    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"prefill {self.context}" if self.phase == "prefill" else f"decode b{self.batch} at {self.context}"

    def tokens(self, steps: int) -> int:
        """Read or written by a run."""
        return self.context if self.phase == "prefill" else self.batch * steps


DECODE_1: Final = Scenario(phase="decode", batch=1, context=512)
DECODE_8: Final = Scenario(phase="decode", batch=8, context=128)
DECODE_32: Final = Scenario(phase="decode", batch=32, context=128)
PREFILL_512: Final = Scenario(phase="prefill", batch=1, context=512)
PREFILL_2048: Final = Scenario(phase="prefill", batch=1, context=2048)
SCENARIOS: Final = (DECODE_1, DECODE_8, DECODE_32, PREFILL_512, PREFILL_2048)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of each side, one after the other, and the memory's speed just before."""

    ours_s: float
    peer_s: float
    read_1_gb_per_s: float
    """With one thread."""
    read_2_gb_per_s: float
    """With all threads."""
    shares: CpuShares

    @property
    def read_gb_per_s(self) -> float:
        return max(self.read_1_gb_per_s, self.read_2_gb_per_s)


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Rounds of one scenario against one peer."""

    scenario: Scenario
    steps: int
    """Of a decoding run."""
    rounds: tuple[Round, ...]

    @property
    def ours_tokens_per_s(self) -> float:
        return self.scenario.tokens(self.steps) / statistics.median(r.ours_s for r in self.rounds)

    @property
    def peer_tokens_per_s(self) -> float:
        return self.scenario.tokens(self.steps) / statistics.median(r.peer_s for r in self.rounds)

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over rounds, so that a slow minute of the machine hits both."""
        return statistics.median(r.peer_s / r.ours_s for r in self.rounds)

    @property
    def others_share(self) -> float:
        """Median share of the processors that neither side used but somebody did."""
        return statistics.median(r.shares.others + r.shares.stolen for r in self.rounds)

    def of_bandwidth(self, bytes_per_step: float) -> float:
        """Share of the memory's speed at the same moment that ours reached."""
        return statistics.median(bytes_per_step * self.steps / r.ours_s / (1e9 * r.read_gb_per_s) for r in self.rounds)

    @property
    def read_gb_per_s(self) -> float:
        return statistics.median(r.read_gb_per_s for r in self.rounds)

    @property
    def takes_longer(self) -> bool:
        """Whether ours does, in most rounds: only then there is a time in which it did more."""
        return 2 * sum(r.ours_s > r.peer_s for r in self.rounds) > len(self.rounds)

    def extra_gb_per_s(self, extra_bytes: float) -> float:
        """Of the bytes that each step of ours reads more than the other's, in the time that it `takes_longer`."""
        extra_s = statistics.median(r.ours_s - r.peer_s for r in self.rounds)
        return extra_bytes * self.steps / (1e9 * extra_s)

    def extra_of_bandwidth(self, extra_bytes: float) -> float:
        """The same over the memory's speed, by what could have been read in each round's time."""
        readable_gb = statistics.median((r.ours_s - r.peer_s) * r.read_gb_per_s for r in self.rounds)
        return extra_bytes * self.steps / (1e9 * readable_gb)


def clean(rounds: Sequence[Round]) -> tuple[Round, ...]:
    """Those in which nobody else used the machine."""
    return tuple(r for r in rounds if not r.shares.is_busy)


def memory_is_fast(rounds: Sequence[Round]) -> bool:
    """Whether a second thread reads faster, in most rounds."""
    return statistics.median(r.read_2_gb_per_s / r.read_1_gb_per_s for r in rounds) >= SECOND_THREAD_HELPS


def steps_per_run(slower_step_s: float) -> int:
    """So many that a run of the slower side takes about `RUN_S`."""
    return min(max(round(RUN_S / slower_step_s), MIN_STEPS), MAX_STEPS)


def bytes_per_step(scenario: Scenario, weight_bytes: int, kv_bytes_per_token: int, steps: int) -> float:
    """What a decoding step has to read: all weights, and the KV of every sequence, grown by half the run."""
    return weight_bytes + scenario.batch * (scenario.context + steps / 2) * kv_bytes_per_token
