"""Medians of repeated runs, and the memory bandwidth that decoding is measured against."""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np


def medians_s(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median wall-clock seconds of `repeats` runs of each, after one that does not count; the actions take turns."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for action, taken in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken[1:]) for taken in times]


def median_s(action: Callable[[], object], repeats: int) -> float:
    """Of one action alone."""
    return medians_s([action], repeats)[0]


def read_bandwidth_gb_s(repeats: int = 7) -> float:
    """GB/s of one thread that sums 256 MiB, larger than any cache level but the largest servers' last."""
    values = np.ones(2**25, np.float64)
    return values.nbytes / median_s(values.sum, repeats) / 1e9
