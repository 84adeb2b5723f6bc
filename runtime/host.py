"""Facts about this process and its host, from /proc."""

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_STATM = Path("/proc/self/statm")


def host_id() -> str:
    """Equal in two processes exactly if they can see each other under /proc, so that shared memory works."""
    try:
        return f"{_BOOT_ID.read_text().strip()}/{_PID_NAMESPACE.readlink()}"
    except OSError:
        return f"no-proc-{uuid.uuid4()}"


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
