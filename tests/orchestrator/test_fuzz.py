"""The simulator finds nothing in the core as it is, and finds every fault that is put into it."""

import dataclasses

import pytest

from edgellm.orchestrator.core import on_attempt, on_request
from edgellm.orchestrator.core.commands import StartDecode
from edgellm.orchestrator.core.nodes import Node, NodeRegistry
from edgellm.orchestrator.core.requests import Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.fuzz import draw_scenario, run_scenario, shrink, tell

SEEDS = range(50)
SEEDS_TO_FIND_A_MUTATION = range(120)


def test_no_seed_breaks_an_invariant():
    for seed in SEEDS:
        _, failure = run_scenario(draw_scenario(seed), DualPool())
        assert failure is None, tell(failure)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_seeds_break_nothing():
    for seed in range(1000, 2000):
        _, failure = run_scenario(draw_scenario(seed), DualPool())
        assert failure is None, tell(failure)


@pytest.mark.parametrize("seed", [3559, 10076])
def test_seeds_that_once_failed(seed):
    """In both, KV of a fenced attempt reached the next process of its decode node: it stayed, or lay in the way."""
    _, failure = run_scenario(draw_scenario(seed), DualPool())
    assert failure is None, tell(failure)


def test_a_seed_is_one_story():
    first, _ = run_scenario(draw_scenario(4), DualPool())
    second, _ = run_scenario(draw_scenario(4), DualPool())
    assert first.story == second.story


def forget_epochs(patch):
    patch.setattr(ClusterState, "request_of", lambda state, attempt: state.requests.get(attempt.request_id))
    patch.setattr(Request, "working", lambda request, attempt: request.phase)


def never_release(patch):
    patch.setattr(ClusterState, "release", lambda state, request: None)


def overcommit_blocks(patch):
    patch.setattr(Node, "free_blocks", property(lambda node: node.profile.kv_blocks))


def free_blocks_before_the_node_did(patch):
    def mark_released(node, now_s, attempt):
        return node.leases.pop(attempt, None) is not None

    patch.setattr(Node, "mark_released", mark_released)


def begin_again_on_takeover(patch):
    queue_again = ClusterState.try_elsewhere

    def try_elsewhere(state, request, avoid, why, delay_s=0.0):
        request.tokens.clear()
        queue_again(state, request, avoid, why, delay_s)

    patch.setattr(ClusterState, "try_elsewhere", try_elsewhere)


def lose_requests_of_dead_nodes(patch):
    def bury_node(state, node, reason):
        state.nodes.bury(node)

    patch.setattr(ClusterState, "bury_node", bury_node)


def never_notice_silence(patch):
    patch.setattr(NodeRegistry, "overdue", lambda registry, now_s: [])


def reserve_only_the_prompt(patch):
    patch.setattr(Request, "capacity_tokens", property(lambda request: len(request.spec.prompt)))


def take_any_token_for_the_next(patch):
    def token_generated(state, event):
        request = state.request_of(event.attempt)
        if request is not None:
            event = dataclasses.replace(event, token=dataclasses.replace(event.token, index=len(request.tokens)))
        take(state, event)

    take = on_attempt.token_generated
    patch.setattr(on_attempt, "token_generated", token_generated)


def decode_with_one_token_too_few(patch):
    def start_decode(state, request, attempt):
        start(state, request, attempt)
        command = state.out[-1]
        assert isinstance(command, StartDecode)
        state.out[-1] = dataclasses.replace(command, generated=(command.generated[:-1] or command.generated))

    start = on_attempt._start_decode
    patch.setattr(on_attempt, "_start_decode", start_decode)
    take_any_token_for_the_next(patch)


def ignore_deadlines_and_timeouts(patch):
    patch.setattr(on_request, "_check_bounds", lambda state, request: None)


def ignore_the_loss_of_a_kv_source(patch):
    """Believe the KV is there as soon as the prompt is read, so that losing the prefill node goes unnoticed."""
    patch.setattr(Request, "uses", lambda request, connection: connection == getattr(request.phase, "decode", None))


def forget_what_earlier_processes_had(patch):
    patch.setattr(NodeRegistry, "lease_orphans", lambda registry, now_s, node: [])


MUTATIONS = (
    forget_epochs,
    never_release,
    overcommit_blocks,
    reserve_only_the_prompt,
    free_blocks_before_the_node_did,
    begin_again_on_takeover,
    decode_with_one_token_too_few,
    lose_requests_of_dead_nodes,
    never_notice_silence,
    ignore_deadlines_and_timeouts,
    ignore_the_loss_of_a_kv_source,
)


def test_a_forgotten_orphan_is_found(monkeypatch):
    forget_what_earlier_processes_had(monkeypatch)
    assert run_scenario(draw_scenario(10076), DualPool())[1] is not None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_faults_put_into_the_core_are_found(mutation, monkeypatch):
    mutation(monkeypatch)
    failures = (run_scenario(draw_scenario(seed), DualPool())[1] for seed in SEEDS_TO_FIND_A_MUTATION)
    assert next((failure for failure in failures if failure is not None), None) is not None


def test_a_failure_is_shrunk_to_a_short_story(monkeypatch):
    lose_requests_of_dead_nodes(monkeypatch)
    failures = (run_scenario(draw_scenario(seed), DualPool())[1] for seed in SEEDS_TO_FIND_A_MUTATION)
    failure = shrink(next(failure for failure in failures if failure is not None), DualPool)
    assert len(failure.scenario.requests) == 1
    assert len(failure.scenario.faults) <= 2
    assert f"seed {failure.scenario.seed}" in tell(failure)
