"""Ranks of one engine: sums, what rank 0 tells the others, and what ends all of them."""

import asyncio
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgellm.engines.base import Batch
from edgellm.engines.spec import EngineLimits, EngineSpec
from edgellm.runtime.cli import main
from edgellm.runtime.config import NodeError
from edgellm.runtime.kv.transfer import TransferError, TransferJob
from edgellm.runtime.kv.types import Attempt, KvTarget, NodeId, RequestId, TransferStats
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.tensor_parallel.group import RankGroup
from edgellm.runtime.tensor_parallel.patience import Patience, Silence
from edgellm.runtime.tensor_parallel.wire import (
    batch_from_proto,
    failed_to_proto,
    sent_to_proto,
    step_to_proto,
    transfer_job_from_proto,
)
from tests.runtime.conftest import eventually, generation, node, orchestrating, prefill, random_prompt

LOOPBACK = "127.0.0.1:1"
PATIENCE = Patience(beat_s=0.02, missed_beats=5, connect_s=20.0, sum_s=2.0)
STATS = TransferStats(transport="shm", codec="raw", chunks=2, bytes=300, hidden_ms=1.0, exposed_ms=2.0)
TARGET = KvTarget(node_id=NodeId("d"), address="h:1", host_id="h", first_layer=0, num_layers=3)
JOB = TransferJob(
    attempt=Attempt(request_id=RequestId("r"), epoch=7),
    prompt_tokens=40,
    capacity_tokens=60,
    blocks=[3, 1],
    targets=(TARGET,),
    timeout_s=2.5,
)


# Sums


@pytest.fixture
def sums():
    """One sum per rank, of three."""
    module = pytest.importorskip("edgellm.runtime.tensor_parallel.sums", reason="needs torch, the extra `tp`")
    store = module.open_store(LOOPBACK, PATIENCE)

    def connect(rank: int):
        own = store if rank == 0 else module.join_store(LOOPBACK, store.port, PATIENCE)
        return module.GlooSum(own, rank=rank, world=3, address="127.0.0.1", max_values=64 * 40, patience=PATIENCE)

    with ThreadPoolExecutor(3) as threads:
        yield list(threads.map(connect, range(3)))


def summed(sums, parts):
    """What each rank has after the sum."""
    with ThreadPoolExecutor(len(sums)) as threads:
        list(threads.map(lambda rank: sums[rank](parts[rank]), range(len(sums))))
    return parts


def test_ranks_are_added_in_their_order(sums):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((64, 40)).astype(np.float32) * 10.0**rank for rank in range(3)]
    expected = (parts[0] + parts[1]) + parts[2]
    for result in summed(sums, [part.copy() for part in parts]):
        assert result.tobytes() == expected.tobytes()
    for rows in (1, 7, 33):
        for result in summed(sums, [part[:rows].copy() for part in parts]):
            assert result.tobytes() == expected[:rows].tobytes()


def test_a_view_with_padded_rows_is_summed_in_place(sums):
    buffers = [np.full((5, 16), np.nan, np.float32) for _ in range(3)]
    for rank, buffer in enumerate(buffers):
        buffer[:, :12] = rank + 1
    summed(sums, [buffer[:, :12] for buffer in buffers])
    for buffer in buffers:
        assert (buffer[:, :12] == 6).all()
        assert np.isnan(buffer[:, 12:]).all()


def test_a_rank_that_does_not_come_ends_the_wait(sums):
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(sums[rank], np.zeros((1, 8), np.float32)) for rank in range(2)]
        for one in waiting:
            with pytest.raises(NodeError, match="a tensor-parallel rank has gone, or hangs"):
                one.result(timeout=20)


# What rank 0 tells


def test_a_step_travels_whole():
    batch = Batch(
        tokens=np.array([5, 6, 7], np.int32),
        hidden=None,
        row_starts=np.array([0, 1, 3], np.int32),
        first_positions=np.array([9, 0], np.int32),
        block_tables=np.array([[4, -1], [2, 3]], np.int32),
        logit_rows=np.array([2], np.int32),
    )
    arrived = batch_from_proto(pb.RankStep.FromString(step_to_proto(batch).SerializeToString()))
    assert arrived.hidden is None
    for name in ("tokens", "row_starts", "first_positions", "block_tables", "logit_rows"):
        np.testing.assert_array_equal(getattr(arrived, name), getattr(batch, name))
        assert getattr(arrived, name).dtype == np.int32
        assert getattr(arrived, name).shape == getattr(batch, name).shape


