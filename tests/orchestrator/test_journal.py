"""What a restarted orchestrator goes on from, and what its clients see."""

import asyncio
import sqlite3
import time
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.orchestrator.answers import Answers
from edgellm.orchestrator.cli_status import what_is_new
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import NodeJoined, Tick
from edgellm.orchestrator.core.values import (
    ConnectionId,
    Generation,
    KvTransfer,
    NodeId,
    RecoveryStats,
    RequestId,
    RequestSpec,
    RequestStats,
    SampledToken,
    Sampling,
)
from edgellm.orchestrator.deadline import LastingDeadline
from edgellm.orchestrator.driver import EPOCHS_RESERVED, Driver
from edgellm.orchestrator.journal import Accepted, Emitted, Ended, EpochsReserved, JournalError, JournalFile, Placed
from edgellm.orchestrator.journal_writer import JournalWriter
from edgellm.orchestrator.metrics import Metrics
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.serve import _journal_path
from edgellm.orchestrator.text import AnswerText
from edgellm.orchestrator.wire_in import WireError, profile_from_proto
from edgellm.runtime.rpc import cluster_pb2
from tests.orchestrator.profiles import simulated_config, simulated_profile

DEADLINE = LastingDeadline(monotonic_s=12.5, boot_id="boot", unix_s=1.8e9)
STATS = RequestStats(
    prompt_tokens=3,
    generated_tokens=2,
    queue_ms=1.0,
    prefill_ms=2.0,
    ttft_ms=3.0,
    tpot_ms=4.0,
    total_ms=5.0,
    prefill_path="remote",
    kv=KvTransfer(transport="shm", bytes=7),
    takeovers=1,
    recovery=RecoveryStats(total_ms=9.0),
)


def accepted(name, **fields):
    sampling = Sampling(temperature=0.5, logit_bias=((3, -1.0),), seed=2**63 - 1)
    spec = RequestSpec(
        request_id=RequestId(name), prompt=(1, 2, 3), generation=Generation(max_tokens=4, sampling=sampling)
    )
    return Accepted(spec=replace(spec, **fields), stop=("\n\n", "é"), keep_s=1.5, deadline=DEADLINE)


def emitted(name, index, logprob=None):
    return Emitted(request_id=RequestId(name), token=SampledToken(index=index, token_id=100 + index, logprob=logprob))


def test_everything_comes_back_as_it_was_written(tmp_path):
    file = JournalFile(tmp_path / "deep" / "journal", "bundle")
    placed = Placed(request_id=RequestId("a"), nodes=frozenset({NodeId("d0"), NodeId("d1")}))
    file.write([accepted("a"), placed, emitted("a", 0, -0.25), emitted("a", 1), accepted("b"), emitted("b", 0)])
    ended = Ended(request_id=RequestId("b"), reason="stop", message="", stats=STATS, unix_s=50.0)
    file.write([ended])
    file.close()
    first, second = JournalFile(tmp_path / "deep" / "journal", "bundle").read()
    assert (first.accepted, first.nodes, first.ended) == (accepted("a"), placed.nodes, None)
    assert first.tokens == (emitted("a", 0, -0.25).token, emitted("a", 1).token)
    assert (second.accepted, second.ended) == (accepted("b"), ended)


@pytest.mark.parametrize("set_by_s", [0.0, 3600.0, -3600.0])
def test_a_deadline_stays_where_it_is_when_the_clock_is_set(set_by_s, monkeypatch):
    deadline = LastingDeadline.at(time.monotonic() + 5.0)
    unix_s = time.time()
    monkeypatch.setattr(time, "time", lambda: unix_s + set_by_s)
    assert deadline.here() == deadline.monotonic_s


