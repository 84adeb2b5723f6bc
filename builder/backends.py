"""The compilers that edgellm-build can use, by name; each is imported when it is chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from edgellm.builder.errors import BuildError
from edgellm.builder.steps import code_sha256
from edgellm.engines.graph import Graph
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import Backend, EngineLimits
from edgellm.engines.weights import WeightStore


class Compile(Protocol):
    """Writes an engine's files into a folder; equal inputs give equal bytes."""

    def __call__(
        self,
        graph: Graph,
        weights: WeightStore,
        *,
        contract: KvContract,
        limits: EngineLimits,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """A backend's build side, imported."""

    name: Backend
    version: str
    code_sha256: str
    """Of the compiler itself: a changed compiler compiles again."""
    compile: Compile


def find_compiler(name: str) -> Compiler:
    """Raises BuildError for a backend that this version does not have."""
    importer = _COMPILERS.get(name)
    if importer is None:
        raise BuildError(
            f"backend {name!r} is not part of this version of EdgeLLM; it has {', '.join(_COMPILERS)}. "
            "Build with --backend cpu"
        )
    return importer()


def _cpu() -> Compiler:
    from edgellm.engines.cpu.compiler import compile_engine
    from edgellm.engines.cpu.engine import BACKEND_VERSION

    code = code_sha256("edgellm.engines.cpu")
    return Compiler(name="cpu", version=BACKEND_VERSION, code_sha256=code, compile=compile_engine)


_COMPILERS: Final[Mapping[str, Callable[[], Compiler]]] = {"cpu": _cpu}
