"""A bundle in two stages, and a cluster of real processes that serves it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.orchestrator.process_cluster import ProcessCluster

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
    "reader": ("prefill-tp0of1", "--kv-blocks", "64"),
    "first": ("decode-pp0of2", "--kv-blocks", "64"),
    "second": ("decode-pp1of2", "--kv-blocks", "64"),
    "spare": ("decode-pp0of2", "--kv-blocks", "64", "--spare"),
}


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
def cluster(staged_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """A node that reads prompts, two decode stages, and a spare. Put in order again before each test."""
    with ProcessCluster(staged_bundle, tmp_path_factory.mktemp("chaos"), NODES) as processes:
        yield processes