def test_after_another_boot_a_deadline_is_where_the_time_of_day_puts_it(monkeypatch):
    deadline = replace(LastingDeadline.at(time.monotonic() + 5.0), boot_id="an earlier one")
    monkeypatch.setattr(time, "monotonic", lambda: 3.0)
    monkeypatch.setattr(time, "time", lambda: deadline.unix_s - 2.0)
    assert deadline.here() == pytest.approx(5.0)


def test_a_deadline_of_a_row_without_a_clock_is_by_the_time_of_day(tmp_path):
    """As rows were before deadlines were kept on two clocks."""
    file = JournalFile(tmp_path / "journal", "bundle")
    row = msgspec.json.decode(msgspec.json.encode(accepted("a")))
    del row["deadline"]
    earlier = msgspec.json.encode({**row, "deadline_unix_s": 1.8e9})
    file._db.execute("INSERT INTO requests (id, accepted) VALUES ('a', ?)", (earlier,))
    (written,) = file.read()
    deadline = LastingDeadline(monotonic_s=0.0, boot_id="", unix_s=1.8e9)
    assert written.accepted == replace(accepted("a"), deadline=deadline)


def test_an_id_that_is_used_again_begins_anew(tmp_path):
    file = JournalFile(tmp_path / "journal", "bundle")
    file.write([accepted("a"), emitted("a", 0), emitted("a", 1)])
    file.write([Ended(request_id=RequestId("a"), reason="stop", message="", stats=STATS, unix_s=50.0)])
    file.write([accepted("a"), emitted("a", 0)])
    (again,) = file.read()
    assert (len(again.tokens), again.ended) == (1, None)


def test_what_ended_long_ago_is_forgotten(tmp_path):
    file = JournalFile(tmp_path / "journal", "bundle")
    file.write([accepted("a"), emitted("a", 0), accepted("b")])
    file.write([Ended(request_id=RequestId("a"), reason="stop", message="", stats=STATS, unix_s=50.0)])
    file.tidy(49.0)
    assert len(file.read()) == 2
    file.tidy(51.0)
    assert [written.accepted.spec.request_id for written in file.read()] == ["b"]


def test_epochs_never_go_back(tmp_path):
    file = JournalFile(tmp_path / "journal", "bundle")
    assert file.epoch() == 0
    file.write([EpochsReserved(highest=2**40)])
    file.write([EpochsReserved(highest=7)])
    file.close()
    assert JournalFile(tmp_path / "journal", "bundle").epoch() == 2**40


def test_epochs_are_reserved_before_they_are_given():
    reserved = []

    class Recorder:
        def record(self, entries, then):
            reserved.extend(entry.highest for entry in entries)
            then()

    about = simulated_profile("d0", "decode", device_class="cpu-local", kv_blocks=8, kv_bytes_per_token=64)
    driver = Driver(Core(simulated_config(first_epoch=50), DualPool()), Metrics(), lambda: 0.0, Recorder())
    driver.post(Tick())
    driver.post(Tick())
    assert reserved == [50 + EPOCHS_RESERVED]
    driver.post(NodeJoined(connection=ConnectionId(1), profile=about, highest_epoch=3 * EPOCHS_RESERVED))
    assert reserved[1:] == [4 * EPOCHS_RESERVED]


def test_another_bundle_has_another_vocabulary(tmp_path):
    file = JournalFile(tmp_path / "journal", "bundle")
    file.write([accepted("a")])
    file.close()
    assert JournalFile(tmp_path / "journal", "another").read() == []


def test_a_journal_in_use_or_of_another_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("edgellm.orchestrator.journal.BUSY_TIMEOUT_S", 0.01)
    mine = JournalFile(tmp_path / "journal", "bundle")
    mine.write([accepted("a")])
    with pytest.raises(JournalError, match="is another edgellm-serve using it"):
        JournalFile(tmp_path / "journal", "bundle")
    (tmp_path / "text").write_text("no database at all, but long enough to be looked at closely" * 10)
    with pytest.raises(JournalError, match="--journal PATH"):
        JournalFile(tmp_path / "text", "bundle")
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 7")
    newer.close()
    with pytest.raises(JournalError, match="has schema 7"):
        JournalFile(tmp_path / "newer", "bundle")


