"""The compilers that edgellm-build can use, by name; each is imported when it is chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from edgellm.builder.assignment import PlannedEngine
from edgellm.builder.errors import BuildError, expected
from edgellm.builder.steps import code_sha256
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import Backend
from edgellm.engines.weights import WeightStore


class Compile(Protocol):
    """Writes a planned engine's files into a folder. Raises ValueError for a graph that the backend cannot run."""

    def __call__(
        self,
        planned: PlannedEngine,
        weights: WeightStore,
        *,
        contract: KvContract,
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
    compute_capability: Callable[[str], str | None]
    """Of the code for a device class; None where no GPU is needed. Raises ValueError for a class without the device."""
    max_sequences: int
    """In one step."""


def find_compiler(name: str) -> Compiler:
    """Raises BuildError for a backend that this version does not have, or this machine."""
    importer = _COMPILERS.get(name)
    if importer is None:
        raise BuildError(
            f"backend {name!r} is not part of this version of EdgeLLM; it has {', '.join(_COMPILERS)}. "
            "Build with --backend cpu"
        )
    with expected(ValueError):
        return importer()


def _cpu() -> Compiler:
    from edgellm.engines.cpu.compiler import compile_engine
    from edgellm.engines.cpu.engine import BACKEND_VERSION

    def compile_planned(
        planned: PlannedEngine,
        weights: WeightStore,
        *,
        contract: KvContract,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        compile_engine(
            planned.graph, weights, contract=contract, limits=planned.limits, folder=folder, progress=progress
        )

    return Compiler(
        name="cpu",
        version=BACKEND_VERSION,
        code_sha256=code_sha256("edgellm.engines.cpu"),
        compile=compile_planned,
        compute_capability=lambda _device_class: None,
        max_sequences=64,
    )


def _tensorrt() -> Compiler:
    from edgellm.engines.tensorrt.api import find_api
    from edgellm.engines.tensorrt.compiler import MAX_SEQUENCES, compile_engine
    from edgellm.engines.tensorrt.targets import build_capability, capability_text

    api = find_api()

    def compile_planned(
        planned: PlannedEngine,
        weights: WeightStore,
        *,
        contract: KvContract,
        folder: Path,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        compile_engine(
            planned.graph,
            weights,
            phase=planned.phase,
            device_class=planned.device_class,
            contract=contract,
            limits=planned.limits,
            world=planned.world if planned.phase == "prefill" else 1,
            folder=folder,
            progress=progress,
            api=api,
        )

    return Compiler(
        name="tensorrt",
        version=api.version,
        code_sha256=code_sha256("edgellm.engines.tensorrt"),
        compile=compile_planned,
        compute_capability=lambda device_class: capability_text(build_capability(api, device_class)),
        max_sequences=MAX_SEQUENCES,
    )


_COMPILERS: Final[Mapping[str, Callable[[], Compiler]]] = {"cpu": _cpu, "tensorrt": _tensorrt}
