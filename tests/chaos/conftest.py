"""A bundle in two stages, and a cluster of real processes that serves it over links that can be broken."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from edgellm.orchestrator.process_cluster import ProcessCluster
from tests.chaos.answers import ask
from tests.chaos.links import Links, links_between

CLUSTER = """
[devices.left]
class = "cpu-local"
[devices.right]
class = "cpu-local"
[pools]
prefill = ["left"]
decode = ["left", "right"]
"""
NODES = {
    "reader": ("prefill-tp0of1",),
    "first": ("decode-pp0of2",),
    "second": ("decode-pp1of2",),
    "spare": ("decode-pp0of2", "--spare"),
}
ROOM = ("--kv-blocks", "40")
"""On each node, for three requests of those that the tests make."""


@pytest.fixture(scope="session")
def staged_bundle(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, its five layers cut into two stages."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "cluster.toml").write_text(CLUSTER)
    arguments = ["--checkpoint", stories260k, "--output", folder / "bundle", "--cache-dir", folder / "cache"]
    options = ["--cluster", folder / "cluster.toml", "--precision-decode", "half", "--no-verify"]
    subprocess.run([sys.executable, "-m", "edgellm.builder.cli", *arguments, *options], check=True, timeout=300)
    return folder / "bundle"


@pytest.fixture(scope="module")
def links() -> Iterator[Links]:
    with links_between(NODES) as made:
        yield made


@pytest.fixture(scope="module")
def node_options() -> Sequence[str]:
    """Of every node; a module may have its own."""
    return ROOM


@pytest.fixture(scope="module")
def cluster(
    staged_bundle: Path, links: Links, node_options: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessCluster]:
    """A node that reads prompts, two decode stages, and a spare."""
    folder = tmp_path_factory.mktemp("chaos")
    nodes = {name: (*engine, *links.options(name), *node_options) for name, engine in NODES.items()}
    with (
        leaving_nothing(folder),
        ProcessCluster(staged_bundle, folder, nodes, serve_options=["--verbose"]) as processes,
    ):
        links.lead_to(processes.address)
        yield processes


@pytest.fixture(scope="module")
def calm(cluster: ProcessCluster) -> list[int]:
    """The tokens of a run without faults."""
    cluster.restore()
    with cluster.client() as stub:
        return ask(stub).token_ids


@pytest.fixture
def whole_cluster(cluster: ProcessCluster, links: Links, calm: list[int]) -> Iterator[ProcessCluster]:
    """Ready before the test, and at rest after it: nothing is under way, and every block of every node is free."""
    cluster.restore()
    yield cluster
    links.heal()
    cluster.restore()
    deadline_s = time.monotonic() + 15
    while (held := cluster.held()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not held


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Afterwards no process, no shared memory, and in `folder` no file but logs and the journal."""
    children, shared_memory = set(psutil.Process().children()), set(Path("/dev/shm").iterdir())
    yield
    assert set(psutil.Process().children(recursive=True)) <= children
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    assert {path.name for path in folder.iterdir() if path.suffix != ".log"} <= {"journal"}
