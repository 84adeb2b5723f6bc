"""Results of the engine benchmark on disk, one file each, so that a table can be measured in parts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.comparison import Compared
from bench.installed_code import Conditions, peer_code
from bench.pairs import Scenario
from bench.peers.contenders import Contender
from bench.peers.models import Model


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One cell of the table."""

    model: Model
    peer: Contender
    scenario: Scenario

    @property
    def name(self) -> str:
        return f"{self.peer.name} on {self.model.name}, {self.scenario.name}"


@dataclass(kw_only=True)
class Gathered:
    """What a report can be made of, and a sentence for each cell that it cannot have."""

    results: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ResultStore:
    """A folder; a newer result of the same cell takes the place of the older."""

    folder: Path

    def write(self, result: Compared) -> str | None:
        """Whole or not at all. One without figures takes the place of none that has some: then a sentence on that."""
        cell = Wanted(model=result.model, peer=result.peer, scenario=result.scenario)
        before = None if result.pairing is not None else self.read(cell)
        if before is not None and before.pairing is not None:
            return f"not measured again: {cell.name}: {result.reason}; the result of {before.measured_at} is kept"
        write_whole(self._path(cell), msgspec.json.encode(result))
        return None

    def read(self, wanted: Wanted) -> Compared | None:
        """None where nothing was measured, or what was is in the form of an older benchmark."""
        try:
            return msgspec.json.decode(self._path(wanted).read_bytes(), type=Compared)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def is_current(self, wanted: Wanted, now: Conditions) -> bool:
        """Whether there are figures that were taken under these conditions, of this code as far as that is known."""
        result = self.read(wanted)
        return result is not None and result.pairing is not None and _difference(result, now) is None

    def gather(self, cells: Sequence[Wanted], now: Conditions, kernels_sha256: str) -> Gathered:
        """Results taken under other conditions or of other peers are left out; those of other kernels are named."""
        gathered = Gathered()
        for cell in cells:
            result = self.read(cell)
            if result is None:
                gathered.notes.append(f"not measured: {cell.name}")
            elif difference := _difference(result, now):
                gathered.notes.append(f"left out: {cell.name}, of {result.measured_at}: {difference}")
            else:
                gathered.results.append(result)
                if result.kernels_sha256 != kernels_sha256:
                    gathered.notes.append(f"with other kernels than now: {cell.name}, of {result.measured_at}")
        unknown = sum(result.peer_code is None for result in gathered.results)
        if unknown:
            gathered.notes.append(f"not known of which versions of the peer and its driver: {unknown} of the results")
        return gathered

    def _path(self, wanted: Wanted) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', wanted.name)}.json"


def _difference(result: Compared, now: Conditions) -> str | None:
    """The first thing that differs from now, for people. A result that does not say its peer's code is as measured."""
    if difference := result.conditions.difference(now):
        return difference
    return None if result.peer_code is None else result.peer_code.difference(peer_code(result.peer))


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
