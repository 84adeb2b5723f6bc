"""Bundles of real weights, and clusters of real processes that serve them."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgellm.orchestrator.local_cluster import LocalCluster, serve
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub


def build(checkpoint: Path, folder: Path, *options: str) -> Path:
    """What `edgellm-build` makes of a checkpoint, without measuring its quality."""
    bundle = folder / "bundle"
    command = [sys.executable, "-m", "edgellm.builder.cli", "--checkpoint", str(checkpoint), "--output", str(bundle)]
    subprocess.run([*command, "--no-verify", *options], check=True, timeout=900)
    return bundle


@pytest.fixture(scope="session")
def stories_bundle(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    return build(stories260k, folder, "--cache-dir", str(folder / "cache"))


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration takes minutes: its result stays where edgellm-build keeps it, and serves `make demo` too."""
    return build(smollm2, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture
def cluster(stories_bundle: Path) -> Iterator[LocalCluster]:
    """stories260K: an orchestrator, a prefill node and a decode node."""
    with serve(stories_bundle) as running:
        yield running


@pytest.fixture
def chat_cluster(smollm2_bundle: Path) -> Iterator[LocalCluster]:
    """SmolLM2-135M-Instruct, likewise."""
    with serve(smollm2_bundle) as running:
        yield running


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All events of one request."""

    token_ids: tuple[int, ...]
    indices: tuple[int, ...]
    text: str
    finished: inference_pb2.Finished


def answer(stub: InferenceStub, request: inference_pb2.GenerateRequest, timeout_s: float = 120.0) -> Answer:
    """Ask and wait for the end."""
    replies = list(stub.Generate(request, timeout=timeout_s))
    tokens = [reply.token for reply in replies if reply.WhichOneof("event") == "token"]
    finished = replies[-1].finished
    return Answer(
        token_ids=tuple(token.token_id for token in tokens),
        indices=tuple(token.index for token in tokens),
        text="".join(token.text for token in tokens) + finished.text,
        finished=finished,
    )


@pytest.fixture(scope="session")
def ask() -> Callable[..., Answer]:
    return answer


@pytest.fixture(scope="session")
def everything_is_free() -> Callable[[InferenceStub], None]:
    """Fails unless, within some seconds, no node holds a block or a request any more."""

    def check(stub: InferenceStub, timeout_s: float = 15.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while (held := _held(stub)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert not held

    return check


def _held(stub: InferenceStub) -> list[str]:
    cluster = stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=10)
    busy = [f"{name} {count}" for name in ("queued", "prefilling", "decoding") if (count := getattr(cluster, name))]
    for node in cluster.nodes:
        used = node.kv_blocks_total - node.kv_blocks_free
        if node.state != "dead" and (used or node.running or node.waiting):
            busy.append(f"{node.node_id}: {used} blocks, {node.running} running, {node.waiting} waiting")
    return busy
