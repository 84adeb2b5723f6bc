"""What every benchmark returns, and how it is shown: for people a table, for programs one JSON object."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number that was promised."""

    name: str
    value: float
    target: float
    met: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of one benchmark; each result is a flat record, and all have the same keys."""

    name: str
    machine: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    targets: Sequence[Target]
    notes: Sequence[str] = ()
    """What a reader has to know beside the figures, a sentence each."""

    def with_note(self, note: str) -> "Report":
        return dataclasses.replace(self, notes=[*self.notes, note])

    def as_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    def show(self, console: Console) -> None:
        console.print(", ".join(f"{key} {value}" for key, value in self.machine.items()), highlight=False)
        console.print(_results_table(self.name, self.results))
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        for target in self.targets:
            verdict = "[green]met" if target.met else "[red]missed"
            console.print(
                f"{verdict}[/] {target.name}: {target.value:.4g}, target {target.target:.4g}", highlight=False
            )


def machine() -> dict[str, Any]:
    """What the numbers were taken on; the load says how busy it was with other work."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """As the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _results_table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    for key in results[0] if results else ():
        table.add_column(key.replace("_", " "), justify="right" if _is_number(results[0][key]) else "left")
    for result in results:
        table.add_row(*map(_cell_text, result.values()))
    return table


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    return _number_text(value) if isinstance(value, float) else str(value)


def _number_text(value: float) -> str:
    """Four digits, no exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
