"""What results must have in common to stand in one report: the machine, how it was asked, and the code's version."""

import functools
from dataclasses import dataclass, fields
from pathlib import Path

from bench.report import cpu_model
from edgellm.engines.bundle import file_sha256
from edgellm.engines.cpu import _native
from edgellm.engines.cpu.plan import BACKEND_VERSION


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Of one run of a benchmark."""

    cpu: str
    threads: int
    real_time: bool
    """Whether SCHED_RR was asked for."""
    backend_version: str

    def difference(self, other: "Conditions") -> str | None:
        """The first thing that differs, for people; None if nothing does."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name.replace('_', ' ')} {mine}, now {theirs}"
        return None


def conditions(*, threads: int, real_time: bool) -> Conditions:
    """Here and now."""
    return Conditions(cpu=cpu_model(), threads=threads, real_time=real_time, backend_version=BACKEND_VERSION)


@functools.cache
def kernels_sha256() -> str:
    """Of the native extension: kernels become faster without a new backend version."""
    return file_sha256(Path(_native.__file__))
