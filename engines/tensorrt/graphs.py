"""A recorded CUDA graph: one launch for a whole network. pycuda has no call for it, so the driver is asked itself."""

import ctypes
from collections.abc import Callable
from typing import Final

from edgellm.engines.tensorrt.api import TensorRtError

_THREAD_LOCAL: Final = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL of cuda.h: other threads may go on using the device."""


class CapturedGraph:
    """What `enqueue` puts on a stream, recorded; addresses and shapes stay those of the recording.

    Raises TensorRtError if the driver refuses.
    """

    def __init__(self, stream: int, enqueue: Callable[[], bool]) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream)
        graph = ctypes.c_void_p()
        self._executable = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        is_enqueued = enqueue()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        if not is_enqueued:
            raise TensorRtError("the network could not be recorded as a CUDA graph; TensorRT's log says why")
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Run it once more, asynchronously."""
        self._call("cuGraphLaunch", self._executable, self._stream)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status != 0:
            raise TensorRtError(f"{function} failed with CUDA error {status}")
