"""Payloads through shared memory: between processes of one host.

The sender owns a ring in anonymous shared memory (memfd) and names it by its process and descriptor; the receiver
maps it through /proc. It never has a name in a file system, so whichever side is killed, nothing is left behind.
The size is sealed, so a sender cannot make the receiver fault.
"""

import asyncio
import fcntl
import mmap
import os
import secrets
from pathlib import Path

from edgellm.runtime.transports.base import Carrier, Payload, TransportError
from edgellm.runtime.transports.ring import RingSpace

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class ShmOutgoing:
    """Owner of a ring. `close` gives this side's memory back; the receiver's mapping keeps its own."""

    name = "shm"

    def __init__(self, size: int) -> None:
        label = f"edgellm-kv-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        self._memory = mmap.mmap(self._fd, size)
        self._space = RingSpace(size)
        self._room = asyncio.Event()
        self.size = size
        self.ring_name = f"{os.getpid()}:{self._fd}:{label}"

    async def place(self, chunk: Carrier, payload: Payload) -> None:
        while (offset := self._space.take(len(payload))) is None:
            self._room.clear()
            await self._room.wait()
        self._memory[offset : offset + len(payload)] = payload
        chunk.shm.offset, chunk.shm.length = offset, len(payload)

    def release(self, chunk: Carrier) -> None:
        self._space.give_back(chunk.shm.offset)
        self._room.set()

    def close(self) -> None:
        self._memory.close()
        os.close(self._fd)


class ShmIncoming:
    """Mapping of a sender's ring. Raises TransportError if it cannot be mapped from here."""

    name = "shm"

    def __init__(self, ring_name: str, size: int) -> None:
        self._memory = _map(ring_name, size)

    def fetch(self, chunk: Carrier) -> bytes:
        start, end = chunk.shm.offset, chunk.shm.offset + chunk.shm.length
        if chunk.WhichOneof("payload") != "shm" or not 0 <= start < end <= len(self._memory):
            raise TransportError(f"bytes {start} to {end} are outside of the ring of {len(self._memory)}")
        return self._memory[start:end]


def _map(ring_name: str, size: int) -> mmap.mmap:
    try:
        return _map_ring(*_parse(ring_name), size)
    except (OSError, ValueError) as error:
        raise TransportError(f"shared memory {ring_name!r} cannot be mapped: {error}") from error


def _map_ring(pid: int, descriptor: int, label: str, size: int) -> mmap.mmap:
    """Whatever the name leads to: opening a pipe must not wait for its writer."""
    fd = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if label not in str(Path(f"/proc/self/fd/{fd}").readlink()) or os.fstat(fd).st_size != size:
            raise TransportError(f"descriptor {descriptor} of process {pid} is not the ring {label}")
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
            raise TransportError(f"the size of ring {label} is not sealed")
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _parse(ring_name: str) -> tuple[int, int, str]:
    pid, _, rest = ring_name.partition(":")
    descriptor, _, label = rest.partition(":")
    if not pid.isdecimal() or not descriptor.isdecimal() or not label.startswith("edgellm-kv-"):
        raise TransportError(f"{ring_name!r} does not name a shared memory ring")
    return int(pid), int(descriptor), label
