"""From a bundle to the engines of one node."""

from dataclasses import dataclass
from typing import Literal

from edgellm.engines.base import Engine
from edgellm.engines.bundle import Bundle, bundle_sha256, engine_spec, open_bundle
from edgellm.engines.kv import HostKvPool, KvContract, KvPool
from edgellm.engines.load import LOCAL_DEVICE_CLASS, load_engine
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.batching.decode import DecodeBatcher
from edgellm.runtime.batching.prefill import PrefillBatcher
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.host import local_device_class, physical_memory_bytes
from edgellm.runtime.lanes import DecodeLane, Lanes, PrefillLane


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeEngines:
    """The engines of a node, on one KV pool."""

    bundle_sha256: str
    contract: KvContract
    """The bundle's, compared at every handshake."""
    half: Engine | None
    decode: Engine | None

    @property
    def role(self) -> Literal["prefill", "decode"]:
        return "prefill" if self.decode is None else "decode"

    @property
    def all(self) -> tuple[Engine, ...]:
        return tuple(engine for engine in (self.half, self.decode) if engine is not None)

    @property
    def pool(self) -> KvPool:
        return self.all[0].kv

    def close(self) -> None:
        for engine in self.all:
            engine.close()


def load_engines(config: NodeConfig) -> NodeEngines:
    """Load the named engine; beside a decode engine, the half-precision engine that reads prompts locally.

    Weights are memory-mapped: an engine that is never asked costs address space, not memory.
    Raises BundleError, and NodeError for an engine that a node cannot serve alone.
    """
    bundle = open_bundle(config.bundle)
    spec = engine_spec(config.bundle, config.engine)
    _check_servable(spec, bundle.kv)
    kv_blocks = _planned_blocks(bundle, spec) if config.kv_blocks is None else config.kv_blocks
    _check_memory(kv_blocks, bundle.kv)
    engine = load_engine(
        config.bundle,
        config.engine,
        kv_blocks=kv_blocks,
        threads=config.threads,
        device_class=_device_class(config, spec),
    )
    half = engine if spec.phase == "prefill" else _load_local_prefill(config, bundle, engine)
    return NodeEngines(
        bundle_sha256=bundle_sha256(config.bundle),
        contract=bundle.kv,
        half=half,
        decode=engine if spec.phase == "decode" else None,
    )


def make_lanes(engines: NodeEngines, config: NodeConfig) -> Lanes:
    """Batchers for the engines; a prefill node takes larger steps than one that also decodes."""
    chunk_rows = config.local_chunk_rows if engines.decode else config.prefill_chunk_rows

    def reader(engine: Engine | None) -> PrefillLane | None:
        if engine is None:
            return None
        batcher = PrefillBatcher(engine.spec.limits, max_batch_tokens=config.max_batch_tokens, chunk_rows=chunk_rows)
        return PrefillLane(engine=engine, batcher=batcher)

    decode = engines.decode
    writer = None if decode is None else DecodeLane(engine=decode, batcher=DecodeBatcher(decode.spec.limits))
    return Lanes(half=reader(engines.half), degraded=reader(decode), decode=writer)


def _check_servable(spec: EngineSpec, contract: KvContract) -> None:
    if spec.world != 1 or spec.num_layers != contract.num_layers:
        raise NodeError(
            f"engine {spec.name} is part {spec.rank} of {spec.world}; a node serves whole models so far, "
            "build the bundle with one device per role"
        )


def _device_class(config: NodeConfig, spec: EngineSpec) -> str:
    if config.device_class is not None:
        return config.device_class
    return LOCAL_DEVICE_CLASS if spec.device_class == LOCAL_DEVICE_CLASS else local_device_class()


def _check_memory(kv_blocks: int, contract: KvContract) -> None:
    kv_bytes, memory_bytes = kv_blocks * contract.num_layers * contract.block_bytes, physical_memory_bytes()
    if kv_bytes > memory_bytes:
        raise NodeError(
            f"{kv_blocks} KV blocks take {kv_bytes / 2**30:.1f} GiB, "
            f"this machine has {memory_bytes / 2**30:.1f} GiB; say --kv-blocks with less"
        )


def _planned_blocks(bundle: Bundle, spec: EngineSpec) -> int:
    for placement in bundle.plan.placements:
        if placement.engine == spec.name:
            return placement.kv_blocks
    raise NodeError(f"the bundle's plan does not place engine {spec.name}; say --kv-blocks N")


def _load_local_prefill(config: NodeConfig, bundle: Bundle, decode: Engine) -> Engine | None:
    """The bundle's whole-model prefill engine for this kind of device, if it has one."""
    if not isinstance(decode.kv, HostKvPool):
        return None
    for name in bundle.engines:
        spec = engine_spec(config.bundle, name)
        if spec.phase == "prefill" and spec.world == 1 and spec.device_class == decode.spec.device_class:
            return load_engine(
                config.bundle,
                name,
                pool=decode.kv,
                kv_blocks=0,
                threads=config.threads,
                device_class=spec.device_class,
            )
    return None
