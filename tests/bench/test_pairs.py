"""Figures from runs that took turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.busy import BUSY_SHARE, CpuShares
from bench.pairs import (
    DECODE_8,
    MAX_STEPS,
    MIN_STEPS,
    PREFILL_512,
    Pairing,
    Round,
    bytes_per_step,
    clean,
    memory_is_fast,
    steps_per_run,
)

IDLE = CpuShares(others=0.0, stolen=0.0)


def round_of(
    ours_s: float, peer_s: float, reads: tuple[float, float] = (10.0, 20.0), shares: CpuShares = IDLE
) -> Round:
    return Round(ours_s=ours_s, peer_s=peer_s, read_1_gb_per_s=reads[0], read_2_gb_per_s=reads[1], shares=shares)


class TestPairing:
    def test_a_slow_minute_hits_both_sides_of_a_ratio(self) -> None:
        rounds = (round_of(1, 2), round_of(10, 20), round_of(1, 2))
        pairing = Pairing(scenario=DECODE_8, steps=16, rounds=rounds)
        assert pairing.ratio == 2
        assert pairing.ours_tokens_per_s == 8 * 16
        assert pairing.peer_tokens_per_s == 8 * 16 / 2

    def test_a_prompts_tokens_count_once(self) -> None:
        assert Pairing(scenario=PREFILL_512, steps=1, rounds=(round_of(2, 1),)).ours_tokens_per_s == 256

    def test_bandwidth_is_held_against_what_was_read_in_the_same_round(self) -> None:
        rounds = (round_of(1, 1, (10, 20)), round_of(2, 1, (10, 10)))
        pairing = Pairing(scenario=DECODE_8, steps=4, rounds=rounds)
        assert pairing.of_bandwidth(bytes_per_step=5e9) == pytest.approx(1.0)

    def test_a_slower_second_thread_does_not_lower_the_bandwidth(self) -> None:
        assert round_of(1, 1, (10, 8)).read_gb_per_s == 10

    def test_what_others_took_is_reported(self) -> None:
        shares = CpuShares(others=0.25, stolen=0.05)
        assert Pairing(scenario=DECODE_8, steps=4, rounds=(round_of(1, 1, shares=shares),)).others_share == 0.3


def test_rounds_in_which_others_computed_do_not_count() -> None:
    disturbed = round_of(1, 9, shares=CpuShares(others=2 * BUSY_SHARE, stolen=0))
    robbed = round_of(1, 9, shares=CpuShares(others=0, stolen=2 * BUSY_SHARE))
    assert clean([round_of(1, 2), disturbed, robbed]) == (round_of(1, 2),)


def test_memory_is_fast_where_a_second_thread_helps() -> None:
    assert memory_is_fast([round_of(1, 1, (40, 80))])
    assert not memory_is_fast([round_of(1, 1, (40, 44))])


@given(st.floats(1e-6, 1e3))
def test_runs_have_some_steps_and_not_too_many(step_s: float) -> None:
    assert MIN_STEPS <= steps_per_run(step_s) <= MAX_STEPS


def test_a_step_reads_all_weights_and_every_sequences_kv() -> None:
    assert bytes_per_step(DECODE_8, weight_bytes=1000, kv_bytes_per_token=2, steps=8) == 1000 + 8 * (128 + 4) * 2
