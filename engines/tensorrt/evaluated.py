"""An executor without a GPU: networks evaluated in NumPy, caches in host memory. The plain twin of `device.py`."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import SumOverRanks
from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.engine import PassResult
from edgellm.engines.tensorrt.evaluate import NetworkEvaluator
from edgellm.engines.tensorrt.manifest import EngineManifest

Array: TypeAlias = npt.NDArray[Any]


class EvaluatedNetworks:
    """Runs an engine's networks one after the other. K and V are kept unrounded in the caches."""

    def __init__(
        self,
        manifest: EngineManifest,
        networks: Sequence[NetworkEvaluator],
        *,
        num_slots: int,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> None:
        self.num_slots = num_slots
        self._manifest = manifest
        self._networks = networks
        self._sum_over_ranks = sum_over_ranks
        self._caches = {tensor.name: np.zeros((num_slots, *tensor.shape[1:]), np.float32) for tensor in manifest.caches}

    def load(self, slot: int, first_token: int, kv: npt.NDArray[np.float16]) -> None:
        for cache, part in zip(self._caches.values(), kv.reshape(-1, *kv.shape[2:]), strict=True):
            cache[slot, :, first_token : first_token + part.shape[1]] = part

    def run(self, first_slot: int, inputs: Mapping[str, Array]) -> PassResult:
        slots = slice(first_slot, first_slot + len(inputs[interface.WRITE_AT]))
        tensors = dict(inputs) | {name: cache[slots] for name, cache in self._caches.items()}
        for info, network in zip(self._manifest.networks, self._networks, strict=True):
            tensors |= network.run(tensors)
            if info.sum_output is not None and info.sum_input is not None:
                tensors[info.sum_input] = self._summed(tensors[info.sum_output])
        for name, cache in self._caches.items():
            self._extend(cache[slots], tensors[interface.new_rows(name)], inputs[interface.WRITE_AT])
        new = [tensors[interface.new_rows(name)] for name in self._caches]
        return PassResult(
            rows=tensors[self._manifest.result],
            kv=np.stack(new).reshape(-1, 2, *new[0].shape).astype(np.float16),
        )

    def close(self) -> None:
        self._caches.clear()

    def _summed(self, partial: Array) -> Array:
        if self._sum_over_ranks is None:
            raise ValueError("this engine is one of several tensor-parallel ranks: it runs in a group")
        total = partial.copy()
        self._sum_over_ranks(total.reshape(-1, total.shape[-1], copy=False))
        return total

    def _extend(self, cache: Array, rows: Array, write_at: Array) -> None:
        """What a cache layer did in place already, or the runner has to do where there is none."""
        for slot, first in enumerate(write_at):
            cache[slot, :, first : first + rows.shape[2]] = rows[slot]
