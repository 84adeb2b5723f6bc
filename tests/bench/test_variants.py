"""The engine beside itself: rows and targets from rounds, and the forms that are compared."""

import dataclasses
from pathlib import Path

import pytest

from bench.busy import CpuShares
from bench.loading import Loaded
from bench.pairs import DECODE_1, Pairing, Round
from bench.peers import compiled
from bench.peers.contenders import OURS, VARIANTS
from bench.peers.models import MODELS
from bench.sharing import Round as SharedRound
from bench.sharing import Run, within
from bench.sharing import row as shared_row
from bench.sharing import targets as shared_targets
from bench.variants import LONG, SHORT, Row, kv_row, target
from edgellm.engines.cpu.engine import load_plan
from edgellm.engines.cpu.plan import Plan

IDLE = CpuShares(others=0, stolen=0)


def pairing(ours_s: float, other_s: float) -> Pairing:
    one = Round(ours_s=ours_s, peer_s=other_s, read_1_gb_per_s=10, read_2_gb_per_s=20, shares=IDLE)
    return Pairing(scenario=LONG, steps=10, rounds=(one,) * 3)


def row(beside: str, times: float = 1.0, kv_of_bandwidth: float | None = None) -> Row:
    return Row(
        model="1.1b",
        what=OURS["int4"].name,
        scenario=DECODE_1.name,
        tokens_per_s=10,
        beside=beside,
        beside_tokens_per_s=10,
        times=times,
        of_bandwidth=0.7,
        kv_of_bandwidth=kv_of_bandwidth,
        read_gb_per_s=20,
        others=0,
    )


def verdict(row: Row) -> bool | None:
    found = target(row)
    return None if found is None else found.met


def test_int8_kv_need_not_reach_the_bandwidth() -> None:
    slow = dataclasses.replace(row(SHORT.name, kv_of_bandwidth=0.3), what=VARIANTS["int8 KV"].name)
    assert verdict(slow) is None


def test_kv_is_read_in_the_time_that_a_long_context_takes_longer() -> None:
    """A billion bytes more a step, ten steps, one second longer."""
    assert pairing(1.5, 0.5).extra_gb_per_s(1e9) == pytest.approx(10)
    assert pairing(1.5, 0.5).extra_of_bandwidth(1e9) == pytest.approx(0.5)


def test_one_round_in_which_the_long_context_was_faster_changes_little() -> None:
    slow, odd = pairing(1.5, 0.5).rounds[0], pairing(0.4, 0.5).rounds[0]
    mixed = dataclasses.replace(pairing(1.5, 0.5), rounds=(odd, slow, slow))
    assert mixed.takes_longer
    assert mixed.extra_of_bandwidth(1e9) == pytest.approx(0.5)


@pytest.mark.parametrize("ours_s", [0.5, 0.4])
def test_no_speed_is_given_where_a_long_context_took_no_longer(ours_s: float) -> None:
    loaded = Loaded(contender=OURS["int4"], process=None, load_s=0, scheduler="", weight_bytes=1)  # type: ignore[arg-type]
    note = kv_row(MODELS["134m"], loaded, pairing(ours_s, 0.5))
    assert note == f"not measured: KV of EdgeLLM INT4 on 134m: {LONG.name} took no longer than {SHORT.name}"


@pytest.mark.parametrize(("times", "met"), [(0.95, True), (0.9, False)])
def test_outlier_channels_may_cost_little(times: float, met: bool) -> None:
    assert verdict(row(VARIANTS["no outliers"].name, times)) is met


@pytest.mark.parametrize(("times", "met"), [(1.7, True), (1.5, False)])
def test_int8_kv_has_to_pay(times: float, met: bool) -> None:
    assert verdict(row(OURS["int4"].name, times)) is met


@pytest.mark.parametrize(("share", "met"), [(0.8, True), (0.7, False)])
def test_kv_has_to_be_read_fast(share: float, met: bool) -> None:
    assert verdict(row(SHORT.name, kv_of_bandwidth=share)) is met


def test_a_long_run_ends_within_what_engines_are_compiled_for() -> None:
    assert LONG.context + 64 == compiled.DECODE_LIMITS.max_seq_len


class TestForms:
    def plan(self, source: Path, precision: str, folder: Path) -> Plan:
        folder.mkdir()
        compiled.write(source, precision, folder)
        return load_plan(folder)

    def test_variants_differ_in_one_thing(self, stories260k: Path, tmp_path: Path) -> None:
        ours = self.plan(stories260k, "int4", tmp_path / "ours")
        plain = self.plan(stories260k, VARIANTS["no outliers"].precision, tmp_path / "plain")
        small = self.plan(stories260k, VARIANTS["int8 KV"].precision, tmp_path / "small")
        assert plain.contract == ours.contract
        assert plain.weights_bytes < ours.weights_bytes == small.weights_bytes
        assert (ours.contract.dtype, small.contract.dtype) == ("fp16", "int8")


class TestSharing:
    def test_runs_that_reach_beyond_the_other_do_not_count(self) -> None:
        runs = [
            Run(start_s=0, end_s=2, seconds=2),
            Run(start_s=2, end_s=5, seconds=3),
            Run(start_s=5, end_s=9, seconds=4),
        ]
        assert within(runs, 1, 6) == [3]

    def test_a_run_longer_than_the_other_is_all_there_is(self) -> None:
        runs = [Run(start_s=0, end_s=2, seconds=2), Run(start_s=2, end_s=9, seconds=7)]
        assert within(runs, 1, 6) == [7]

    def test_each_keeps_a_share_of_its_speed(self) -> None:
        one = SharedRound(prefill_alone_s=1, prefill_beside_s=2, decode_alone_s=0.1, decode_beside_s=0.25, others=0.01)
        found = shared_row(MODELS["134m"], LONG, DECODE_1, 4, [one] * 3)
        assert (found.prefill_kept, found.decode_kept) == (0.5, 0.4)
        assert found.decode_alone_tokens_per_s == pytest.approx(40)
        assert [target.met for target in shared_targets(found)] == [True, False]
