"""A whole served cluster on this machine, as a context: what the demo, the benchmarks and the system tests talk to."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import msgspec

from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub


class ClusterStartError(RuntimeError):
    """`edgellm-serve` ended, or was not ready in time; the message carries the end of its output."""


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """A running `edgellm-serve` and its nodes, each a process of its own."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    """Standard output and error of the server and its nodes."""

    @contextlib.contextmanager
    def client(self) -> Iterator[InferenceStub]:
        """A blocking stub on a channel of its own."""
        with grpc.insecure_channel(self.address) as channel:
            yield InferenceStub(channel)


@contextlib.contextmanager
def serve(bundle: Path, *, options: Sequence[str] = (), ready_timeout_s: float = 60.0) -> Iterator[LocalCluster]:
    """Start `edgellm-serve` on a free port with the bundle's own nodes; stop all of it at the end.

    Raises ClusterStartError.
    """
    with tempfile.TemporaryDirectory(prefix="edgellm-") as folder:
        ready, log = Path(folder) / "ready", Path(folder) / "log"
        command = [sys.executable, "-m", "edgellm.orchestrator.serve", "--bundle", str(bundle)]
        command += ["--listen", "127.0.0.1:0", "--ready-file", str(ready), *options]
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            try:
                address = _wait_until_ready(process, ready, log, time.monotonic() + ready_timeout_s)
                yield LocalCluster(address=address, process=process, log=log)
            finally:
                _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Path, log: Path, deadline_s: float) -> str:
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = log.read_text(errors="replace")[-2000:]
            raise ClusterStartError(f"the server did not become ready:\n{tail}")
        time.sleep(0.02)
    return str(msgspec.json.decode(ready.read_bytes())["address"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
