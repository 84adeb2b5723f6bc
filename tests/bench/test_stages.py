"""Two stages beside one, and what failures cost: from runs to rows and targets."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.clusters import Steady, median_ratio
from bench.failover import choose_contexts
from bench.failover_report import KILLED, Row, steady_row, targets
from bench.node_metrics import StepTimes, parse_page, step_times
from bench.stages import check_alike, hop_ms, median_of
from edgellm.orchestrator.bundle import open_bundle


def steady(tokens_per_s: float, lags: tuple[float, ...] = (0.0,)) -> Steady:
    return Steady(tokens_per_s=tokens_per_s, copied_bytes_per_token=100, lag_tokens=lags, others=0)


def test_a_slow_minute_hits_both_clusters() -> None:
    assert median_ratio([steady(90), steady(9), steady(95)], [steady(100), steady(10), steady(100)]) == 0.9


BEFORE = """# HELP edgellm_step_seconds Engine steps
# TYPE edgellm_step_seconds histogram
edgellm_step_seconds_bucket{kind="decode",le="+Inf"} 10.0
edgellm_step_seconds_count{kind="prefill"} 4.0
edgellm_step_seconds_sum{kind="prefill"} 4.0
edgellm_step_seconds_count{kind="decode"} 10.0
edgellm_step_seconds_sum{kind="decode"} 1.0
edgellm_stage_round_trip_seconds_count 0.0
edgellm_stage_round_trip_seconds_sum 0.0
"""
AFTER = """edgellm_step_seconds_count{kind="prefill"} 9.0
edgellm_step_seconds_sum{kind="prefill"} 9.0
edgellm_step_seconds_count{kind="decode"} 20.0
edgellm_step_seconds_sum{kind="decode"} 1.05
edgellm_stage_round_trip_seconds_count 10.0
edgellm_stage_round_trip_seconds_sum 0.08
"""


class TestStepTimes:
    def test_they_are_means_of_what_was_counted_in_between(self) -> None:
        found = step_times(parse_page(BEFORE), parse_page(AFTER))
        assert found.step_ms == pytest.approx(5)
        assert found.round_trip_ms == pytest.approx(8)

    def test_a_later_stage_has_steps_and_no_round_trip(self) -> None:
        page = {'edgellm_step_seconds_count{kind="stage"}': 4.0, 'edgellm_step_seconds_sum{kind="stage"}': 0.008}
        assert step_times({}, page) == StepTimes(step_ms=2, round_trip_ms=None)
        assert step_times(page, page) == StepTimes(step_ms=None, round_trip_ms=None)

    def test_a_hop_is_what_a_round_trip_takes_beside_the_step(self) -> None:
        first, last = StepTimes(step_ms=5, round_trip_ms=8), StepTimes(step_ms=6, round_trip_ms=None)
        assert hop_ms([first, last]) == 2
        assert hop_ms([last]) is None
        assert median_of([1, None, 3, 4]) == 3
        assert median_of([None]) is None


class TestFailover:
    def test_copies_lag_by_tokens_and_by_the_time_that_these_take(self) -> None:
        runs = [steady(400, (0, 2)), steady(400, (4, 10))]
        row = steady_row("hot copy", 1024, 8, runs, [steady(500)] * 2)
        assert (row.lag_tokens, row.lag_most_tokens, row.of_no_copies) == (3, 10, 0.8)
        assert row.lag_ms == pytest.approx(60)
        assert row.requests == 16

    def test_only_what_was_measured_is_held_to_targets(self) -> None:
        calm = steady_row("hot copy", 1024, 8, [steady(96)], [steady(100)])
        found = {target.name: target.met for target in targets([calm], differing=0)}
        assert list(found.values()) == [True, True]
        assert not any("SIG" in name for name in found)

    def test_the_longest_context_is_held_against_reading_again(self) -> None:
        pauses = {
            ("hot copy", 1024): 200,
            ("token replay", 1024): 900,
            ("hot copy", 4096): 300,
            ("token replay", 4096): 900,
        }
        rows = [
            Row(event=KILLED, way=way, context=context, requests=8, pause_ms=pause, pause_p99_ms=800)
            for (way, context), pause in pauses.items()
        ]
        found = [(target.value, target.met) for target in targets(rows, differing=1)]
        assert found == [(200, True), (800, False), (3, False), (1, False)]


def test_a_chart_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["failover", "--bundle", "nowhere", "--chart", "chart.svg"]) == 1
    assert capsys.readouterr().err == (
        "bench failover: --chart needs matplotlib: pip install 'edgellm[bench]', or leave the chart out\n"
    )


MODEL = {"id": "m", "vocab_size": 8, "max_seq_len": 64, "num_layers": 4, "bos_token_id": 1, "eos_token_ids": [2]}


class TestBundles:
    def bundle(self, folder: Path, stages: int, **changes: object) -> Path:
        """Its table of contents alone: nothing else of it is looked at."""
        placement = {"device": "a", "device_class": "cpu-local", "role": "decode", "num_layers": 4}
        contents = {
            "schema_version": 1,
            "model": MODEL,
            "kv": {"num_layers": 4, "kv_heads": 1, "head_dim": 8, "dtype": "fp16", "block_tokens": 32},
            "plan": {"placements": [placement | {"engine": f"decode{n}"} for n in range(stages)]},
            "provenance": {"outliers": "32"},
        }
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "bundle.json").write_text(json.dumps(contents | changes))
        return folder

    def test_a_long_context_is_as_long_as_the_bundle_has_room_for(self, tmp_path: Path) -> None:
        model = MODEL | {"max_seq_len": 4096}
        bundle = open_bundle(self.bundle(tmp_path / "bundle", 1, model=model))
        assert choose_contexts(bundle, None) == [1024, 3072]
        assert choose_contexts(bundle, [2048, 512]) == [512, 2048]
        with pytest.raises(ValueError, match=r"--contexts 4000.*larger --max-seq-len"):
            choose_contexts(bundle, [1024, 4000])
        with pytest.raises(ValueError, match="--contexts 0: a prompt has at least one token"):
            choose_contexts(bundle, [0, 1024])

    def test_a_bundle_without_room_for_an_answer_is_refused(self, tmp_path: Path) -> None:
        bundle = open_bundle(self.bundle(tmp_path / "bundle", 1, model=MODEL | {"max_seq_len": 1024}))
        with pytest.raises(ValueError, match=r"room for 1024 tokens.* build it with --max-seq-len 2048"):
            choose_contexts(bundle, None)

    def test_only_their_cluster_may_differ(self, tmp_path: Path) -> None:
        two, one = self.bundle(tmp_path / "two", 2), self.bundle(tmp_path / "one", 1)
        check_alike(open_bundle(two), open_bundle(one))
        with pytest.raises(ValueError, match=r"has 1 decode stages and .* 2; needed are 2 and 1"):
            check_alike(open_bundle(one), open_bundle(two))
        other = self.bundle(tmp_path / "other", 1, provenance={"outliers": "0"})
        with pytest.raises(ValueError, match="differ in provenance"):
            check_alike(open_bundle(two), open_bundle(other))
