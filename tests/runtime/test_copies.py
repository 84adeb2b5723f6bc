"""Copies of KV under every order of steps, messages, losses, takeovers and releases: nothing is ever overstated."""

import zlib
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgellm.engines.kv import HostKvPool, KvContract
from edgellm.runtime.kv.codecs import CodecError
from edgellm.runtime.kv.copying.coverage import Coverage
from edgellm.runtime.kv.copying.holder import Entry
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.queue import CopyConfig, CopyKey, CopyQueue, Rows
from edgellm.runtime.kv.copying.rows import Span, read_spans, wire_row_bytes, write_spans
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, HeldKv
from tests.runtime.conftest import CONTRACT, LAYERS, tiny_pool
from tests.runtime.copies import CAPACITY, LAYER_RANGE, Holder, attempt, row


@given(st.data())
def test_reach_is_the_first_missing_position_of_a_plain_twin(data):
    coverage, twin = Coverage(range(2, 6), 40), np.zeros((41, 4), bool)
    for _ in range(data.draw(st.integers(1, 12))):
        first, start = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 40))
        layers, tokens = (
            range(first, data.draw(st.integers(first + 1, 6))),
            range(start, data.draw(st.integers(start, 40))),
        )
        if data.draw(st.integers(0, 5)):
            coverage.add(layers, tokens, "copy")
            twin[tokens.start : tokens.stop, layers.start - 2 : layers.stop - 2] = True
        else:
            coverage.pass_on(tokens.start)
            twin[tokens.start :] = False
        for one in range(2, 6):
            assert coverage.reach(range(one, one + 1)) == twin[:, one - 2].argmin()
        assert coverage.reach(layers) == twin[:, layers.start - 2 : layers.stop - 2].all(axis=1).argmin()


def test_coverage_refuses_what_there_is_no_room_for():
    coverage = Coverage(range(2, 6), 40)
    for layers, tokens in (
        (range(1, 3), range(4)),
        (range(4, 7), range(4)),
        (range(3, 4), range(41)),
        (range(3, 3), range(1)),
    ):
        with pytest.raises(IndexError):
            coverage.add(layers, tokens, "own")
        assert coverage.reach(layers) == 0


def test_runs_name_copies_and_own_layers_apart():
    holdings = Holdings(BlockLedger(tiny_pool(8)))
    holdings.reserve(attempt(), CAPACITY)
    holdings.computed(attempt(), range(1), 40)
    holdings.add(attempt(), range(1, 3), range(40), "copy")
    holdings.add(attempt(), range(2, 3), range(40, 44), "copy")
    held = [
        HeldKv(attempt=attempt(), first_layer=first, num_layers=1, tokens=tokens)
        for first, tokens in ((0, 40), (1, 40), (2, 44))
    ]
    assert holdings.held() == held
    assert holdings.copies_changed() == held[1:]
    assert holdings.copies_changed() == []
    holdings.rename(attempt(), attempt(epoch=1), 42)
    assert [one.tokens for one in holdings.copies_changed()] == [40, 42]
    holdings.computed(attempt(epoch=1), range(1, 3), 43)
    assert [(one.first_layer, one.num_layers, one.tokens) for one in holdings.held()] == [(0, 1, 40), (1, 2, 43)]


