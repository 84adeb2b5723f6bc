"""network.json: what a compiled folder holds, for the loader and for people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.api import TensorRtError
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.network import EmittedNetwork

MANIFEST_FILE: Final = "network.json"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output of a network."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """-1 for sizes that change from step to step."""


@dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """One network, built into one file."""

    file: str
    engine_bytes: int
    layers: dict[str, int]
    """How many of each type the network was written with; the compiler fuses them."""
    constant_bytes: dict[str, int]
    """By type."""
    int4_weights: int
    """Elements of the int4 linears."""
    int4_bytes: int
    """What these keep: nibbles, scales, outlier channels, input scales."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sum_output: str | None
    """This output is to be added up over the ranks before the next network reads it as `sum_input`."""
    sum_input: str | None


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """A compiled engine."""

    version: str
    """Product and version of TensorRT, such as `tensorrt_rtx-1.7.1.116`."""
    compute_capability: str
    """That the code was made for; a device of a later minor version runs it too."""
    form: Literal["fused", "primitive"]
    """Whether attention and cache have layers of their own."""
    bounds: Bounds
    networks: tuple[NetworkInfo, ...]

    @property
    def is_first_stage(self) -> bool:
        return any(tensor.name == interface.TOKENS for tensor in self.networks[0].inputs)

    @property
    def is_last_stage(self) -> bool:
        return self.result == interface.LOGITS

    @property
    def result(self) -> str:
        """The output that is the step's result."""
        names = [tensor.name for tensor in self.networks[-1].outputs]
        return interface.LOGITS if interface.LOGITS in names else interface.HIDDEN

    def is_static(self, network: NetworkInfo) -> bool:
        """Whether every step has the same shapes: that of a decode network which does not cut the caches."""
        return self.bounds.is_decode and all(tensor.name != interface.VISIBLE for tensor in network.inputs)

    @property
    def caches(self) -> tuple[TensorInfo, ...]:
        """Cache inputs of all networks: K and V of the first layer, then of the next."""
        caches = [tensor for network in self.networks for tensor in network.inputs if interface.is_cache(tensor.name)]
        return tuple(sorted(caches, key=lambda tensor: tensor.name))


def describe(emitted: EmittedNetwork, file: str, engine_bytes: int) -> NetworkInfo:
    """`engine_bytes`: size of the built file."""
    segment, network = emitted.segment, emitted.network
    layers: dict[str, int] = {}
    for index in range(network.num_layers):
        kind = network.get_layer(index).type.name.lower()
        layers[kind] = layers.get(kind, 0) + 1
    return NetworkInfo(
        file=file,
        engine_bytes=engine_bytes,
        layers=dict(sorted(layers.items())),
        constant_bytes=_constant_bytes(emitted),
        int4_weights=emitted.int4_weights,
        int4_bytes=emitted.int4_bytes,
        inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        sum_output=None if segment.reduced is None else segment.outputs[-1].name,
        sum_input=None if segment.reduced is None else interface.rows(segment.reduced),
    )


def read_manifest(folder: Path) -> EngineManifest:
    """Raises TensorRtError if the file is not one of this version."""
    path = folder / MANIFEST_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineManifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise TensorRtError(f"{path} cannot be used ({error}); rebuild the bundle with edgellm-build") from error


def write_manifest(folder: Path, manifest: EngineManifest) -> None:
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def _constant_bytes(emitted: EmittedNetwork) -> dict[str, int]:
    """int4 constants are kept as bytes, two values each; nothing else is."""
    sizes: dict[str, int] = {}
    for values in emitted.layers.constants.values():
        kind = "int4" if values.dtype.name == "uint8" else values.dtype.name
        sizes[kind] = sizes.get(kind, 0) + values.nbytes
    return dict(sorted(sizes.items()))


def _tensor(tensor: object) -> TensorInfo:
    name, dtype, shape = (getattr(tensor, field) for field in ("name", "dtype", "shape"))
    return TensorInfo(name=name, dtype=dtype.name.lower(), shape=tuple(shape))
