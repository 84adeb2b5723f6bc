"""A journal on a disk that takes its time, and that outlives the orchestrator."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from edgellm.orchestrator.journal import Entry, JournalFile

COMMIT_S: Final = 0.002


class SimulatedJournal:
    """The real file; a commit takes COMMIT_S and carries all that was recorded meanwhile, as the real writer's does.

    A process that is killed loses what was not committed, and nobody was told of that.
    """

    def __init__(self, path: Path, bundle_sha256: str, loop: asyncio.AbstractEventLoop) -> None:
        self.file = JournalFile(path, bundle_sha256)
        self._loop = loop
        self._waiting: list[tuple[Sequence[Entry], Callable[[], None]]] = []
        self._is_writing = False

    def record(self, entries: Sequence[Entry], then: Callable[[], None]) -> None:
        self._waiting.append((entries, then))
        if not self._is_writing:
            self._write()

    def _write(self) -> None:
        batch, self._waiting = self._waiting, []
        self._is_writing = bool(batch)
        if batch:
            self._loop.call_later(COMMIT_S, self._committed, batch)

    def _committed(self, batch: list[tuple[Sequence[Entry], Callable[[], None]]]) -> None:
        self.file.write(entry for entries, _ in batch for entry in entries)
        for _, then in batch:
            then()
        self._write()
