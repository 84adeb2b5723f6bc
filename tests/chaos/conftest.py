"""A cluster of real processes that serves a bundle in two stages over links that can be broken."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from edgellm.orchestrator.process_cluster import ProcessCluster
from tests.chaos.answers import ask
from tests.chaos.links import Links, links_between

NODES = {
    "reader": ("prefill-tp0of1",),
    "first": ("decode-pp0of2",),
    "second": ("decode-pp1of2",),
    "spare": ("decode-pp0of2", "--spare"),
}
ROOM = ("--kv-blocks", "40")
"""On each node, for three requests of those that the tests make."""


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
    staged_stories: Path, links: Links, node_options: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessCluster]:
    """A node that reads prompts, two decode stages, and a spare."""
    folder = tmp_path_factory.mktemp("chaos")
    nodes = {name: (*engine, *links.options(name), *node_options) for name, engine in NODES.items()}
    with (
        leaving_nothing(folder),
        ProcessCluster(staged_stories, folder, nodes, serve_options=["--verbose"]) as processes,
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
    """Ready before the test, and at rest after it: nothing is under way, every block of every node is free, and no
    node has memory that would stay behind if it were killed."""
    cluster.restore()
    yield cluster
    links.heal()
    cluster.restore()
    deadline_s = time.monotonic() + 15
    while (held := cluster.held()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not held
    assert not named_shared_memory()


def named_shared_memory() -> list[str]:
    """What this process's children have mapped of /dev/shm. The folder itself tells nothing: all programs use it."""
    maps = [Path(f"/proc/{child.pid}/maps").read_text() for child in psutil.Process().children(recursive=True)]
    return [line for one in maps for line in one.splitlines() if "/dev/shm/" in line]


@contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Afterwards no process, and in `folder` no file but logs and the journal."""
    children = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children(recursive=True)) <= children
    assert {path.name for path in folder.iterdir() if path.suffix != ".log"} <= {"journal"}
