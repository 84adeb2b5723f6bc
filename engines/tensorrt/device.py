"""An engine's networks on a GPU, through TensorRT and pycuda. Its plain twin is `evaluated.py`.

folder ── deserialise ──> one execution context per network
caches   half [slots, kv_heads, capacity, head_dim] on the device; a pass over slots s.. binds them from slot s on
a pass   inputs to the device, networks one after the other, rows and new K and V back to the host
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import SumOverRanks
from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.api import TensorRtError, find_api
from edgellm.engines.tensorrt.context import NetworkContext
from edgellm.engines.tensorrt.engine import PassResult
from edgellm.engines.tensorrt.manifest import EngineManifest, TensorInfo
from edgellm.engines.tensorrt.targets import require_device

Array: TypeAlias = npt.NDArray[Any]


class DeviceNetworks:
    """Executor on the first GPU. Raises TensorRtError if there is none, or it or TensorRT is not what the engine was
    built for; the message says what to do."""

    def __init__(
        self, folder: Path, manifest: EngineManifest, *, num_slots: int, sum_over_ranks: SumOverRanks | None = None
    ) -> None:
        self.num_slots = num_slots
        self._manifest = manifest
        self._sum_over_ranks = sum_over_ranks
        self._cuda, self._context = open_cuda()
        require_device(manifest.compute_capability, self._cuda.Device(0).compute_capability())
        with self._current():
            self._stream = self._cuda.Stream()
            self._caches = {tensor.name: self._zeros(tensor) for tensor in manifest.caches}
            self._new = self._cuda.mem_alloc(self._new_bytes(manifest.bounds.max_batch, manifest.bounds.max_chunk))
            api = find_api([manifest.version.split("-")[0]])
            self._networks = [
                NetworkContext(api, self._cuda, self._stream, folder, info, is_static=manifest.is_static(info))
                for info in manifest.networks
            ]

    def load(self, slot: int, first_token: int, kv: npt.NDArray[np.float16]) -> None:
        parts = kv.reshape(-1, *kv.shape[2:])
        with self._current():
            for tensor, part in zip(self._manifest.caches, parts, strict=True):
                self._load(tensor, slot, first_token, part)

    def _load(self, tensor: TensorInfo, slot: int, first_token: int, part: npt.NDArray[np.float16]) -> None:
        """part [kv_heads, tokens, head_dim]."""
        token_bytes = 2 * tensor.shape[3]
        copy = self._cuda.Memcpy2D()
        copy.set_src_host(np.ascontiguousarray(part))
        copy.set_dst_device(self._cache_address(tensor, slot) + first_token * token_bytes)
        copy.src_pitch, copy.dst_pitch = part.shape[1] * token_bytes, tensor.shape[2] * token_bytes
        copy.width_in_bytes, copy.height = part.shape[1] * token_bytes, part.shape[0]
        copy(aligned=False)

    def run(self, first_slot: int, inputs: Mapping[str, Array]) -> PassResult:
        with self._current():
            return self._run(first_slot, inputs)

    def _run(self, first_slot: int, inputs: Mapping[str, Array]) -> PassResult:
        batch, chunk = inputs[interface.POSITIONS].shape
        host, bound = dict(inputs), self._bound(first_slot, batch, chunk)
        for info, network in zip(self._manifest.networks, self._networks, strict=True):
            host |= network.run(host, bound)
            if info.sum_output is not None and info.sum_input is not None:
                host[info.sum_input] = self._summed(host[info.sum_output])
        if self._manifest.form == "primitive":
            self._extend_caches(first_slot, inputs[interface.WRITE_AT], chunk)
        _, kv_heads, _, head_dim = self._manifest.caches[0].shape
        kv = np.empty((len(self._caches) // 2, 2, batch, kv_heads, chunk, head_dim), np.float16)
        self._cuda.memcpy_dtoh_async(kv, self._new, self._stream)
        self._stream.synchronize()
        return PassResult(rows=host[self._manifest.result], kv=kv)

    def close(self) -> None:
        """Keep what the GPU's compiler made for the next start, and free the memory."""
        with self._current():
            for network in self._networks:
                network.close()
            for memory in (*self._caches.values(), self._new):
                memory.free()
        self._caches.clear()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """`forward` may be called from any thread, and CUDA's context is one thread's."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def _bound(self, first_slot: int, batch: int, chunk: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Addresses and shapes of what stays on the device: caches, the same as outputs, and new rows side by side."""
        bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        for index, tensor in enumerate(self._manifest.caches):
            _, kv_heads, capacity, head_dim = tensor.shape
            cache = (self._cache_address(tensor, first_slot), (batch, kv_heads, capacity, head_dim))
            new = int(self._new) + index * 2 * batch * kv_heads * chunk * head_dim
            bound[tensor.name] = bound[interface.cache_out(tensor.name)] = cache
            bound[interface.new_rows(tensor.name)] = (new, (batch, kv_heads, chunk, head_dim))
        return bound

    def _extend_caches(self, first_slot: int, write_at: Array, chunk: int) -> None:
        """Copy new rows into the caches, on the device, where no layer of the network has done so."""
        for index, tensor in enumerate(self._manifest.caches):
            _, kv_heads, capacity, head_dim = tensor.shape
            row_bytes, size = 2 * chunk * head_dim, 2 * len(write_at) * kv_heads * chunk * head_dim
            for slot, first in enumerate(write_at):
                copy = self._cuda.Memcpy2D()
                copy.set_src_device(int(self._new) + index * size + slot * kv_heads * row_bytes)
                copy.set_dst_device(self._cache_address(tensor, first_slot + slot) + int(first) * 2 * head_dim)
                copy.src_pitch, copy.dst_pitch = row_bytes, 2 * capacity * head_dim
                copy.width_in_bytes, copy.height = row_bytes, kv_heads
                copy(self._stream)

    def _summed(self, partial: Array) -> Array:
        if self._sum_over_ranks is None:
            raise ValueError("this engine is one of several tensor-parallel ranks: it runs in a group")
        self._sum_over_ranks(partial.reshape(-1, partial.shape[-1], copy=False))
        return partial

    def _zeros(self, tensor: TensorInfo) -> Any:
        """Zero, since a masked token is still multiplied by its weight, 0, and garbage may be infinite."""
        size = self.num_slots * _slot_bytes(tensor)
        memory = self._cuda.mem_alloc(size)
        self._cuda.memset_d8(memory, 0, size)
        return memory

    def _cache_address(self, tensor: TensorInfo, slot: int) -> int:
        return int(self._caches[tensor.name]) + slot * _slot_bytes(tensor)

    def _new_bytes(self, batch: int, chunk: int) -> int:
        return sum(2 * batch * chunk * tensor.shape[1] * tensor.shape[3] for tensor in self._manifest.caches)


def _slot_bytes(tensor: TensorInfo) -> int:
    _, kv_heads, capacity, head_dim = tensor.shape
    return 2 * kv_heads * capacity * head_dim


def open_cuda() -> tuple[Any, Any]:
    """pycuda's driver module, and the primary context of the first GPU. Raises TensorRtError if there is none."""
    try:
        cuda = importlib.import_module("pycuda.driver")
        cuda.init()
        return cuda, cuda.Device(0).retain_primary_context()
    except ImportError as error:
        raise TensorRtError(
            f"TensorRT engines run through pycuda, which is not here ({error}); pip install pycuda"
        ) from error
    except cuda.Error as error:
        raise TensorRtError(f"no GPU can be used ({error}); run this engine where there is one") from error
