"""Notices a node whose decode steps take far longer than its own usual: thermal throttling, a failing disk."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from edgellm.orchestrator.core.values import NodeLoad

SLOW_FACTOR = 2.5
"""A device throttled to a third takes three times as long, and its steps scatter."""
WELL_FACTOR = 1.5
BEATS_TO_JUDGE = 10
"""Heartbeats in a row that must agree, so that nothing flaps: one second."""
LEAST_HISTORY = 20
LONGEST_HISTORY = 64
FIRST_PROBE_S = 10.0
"""A node without work cannot show that it is well again: after so long it gets some, then after twice as long."""
LONGEST_PROBE_S = 300.0


@dataclass(kw_only=True)
class StepTimes:
    """One node's step times, compared with those of batches of a like size before."""

    slow_since_s: float | None = None
    factor: float = 1.0
    """Of its usual step time, as of the last heartbeat with work."""
    _history: dict[int, deque[float]] = field(default_factory=dict)
    _agreeing: int = 0
    _steps: int = 0
    _probe_s: float = FIRST_PROBE_S

    def observe(self, now_s: float, load: NodeLoad, others: Iterable["StepTimes"]) -> None:
        """Take a heartbeat. Where the other working nodes are slower as well, load is to blame, not this node."""
        worked, self._steps = load.steps > self._steps, load.steps
        if self.slow_since_s is not None and now_s - self.slow_since_s > self._probe_s:
            self._recover(min(2 * self._probe_s, LONGEST_PROBE_S))
        if not worked or load.running == 0 or load.decode_step_ms <= 0:
            return
        self._compare(load)
        busy = median([other.factor for other in others] or [1.0]) > WELL_FACTOR
        self._judge(now_s, is_slow=self.factor >= SLOW_FACTOR and not busy)

    def _compare(self, load: NodeLoad) -> None:
        history = self._history.setdefault(load.running.bit_length(), deque(maxlen=LONGEST_HISTORY))
        self.factor = load.decode_step_ms / median(history) if len(history) >= LEAST_HISTORY else 1.0
        if self.factor < SLOW_FACTOR:
            history.append(load.decode_step_ms)

    def _judge(self, now_s: float, *, is_slow: bool) -> None:
        if self.slow_since_s is None:
            self._agreeing = self._agreeing + 1 if is_slow else 0
            if self._agreeing >= BEATS_TO_JUDGE:
                self.slow_since_s, self._agreeing = now_s, 0
        else:
            self._agreeing = self._agreeing + 1 if self.factor < WELL_FACTOR else 0
            if self._agreeing >= BEATS_TO_JUDGE:
                self._recover(FIRST_PROBE_S)

    def _recover(self, next_probe_s: float) -> None:
        self.slow_since_s, self._agreeing, self._probe_s = None, 0, next_probe_s