class OwnPush:
    """Rank 0's own part, of which a test says when it ends."""

    target = TARGET

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.computed: list[int] = []
        self.stats = STATS
        self.is_stopped = False

    async def run(self, _links) -> None:
        await self.ended.wait()

    def advance(self, computed: int) -> None:
        self.computed.append(computed)

    def stop(self) -> None:
        self.is_stopped = True


def group_of(world: int) -> RankGroup:
    spec = EngineSpec(
        name=f"prefill-tp0of{world}", phase="prefill", backend="cpu", backend_version="", device_class="cpu-local",
        first_layer=0, num_layers=3, rank=0, world=world, precision="half", hidden_size=8, vocab_size=9,
        limits=EngineLimits(max_rows=4, max_sequences=2, max_seq_len=64), files=(),
    )  # fmt: skip
    return RankGroup(spec, "bundle", pb.RankWelcome(kv_blocks=4, store_port=5), PATIENCE)


def told(peer) -> list[str | None]:
    """What a rank was told since the last call."""
    return [peer.outgoing.get_nowait().WhichOneof("message") for _ in range(peer.outgoing.qsize())]


def test_a_transfer_is_over_when_every_rank_has_sent_its_share():
    async def run() -> None:
        group = group_of(3)
        peers = [group.join(1), group.join(2)]
        own = OwnPush()
        push = group.share(own, JOB)
        sending = asyncio.create_task(push.run(None))
        push.advance(32)
        push.advance(40)
        assert own.computed == [32, 40]
        for peer in peers:
            first = peer.outgoing.get_nowait()
            assert first.welcome == group.welcome
            order = peer.outgoing.get_nowait().transfer
            assert vars(transfer_job_from_proto(order)) == vars(JOB)
            assert told(peer) == ["advance", "advance"]
            peer.handle(sent_to_proto(order.transfer_id, STATS))
        await asyncio.sleep(0)
        assert not sending.done()
        own.ended.set()
        await sending
        assert push.stats.bytes == 3 * STATS.bytes
        push.stop()
        assert [told(peer) for peer in peers] == [[], []]

    asyncio.run(run())


def test_a_share_that_fails_fails_the_transfer():
    async def run() -> None:
        group = group_of(2)
        peer = group.join(1)
        push = group.share(OwnPush(), JOB)
        sending = asyncio.create_task(push.run(None))
        peer.handle(failed_to_proto(1, TransferError("capacity", NodeId("d"), "full")))
        with pytest.raises(TransferError, match="full") as raised:
            await sending
        assert (raised.value.kind, raised.value.peer) == ("capacity", "d")

    asyncio.run(run())


def test_the_end_of_a_transfer_is_told_before_the_step_that_may_use_its_blocks():
    async def run() -> None:
        group = group_of(2)
        peer = group.join(1)
        own = OwnPush()
        push = group.share(own, JOB)
        told(peer)
        push.stop()
        push.stop()
        group.step(
            Batch(
                tokens=np.zeros(1, np.int32), hidden=None, row_starts=np.array([0, 1], np.int32),
                first_positions=np.zeros(1, np.int32), block_tables=np.zeros((1, 1), np.int32),
                logit_rows=np.zeros(0, np.int32),
            )
        )  # fmt: skip
        push.advance(40)
        assert told(peer) == ["cancel", "step"]
        assert own.is_stopped
        peer.handle(sent_to_proto(1, STATS))

    asyncio.run(run())


# What ends all of them


@pytest.mark.parametrize(
    ("rank", "world", "bundle", "reason"),
    [(1, 2, "other", "has another bundle"), (2, 2, "bundle", "is not one of"), (1, 4, "bundle", "is not one of")],
)
def test_a_rank_that_does_not_belong_here_is_refused(rank: int, world: int, bundle: str, reason: str):
    async def run() -> None:
        refusal = group_of(2).refusal(pb.RankHello(rank=rank, world=world, bundle_sha256=bundle))
        assert refusal is not None
        assert reason in refusal

    asyncio.run(run())


def test_a_rank_is_here_once():
    async def run() -> None:
        group = group_of(2)
        assert group.refusal(pb.RankHello(rank=1, world=2, bundle_sha256="bundle")) is None
        assert group.join(1) is not None
        assert group.join(1) is None

    asyncio.run(run())


def test_a_rank_that_does_not_come_is_named():
    async def run() -> None:
        group = group_of(3)
        group.join(1)
        with pytest.raises(NodeError, match=r"rank 2 of 3 did not come within 0.05 s; .* --engine prefill-tp2of3"):
            await group.wait_until_complete(0.05)

    asyncio.run(run())


