"""The servers to compare, each started alone on this machine with 16 slots, ready when the block begins."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from bench.peers import llama_cpp_build
from bench.peers.environments import ROOT, Environments, UnavailableError
from bench.peers.models import MODELS, ModelStore
from bench.serving.clients import Client, EdgellmClient, OpenAiClient
from edgellm.orchestrator.local_cluster import serve

SLOTS: Final = 16
MODEL: Final = MODELS["smollm2"]
MAX_SEQ_LEN: Final = 256
READY_TIMEOUT_S: Final = 900.0


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that answers."""

    pid: int
    client: Callable[[], contextlib.AbstractAsyncContextManager[Client]]
    """Made inside the event loop that uses it."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """`start` raises UnavailableError, or ClusterStartError for ours."""

    name: str
    weights: str
    """What is compared is not the same precision everywhere."""
    start: Callable[[], contextlib.AbstractContextManager[Running]]


def servers(bundle: Path, threads: int, say: Callable[[str], None]) -> list[Server]:
    """Ours first."""
    environments, store = Environments(say), ModelStore(say)
    return [
        Server(
            name="EdgeLLM",
            weights="bf16 to read, int4 to write",
            start=lambda: _edgellm(bundle),
        ),
        Server(name="llama-server", weights="int4 (Q4_0)", start=lambda: _llama_server(environments, store, threads)),
        Server(name="vLLM", weights="bf16", start=lambda: _vllm(environments, store)),
    ]


@contextlib.contextmanager
def _edgellm(bundle: Path) -> Iterator[Running]:
    with serve(bundle) as cluster:

        @contextlib.asynccontextmanager
        async def client() -> AsyncIterator[Client]:
            async with grpc.aio.insecure_channel(cluster.address) as channel:
                yield EdgellmClient(channel)

        yield Running(pid=cluster.process.pid, client=client)


@contextlib.contextmanager
def _llama_server(environments: Environments, store: ModelStore, threads: int) -> Iterator[Running]:
    environment = environments.prepare("llama_cpp")
    model = store.converted(MODEL, environment, "int4") / "model.gguf"
    port = _free_port()
    command = [str(llama_cpp_build.server(ROOT / "llama_cpp")), "--model", str(model)]
    command += ["--ctx-size", str(SLOTS * MAX_SEQ_LEN), "--parallel", str(SLOTS), "--threads", str(threads)]
    with _http_server(command, environment.variables, port, "smollm2") as running:
        yield running


@contextlib.contextmanager
def _vllm(environments: Environments, store: ModelStore) -> Iterator[Running]:
    environment = environments.prepare("vllm")
    model, port = str(store.hugging_face(MODEL)), _free_port()
    command = [str(environment.python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--dtype", "bfloat16", "--max-num-seqs", str(SLOTS), "--max-model-len", str(MAX_SEQ_LEN)]
    command += ["--no-enable-prefix-caching"]
    variables = environment.variables | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with _http_server(command, variables, port, model) as running:
        yield running


@contextlib.contextmanager
def _http_server(command: Sequence[str], variables: dict[str, str], port: int, model: str) -> Iterator[Running]:
    """A process group of its own, so that all of its processes can be stopped."""

    @contextlib.asynccontextmanager
    async def client() -> AsyncIterator[Client]:
        async with contextlib.aclosing(OpenAiClient(port, model)) as client:
            yield client

    with tempfile.NamedTemporaryFile(prefix="bench-server-", suffix=".log") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | variables,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, port, Path(log.name))
            yield Running(pid=process.pid, client=client)
        finally:
            _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not _is_healthy(port):
        if process.poll() is not None or time.monotonic() > deadline_s:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UnavailableError(f"the server did not become ready: {' | '.join(lines[-4:])}")
        time.sleep(0.2)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
