"""Writes the journal beside the event loop, and lets tokens through once they are in it."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from edgellm.orchestrator.journal import Entry, JournalFile

logger = logging.getLogger(__name__)

RESUMABLE_S = 300.0
"""Requests that ended are kept for so long."""
TIDY_EVERY_S = 30.0


class Journal(Protocol):
    """Where a driver writes what must outlive it."""

    def record(self, entries: Sequence[Entry], then: Callable[[], None]) -> None:
        """Call `then` on the event loop once the entries are safe; calls keep the order of the records."""
        ...


class JournalWriter:
    """A thread that commits whatever came in while it committed what came before.

    So a commit that takes long makes the next one larger, and never the event loop wait. Should the disk fail, answers
    go on without a journal: they are worth more.
    """

    def __init__(self, file: JournalFile, loop: asyncio.AbstractEventLoop) -> None:
        self._file = file
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Sequence[Entry], Callable[[], None]] | None] = queue.SimpleQueue()
        self._tidied_s = time.monotonic()
        self._works = True
        self._thread = threading.Thread(target=self._run, name="journal")
        self._thread.start()

    def record(self, entries: Sequence[Entry], then: Callable[[], None]) -> None:
        self._queue.put((entries, then))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is left and end."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            records = [record for record in batch if record is not None]
            self._guarded(lambda: self._file.write(entry for entries, _ in records for entry in entries))  # noqa: B023
            if not self._let_through([then for _, then in records]) or None in batch:
                return
            if time.monotonic() - self._tidied_s > TIDY_EVERY_S:
                self._tidied_s = time.monotonic()
                self._guarded(lambda: self._file.tidy(time.time() - RESUMABLE_S))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            if self._works:
                action()
        except Exception:  # whatever it is, clients must not wait for a thread that has ended
            self._works = False
            logger.exception("the journal failed: answers go on, but would not survive a restart")

    def _let_through(self, thens: Sequence[Callable[[], None]]) -> bool:
        def run() -> None:
            for then in thens:
                then()

        try:
            self._loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop is closed
            return False
        return True
