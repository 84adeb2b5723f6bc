"""One network on the GPU: its execution context, its buffers, and what is kept beside its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.tensorrt.api import Api, TensorRtError
from edgellm.engines.tensorrt.graphs import CapturedGraph
from edgellm.engines.tensorrt.manifest import NetworkInfo

Array: TypeAlias = npt.NDArray[Any]
Bound: TypeAlias = Mapping[str, tuple[int, tuple[int, ...]]]
"""Device address and shape by tensor name."""


class NetworkContext:
    """Runs one network on a stream.

    With `is_static`, every run has the same shapes and addresses: it is recorded as a CUDA graph, by RTX's runtime
    itself, or here after a first run.
    """

    def __init__(self, api: Api, cuda: Any, stream: Any, folder: Path, info: NetworkInfo, *, is_static: bool) -> None:
        self._api = api
        self._cuda = cuda
        self._stream = stream
        self._info = info
        self._is_static = is_static
        self._buffers: dict[str, Any] = {}
        self._results: dict[str, Array] = {}
        self._graph: CapturedGraph | None = None
        self._runs = 0
        self._cache_file = folder / f"{info.file}.cache"
        self._runtime = api.trt.Runtime(api.logger())
        self._engine = self._deserialize((folder / info.file).read_bytes())
        self._runtime_cache: Any = None
        self._context = self._create_context()

    def run(self, host: Mapping[str, Array], bound: Bound) -> dict[str, Array]:
        """Results by name, valid until the next run: all outputs but those in `bound`, which stay where they are."""
        for tensor in self._info.inputs:
            address, shape = bound[tensor.name] if tensor.name in bound else self._send(tensor.name, host[tensor.name])
            self._check(self._context.set_input_shape(tensor.name, shape), f"shape {shape} of {tensor.name}")
            self._context.set_tensor_address(tensor.name, address)
        returned = [tensor.name for tensor in self._info.outputs if tensor.name not in bound]
        for tensor in self._info.outputs:
            address = bound[tensor.name][0] if tensor.name in bound else self._receive(tensor.name)
            self._context.set_tensor_address(tensor.name, address)
        self._enqueue()
        for name in returned:
            self._cuda.memcpy_dtoh_async(self._results[name], self._buffers[name], self._stream)
        self._stream.synchronize()
        return {name: self._results[name] for name in returned}

    def close(self) -> None:
        """Keep the kernels that the runtime compiled for this GPU beside the engine, where that can be written."""
        if self._runtime_cache is not None:
            try:
                self._cache_file.write_bytes(bytes(self._runtime_cache.serialize()))
            except OSError:
                self._cache_file.unlink(missing_ok=True)
        self._graph = None
        for memory in self._buffers.values():
            memory.free()
        self._buffers.clear()
        self._context = self._engine = None

    def _enqueue(self) -> None:
        if self._graph is not None:
            self._graph.launch()
            return
        self._check(self._context.execute_async_v3(self._stream.handle), "a run")
        self._runs += 1
        if self._is_static and self._runtime_cache is None and self._runs == 2:
            self._stream.synchronize()
            self._graph = CapturedGraph(
                self._stream.handle, lambda: self._context.execute_async_v3(self._stream.handle)
            )

    def _send(self, name: str, values: Array) -> tuple[int, tuple[int, ...]]:
        data = np.ascontiguousarray(values)
        self._grow(name, data.nbytes)
        self._cuda.memcpy_htod_async(self._buffers[name], data, self._stream)
        return int(self._buffers[name]), data.shape

    def _receive(self, name: str) -> int:
        """Address of an output's buffer, of the size that the inputs' shapes give it."""
        shape = tuple(self._context.get_tensor_shape(name))
        if name not in self._results or self._results[name].shape != shape:
            self._results[name] = self._cuda.pagelocked_empty(shape, np.float32)
        self._grow(name, self._results[name].nbytes)
        return int(self._buffers[name])

    def _grow(self, name: str, size: int) -> None:
        if name not in self._buffers or self._buffers[name].size < size:
            if name in self._buffers:
                self._buffers[name].free()
            self._buffers[name] = _Buffer(self._cuda.mem_alloc(size), size)

    def _deserialize(self, data: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise TensorRtError(f"{self._api.version} refuses {self._info.file} here{self._why(data)}; {_REMEDY}")
        return engine

    def _why(self, data: bytes) -> str:
        """What RTX says of an engine that does not fit; nothing from other products."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return ""
        _, diagnostics = self._runtime.get_engine_validity(data)
        reasons = self._api.trt.EngineInvalidityDiagnostics.__members__.items()
        named = [name.lower().replace("_", " ") for name, reason in reasons if diagnostics & int(reason)]
        return f" ({', '.join(named)})" if named else ""

    def _create_context(self) -> Any:
        """With RTX: a runtime cache, and CUDA graphs where shapes do not change."""
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self._runtime_cache = config.create_runtime_cache()
            if self._cache_file.exists():
                self._runtime_cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._runtime_cache)
            if self._is_static:
                config.cuda_graph_strategy = self._api.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)

    def _check(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise TensorRtError(f"{self._api.version} refused {what} of {self._info.file}; its log says why")


_REMEDY = "build the bundle with the edgellm-build of this version, for this device's --target"


class _Buffer:
    """Device memory that knows its size."""

    def __init__(self, memory: Any, size: int) -> None:
        self._memory = memory
        self.size = size

    def __int__(self) -> int:
        return int(self._memory)

    def free(self) -> None:
        self._memory.free()
