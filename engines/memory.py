"""Host memory for KV pools and arenas."""

import mmap

import numpy as np
import numpy.typing as npt


def private_memory(size: int) -> npt.NDArray[np.uint8]:
    """`size` zero bytes, page-aligned; pages are taken from the system when first touched.

    Private, so that the system does not count them as shared memory, as it does mapped weights, and may back them
    with huge pages.
    """
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8, size)
