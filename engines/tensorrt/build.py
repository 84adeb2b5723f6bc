"""From a finished network to the bytes of an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.api import Api, TensorRtError
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.network import EmittedNetwork
from edgellm.engines.tensorrt.targets import set_target

WORKSPACE_BYTES = 1 << 30
"""Scratch memory that kernels may ask for; boards have 4 to 16 GB in all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltEngine:
    """A serialised engine."""

    data: bytes
    compute_capability: tuple[int, int]
    timing_cache: bytes
    """What the next build of such a network need not measure again; empty where the module measures nothing."""


def build_engine(
    api: Api,
    emitted: EmittedNetwork,
    device_class: str,
    *,
    timing_cache: bytes = b"",
    progress: Callable[[int, int], None] | None = None,
) -> BuiltEngine:
    """Build for a device class. Raises TensorRtError with what to do if the compiler refuses."""
    config = emitted.builder.create_builder_config()
    config.set_memory_pool_limit(api.trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = api.trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(emitted))
    capability = set_target(api, config, device_class)
    measures = api.product == "tensorrt"  # RTX chooses kernels on the device, where it keeps a runtime cache
    if measures:
        config.set_timing_cache(config.create_timing_cache(timing_cache), False)
    if progress is not None:
        config.progress_monitor = _monitor(api, progress)
    data = emitted.builder.build_serialized_network(emitted.network, config)
    if data is None:
        raise TensorRtError(f"{api.version} did not build the network for {device_class}; its messages above say why")
    kept = bytes(config.get_timing_cache().serialize()) if measures else b""
    return BuiltEngine(data=bytes(data), compute_capability=capability, timing_cache=kept)


def _profile(emitted: EmittedNetwork) -> Any:
    """Least, usual and largest shape of every input."""
    profile, network = emitted.builder.create_optimization_profile(), emitted.network
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape), emitted.bounds))
    return profile


def shapes(name: str, shape: tuple[int, ...], bounds: Bounds) -> tuple[tuple[int, ...], ...]:
    """Least, usual and largest shape of an input of this name; `shape` has -1 where the size may change.

    Usual is one prompt's full chunk for a prefill network, and a full batch for a decode network.
    """
    batch = (1, bounds.max_batch if bounds.is_decode else 1, bounds.max_batch)
    chunk = (1, bounds.max_chunk, bounds.max_chunk)
    longest = (1, min(2 * bounds.max_chunk, bounds.capacity), bounds.capacity)
    selected = (1, 1, bounds.max_selected)
    sizes = {interface.VISIBLE: (longest,), interface.SELECTED: (selected,)}.get(name, (batch, chunk))
    unknown = [index for index, size in enumerate(shape) if size == -1]
    chosen = dict(zip(unknown, sizes, strict=False))
    return tuple(
        tuple(chosen[index][case] if index in chosen else size for index, size in enumerate(shape)) for case in range(3)
    )


def _monitor(api: Api, progress: Callable[[int, int], None]) -> Any:
    """Steps of the outermost phase; TensorRT calls it from its own threads."""

    base: Any = api.trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._outermost: str | None = None
            self._steps = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._outermost, self._steps = phase, steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._outermost:
                progress(step + 1, self._steps)
            return True

        def phase_finish(self, phase: str) -> None:
            if phase == self._outermost:
                progress(self._steps, self._steps)

    return Monitor()
