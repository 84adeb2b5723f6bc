"""A deadline that outlives its process: on the clock since boot, and by the time of day for after another boot."""

import time
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class LastingDeadline:
    """One moment on two clocks. The monotonic one is the same for all processes of a boot, and nobody sets it."""

    monotonic_s: float
    boot_id: str
    unix_s: float

    @classmethod
    def at(cls, monotonic_s: float) -> "LastingDeadline":
        unix_s = time.time() + monotonic_s - time.monotonic()
        return cls(monotonic_s=monotonic_s, boot_id=_boot_id(), unix_s=unix_s)

    def here(self) -> float:
        """On this process's monotonic clock, in seconds."""
        if self.boot_id and self.boot_id == _boot_id():
            return self.monotonic_s
        return time.monotonic() + self.unix_s - time.time()


def _boot_id() -> str:
    """Empty where there is no /proc: the time of day has to do."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
