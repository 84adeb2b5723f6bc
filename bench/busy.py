"""How much processor time others use: a comparison means something only where that is next to nothing."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BUSY_SHARE: Final = 0.05
"""Of all cores. Above it nothing is compared."""
WATCH_S: Final = 2.0
_PROC: Final = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Seconds since the start of the machine, over all cores, but for `at_s`."""

    at_s: float
    busy_s: float
    stolen_s: float
    """Taken by the host for other virtual machines."""
    ours_s: float
    """Of the processes of this run."""


@dataclass(frozen=True, kw_only=True)
class CpuShares:
    """Of the time of all cores, 0 to 1."""

    others: float
    stolen: float

    @property
    def is_busy(self) -> bool:
        return self.others + self.stolen > BUSY_SHARE


def read_times(pids: Sequence[int]) -> CpuTimes:
    """Now; `pids`: running processes of this run beside this process."""
    busy_s, stolen_s = parse_machine((_PROC / "stat").read_text(), os.sysconf("SC_CLK_TCK"))
    ours_s = sum(_process_s(pid) for pid in (os.getpid(), *pids))
    return CpuTimes(at_s=time.monotonic(), busy_s=busy_s, stolen_s=stolen_s, ours_s=ours_s)


def shares(before: CpuTimes, after: CpuTimes, cores: int) -> CpuShares:
    """What others and the host took in between."""
    whole_s = cores * max(after.at_s - before.at_s, 1e-9)
    others_s = (after.busy_s - before.busy_s) - (after.ours_s - before.ours_s)
    return CpuShares(
        others=min(max(others_s / whole_s, 0.0), 1.0),
        stolen=min(max((after.stolen_s - before.stolen_s) / whole_s, 0.0), 1.0),
    )


def core_count() -> int:
    """Of the machine, as /proc/stat sums over all of them."""
    return os.cpu_count() or 1


def watch(seconds: float) -> CpuShares:
    """Shares while this process sleeps."""
    before = read_times([])
    time.sleep(seconds)
    return shares(before, read_times([]), core_count())


def refuse_if_busy(even_if_busy: bool) -> None:
    """ValueError if others use the machine now, unless that is accepted."""
    found = watch(WATCH_S)
    if found.is_busy and not even_if_busy:
        raise ValueError(
            f"others use {found.others:.0%} of the processors and the host takes {found.stolen:.0%}; "
            f"above {BUSY_SHARE:.0%} nothing is compared. Wait, or pass --even-if-busy"
        )


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {int(path.name): _parent(path) for path in _PROC.iterdir() if path.name.isdecimal()}
    return descendants(pid, parents)


def descendants(pid: int, parents: Mapping[int, int]) -> list[int]:
    """`pid` and whoever has it as an ancestor; parents: of each process."""
    found = [pid]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found


def parse_machine(stat: str, ticks_per_s: int) -> tuple[float, float]:
    """Busy and stolen seconds from /proc/stat: `cpu user nice system idle iowait irq softirq steal guest guest_nice`.

    Time of guests is part of user's. Stolen time is not busy time.
    """
    name, *fields = stat.splitlines()[0].split()
    if name != "cpu" or len(fields) < 8:
        raise ValueError(f"/proc/stat begins with {stat.splitlines()[0]!r}, not with the sums over all cores")
    user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, fields[:8])
    return (user + nice + system + irq + softirq) / ticks_per_s, stolen / ticks_per_s


def parse_process(stat: str, ticks_per_s: int) -> float:
    """User and system seconds from /proc/PID/stat, children that were waited for included; the name may have spaces."""
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / ticks_per_s


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _process_s(pid: int) -> float:
    try:
        return parse_process((_PROC / str(pid) / "stat").read_text(), os.sysconf("SC_CLK_TCK"))
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