def test_a_rank_that_goes_or_falls_silent_ends_the_watch():
    async def run() -> None:
        gone = group_of(2)
        gone.join(1)
        gone.leave(1)
        with pytest.raises(NodeError, match="rank 1 of 2 has gone"):
            await gone.watch()
        silent = group_of(2)
        silent.join(1).handle(pb.RankMessage(ready=pb.RankReady()))
        async with asyncio.timeout(10):
            with pytest.raises(NodeError, match="rank 1 has said nothing"):
                await silent.watch()

    asyncio.run(run())


def test_silence_is_counted_in_beats():
    silence = Silence("rank 1", Patience(beat_s=0.5, missed_beats=2, missed_loading=7))
    silence.works()
    for _ in range(5):
        silence.beat()
        silence.beat()
        silence.heard()
    silence.beat()
    silence.beat()
    with pytest.raises(NodeError, match=r"rank 1 has said nothing for 1.5 s"):
        silence.beat()


def test_a_rank_that_loads_its_engine_has_longer():
    silence = Silence("rank 1", Patience(beat_s=0.5, missed_beats=2, missed_loading=7))
    for _ in range(7):
        silence.beat()
    with pytest.raises(NodeError, match="rank 1 has said nothing for 4 s"):
        silence.beat()


def test_a_group_that_stops_during_a_long_step_beats_until_it_ends():
    """The step ends once other ranks have heard more beats than they could miss, which it keeps nobody from sending."""
    begun, heard, lasted = threading.Event(), threading.Event(), list[bool]()

    async def run() -> None:
        group = group_of(2)
        peer = group.join(1)
        async with orchestrating() as orchestrator, node(orchestrator, "reader", "prefill") as reader:
            engine = reader.server.node.lanes.half.engine
            forward = engine.forward

            def long_step(batch):
                begun.set()
                lasted.append(heard.wait(20))
                return forward(batch)

            engine.forward = long_step
            reader.joined.send(prefill=prefill("r", random_prompt(40), generation(4)))
            await eventually(begun.is_set)
            watching = asyncio.create_task(group.watch())
            reader.server.stop()
            for _ in range(4 * PATIENCE.missed_beats):
                await peer.outgoing.get()
                peer.handle(pb.RankMessage(beat=pb.RankBeat()))
            assert not reader.task.done()
            heard.set()
            await reader.task
            watching.cancel()

    asyncio.run(run())
    assert lasted == [True]


# The command


@pytest.fixture
def rank_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose prefill engine says that it is rank 1 of 2."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    file = bundle / "prefill-tp0of1" / "engine.json"
    file.write_bytes(msgspec.json.encode(msgspec.json.decode(file.read_bytes()) | {"rank": 1, "world": 2}))
    return bundle


def refusal(capsys: pytest.CaptureFixture[str], bundle: Path, *options: str) -> str:
    """The one line of a node that does not start."""
    assert main(["--node-id", "n", "--bundle", str(bundle), "--engine", "prefill-tp0of1", *options]) == 1
    return capsys.readouterr().err


def test_a_rank_needs_to_know_rank_0(rank_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert "rank 1 of 2, which read prompts together; give all of them the same --tp-leader" in refusal(
        capsys, rank_bundle
    )


def test_metrics_are_those_of_rank_0(rank_bundle: Path, capsys: pytest.CaptureFixture[str]):
    line = refusal(capsys, rank_bundle, "--tp-leader", "127.0.0.1:1", "--metrics-port", "0")
    assert "has no metrics of its own; leave out --metrics-port" in line


def test_a_rank_without_torch_says_what_to_install(
    rank_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("sums", "leader", "follower"):
        monkeypatch.delitem(sys.modules, f"edgellm.runtime.tensor_parallel.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refusal(capsys, rank_bundle, "--tp-leader", "127.0.0.1:1")
    assert line == (
        "edgellm-node: engine prefill-tp0of1 is rank 1 of 2, and ranks are summed by torch, which this node does not "
        "have; install it with: pip install 'edgellm[tp]'\n"
    )


def test_a_rank_without_rank_0_gives_up(rank_bundle: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch")
    line = refusal(capsys, rank_bundle, "--tp-leader", "127.0.0.1:1", "--join-timeout", "0.3")
    assert "no rank 0 at 127.0.0.1:1 for 0.3 s; check --tp-leader" in line


def test_an_engine_that_is_no_rank_has_no_leader(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--orchestrator", "127.0.0.1:1", "--tp-leader", "127.0.0.1:2")
    assert "prefill-tp0of1 is not one of several ranks; leave out --tp-leader" in refusal(capsys, tiny_bundle, *options)


def test_rank_0_and_nodes_that_are_no_rank_need_an_orchestrator(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert "say --orchestrator HOST:PORT" in refusal(capsys, tiny_bundle)
