"""Bundles of real weights, and clusters of real processes that serve them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.orchestrator.local_cluster import LocalCluster, serve


def build(checkpoint: Path, folder: Path) -> Path:
    """What `edgellm-build` makes of a checkpoint, without measuring its quality."""
    bundle = folder / "bundle"
    command = [sys.executable, "-m", "edgellm.builder.cli", "--checkpoint", str(checkpoint), "--output", str(bundle)]
    subprocess.run([*command, "--no-verify", "--cache-dir", str(folder / "cache")], check=True, timeout=280)
    return bundle


@pytest.fixture(scope="session")
def stories_bundle(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(stories260k, tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
