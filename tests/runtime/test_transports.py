"""Room in the ring, and shared memory between processes that outlives nobody."""

import asyncio
import fcntl
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.transports.base import TransportError
from edgellm.runtime.transports.grpc import GrpcIncoming, GrpcOutgoing
from edgellm.runtime.transports.ring import RingSpace
from edgellm.runtime.transports.shm import ShmIncoming, ShmOutgoing


@given(st.integers(1, 200), st.lists(st.integers(1, 80) | st.none(), max_size=100), st.randoms())
def test_spans_never_overlap_and_all_room_comes_back(size, actions, random):
    ring = RingSpace(size)
    live: dict[int, int] = {}
    for length in actions:
        if length is None or length > size:
            if live:
                offset = random.choice(sorted(live))
                ring.give_back(offset)
                del live[offset]
            continue
        offset = ring.take(length)
        if offset is None:
            assert live
            continue
        assert 0 <= offset <= offset + length <= size
        assert all(offset + length <= other or other + live[other] <= offset for other in live)
        live[offset] = length
    for offset in live:
        ring.give_back(offset)
    assert ring.take(size) == 0


def test_a_span_larger_than_the_ring_is_an_error():
    with pytest.raises(ValueError, match="11 bytes"):
        RingSpace(10).take(11)


async def send_through(outgoing, incoming, payloads: list[bytes], in_flight: int) -> list[bytes]:
    received, waiting = [], deque()
    for payload in payloads:
        chunk = kv_pb2.KvChunk()
        async with asyncio.timeout(5):
            while len(waiting) >= in_flight:
                outgoing.release(waiting.popleft())
            await outgoing.place(chunk, payload)
        received.append(incoming.fetch(chunk))
        waiting.append(chunk)
    return received


@pytest.mark.parametrize("name", ["shm", "grpc"])
def test_payloads_arrive(name):
    async def run() -> None:
        payloads = [os.urandom(1000 + 37 * i) for i in range(40)]
        outgoing = ShmOutgoing(1 << 14) if name == "shm" else GrpcOutgoing()
        incoming = ShmIncoming(outgoing.ring_name, outgoing.size) if name == "shm" else GrpcIncoming()
        assert await send_through(outgoing, incoming, payloads, in_flight=3) == payloads
        outgoing.close()

    asyncio.run(run())


def test_a_full_ring_waits_for_room():
    async def run() -> None:
        outgoing = ShmOutgoing(100)
        first, second = kv_pb2.KvChunk(), kv_pb2.KvChunk()
        await outgoing.place(first, b"a" * 80)
        placing = asyncio.create_task(outgoing.place(second, b"b" * 80))
        await asyncio.sleep(0)
        assert not placing.done()
        outgoing.release(first)
        await asyncio.wait_for(placing, 5)
        assert second.shm.offset == 0
        outgoing.close()

    asyncio.run(run())


def test_only_rings_can_be_mapped(tmp_path):
    outgoing = ShmOutgoing(4096)
    pid, descriptor, label = outgoing.ring_name.split(":")
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(4096)
        for name in (
            f"{pid}:{file.fileno()}:{label}",
            f"{pid}:999999:{label}",
            f"{pid}:{descriptor}:edgellm-kv-other",
            f"{pid}:{descriptor}:passwd",
            f"../{pid}:{descriptor}:{label}",
            "",
        ):
            with pytest.raises(TransportError):
                ShmIncoming(name, 4096)
    with pytest.raises(TransportError):
        ShmIncoming(outgoing.ring_name, 8192)
    outgoing.close()


def test_a_ring_that_may_shrink_is_refused():
    label = "edgellm-kv-unsealed"
    descriptor = os.memfd_create(label, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(TransportError, match="sealed"):
        ShmIncoming(f"{os.getpid()}:{descriptor}:{label}", 4096)
    os.close(descriptor)


def test_what_is_no_ring_is_refused_at_once(tmp_path):
    """Whatever a name leads to: a file, a pipe that nobody writes to, and an empty ring."""
    label = "edgellm-kv-x"
    file, pipe = tmp_path / f"{label}-file", tmp_path / f"{label}-pipe"
    file.write_bytes(bytes(4096))
    os.mkfifo(pipe)
    empty = os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(empty, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    descriptors = {empty: 0, os.open(file, os.O_RDONLY): 4096, os.open(pipe, os.O_RDONLY | os.O_NONBLOCK): 0}
    for descriptor, size in descriptors.items():
        with pytest.raises(TransportError):
            ShmIncoming(f"{os.getpid()}:{descriptor}:{label}", size)
        os.close(descriptor)
    with pytest.raises(TransportError):
        ShmIncoming(f"{os.getpid()}:{'9' * 5000}:{label}", 4096)


def test_spans_outside_of_the_ring_are_refused():
    outgoing = ShmOutgoing(4096)
    incoming = ShmIncoming(outgoing.ring_name, 4096)
    for offset, length in ((4000, 97), (0, 0), (1 << 60, 4)):
        with pytest.raises(TransportError):
            incoming.fetch(kv_pb2.KvChunk(shm=kv_pb2.ShmSpan(offset=offset, length=length)))
    with pytest.raises(TransportError):
        incoming.fetch(kv_pb2.KvChunk(inline_payload=b"x"))
    with pytest.raises(TransportError):
        GrpcIncoming().fetch(kv_pb2.KvChunk(shm=kv_pb2.ShmSpan(offset=0, length=4)))
    outgoing.close()


OWN_A_RING = """
import asyncio, sys
from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.transports.shm import ShmOutgoing
outgoing = ShmOutgoing(1 << 16)
asyncio.run(outgoing.place(kv_pb2.KvChunk(), b"survives"))
print(outgoing.ring_name, flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_leaves_the_mapping_readable_and_nothing_after_it():
    with subprocess.Popen(
        [sys.executable, "-c", OWN_A_RING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        incoming = ShmIncoming(name, 1 << 16)
        owner.kill()
    assert incoming.fetch(kv_pb2.KvChunk(shm=kv_pb2.ShmSpan(offset=0, length=8))) == b"survives"
    with pytest.raises(TransportError):
        ShmIncoming(name, 1 << 16)
    label = name.split(":")[2]
    assert label in Path("/proc/self/maps").read_text()
    del incoming
    assert label not in Path("/proc/self/maps").read_text()
