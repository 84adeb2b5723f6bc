"""weights.bin, written one segment at a time."""

from collections.abc import Callable, Hashable
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgellm.engines.cpu.plan import SEGMENT_ALIGNMENT, Segment
from edgellm.engines.graph import WeightName
from edgellm.engines.weights import FloatArray, Weight, WeightStore


class WeightsFile:
    """Appends aligned segments; what was written under a key before is not written again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._segments: dict[Hashable, Segment] = {}
        self.size = 0

    def known(self, key: Hashable) -> Segment | None:
        return self._segments.get(key)

    def append(self, values: npt.NDArray[np.generic], key: Hashable = None) -> Segment:
        """Write an array's bytes, C order; with a key, only the first time."""
        if key is not None and key in self._segments:
            return self._segments[key]
        data = np.ascontiguousarray(values)
        segment = Segment(offset=self.size, bytes=data.nbytes)
        self._file.write(data.data)
        self._file.write(bytes(-data.nbytes % SEGMENT_ALIGNMENT))
        self.size += data.nbytes + -data.nbytes % SEGMENT_ALIGNMENT
        if key is not None:
            self._segments[key] = segment
        return segment


class CountedWeights:
    """A weight store that reports each look-up, and whose vectors must be plain arrays."""

    def __init__(self, weights: WeightStore, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._weights = weights
        self._total = total
        self._done = 0
        self._progress = progress

    def take(self, name: WeightName) -> Weight:
        if name not in self._weights:
            raise ValueError(f"the checkpoint has no weight {name!r}")
        weight = self._weights[name]
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return weight

    def vector(self, name: WeightName, size: int) -> FloatArray:
        """A float32 [size] weight."""
        weight = self.take(name)
        if not isinstance(weight, np.ndarray) or weight.shape != (size,):
            shape = weight.shape if isinstance(weight, np.ndarray) else type(weight).__name__
            raise ValueError(f"weight {name!r} is {shape}, its op needs float32 [{size}]")
        return weight.astype(np.float32)
