"""Medians of repeated runs, and the memory bandwidth that decoding is measured against."""

import statistics
import time
from collections.abc import Callable

import numpy as np


def median_s(action: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of `repeats` runs, after one that does not count."""
    action()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_bandwidth_gb_s(repeats: int = 7) -> float:
    """GB/s of one thread that sums 256 MiB, larger than any cache level but the largest servers' last."""
    values = np.ones(2**25, np.float64)
    return values.nbytes / median_s(values.sum, repeats) / 1e9
