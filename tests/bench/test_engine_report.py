"""From paired runs to rows, targets, sentences and bars."""

from pathlib import Path

import pytest

from bench import chart
from bench.comparison import Compared
from bench.engine_report import behind, embedding_bytes, extra_rss_mib, ours_rows, peer_rows, targets
from bench.pairs import DECODE_1, DECODE_8, PREFILL_512
from bench.peers.contenders import PEERS
from bench.peers.models import MODELS
from tests.bench.comparisons import LARGE, PEAKS, WEIGHT_BYTES, compared


def not_compared() -> Compared:
    whole = vars(compared(DECODE_1, 1, 1))
    return Compared(**{**whole, "pairing": None, "reason": "others used up to 40% of the processors"})


class TestRows:
    def test_ours_has_one_row_whatever_the_peers(self) -> None:
        (row,) = ours_rows([compared(DECODE_8, 1, 2), compared(DECODE_8, 1, 3, peer=1), not_compared()])
        assert (row.model, row.scenario, row.tokens_per_s, row.memory) == ("1.1b", DECODE_8.name, 80, "fast")

    def test_a_row_says_when_it_was_measured_and_at_what_peak(self) -> None:
        morning, noon = compared(DECODE_8, 1, 2), compared(DECODE_8, 1, 3, peer=1, measured_at="2026-01-01 12:00")
        assert ours_rows([noon, morning])[0].measured_at == "2026-01-01 10:00 to 2026-01-01 12:00"
        assert [row.measured_at for row in peer_rows([noon, morning])] == ["2026-01-01 12:00", "2026-01-01 10:00"]
        assert ours_rows([noon])[0].bf16_gflop_per_s == PEAKS.bf16

    def test_decoding_is_held_against_the_bandwidth(self) -> None:
        """The embedding's table is not read, the KV is."""
        (row,) = ours_rows([compared(DECODE_1, 0.5, 1)])
        read = WEIGHT_BYTES - embedding_bytes(LARGE) + (512 + 5) * LARGE.kv_bytes_per_token
        assert row.of_limit == pytest.approx(10 * read / 0.5 / 20e9)

    def test_prefill_is_held_against_the_multipliers(self) -> None:
        (row,) = ours_rows([compared(PREFILL_512, 2, 1, peer=3)])
        assert row.of_limit == pytest.approx(2 * LARGE.linear_parameters * 512 / 2 / 1e12)

    def test_all_rows_have_the_same_keys(self) -> None:
        results = [compared(DECODE_1, 1, 2)]
        assert list(vars(ours_rows(results)[0])) == list(vars(peer_rows(results)[0]))

    def test_a_tied_embedding_is_read_by_the_head(self) -> None:
        assert embedding_bytes(MODELS["smollm2"]) == 0


class TestTargets:
    def test_the_best_peer_decides(self) -> None:
        results = [compared(DECODE_8, 1, 4), compared(DECODE_8, 1, 2, peer=1)]
        ratio = targets(ours_rows(results), results)[0]
        assert (ratio.value, ratio.target, ratio.met) == (2, 2.5, False)
        assert PEERS[1].name in ratio.name

    @pytest.mark.parametrize(("reads", "wanted"), [((40, 80), 2.0), ((40, 44), 1.4)])
    def test_batch_one_is_promised_more_where_memory_is_fast(self, reads: tuple[float, float], wanted: float) -> None:
        results = [compared(DECODE_1, 1, 1.5, reads=reads)]
        assert targets(ours_rows(results), results)[0].target == wanted

    def test_memory_and_loading_are_bounded_from_above(self) -> None:
        results = [compared(DECODE_1, 1, 2)]
        assert extra_rss_mib(results[0]) == pytest.approx(50)
        found = {target.name: target.met for target in targets(ours_rows(results), results)}
        assert [met for name, met in found.items() if "at most" in name] == [True, True]

    def test_a_pairing_that_did_not_come_about_promises_nothing(self) -> None:
        assert targets([], [not_compared()]) == []


def test_what_is_behind_or_missing_is_said() -> None:
    sentences = behind([compared(DECODE_8, 2, 1), compared(DECODE_8, 1, 2), not_compared()])
    assert sentences == [
        f"behind: {PEERS[0].name} on 1.1b, {DECODE_8.name}: 0.50 times its speed",
        f"not compared: {PEERS[0].name} on 1.1b, {DECODE_1.name}: others used up to 40% of the processors",
    ]


class TestChart:
    def test_bars_go_from_fast_to_slow(self) -> None:
        results = [compared(DECODE_8, 1, 4), compared(DECODE_8, 1, 0.5, peer=1), compared(DECODE_1, 1, 2)]
        panels = chart.panels(ours_rows(results), results)
        eight = next(panel for panel in panels if DECODE_8.name in panel.title)
        assert eight.tokens_per_s == (160, 80, 20)
        assert eight.is_ours == (False, True, False)
        assert len(panels) == 2

    def test_it_is_written_where_matplotlib_is_installed(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        results = [compared(DECODE_8, 1, 4)]
        assert chart.draw(chart.panels(ours_rows(results), results), tmp_path / "chart.svg")
        assert "EdgeLLM INT4" in (tmp_path / "chart.svg").read_text()

    def test_nothing_is_drawn_of_nothing(self, tmp_path: Path) -> None:
        assert not chart.draw([], tmp_path / "chart.svg")
