"""How long the ranks of one engine wait for each other."""

from dataclasses import dataclass

from edgellm.runtime.config import NodeError


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Every wait of one rank for another."""

    beat_s: float = 1.0
    missed_beats: int = 10
    """So many in a row, and the other rank counts as gone."""
    connect_s: float = 30.0
    """To meet for the first sum."""
    sum_s: float = 20.0
    """For the slowest rank to come to one sum."""


class Silence:
    """Beats that one peer has missed. They are counted, not timed: a process that was stopped itself has missed one."""

    def __init__(self, peer: str, patience: Patience) -> None:
        self._peer = peer
        self._patience = patience
        self._missed = 0

    def heard(self) -> None:
        self._missed = 0

    def beat(self) -> None:
        """Called once per `beat_s`. Raises NodeError when it was too many."""
        self._missed += 1
        if self._missed > self._patience.missed_beats:
            raise NodeError(
                f"{self._peer} has said nothing for {self._patience.missed_beats * self._patience.beat_s:g} s; "
                "all ranks must start again"
            )
