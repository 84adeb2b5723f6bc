"""Hidden and exposed sending time of one transfer."""

from collections.abc import Callable


class SendingClock:
    """How long something was on its way: before the prompt was finished (hidden), and after (exposed)."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._busy_since_s: float | None = None
        self._busy_s = 0.0
        self._finished_s: float | None = None
        self._hidden_s = 0.0
        self._last_ack_s = 0.0

    @property
    def busy_s(self) -> float:
        running_s = 0.0 if self._busy_since_s is None else self._now_s() - self._busy_since_s
        return self._busy_s + running_s

    @property
    def hidden_ms(self) -> float:
        return 1e3 * self._hidden_s

    @property
    def exposed_ms(self) -> float:
        return 0.0 if self._finished_s is None else 1e3 * max(0.0, self._last_ack_s - self._finished_s)

    def chunk_started(self) -> None:
        if self._busy_since_s is None:
            self._busy_since_s = self._now_s()

    def prompt_finished(self) -> None:
        self._finished_s = self._now_s()
        self._hidden_s = self.busy_s

    def acknowledged(self, *, outstanding: bool) -> None:
        self._last_ack_s = self._now_s()
        if not outstanding:
            self._busy_s = self.busy_s
            self._busy_since_s = None
