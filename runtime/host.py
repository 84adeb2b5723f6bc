"""Facts about this process and its host."""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from edgellm.engines.load import LOCAL_DEVICE_CLASS
from edgellm.jetson.telemetry import device_class, read_identity, read_telemetry

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_STATM = Path("/proc/self/statm")


def host_id() -> str:
    """Equal in two processes exactly if they can see each other under /proc, so that shared memory works."""
    try:
        return f"{_BOOT_ID.read_text().strip()}/{_PID_NAMESPACE.readlink()}"
    except OSError:
        return f"no-proc-{uuid.uuid4()}"


def address_towards(peer: str) -> str:
    """This host's address as `peer`, host:port, sees it. Raises OSError where there is no way to it."""
    host, _, port = peer.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def local_device_class() -> str:
    """What this machine is, by its device tree; `cpu-local` if it is no known board."""
    return device_class(read_identity(), read_telemetry().memory_total_bytes) or LOCAL_DEVICE_CLASS


def physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory of this process."""

    rss_bytes: int
    shared_bytes: int
    """Of that, pages of files and of shared memory, such as mapped weights."""


def memory() -> Memory:
    """Zeros where there is no /proc."""
    try:
        pages = [int(field) for field in _STATM.read_text().split()]
    except OSError:
        return Memory(rss_bytes=0, shared_bytes=0)
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return Memory(rss_bytes=pages[1] * page_bytes, shared_bytes=pages[2] * page_bytes)
