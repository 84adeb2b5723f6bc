"""What `edgellm-build inspect` prints of TensorRT engines: layers, precisions, inputs and outputs, sizes, targets."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table

from edgellm.engines.spec import EngineSpec
from edgellm.engines.tensorrt.interface import is_cache
from edgellm.engines.tensorrt.manifest import EngineManifest, NetworkInfo, TensorInfo, read_manifest

_MIB = 1 << 20


def read_manifests(bundle: Path, engines: Sequence[EngineSpec]) -> dict[str, EngineManifest]:
    """Of the TensorRT engines, by name. Raises TensorRtError for a damaged one."""
    return {spec.name: read_manifest(bundle / spec.name) for spec in engines if spec.backend == "tensorrt"}


def network_tables(engines: Sequence[EngineSpec], manifests: Mapping[str, EngineManifest]) -> Iterator[RenderableType]:
    """One table per engine."""
    for spec in engines:
        if spec.name in manifests:
            yield _table(spec, manifests[spec.name])


def _table(spec: EngineSpec, manifest: EngineManifest) -> Table:
    table = Table(title=spec.name, box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, collapse_padding=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    bounds, networks = manifest.bounds, manifest.networks
    capability = manifest.compute_capability.replace(".", "")
    table.add_row("target", f"{spec.device_class}, code for sm{capability}, {manifest.version}")
    table.add_row(
        "limits", f"{bounds.max_batch} slots of {bounds.max_seq_len} tokens, {bounds.max_chunk} rows per pass"
    )
    table.add_row("networks", f"{len(networks)}, {_mib(sum(network.engine_bytes for network in networks))} MiB")
    table.add_row("attention", f"{manifest.form} layers")
    table.add_row("layers", _totals([network.layers for network in networks], str))
    table.add_row("constants", "MiB: " + _totals([network.constant_bytes for network in networks], _mib))
    table.add_row("int4 linears", _int4(networks))
    table.add_row("inputs", _tensors(networks[0].inputs))
    table.add_row("outputs", _tensors(networks[-1].outputs))
    return table


def _totals(parts: Sequence[Mapping[str, int]], show: Callable[[int], str]) -> str:
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return ", ".join(f"{name} {show(count)}" for name, count in sorted(total.items()))


def _int4(networks: Sequence[NetworkInfo]) -> str:
    weights = sum(network.int4_weights for network in networks)
    if not weights:
        return "none"
    kept = sum(network.int4_bytes for network in networks)
    return f"{weights:,} weights, {8 * kept / weights:.2f} bits each with scales and outlier channels"


def _tensors(tensors: Sequence[TensorInfo]) -> str:
    """Those of the caches are all alike: the first stands for them."""
    caches = [tensor for tensor in tensors if is_cache(tensor.name.removeprefix("out.").removeprefix("new."))]
    others = [_tensor(tensor) for tensor in tensors if tensor not in caches]
    if caches:
        others.append(f"{len(caches)} of KV such as {_tensor(caches[0])}")
    return "; ".join(others)


def _tensor(tensor: TensorInfo) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f}"
