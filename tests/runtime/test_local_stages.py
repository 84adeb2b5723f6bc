"""The stage exchange over a Unix socket: messages come whole and in order, or the connection ends."""

import asyncio
import contextlib
import itertools
import os
import socket
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgellm.runtime.kv.links import MAX_MESSAGE_BYTES
from edgellm.runtime.kv.types import Attempt, RequestId
from edgellm.runtime.stages import local
from edgellm.runtime.stages.local import Frames, connect_locally, serving_locally, socket_name
from edgellm.runtime.stages.messages import StageSegment, StageStep
from edgellm.runtime.stages.servicer import ServicerHooks
from edgellm.runtime.stages.wire import step_to_proto
from tests.runtime.conftest import eventually

ADDRESS = "192.0.2.1:7"
ATTEMPT = Attempt(request_id=RequestId("r"), epoch=2)
STEP = StageStep(
    step_id=1, stage=1, hidden=np.arange(6, dtype=np.float16).reshape(2, 3),
    segments=(StageSegment(attempt=ATTEMPT, first_position=4, rows=2, sample=True),),
)  # fmt: skip


def ignore(message: object) -> None:
    pass


def framed(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=8))
def test_messages_come_whole_however_they_were_cut(messages, cuts):
    async def run() -> list[bytes]:
        received: list[bytes] = []
        frames, stream = Frames(bytes, received.append), b"".join(map(framed, messages))
        bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
        for start, end in itertools.pairwise(bounds):
            frames.data_received(stream[start:end])
        return received

    assert asyncio.run(run()) == messages


def on_one_host(test):
    """Run `test(gone)` beside a listener at ADDRESS; `gone` has whoever came and went."""

    async def run() -> None:
        crashes: list[BaseException] = []
        gone: list[object] = []
        hooks = ServicerHooks(on_step=lambda step, source: None, on_gone=gone.append, on_crash=crashes.append)
        async with asyncio.timeout(20), serving_locally(ADDRESS, hooks):
            await test(gone)
        assert crashes == []

    asyncio.run(run())


def test_what_is_not_a_message_ends_the_connection():
    async def test(gone):
        for count, wrong in enumerate(
            [struct.pack("<I", MAX_MESSAGE_BYTES + 1), framed(b"\xff"), framed(b"")], start=1
        ):
            reader, writer = await asyncio.open_unix_connection(socket_name(ADDRESS))
            writer.write(wrong)
            assert await reader.read() == b""
            await eventually(lambda count=count: len(gone) == count)
            writer.close()

    on_one_host(test)


def test_a_source_that_goes_is_told():
    async def test(gone):
        frames = await connect_locally(ADDRESS, bytes, ignore)
        frames.abort()
        frames.send(b"to nobody")
        await frames.ended
        await eventually(lambda: len(gone) == 1)

    on_one_host(test)


def test_a_listener_that_goes_is_seen_and_is_not_found_again():
    async def run() -> None:
        arrived: list[StageStep] = []
        hooks = ServicerHooks(
            on_step=lambda step, source: arrived.append(step), on_gone=lambda source: None, on_crash=lambda error: None
        )
        async with asyncio.timeout(20):
            async with serving_locally(ADDRESS, hooks):
                frames = await connect_locally(ADDRESS, bytes, ignore)
                frames.send(step_to_proto(STEP).SerializeToString())
                await eventually(lambda: arrived)
            await frames.ended
            assert await connect_locally(ADDRESS, bytes, ignore) is None
        assert arrived[0].segments == STEP.segments
        assert np.array_equal(arrived[0].hidden, STEP.hidden)

    asyncio.run(run())


def test_what_nobody_expected_is_told_and_not_taken_for_damage():
    def fail(step, source):
        raise ValueError("a fault of the node")

    async def run() -> list[BaseException]:
        crashes: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        hooks = ServicerHooks(on_step=fail, on_gone=ignore, on_crash=crashes.append)
        async with asyncio.timeout(20), serving_locally(ADDRESS, hooks):
            frames = await connect_locally(ADDRESS, bytes, ignore)
            frames.send(step_to_proto(STEP).SerializeToString())
            await frames.ended
            await eventually(lambda: crashes)
        return crashes

    assert [str(crash) for crash in asyncio.run(run())] == ["a fault of the node"]


def test_another_users_socket_is_not_used(monkeypatch):
    async def run() -> None:
        hooks = ServicerHooks(on_step=lambda step, source: arrived.append(step), on_gone=gone.append, on_crash=ignore)
        async with asyncio.timeout(20), serving_locally(ADDRESS, hooks):
            monkeypatch.setattr(local, "_user_of", lambda peer: os.getuid() + 1)
            assert await connect_locally(ADDRESS, bytes, ignore) is None
            reader, writer = await asyncio.open_unix_connection(socket_name(ADDRESS))
            writer.write(framed(step_to_proto(STEP).SerializeToString()))
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            await eventually(lambda: len(gone) == 2)
            writer.close()

    arrived: list[StageStep] = []
    gone: list[object] = []
    asyncio.run(run())
    assert arrived == []


def test_the_user_of_a_connection_is_known():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert local._user_of(ours) == os.getuid()


def test_a_name_that_is_taken_leaves_grpc(caplog):
    async def run() -> None:
        hooks = ServicerHooks(on_step=ignore, on_gone=ignore, on_crash=ignore)
        async with serving_locally(ADDRESS, hooks), serving_locally(ADDRESS, hooks):
            pass

    asyncio.run(run())
    assert "no local stage streams" in caplog.text


def test_a_connection_that_is_only_being_made_can_be_ended():
    async def run() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            frames = Frames(bytes, ignore)
            frames.abort()
            await asyncio.get_running_loop().connect_accepted_socket(lambda: frames, ours)
            frames.send(b"to nobody")
            async with asyncio.timeout(20):
                await frames.ended
            assert theirs.recv(1) == b""

    asyncio.run(run())
