"""No seed breaks an invariant; what once did stays fixed; and a failure is told as a short story."""

from pathlib import Path

import pytest

from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.fuzz import draw_scenario, read_scenario, run_scenario, shrink, tell
from edgellm.orchestrator.sim.story import Story

SEEDS = range(40)
KEPT = sorted((Path(__file__).parent / "scenarios").glob("*.json"))


def failure_of(scenario):
    return run_scenario(scenario, DualPool, Story(wanted=False))


def test_no_seed_breaks_an_invariant():
    for seed in SEEDS:
        failure = failure_of(draw_scenario(seed))
        assert failure is None, tell(failure, DualPool)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_scenarios_that_once_failed(path):
    failure = failure_of(read_scenario(path))
    assert failure is None, tell(failure, DualPool)


def test_a_seed_is_one_story():
    stories = [Story(wanted=True), Story(wanted=True)]
    for story in stories:
        run_scenario(draw_scenario(4), DualPool, story)
    assert stories[0].lines
    assert stories[0].lines == stories[1].lines


def test_a_failure_is_shrunk_to_a_short_story_that_can_be_kept(monkeypatch, tmp_path):
    queue_again = ClusterState.try_elsewhere

    def forget_tokens(state, request, avoid, why, **how):
        request.tokens.clear()
        queue_again(state, request, avoid, why, **how)

    monkeypatch.setattr(ClusterState, "try_elsewhere", forget_tokens)
    failures = (failure_of(draw_scenario(seed)) for seed in range(200))
    failure = shrink(next(failure for failure in failures if failure is not None), DualPool)
    assert len(failure.scenario.asks) <= 2
    assert 1 <= len(failure.scenario.faults) <= 2
    story = tell(failure, DualPool).splitlines()
    assert f"seed {failure.scenario.seed}" in story[0]
    kept = tmp_path / "kept.json"
    kept.write_text(story[-1])
    assert failure_of(read_scenario(kept)) == failure
