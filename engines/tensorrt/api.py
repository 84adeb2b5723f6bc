"""NVIDIA's modules: which one is here, and what its network API offers.

`tensorrt` comes with JetPack and builds for the device it runs on; `tensorrt_rtx` builds on any machine, for a named
compute capability, and finishes on the device. Both are imported only when an engine is built or run.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

MODULES: Final = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
"""By product, in order of preference: the Python module that binds it."""


class TensorRtError(ValueError):
    """TensorRT is missing, or refused; the message says what it said and what to do."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Layers that not every version has."""

    attention: bool
    """Attention, rotary embedding and cache update in one layer each; TensorRT 10.16 and RTX have them."""
    lengths: bool
    """That attention layer takes the number of keys of each slot, and masks from the lower right; in RTX."""
    collective: bool
    """Sums over ranks inside of a network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Api:
    """One of NVIDIA's modules, imported."""

    product: str
    """`tensorrt` or `tensorrt_rtx`."""
    trt: Any
    features: Features

    @property
    def version(self) -> str:
        """What an engine's `backend_version` says: engines of another version are refused."""
        return f"{self.product}-{self.trt.__version__}"

    def logger(self) -> Any:
        """Only errors: the rest is progress that the caller shows in its own way."""
        return self.trt.Logger(self.trt.Logger.ERROR)


def find_api(products: Sequence[str] = tuple(MODULES)) -> Api:
    """The first of the products that is installed. Raises TensorRtError if none is."""
    for product in products:
        if importlib.util.find_spec(MODULES[product]) is not None:
            trt = importlib.import_module(MODULES[product])
            return Api(product=product, trt=trt, features=_features(trt))
    raise TensorRtError(
        f"no TensorRT here (looked for {', '.join(MODULES[product] for product in products)}); "
        "pip install 'edgellm[tensorrt]', or on a Jetson use the Python that JetPack's TensorRT was installed for"
    )


def _features(trt: Any) -> Features:
    network = trt.INetworkDefinition
    fused = ("add_attention", "add_rotary_embedding", "add_kv_cache_update")
    return Features(
        attention=all(hasattr(network, name) for name in fused),
        lengths=hasattr(network, "add_attention_v2"),
        collective=hasattr(network, "add_dist_collective"),
    )
