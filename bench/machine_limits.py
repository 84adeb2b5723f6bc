"""The machine's own limits, measured in the same run as what is held against them: memory reads and multiplications."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

SOURCE: Final = Path(__file__).with_name("limits.cpp")
OUT: Final = Path(__file__).parent / "out"
READ_BYTES: Final = 512 << 20
"""Read per measurement: larger than the last-level cache of most machines (`L3` is reported beside it)."""
_FLAGS: Final = ("-std=c++20", "-O2", "-march=native", "-shared", "-fPIC", "-pthread")


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """With all threads: GFLOP/s, GFLOP/s and GOP/s; 0 where there is no such instruction."""

    fp32: float
    bf16: float
    int8: float


class MachineLimits:
    """The compiled measurements, and memory to read."""

    def __init__(self, threads: int) -> None:
        """ValueError if there is no compiler, or it does not know this machine."""
        self.threads = threads
        self._library = ctypes.CDLL(str(_built()))
        for name in ("read_gb_per_s", "fp32_per_s", "bf16_per_s", "int8_per_s"):
            getattr(self._library, name).restype = ctypes.c_double
        memory = np.ones(READ_BYTES + 64, np.uint8)
        self._memory = memory[-memory.ctypes.data % 64 :][:READ_BYTES]

    def read_gb_per_s(self, threads: int) -> float:
        """GB/s of one pass over `READ_BYTES`, shared out over the threads."""
        return float(
            self._library.read_gb_per_s(
                ctypes.c_void_p(self._memory.ctypes.data), ctypes.c_int64(READ_BYTES), ctypes.c_int(threads)
            )
        )

    def peaks(self, repeats: int = 5) -> Peaks:
        """The best of `repeats`: a peak is what was reached once."""
        names = ("fp32", "bf16", "int8")
        measured = {name: getattr(self._library, f"{name}_per_s") for name in names}
        threads = ctypes.c_int(self.threads)
        return Peaks(**{name: max(measure(threads) for _ in range(repeats)) for name, measure in measured.items()})


def last_level_cache_mib() -> float | None:
    """Of the first core, as the system says; None where it does not."""
    sizes = [_size_mib(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=None)


def _size_mib(text: str) -> float:
    """`107520K` as MiB."""
    return int(text.strip().rstrip("K")) / 1024


def _built() -> Path:
    """The library for this source and processor, compiled if it is not there."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ValueError("no C++ compiler to measure the machine's limits with; install g++, or set CXX")
    key = hashlib.sha256(SOURCE.read_bytes() + _processor()).hexdigest()
    library = OUT / f"limits-{key[:16]}.so"
    if not library.exists():
        _compile(compiler, library)
    return library


def _processor() -> bytes:
    """What `-march=native` depends on."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    return b"".join(line for line in lines if line.startswith((b"model", b"flags", b"Features")))


def _compile(compiler: str, library: Path) -> None:
    OUT.mkdir(exist_ok=True)
    partial = library.with_suffix(".partial")
    done = subprocess.run([compiler, *_FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{SOURCE.name} does not compile on this machine: {done.stderr.strip().splitlines()[0]}")
    partial.replace(library)
