"""cluster.toml: which devices there are, what they can do, and which phase each one serves.

    [devices.nx0]
    class = "orin-nx-16gb"        # a profile; `edgellm-profile` lists them, and an unknown one is answered with all
    watts = 40                    # optional: one of the profile's power modes
    memory_gib = 16               # optional, as the two below: what differs from the profile
    bandwidth_gb_s = 102
    link_gbit_s = 0.94

    [pools]
    prefill = ["nx0"]
    decode = ["nano0", "nano1"]   # in pipeline order

A device may be in both pools; it then shares its memory between the two engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from edgellm.jetson.profiles import CPU_LOCAL, GIB, PROFILES, DeviceProfile, PowerMode

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class ClusterError(Exception):
    """A cluster description that cannot be used; the message names the entry and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, its profile and the file's overrides resolved to rates that can be expected in practice."""

    name: str
    device_class: str
    usable_bytes: int
    """For weights, KV and activations."""
    reserved_bytes: int
    """Left to the operating system and the node process."""
    flops_per_s: float
    """Half-precision arithmetic in prompt processing."""
    bytes_per_s: float
    """Memory reads while decoding."""
    link_bytes_per_s: float
    link_latency_s: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The two pools, each in the order of the file."""

    prefill: tuple[Device, ...]
    decode: tuple[Device, ...]


class _DeviceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device_class: str = msgspec.field(name="class")
    watts: int | None = None
    memory_gib: _Positive | None = None
    bandwidth_gb_s: _Positive | None = None
    link_gbit_s: _Positive | None = None


class _PoolsEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prefill: list[str]
    decode: list[str]


class _ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    devices: dict[str, _DeviceEntry]
    pools: _PoolsEntry


def read_cluster(path: Path) -> Cluster:
    """Read a cluster.toml. Raises ClusterError."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_cluster(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{path} cannot be read: {error}") from error
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from error


def parse_cluster(text: str) -> Cluster:
    """The cluster that the text of a cluster.toml describes. Raises ClusterError."""
    try:
        file = msgspec.toml.decode(text, type=_ClusterFile)
    except msgspec.DecodeError as error:
        raise ClusterError(str(error)) from error
    devices = {name: _resolve(name, entry) for name, entry in file.devices.items()}
    idle = devices.keys() - {*file.pools.prefill, *file.pools.decode}
    if idle:
        raise ClusterError(f"device {min(idle)!r} is in no pool; add it to pools.prefill or pools.decode, or drop it")
    return Cluster(
        prefill=_pool("prefill", file.pools.prefill, devices), decode=_pool("decode", file.pools.decode, devices)
    )


def _pool(pool: str, names: Sequence[str], devices: dict[str, Device]) -> tuple[Device, ...]:
    if not names:
        raise ClusterError(f"pools.{pool} is empty; name at least one device")
    for name in names:
        if name not in devices:
            raise ClusterError(f"pools.{pool} names {name!r}; the devices are {', '.join(sorted(devices)) or 'none'}")
        if names.count(name) > 1:
            raise ClusterError(f"pools.{pool} names {name!r} more than once")
    return tuple(devices[name] for name in names)


def _resolve(name: str, entry: _DeviceEntry) -> Device:
    profile = PROFILES.get(entry.device_class)
    if profile is None:
        raise ClusterError(
            f"device {name!r} has class {entry.device_class!r}; the known classes are {', '.join(PROFILES)}"
        )
    mode = _power_mode(name, profile, entry.watts)
    memory_bytes = profile.memory_bytes if entry.memory_gib is None else int(entry.memory_gib * GIB)
    if memory_bytes <= profile.reserved_bytes:
        raise ClusterError(
            f"device {name!r} has {memory_bytes / GIB:g} GiB of memory; the system alone is taken to need "
            f"{profile.reserved_bytes / GIB:g} GiB"
        )
    bandwidth_gb_s = entry.bandwidth_gb_s or mode.memory_bandwidth_gb_s
    link_gb_s = profile.link_gb_s if entry.link_gbit_s is None else entry.link_gbit_s / 8
    return Device(
        name=name,
        device_class=profile.device_class,
        usable_bytes=memory_bytes - profile.reserved_bytes,
        reserved_bytes=profile.reserved_bytes,
        flops_per_s=mode.half_tflops * 1e12 * profile.compute_efficiency,
        bytes_per_s=bandwidth_gb_s * 1e9 * profile.bandwidth_efficiency,
        link_bytes_per_s=link_gb_s * 1e9,
        link_latency_s=profile.link_latency_ms * 1e-3,
    )


def _power_mode(name: str, profile: DeviceProfile, watts: int | None) -> PowerMode:
    if watts is None:
        return profile.modes[0]
    for mode in profile.modes:
        if mode.watts == watts:
            return mode
    known = ", ".join(str(mode.watts) for mode in profile.modes if mode.watts) or "none"
    raise ClusterError(f"device {name!r} has watts = {watts}; the power modes of {profile.device_class} are {known}")


def cluster_of(prefill: Sequence[str], decode: Sequence[str]) -> Cluster:
    """Devices of these classes in the two pools; one class alone in both is one device that serves both phases.

    Raises ClusterError for a class that is not known.
    """
    if list(prefill) == list(decode) and len(prefill) == 1:
        both = (_resolve("local", _DeviceEntry(device_class=prefill[0])),)
        return Cluster(prefill=both, decode=both)
    pools = {
        role: tuple(_resolve(f"{role}{index}", _DeviceEntry(device_class=name)) for index, name in enumerate(names))
        for role, names in (("prefill", prefill), ("decode", decode))
    }
    return Cluster(prefill=pools["prefill"], decode=pools["decode"])


_LOCAL: Final = _resolve("local", _DeviceEntry(device_class=CPU_LOCAL.device_class))
LOCAL_CLUSTER: Final = Cluster(prefill=(_LOCAL,), decode=(_LOCAL,))
"""One ordinary machine that serves both phases."""
