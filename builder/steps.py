"""Results of build steps, kept on disk under the sha256 of what went into them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec

from edgellm.builder.files import list_files, new_folder, text_sha256
from edgellm.engines.bundle import BundleError, file_sha256, verify_files
from edgellm.engines.spec import EngineFile

_MANIFEST: Final = "step.json"
_LIBRARIES: Final = ("torch", "nvidia-modelopt", "transformers", "numpy", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """A finished step."""

    step: str
    key: str
    """sha256 of the step's name and inputs."""
    folder: Path
    files: tuple[EngineFile, ...]
    reused: bool
    """It was there already, and its files still had their hashes."""


class StepCache:
    """A folder of finished steps. Builds may share it: a step appears whole or not at all, and the first one stays."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._results: dict[str, StepResult] = {}

    @property
    def results(self) -> tuple[StepResult, ...]:
        """Of all steps asked for so far, in order; a step asked for twice counts as what it was the first time."""
        return tuple(self._results.values())

    def run(self, step: str, inputs: Mapping[str, str], make: Callable[[Path], None]) -> StepResult:
        """The result of `make(folder)` for these inputs, from the cache if it is there undamaged."""
        key = text_sha256(msgspec.json.encode({"step": step, **inputs}, order="sorted").decode())
        if key not in self._results:
            self._results[key] = self._run(step, key, make)
        return self._results[key]

    def _run(self, step: str, key: str, make: Callable[[Path], None]) -> StepResult:
        folder = self._root / step / key[:32]
        files = _read_manifest(folder)
        reused = files is not None
        if files is None:
            with new_folder(folder, keep=_is_finished) as new:
                make(new)
                (new / _MANIFEST).write_bytes(msgspec.json.encode(list_files(new)))
            files = _manifest(folder)
        return StepResult(step=step, key=key, folder=folder, files=files, reused=reused)


def _read_manifest(folder: Path) -> tuple[EngineFile, ...] | None:
    """The files of a finished step; None if it is not there or a file is damaged."""
    try:
        files = _manifest(folder)
        verify_files(folder, files)
    except (OSError, msgspec.DecodeError, BundleError):
        return None
    return files


def _manifest(folder: Path) -> tuple[EngineFile, ...]:
    return msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=tuple[EngineFile, ...])


def _is_finished(folder: Path) -> bool:
    return _read_manifest(folder) is not None


@cache
def code_sha256(*packages: str) -> str:
    """Hash of all source files and extensions of some packages, so that changed code is a changed input."""
    hashes = []
    for package in packages:
        for root in map(Path, importlib.import_module(package).__path__):
            sources = sorted(path for suffix in ("py", "so") for path in root.rglob(f"*.{suffix}"))
            hashes += [f"{package}/{path.relative_to(root)} {file_sha256(path)}" for path in sources]
    return text_sha256("\n".join(hashes))


def library_versions() -> str:
    """Of the libraries whose arithmetic or tokens end up in a step's files."""
    return " ".join(f"{name}-{version(name)}" for name in _LIBRARIES)
