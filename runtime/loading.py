"""From a bundle to the engines of one node."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgellm.engines.base import Engine, SumOverRanks
from edgellm.engines.bundle import Bundle, bundle_sha256, engine_spec, open_bundle
from edgellm.engines.kv import HostKvPool, KvContract, KvPool
from edgellm.engines.load import LOCAL_DEVICE_CLASS, engine_layers, engine_pool, load_engine
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.batching.prefill import PrefillBatcher
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.host import local_device_class, physical_memory_bytes
from edgellm.runtime.lanes import Lanes, PrefillLane
from edgellm.runtime.stages.engines import StageEngines


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeEngines:
    """The engines of a node, on one KV pool of all layers: what it was started for, and what it maps to take over."""

    bundle_sha256: str
    contract: KvContract
    """The bundle's, compared at every handshake."""
    role: Literal["prefill", "decode"]
    planned: str
    """Name of the engine that the node was started for."""
    half: Engine | None
    """The whole model in half precision."""
    stages: StageEngines

    @property
    def all(self) -> tuple[Engine, ...]:
        half = () if self.half is None else (self.half,)
        return (*half, *self.stages.stages)

    @property
    def pool(self) -> KvPool:
        return self.stages.pool

    def close(self) -> None:
        for engine in self.all:
            engine.close()


def load_engines(config: NodeConfig, sum_over_ranks: SumOverRanks | None = None) -> NodeEngines:
    """Load the named engine, and beside it every engine of the bundle by which this device could stand in for others:
    all decode stages, and the half-precision engine that reads prompts. A tensor-parallel rank, which needs
    `sum_over_ranks`, has KV of its own heads only, so it stands in for nobody.

    Weights are memory-mapped, and KV pages are taken when first touched: what is never asked costs address space only.
    Raises BundleError, and NodeError for more KV blocks than there is memory.
    """
    bundle = open_bundle(config.bundle)
    spec = engine_spec(config.bundle, config.engine)
    kv_blocks = planned_kv_blocks(bundle, spec) if config.kv_blocks is None else config.kv_blocks
    _check_memory(kv_blocks, spec, bundle.kv)
    pool = engine_pool(bundle.kv, spec, range(bundle.kv.num_layers), kv_blocks)
    loader = _Loader(config=config, device_class=_device_class(config, spec), pool=pool, sum_over_ranks=sum_over_ranks)
    planned = loader.load(spec)
    others = [engine_spec(config.bundle, name) for name in bundle.engines if name != spec.name]
    others = [other for other in others if other.device_class == spec.device_class and pool.contract == bundle.kv]
    half = [other for other in others if other.phase == "prefill" and other.world == 1]
    stages = [other for other in others if other.phase == "decode" and other.world == _decode_world(spec, others)]
    is_reader = spec.phase == "prefill"
    return NodeEngines(
        bundle_sha256=bundle_sha256(config.bundle),
        contract=bundle.kv,
        role=spec.phase,
        planned=spec.name,
        half=planned if is_reader else next((loader.load(one) for one in half), None),
        stages=StageEngines([*([] if is_reader else [planned]), *(loader.load(one) for one in stages)], pool),
    )


def is_rank(spec: EngineSpec) -> bool:
    """Whether the engine is one of several that read a prompt together."""
    return spec.phase == "prefill" and spec.world > 1


def planned_kv_blocks(bundle: Bundle, spec: EngineSpec) -> int:
    """Of the device that has least, where several read prompts: on tensor-parallel ranks a block id is the same block.

    Raises NodeError.
    """
    together = [
        placement.kv_blocks
        for placement in bundle.plan.placements
        if placement.engine == spec.name or (is_rank(spec) and placement.role == "prefill")
    ]
    if not together:
        raise NodeError(f"the bundle's plan does not place engine {spec.name}; say --kv-blocks N")
    return min(together)


def make_lanes(engines: NodeEngines, config: NodeConfig) -> Lanes:
    """Batchers for the engines; a prefill node takes larger steps than one that also decodes."""
    chunk_rows = config.local_chunk_rows if engines.role == "decode" else config.prefill_chunk_rows

    def reader(engine: Engine | None) -> PrefillLane | None:
        if engine is None:
            return None
        batcher = PrefillBatcher(engine.spec.limits, max_batch_tokens=config.max_batch_tokens, chunk_rows=chunk_rows)
        return PrefillLane(engine=engine, batcher=batcher)

    return Lanes(
        half=reader(engines.half),
        degraded=reader(engines.stages.whole),
        stages=engines.stages,
        num_layers=engines.contract.num_layers,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loader:
    config: NodeConfig
    device_class: str
    pool: HostKvPool
    sum_over_ranks: SumOverRanks | None

    def load(self, spec: EngineSpec) -> Engine:
        return load_engine(
            self.config.bundle,
            spec.name,
            pool=self.pool.window(engine_layers(spec)),
            kv_blocks=0,
            threads=self.config.threads,
            device_class=self.device_class,
            sum_over_ranks=self.sum_over_ranks,
        )


def _decode_world(planned: EngineSpec, others: Sequence[EngineSpec]) -> int:
    """How many stages there are: the planned engine's, or the most that the bundle has."""
    if planned.phase == "decode":
        return planned.world
    return max((other.world for other in others if other.phase == "decode"), default=1)


def _device_class(config: NodeConfig, spec: EngineSpec) -> str:
    if config.device_class is not None:
        return config.device_class
    return LOCAL_DEVICE_CLASS if spec.device_class == LOCAL_DEVICE_CLASS else local_device_class()


def _check_memory(kv_blocks: int, spec: EngineSpec, contract: KvContract) -> None:
    kv_bytes, memory_bytes = kv_blocks * spec.num_layers * contract.block_bytes, physical_memory_bytes()
    if kv_bytes > memory_bytes:
        raise NodeError(
            f"{kv_blocks} KV blocks take {kv_bytes / 2**30:.1f} GiB, "
            f"this machine has {memory_bytes / 2**30:.1f} GiB; say --kv-blocks with less"
        )