def test_the_writer_keeps_the_order_and_a_broken_disk_stops_nobody(tmp_path):
    told = []

    async def scenario(file):
        with JournalWriter(file, asyncio.get_running_loop()) as writer:
            done = asyncio.Event()
            for index in range(50):
                writer.record([emitted("a", index)], lambda index=index: told.append(index))
            writer.record([], done.set)
            await asyncio.wait_for(done.wait(), 10)

    file = JournalFile(tmp_path / "journal", "bundle")
    file.write([accepted("a")])
    asyncio.run(scenario(file))
    assert told == list(range(50))
    assert len(JournalFile(tmp_path / "journal", "bundle").read()[0].tokens) == 50

    told.clear()
    broken = JournalFile(tmp_path / "broken", "bundle")
    broken.write([accepted("a")])
    broken._db.execute("DROP TABLE tokens")
    asyncio.run(scenario(broken))
    assert told == list(range(50))


def test_a_record_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    async def scenario(file):
        with JournalWriter(file, asyncio.get_running_loop()) as writer:
            done = asyncio.Event()
            writer.record([accepted("a"), EpochsReserved(highest=2**63)], lambda: None)
            writer.record([emitted("a", 0)], done.set)
            await asyncio.wait_for(done.wait(), 10)

    asyncio.run(scenario(JournalFile(tmp_path / "journal", "bundle")))
    assert "the journal failed" in caplog.text
    assert JournalFile(tmp_path / "journal", "bundle").read() == []


def test_a_node_that_has_heard_of_an_impossible_epoch_is_refused():
    hello = cluster_pb2.Hello(node_id="d0", role="decode", highest_epoch=2**62)
    assert profile_from_proto(hello).node_id == "d0"
    hello.highest_epoch = 2**63
    with pytest.raises(WireError, match="epoch 9223372036854775808"):
        profile_from_proto(hello)


class LateJournal:
    """Whose commits wait until `commit`."""

    def __init__(self):
        self._then = []

    def record(self, _entries, then):
        self._then.append(then)

    def commit(self):
        waiting, self._then = self._then, []
        for then in waiting:
            then()


@pytest.mark.parametrize("keep_s", [0.0, 0.001])
def test_a_client_that_leaves_before_its_acceptance_is_in_the_journal_takes_its_request_along(keep_s):
    async def scenario():
        journal = LateJournal()
        driver = Driver(Core(simulated_config(), DualPool()), Metrics(), lambda: 0.0, journal)
        answers = Answers(driver, lambda _: AnswerText(lambda _: "", (), frozenset()))
        answer = answers.begin(accepted("a"))
        answers.leave(answer, answer.open(), keep_s)
        await asyncio.sleep(2 * keep_s)
        journal.commit()
        return driver.core.state.requests

    assert asyncio.run(scenario()) == {}


def test_the_same_command_finds_its_journal_again(tmp_path):
    first = _journal_path("automatic", tmp_path / "bundle", "127.0.0.1:50051")
    assert first == _journal_path("automatic", tmp_path / "bundle", "127.0.0.1:50051")
    assert first != _journal_path("automatic", tmp_path / "bundle", "127.0.0.1:50052")
    assert _journal_path("automatic", tmp_path / "bundle", "127.0.0.1:0") is None
    assert _journal_path("off", tmp_path / "bundle", "127.0.0.1:50051") is None
    assert _journal_path("here", tmp_path / "bundle", "127.0.0.1:0").name == "here"


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=6), st.integers(1, 6))
def test_a_watcher_is_told_what_is_new(before, added, kept):
    view, later = before[-kept:], (before + added)[-kept:]
    new = what_is_new(view, later)
    assert len(new) <= len(added)
    assert (view + list(new))[-kept:] == later
