"""An orchestrator and its nodes as processes that can each be killed, stopped and started again."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import grpc

from edgellm.orchestrator.client import connect
from edgellm.orchestrator.local_cluster import ClusterStartError
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

ORCHESTRATOR: Final = "orchestrator"
_LOOK_S: Final = 0.02
_STOP_TIMEOUT_S: Final = 20.0


class ProcessCluster:
    """Logs and the journal are in `folder`. Use as a context, and `restore` before the first request."""

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        nodes: Mapping[str, Sequence[str]],
        *,
        serve_options: Sequence[str] = (),
        host: str = "127.0.0.1",
        starters: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """nodes: for each name its engine, and options of edgellm-node.

        host: the orchestrator's. starters: for some names a command that becomes the process, such as `ip netns exec`.
        """
        self.address: Final = f"{host}:{free_port(host)}"
        self.folder: Final = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._starters = starters
        serve = ["edgellm.orchestrator.serve", "--listen", self.address, "--no-local-nodes", *serve_options]
        self._commands = {ORCHESTRATOR: [*serve, "--bundle", str(bundle), "--journal", str(folder / "journal")]}
        for name, (engine, *options) in nodes.items():
            joins = ["--orchestrator", self.address, "--node-id", name, "--engine", engine]
            self._commands[name] = ["edgellm.runtime.cli", *joins, "--bundle", str(bundle), *options]

    @property
    def nodes(self) -> list[str]:
        return [name for name in self._commands if name != ORCHESTRATOR]

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [*self._starters.get(name, ()), sys.executable, "-m", *self._commands[name]]
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def signal(self, name: str, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP, SIGTERM... No effect on a process that has ended."""
        self.processes[name].send_signal(number)

    def restore(self, timeout_s: float = 60.0) -> None:
        """Start what has ended, let go on what was stopped, and wait until all nodes are ready.

        Raises ClusterStartError, at once where a process ends that was started here; another one may be about to end
        while this waits, and is started then.
        """
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
        started: set[str] = set()
        deadline_s = time.monotonic() + timeout_s
        while missing := self._missing():
            ended = [name for name in missing if not self._runs(name)]
            if started.intersection(ended) or time.monotonic() > deadline_s:
                said = "\n".join(f"{name}: {self._said(name)}" for name in missing)
                raise ClusterStartError(f"{', '.join(missing)} did not become ready:\n{said}")
            for name in ended:
                self.start(name)
            started.update(ended)
            time.sleep(_LOOK_S)

    @contextlib.contextmanager
    def client(self) -> Iterator[InferenceStub]:
        with connect(self.address) as stub:
            yield stub

    def status(self) -> inference_pb2.GetClusterResponse | None:
        """None while the orchestrator does not answer."""
        with grpc.insecure_channel(self.address) as channel:
            try:
                return InferenceStub(channel).GetCluster(inference_pb2.GetClusterRequest(), timeout=2)
            except grpc.RpcError:
                return None

    def held(self) -> list[str]:
        """Requests that are under way, and blocks that nodes count as used; nothing on a cluster at rest."""
        status = self.status()
        if status is None:
            return ["the orchestrator does not answer"]
        busy = [f"{name} {count}" for name in ("queued", "prefilling", "decoding") if (count := getattr(status, name))]
        for node in status.nodes:
            used = node.kv_blocks_total - node.kv_blocks_free
            if used or node.running or node.waiting:
                busy.append(f"{node.node_id}: {used} blocks, {node.running} running, {node.waiting} waiting")
        return busy

    def __enter__(self) -> "ProcessCluster":
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.nodes, ORCHESTRATOR]:
            if name in self.processes:
                _end(self.processes[name])

    def _runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def _said(self, name: str) -> str:
        """The end of its log, which is gone when the cluster is."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-1000:].strip() or "no output"

    def _missing(self) -> list[str]:
        """Those that do not run, and nodes that are not ready."""
        status = self.status()
        ready = {} if status is None else {node.node_id: node.pid for node in status.nodes if node.state == "ready"}
        waiting = [name for name in self.nodes if not self._runs(name) or ready.get(name) != self.processes[name].pid]
        return waiting if self._runs(ORCHESTRATOR) else [ORCHESTRATOR, *waiting]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, then make it."""
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """Nobody listens on it now."""
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])
