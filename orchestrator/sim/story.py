"""What happened in a simulation: the program's own log lines, with the simulated time and the process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from edgellm.orchestrator.sim.loop import SimulatedLoop, current_process

_PROGRAM = logging.getLogger("edgellm")
_SILENT = logging.CRITICAL + 1


class Story(logging.Handler):
    """Empty where `wanted` is false: logging costs time."""

    def __init__(self, *, wanted: bool) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._wanted = wanted
        self._loop: SimulatedLoop | None = None

    def tell(self, line: str) -> None:
        if self._loop is not None:
            self.lines.append(f"{self._loop.time():9.4f} {line}")

    def end(self) -> None:
        """What still comes is only the cleaning up."""
        self._loop = None

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(f"{current_process().name}: {record.getMessage()}")

    @contextmanager
    def told_by(self, loop: SimulatedLoop) -> Iterator[None]:
        """While it is entered, the program's log lines go here, or nowhere."""
        self._loop = loop
        level, propagates = _PROGRAM.level, _PROGRAM.propagate
        _PROGRAM.setLevel(logging.INFO if self._wanted else _SILENT)
        _PROGRAM.propagate = False
        _PROGRAM.addHandler(self)
        try:
            yield
        finally:
            _PROGRAM.removeHandler(self)
            _PROGRAM.setLevel(level)
            _PROGRAM.propagate = propagates
