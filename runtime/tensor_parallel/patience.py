"""How long the ranks of one engine wait for each other."""

from dataclasses import dataclass

from edgellm.runtime.config import NodeError


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Every wait of one rank for another."""

    beat_s: float = 0.1
    missed_beats: int = 5
    """So many in a row are borne; with one more, the other rank counts as gone. A process that is stopped is noticed
    within 0.6 s of its last beat; one that lives has missed four where the machine was overloaded many times over."""
    missed_loading: int = 100
    """Likewise of a rank that is not known to work yet: to load an engine may keep all else in a process waiting."""
    connect_s: float = 30.0
    """To meet for the first sum."""
    sum_s: float = 20.0
    """For the slowest rank to come to one sum."""


class Silence:
    """Beats that one peer has missed. They are counted, not timed: a process that was stopped itself has missed one."""

    def __init__(self, peer: str, patience: Patience) -> None:
        self._peer = peer
        self._patience = patience
        self._borne = patience.missed_loading
        self._missed = 0

    def heard(self) -> None:
        self._missed = 0

    def works(self) -> None:
        """The peer's engine is loaded."""
        self._borne = self._patience.missed_beats

    def beat(self) -> None:
        """Called once per `beat_s`. Raises NodeError when it was too many."""
        self._missed += 1
        if self._missed > self._borne:
            silence_s = self._missed * self._patience.beat_s
            raise NodeError(f"{self._peer} has said nothing for {silence_s:g} s; all ranks must start again")
