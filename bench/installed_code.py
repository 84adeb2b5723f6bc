"""What results must have in common to stand in one report: the machine, how it was asked, and the code's version."""

import functools
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from bench.peers.contenders import DRIVERS, OURS, Contender
from bench.peers.environments import environment_key
from bench.report import cpu_model
from edgellm.engines.bundle import file_sha256
from edgellm.engines.cpu import _native
from edgellm.engines.cpu.plan import BACKEND_VERSION

_PROTOCOL: Final = "driver_protocol.py"


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


@dataclass(frozen=True, kw_only=True)
class PeerCode:
    """What a peer was measured with."""

    environment: str
    """Changes with what is installed for it."""
    drivers_sha256: str
    """Of its driver, ours, and what they have in common."""

    def difference(self, other: "PeerCode") -> str | None:
        """The first thing that differs, for people; None if nothing does."""
        if self.environment != other.environment:
            return "another version of the peer than now"
        return "other drivers than now" if self.drivers_sha256 != other.drivers_sha256 else None


@functools.cache
def peer_code(peer: Contender) -> PeerCode:
    """Here and now, whether it is installed or not."""
    drivers = (DRIVERS / name for name in (peer.driver, OURS["int4"].driver, _PROTOCOL))
    joined = "".join(file_sha256(driver) for driver in drivers)
    return PeerCode(
        environment=environment_key(peer.environment), drivers_sha256=hashlib.sha256(joined.encode()).hexdigest()
    )


@functools.cache
def kernels_sha256() -> str:
    """Of the native extension: kernels become faster without a new backend version."""
    return file_sha256(Path(_native.__file__))
