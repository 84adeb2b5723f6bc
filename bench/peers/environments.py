"""A Python environment per peer, made by the benchmark from pinned requirements, and made again when these change."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from bench.peers import llama_cpp_build

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent / "out" / "peers"
LOW_PRIORITY: Final = 5
PROJECT: Final = "edgellm"
"""The environment that the benchmark itself runs in."""
INSTALL_TIMEOUT_S: Final = 3600.0


class UnavailableError(RuntimeError):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a peer's scripts run."""

    name: str
    python: Path
    variables: dict[str, str]
    """Added to the process's environment."""
    key: str
    """Changes with what is installed."""


class Environments:
    """Installs each environment when it is first asked for, and tries once only."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failures: dict[str, str] = {}

    def prepare(self, name: str) -> Environment:
        """The environment of this name. Raises UnavailableError."""
        if name == PROJECT:
            return Environment(name=name, python=Path(sys.executable), variables={}, key="project")
        if name in self._failures:
            raise UnavailableError(self._failures[name])
        try:
            return self._installed(name)
        except UnavailableError as error:
            self._failures[name] = str(error)
            raise

    def _installed(self, name: str) -> Environment:
        folder, wanted = ROOT / name, _fingerprint(name)
        with _locked(folder):
            stamp = folder / "ready"
            if not stamp.exists() or stamp.read_text() != wanted:
                self._say(f"installing {name} (once; minutes)")
                stamp.unlink(missing_ok=True)
                _install(name, folder)
                stamp.write_text(wanted)
        return Environment(name=name, python=_python(folder), variables=_variables(name, folder), key=wanted)


def environment_key(name: str) -> str:
    """What the key of this environment is, or will be once it is prepared; of the project's own, the peer in it."""
    if name != PROJECT:
        return _fingerprint(name)
    return ", ".join(f"{package} {metadata.version(package)}" for package in ("transformers", "torch"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(environment: Environment, script: Path, arguments: Sequence[str]) -> None:
    """Run a script to its end, at low priority. Raises UnavailableError with the end of its output."""
    _run([str(environment.python), str(script), *arguments], script.stem, environment.variables)


def _install(name: str, folder: Path) -> None:
    requirements = str(_requirements(name))
    _run([sys.executable, "-m", "venv", str(folder / "venv")], f"venv of {name}")
    pip = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--no-deps", "-r", requirements]
    _run(pip, f"pip install for {name}", {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"} if name == "llama_cpp" else {})
    if name == "llama_cpp":
        for number, command in enumerate(llama_cpp_build.commands(folder, _requirements(name).read_text())):
            _run(command, f"build of llama.cpp, step {number + 1}")


def _variables(name: str, folder: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return offline | (llama_cpp_build.variables(folder) if name == "llama_cpp" else {})


def _run(command: Sequence[str], what: str, variables: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            ["nice", "-n", str(LOW_PRIORITY), *command],
            env=os.environ | (variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{what}: {error}") from error
    if done.returncode:
        raise UnavailableError(f"{what} failed: {_last_lines(done.stdout.decode(errors='replace'))}")


def _last_lines(output: str, count: int = 4) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "no output"


def _requirements(name: str) -> Path:
    return HERE / "requirements" / f"{name}.txt"


def _fingerprint(name: str) -> str:
    text = _requirements(name).read_text() + (HERE / "llama_cpp_build.py").read_text() * (name == "llama_cpp")
    return hashlib.sha256(text.encode()).hexdigest()


def _python(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"
