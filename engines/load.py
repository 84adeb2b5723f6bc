"""From a name in a bundle to a running engine: checks first, then the backend that compiled it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgellm.engines.base import Engine, SumOverRanks
from edgellm.engines.bundle import BundleError, engine_spec, open_bundle
from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.engines.spec import EngineSpec
from edgellm.engines.verified import verify_once

LOCAL_DEVICE_CLASS: Final = "cpu-local"
"""Device class of a machine that was not told that it is something else."""


@dataclass(frozen=True, kw_only=True)
class _Backend:
    """A backend, imported: the version its engines must have, and how to make an engine of a verified folder."""

    version: str
    create: Callable[[Path, EngineSpec, HostKvPool, int | None, SumOverRanks | None], Engine]


def load_engine(
    bundle_dir: Path,
    name: str,
    *,
    pool: HostKvPool | None = None,
    kv_blocks: int,
    threads: int | None = None,
    device_class: str = LOCAL_DEVICE_CLASS,
    sum_over_ranks: SumOverRanks | None = None,
) -> Engine:
    """Load engine `name` of a bundle, on a pool of its own with `kv_blocks` blocks, or on `pool`.

    `threads`: None lets the backend choose. `device_class`: what this device is. A tensor-parallel rank needs
    `sum_over_ranks`. Every file of the engine is hashed, unless it is known unchanged.
    Raises BundleError if the bundle or engine is damaged, of another version, or for another device class, and
    ValueError if `pool` does not hold this engine's KV.
    """
    kv = open_bundle(bundle_dir).kv
    spec = engine_spec(bundle_dir, name)
    if spec.device_class != device_class:
        raise BundleError(
            f"engine {name} is for device class {spec.device_class!r} and this device is {device_class!r}; "
            "build a bundle whose cluster.toml names this device's class"
        )
    return create_engine(
        bundle_dir / name,
        spec,
        contract=kv,
        pool=pool,
        kv_blocks=kv_blocks,
        threads=threads,
        sum_over_ranks=sum_over_ranks,
    )


def create_engine(
    folder: Path,
    spec: EngineSpec,
    *,
    contract: KvContract,
    pool: HostKvPool | None = None,
    kv_blocks: int,
    threads: int | None = None,
    sum_over_ranks: SumOverRanks | None = None,
) -> Engine:
    """`load_engine` for an engine that is in no bundle yet, on whatever device; `contract` is the whole model's."""
    backend = _import_backend(spec)
    if spec.backend_version != backend.version:
        raise BundleError(
            f"engine {spec.name} was compiled by {spec.backend} backend {spec.backend_version}, "
            f"this one is {backend.version}; rebuild the bundle with edgellm-build"
        )
    verify_once(folder, spec.files)
    if pool is None:
        pool = engine_pool(contract, spec, engine_layers(spec), kv_blocks)
    _check_pool(pool, contract, spec)
    return backend.create(folder, spec, pool, threads, sum_over_ranks)


def engine_layers(spec: EngineSpec) -> range:
    """Model layers whose KV this engine keeps."""
    return range(spec.first_layer, spec.first_layer + spec.num_layers)


def engine_contract(kv: KvContract, spec: EngineSpec) -> KvContract:
    """The bundle's contract as one engine stores it: a tensor-parallel rank keeps its share of the KV heads."""
    ranks = spec.world if spec.phase == "prefill" else 1
    return dataclasses.replace(kv, kv_heads=kv.kv_heads // ranks)


def engine_pool(kv: KvContract, spec: EngineSpec, layers: range, num_blocks: int) -> HostKvPool:
    """A pool for some layers of the model and this engine's heads; `kv` is the bundle's contract."""
    own = engine_contract(kv, spec)
    first_head = spec.rank * own.kv_heads if own.kv_heads < kv.kv_heads else 0
    return HostKvPool(own, layers, num_blocks, first_head=first_head)


def _check_pool(pool: HostKvPool, kv: KvContract, spec: EngineSpec) -> None:
    if pool.contract != engine_contract(kv, spec) or pool.layers != engine_layers(spec):
        raise ValueError(
            f"the pool keeps layers {pool.layers} under contract {pool.contract}, "
            f"engine {spec.name} needs {engine_layers(spec)} under {engine_contract(kv, spec)}"
        )


def _import_backend(spec: EngineSpec) -> _Backend:
    """Import the backend of an engine; heavy modules are loaded here and nowhere else."""
    importer = _BACKENDS.get(spec.backend)
    if importer is None:
        raise BundleError(
            f"engine {spec.name} is for the {spec.backend} backend, which this version of EdgeLLM cannot run; "
            "build the bundle with --backend cpu"
        )
    return importer()


def _import_cpu() -> _Backend:
    from edgellm.engines.cpu.engine import BACKEND_VERSION, CpuEngine

    def create(
        folder: Path, spec: EngineSpec, pool: HostKvPool, threads: int | None, sum_over_ranks: SumOverRanks | None
    ) -> Engine:
        return CpuEngine(folder, spec, pool=pool, threads=threads, sum_over_ranks=sum_over_ranks)

    return _Backend(version=BACKEND_VERSION, create=create)


def _import_tensorrt() -> _Backend:
    from edgellm.engines.tensorrt.api import TensorRtError, find_api
    from edgellm.engines.tensorrt.load import load_engine as load_tensorrt

    def create(
        folder: Path, spec: EngineSpec, pool: HostKvPool, _threads: int | None, sum_over_ranks: SumOverRanks | None
    ) -> Engine:
        try:
            return load_tensorrt(folder, spec, pool, sum_over_ranks)
        except TensorRtError as error:
            raise BundleError(f"engine {spec.name}: {error}") from error

    try:
        return _Backend(version=find_api().version, create=create)
    except TensorRtError as error:
        raise BundleError(str(error)) from error


_BACKENDS: Final[Mapping[str, Callable[[], _Backend]]] = {"cpu": _import_cpu, "tensorrt": _import_tensorrt}
