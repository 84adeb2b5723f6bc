"""Nodes with addresses of their own, between which packets are lost; the client sees the tokens of a calm run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm.orchestrator.process_cluster import ProcessCluster
from tests.chaos.answers import ask
from tests.chaos.conftest import NODES, ROOM, leaving_nothing
from tests.chaos.namespaces import SWITCH_ADDRESS, Network, NotPermittedError, network

PARTITIONS: dict[str, tuple[str | int, Callable[[Network], None]]] = {
    "a stage is cut off": (40, lambda net: net.unplug("second")),
    "the prompt's reader is cut off": ("accepted", lambda net: net.unplug("reader")),
    "the holder of the copies is cut off": (3, lambda net: net.unplug("spare")),
    "no step arrives": (40, lambda net: net.lose("first", "second")),
    "no result comes back": (40, lambda net: net.lose("second", "first")),
    "no KV arrives": ("before", lambda net: net.lose("reader", "first")),
    "no copy arrives": (3, lambda net: net.lose("second", "spare")),
    "two stages lose each other, and the copies": (40, lambda net: _apart(net, "first", "second", "spare")),
}
QUICK = {"no step arrives"}


def _apart(net: Network, *names: str) -> None:
    for sender in names:
        for receiver in names:
            if sender != receiver:
                net.lose(sender, receiver)


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    try:
        with network(NODES) as made:
            yield made
    except NotPermittedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(staged_stories: Path, net: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """As everywhere here, but each node has a host of its own, and sends no KV through shared memory."""
    folder = tmp_path_factory.mktemp("partitions")
    nodes = {name: (*engine, *ROOM, "--no-shm", "--listen", "0.0.0.0:0") for name, engine in NODES.items()}
    starters = {name: host.starter for name, host in net.hosts.items()}
    with leaving_nothing(folder), ProcessCluster(
        staged_stories, folder, nodes, serve_options=["--verbose"], host=SWITCH_ADDRESS, starters=starters
    ) as processes:  # fmt: skip
        yield processes


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "partition", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PARTITIONS]
)
def test_a_partition_changes_no_token(
    partition: str, whole_cluster: ProcessCluster, net: Network, calm: list[int]
) -> None:
    moment, part = PARTITIONS[partition]

    def at(now: str | int) -> None:
        if now == moment:
            part(net)

    try:
        at("before")
        with whole_cluster.client() as stub:
            ask(stub, at).check(calm)
    finally:
        net.heal()
