"""How long a request stood still because devices failed, and where that time went."""

from dataclasses import dataclass, field

from edgellm.orchestrator.core.values import RecoveryStats


@dataclass(kw_only=True)
class Pause:
    """From a failure to the next token."""

    last_sign_s: float
    """When the failing device was last heard of."""
    decided_s: float
    commanded_s: float
    restored_s: float


@dataclass(kw_only=True)
class RecoveryClock:
    """Sums the pauses of one request. At most one is under way: a second failure lengthens the first."""

    stats: RecoveryStats = field(default_factory=RecoveryStats)
    interruptions: int = 0
    _pause: Pause | None = None

    @property
    def is_paused(self) -> bool:
        return self._pause is not None

    def interrupt(self, now_s: float, last_sign_s: float) -> None:
        self.interruptions += 1
        if self._pause is None:
            self._pause = Pause(last_sign_s=last_sign_s, decided_s=now_s, commanded_s=now_s, restored_s=now_s)

    def commanded(self, now_s: float) -> None:
        """Nodes are told to go on."""
        if self._pause is not None:
            self._pause.commanded_s = self._pause.restored_s = now_s

    def restored(self, now_s: float) -> None:
        """The KV is where it is needed, as far as is heard; only known tokens may have to be computed again."""
        if self._pause is not None:
            self._pause.restored_s = now_s

    def token(self, now_s: float) -> None:
        if self._pause is None:
            return
        pause, before, self._pause = self._pause, self.stats, None
        self.stats = RecoveryStats(
            total_ms=before.total_ms + 1000 * (now_s - pause.last_sign_s),
            detect_ms=before.detect_ms + 1000 * (pause.decided_s - pause.last_sign_s),
            fence_ms=before.fence_ms + 1000 * (pause.commanded_s - pause.decided_s),
            restore_ms=before.restore_ms + 1000 * (pause.restored_s - pause.commanded_s),
            first_token_ms=before.first_token_ms + 1000 * (now_s - pause.restored_s),
        )
