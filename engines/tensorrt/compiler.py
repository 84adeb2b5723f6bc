"""Graph and weights -> one `.engine` file per network, and `network.json`."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from edgellm.engines.graph import Attention, Graph, Int4, linears
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits, Phase
from edgellm.engines.tensorrt.api import Api, find_api
from edgellm.engines.tensorrt.build import build_engine
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.manifest import EngineManifest, NetworkInfo, describe, write_manifest
from edgellm.engines.tensorrt.network import emit, segments_of
from edgellm.engines.tensorrt.targets import capability_text
from edgellm.engines.weights import WeightStore

MAX_SEQUENCES: Final = 8
"""In one step. Every slot has a cache of full length on the device, whether it is used or not."""
MAX_SELECTED: Final = 64
"""Logits of one prefill pass; a step that wants more takes several."""
TIMING_CACHE: Final = "timing.cache"


def compile_engine(
    graph: Graph,
    weights: WeightStore,
    *,
    phase: Phase,
    device_class: str,
    contract: KvContract,
    limits: EngineLimits,
    world: int,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    api: Api | None = None,
) -> EngineManifest:
    """Write an engine into `folder`. `world`: tensor-parallel ranks. `progress(done, total)`: steps of the compiler.

    Raises ValueError for a graph that this backend cannot run or a weight that does not fit its op, TensorRtError
    where the module is missing or refuses.
    """
    api = api or find_api()
    _check(graph, contract)
    bounds = bounds_of(phase, limits)
    segments = segments_of(graph, api)
    networks: list[NetworkInfo] = []
    timing_cache = b""
    for number, segment in enumerate(segments):
        emitted = emit(segment, weights, bounds=bounds, api=api, world=world)
        part = _part(progress, number, len(segments))
        built = build_engine(api, emitted, device_class, timing_cache=timing_cache, progress=part)
        timing_cache = built.timing_cache
        file = f"{number:03}.engine"
        (folder / file).write_bytes(built.data)
        networks.append(describe(emitted, file, len(built.data)))
    if timing_cache:
        (folder / TIMING_CACHE).write_bytes(timing_cache)
    manifest = EngineManifest(
        version=api.version,
        compute_capability=capability_text(built.compute_capability),
        form="fused" if api.features.attention else "primitive",
        bounds=bounds,
        networks=tuple(networks),
    )
    write_manifest(folder, manifest)
    return manifest


def bounds_of(phase: Phase, limits: EngineLimits) -> Bounds:
    """A decode network takes one row of each slot; a step with more rows takes several passes."""
    chunk = 1 if phase == "decode" else limits.max_rows
    return Bounds(
        max_batch=limits.max_sequences,
        max_chunk=chunk,
        max_seq_len=limits.max_seq_len,
        max_selected=limits.max_sequences if phase == "decode" else MAX_SELECTED,
    )


def _check(graph: Graph, contract: KvContract) -> None:
    if contract.dtype != "fp16":
        raise ValueError(
            f"TensorRT's cache layers keep half precision, the KV contract says {contract.dtype}; "
            "build with --kv-dtype half"
        )
    for op in graph.ops:
        if isinstance(op, Attention) and (op.kv_heads, op.head_dim) != (contract.kv_heads, contract.head_dim):
            raise ValueError(
                f"layer {op.layer} has {op.kv_heads} KV heads of {op.head_dim}, "
                f"the KV contract has {contract.kv_heads} of {contract.head_dim}"
            )
    for linear in linears(graph):
        if isinstance(linear.precision, Int4) and linear.precision.act_bits != 16:
            raise ValueError(
                f"{linear.weight} asks for {linear.precision.act_bits}-bit activations; TensorRT multiplies int4 "
                "weights with half-precision activations only, build with --act-bits 16"
            )


def _part(progress: Callable[[int, int], None] | None, number: int, count: int) -> Callable[[int, int], None] | None:
    """Progress of one network of `count`, as progress of all."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
