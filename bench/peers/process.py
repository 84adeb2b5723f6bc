"""A driver's process: started, asked, measured from outside, stopped."""

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench.peers.environments import Environment, UnavailableError

REPLY_TIMEOUT_S: Final = 600.0


class DriverProcess:
    """Requests and replies as driver_protocol.py has them."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: object) -> dict[str, Any]:
        """The reply. Raises UnavailableError if the driver answers with an error, dies, or is silent for too long."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = self._read()
        if "error" in reply:
            raise UnavailableError(reply["error"])
        return reply

    def rss_mib(self) -> float:
        """Resident memory now, files that are mapped included."""
        return status_mib(Path(f"/proc/{self.pid}/status").read_text(), "VmRSS")

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            ready = selector.select(REPLY_TIMEOUT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise UnavailableError(f"the driver {'ended' if ready else 'hangs'}: {self._last_words()}")
        return dict(json.loads(line))

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:]) or "it said nothing"


@contextlib.contextmanager
def started(environment: Environment, script: Path) -> Iterator[DriverProcess]:
    """A driver that ends with the block."""
    with tempfile.NamedTemporaryFile(prefix=f"{script.stem}-", suffix=".log") as log:
        process = subprocess.Popen(
            [str(environment.python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | environment.variables,
        )
        try:
            yield DriverProcess(process, Path(log.name))
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[str]") -> None:
    """A driver ends by itself when its input does."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def status_mib(status: str, field: str) -> float:
    """A field of /proc/PID/status in MiB: `VmRSS:   12345 kB`."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise ValueError(f"no field {field} in the process's status")