@given(st.sampled_from(["fp16", "int8"]), st.integers(0, 100), st.data())
def test_rows_arrive_in_other_blocks_bit_for_bit(dtype, seed, data):
    contract = KvContract(num_layers=4, kv_heads=2, head_dim=4, dtype=dtype)
    source, target = HostKvPool(contract, range(4), 8), HostKvPool(contract, range(4), 8)
    source.data[...] = np.random.default_rng(seed).integers(0, 120, source.data.shape, np.uint8)
    before = target.data.copy()
    spans = []
    for blocks in ([4, 1, 6], [0, 7]):
        start = data.draw(st.integers(0, 32 * len(blocks) - 1))
        spans.append((blocks, range(start, data.draw(st.integers(start + 1, 32 * len(blocks))))))
    layers = range(1, 3)
    rows = read_spans(source, layers, [Span(blocks=blocks, tokens=tokens) for blocks, tokens in spans], "raw")
    moved = [Span(blocks=[7 - block for block in blocks], tokens=tokens) for blocks, tokens in spans]
    write_spans(target, layers, moved, rows, "raw")
    written = np.zeros((8, 32), bool)
    for blocks, tokens in spans:
        for token in tokens:
            written[blocks[token // 32], token % 32] = True
    for block, token in np.ndindex(8, 32):
        where = (np.array([block]), np.array([token]))
        got = target.read_rows(np.array([7 - block]), where[1], layers)
        assert np.array_equal(got, source.read_rows(*where, layers)) or not written[block, token]
    assert np.array_equal(np.delete(target.data, [1, 2], 0), np.delete(before, [1, 2], 0))
    assert (target.data != before).any(axis=(0, 2)).sum() <= written.any(axis=1).sum()


def test_int8_rows_are_within_half_a_step_and_half_the_size():
    source, target = tiny_pool(4), tiny_pool(4)
    values = np.random.default_rng(0).normal(0, 3, source.data.size // 2).astype(np.float16)
    source.data[...] = values.view(np.uint8).reshape(source.data.shape)
    span = Span(blocks=[2, 0], tokens=range(20, 50))
    rows = read_spans(source, LAYER_RANGE, [span], "int8")
    assert rows.shape == (30, len(LAYER_RANGE), wire_row_bytes("int8", CONTRACT))
    assert wire_row_bytes("int8", CONTRACT) < 0.63 * wire_row_bytes("raw", CONTRACT)
    write_spans(target, LAYER_RANGE, [span], rows, "int8")
    exact, got = (
        read_spans(pool, LAYER_RANGE, [span], "raw").view(np.float16).astype(np.float32) for pool in (source, target)
    )
    largest = np.abs(exact.reshape(*exact.shape[:2], -1, CONTRACT.head_dim)).max(axis=3, keepdims=True)
    step = np.broadcast_to(largest / 127, (*largest.shape[:3], CONTRACT.head_dim)).reshape(exact.shape)
    assert (np.abs(got - exact) <= 0.51 * step + np.abs(exact) * 2**-11 + 1e-6).all()
    with pytest.raises(CodecError, match="'int3'"):
        wire_row_bytes("int3", CONTRACT)


def test_rows_that_are_not_what_they_say_leave_nothing_behind():
    holder = Holder()
    rows = np.concatenate([row(seed) for seed in range(3)]).tobytes()
    good = Entry(
        attempt=attempt(), layers=LAYER_RANGE, tokens=range(3), capacity_tokens=CAPACITY, codec="raw", length=len(rows)
    )
    for wrong in (
        {"layers": range(1, LAYERS + 1)}, {"layers": range(1, 1)}, {"tokens": range(4)}, {"tokens": range(2, 2)},
        {"tokens": range(CAPACITY - 1, CAPACITY + 2)}, {"codec": "int8"}, {"codec": "int3"},
    ):  # fmt: skip
        [refused] = holder.copies.install([replace(good, **wrong)], rows, zlib.crc32(rows))
        assert refused.reason == "corrupt"
    assert [one.reason for one in holder.copies.install([good, good], rows, zlib.crc32(rows))] == ["corrupt"] * 2
    assert [one.reason for one in holder.copies.install([good], rows, zlib.crc32(rows) ^ 1)] == ["corrupt"]
    [refused] = holder.copies.install([replace(good, capacity_tokens=13 * 32)], rows, zlib.crc32(rows))
    assert refused.reason == "no capacity"
    assert holder.ledger.attempts() == []
    assert holder.holdings.held() == []
    assert holder.copies.install([good], rows, zlib.crc32(rows)) == []
    holder.holdings.computed(attempt(), LAYER_RANGE, 3)
    assert [one.reason for one in holder.copies.install([good], rows, zlib.crc32(rows))] == ["stale"]


class CopyMachine(RuleBasedStateMachine):
    """One source and one holder; time, the wire and the orchestrator are the machine's."""

    names = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.ledger = BlockLedger(tiny_pool(12))
        self.holdings = Holdings(self.ledger)
        self.holder = Holder()
        self.config = CopyConfig(batch_tokens=3, new_tokens=8, message_bytes=4000, window_bytes=9000, max_lag_tokens=30)
        self.queue = self._queue()
        self.wire: deque[tuple[list[Rows], list[Entry], bytes]] = deque()
        self.truth: dict[Attempt, list[int]] = {}
        """What each position of the source's live attempts was computed from."""
        self.epochs: dict[str, int] = {}
        self.holds: list[tuple[Attempt, Attempt, int]] = []
        """On their way to the holder."""

    def _queue(self):
        return CopyQueue(self.config, bytes_per_layer=CONTRACT.row_bytes)

    def _live(self, name):
        one = attempt(name, self.epochs.get(name, 0))
        return one if one in self.truth else None

    def _compute(self, one, tokens):
        truth, blocks = self.truth[one], np.array(self.holdings.blocks(one))
        for position in range(len(truth), min(len(truth) + tokens, CAPACITY)):
            truth.append(hash((one.request_id, one.epoch, position)) % 2**32)
            slot = np.array([blocks[position // 32]]), np.array([position % 32])
            self.ledger.pool.write_rows(*slot, LAYER_RANGE, row(truth[-1]))
        self.holdings.computed(one, LAYER_RANGE, len(truth))
        self.queue.advance(CopyKey(attempt=one, layers=LAYER_RANGE), len(truth), self.now_s)

    @rule(name=names, prompt=st.integers(1, 60), by_prefill=st.booleans())
    def begin(self, name, prompt, by_prefill):
        """A prompt; the prefill node gives its KV to the holder too, or the source copies all of it."""
        if self._live(name) is None and self.ledger.fits(CAPACITY):
            one = attempt(name, self.epochs.setdefault(name, 0))
            self.holdings.reserve(one, CAPACITY)
            self.truth[one] = []
            self._compute(one, prompt)
            first_token = 0
            if by_prefill and self.holder.ledger.fits(CAPACITY) and self.holder.admit(one) == "admitted":
                self._prefill_holder(one, prompt)
                first_token = prompt
            self._start(one, first_token)

    def _prefill_holder(self, one, prompt):
        blocks = np.array(self.holder.holdings.reserve(one, CAPACITY))
        positions = np.arange(prompt)
        rows = np.concatenate([row(seed) for seed in self.truth[one]])
        self.holder.ledger.pool.write_rows(blocks[positions // 32], positions % 32, LAYER_RANGE, rows)
        self.holder.holdings.add(one, LAYER_RANGE, range(prompt), "copy")

    def _start(self, one, first_token):
        key = CopyKey(attempt=one, layers=LAYER_RANGE)
        self.queue.start(key, first_token=first_token, computed=len(self.truth[one]), now_s=self.now_s)

    @rule(tokens=st.integers(1, 5))
    def step(self, tokens):
        for one in list(self.truth):
            self._compute(one, tokens)

    @rule(seconds=st.sampled_from([0.01, 0.06, 1.5]))
    def time_passes(self, seconds):
        self.now_s += seconds

    @rule()
    def send(self):
        if rows := self.queue.take(self.now_s):
            spans = [Span(blocks=self.holdings.blocks(one.key.attempt), tokens=one.tokens) for one in rows]
            payload = read_spans(self.ledger.pool, LAYER_RANGE, spans, "raw").tobytes()
            entries = [
                Entry(attempt=one.key.attempt, layers=one.key.layers, tokens=one.tokens, capacity_tokens=CAPACITY,
                      codec="raw", length=len(one.tokens) * len(LAYER_RANGE) * CONTRACT.row_bytes) for one in rows
            ]  # fmt: skip
            self.wire.append((rows, entries, payload))

    @precondition(lambda self: self.wire)
    @rule(damage=st.integers(0, 4))
    def deliver(self, damage):
        rows, entries, payload = self.wire.popleft()
        checksum = zlib.crc32(payload)
        if damage == 0:
            payload = bytes([payload[0] ^ 1]) + payload[1:]
        refused = self.holder.copies.install(entries, payload, checksum)
        assert damage or len(refused) == len(entries)
        answers = {one.index: "again" if one.reason in ("corrupt", "early") else "never" for one in refused}
        self.queue.answered(rows, answers, self.now_s)
        self.queue.give_up(self.now_s)

    @rule()
    def link_breaks(self):
        """The copies end; the orchestrator asks for new ones."""
        self.wire.clear()
        self.queue = self._queue()
        for one in self.truth:
            self._start(one, 0)

    @rule(name=names)
    def resumes(self, name):
        """The pipeline of a request broke elsewhere: a new epoch from the common watermark on."""
        old = self._live(name)
        if old is None:
            return
        new = attempt(name, old.epoch + 1)
        known = self.holder.holdings.reach(old, LAYER_RANGE)
        kept = min(known, len(self.truth[old]))
        self.epochs[name] = new.epoch
        self.holdings.rename(old, new, kept)
        self.truth[new] = self.truth.pop(old)[:kept]
        self.queue.stop(CopyKey(attempt=old, layers=LAYER_RANGE))
        self.holds.append((old, new, kept))
        self._start(new, kept)

    @precondition(lambda self: self.holds)
    @rule()
    def hold_arrives(self):
        self.holder.hold(*self.holds.pop(0))

    @rule(name=names)
    def release(self, name):
        one = self._live(name)
        if one is not None:
            while self.holds:
                self.hold_arrives()
            del self.truth[one]
            self.epochs[name] = one.epoch + 1
            self.queue.stop(CopyKey(attempt=one, layers=LAYER_RANGE))
            self.holdings.drop(one)
            self.ledger.drop(one)
            self.holder.drop(one)

    def teardown(self):
        """Nothing is lost any more: whatever is still copied is copied completely."""
        while self.holds:
            self.hold_arrives()
        for _ in range(400):
            self.time_passes(0.06)
            self.send()
            if self.wire:
                self.deliver(damage=1)
            elif self.queue.wake_s() is None:
                break
        assert self.queue.lag == 0
        for key in self.queue.keys:
            assert self.holder.holdings.reach(key.attempt, LAYER_RANGE) == len(self.truth[key.attempt])

    @invariant()
    def what_counts_is_there(self):
        pool = self.holder.ledger.pool
        for held in self.holder.holdings.held():
            truth = self.truth.get(held.attempt)
            if truth is not None:
                assert held.tokens <= len(truth)
                positions = np.arange(held.tokens)
                blocks = np.array(self.holder.ledger.blocks(held.attempt))
                got = pool.read_rows(blocks[positions // 32], positions % 32, LAYER_RANGE)
                assert all(np.array_equal(got[p], row(truth[p])[0]) for p in positions)

    @invariant()
    def blocks_are_counted(self):
        self.ledger.check_integrity()
        self.holder.ledger.check_integrity()
        assert set(self.ledger.attempts()) == set(self.truth)
        assert {one.request_id for one in self.holder.ledger.attempts()} <= set(self.holder.live)


TestCopies = CopyMachine.TestCase
TestCopies.settings = settings(max_examples=60, stateful_step_count=40)
