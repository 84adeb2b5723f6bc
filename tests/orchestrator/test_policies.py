"""Placement as a function of values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.orchestrator.core.pipelines import Stage, connections_of
from edgellm.orchestrator.core.policy import NodeView, WaitingRequest
from edgellm.orchestrator.core.values import ConnectionId, Layers, NodeId, RequestId
from edgellm.orchestrator.policies import POLICIES
from edgellm.orchestrator.policies.cost import CostModel
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.policies.room import Decoders


def node(connection: int, role: str = "decode", **fields) -> NodeView:
    values = {
        "node_id": NodeId(f"n{connection}"),
        "suspect": False,
        "host_id": f"h{connection}",
        "free_blocks": 100,
        "free_sequences": 8,
        "prefill_tokens": 0,
        "running": 0,
        "can_prefill": True,
        "avoid": frozenset(),
        "kv_bytes_per_token": 10_000,
        "prefill_tokens_per_s": 1000.0,
        "decode_step_ms": 10.0,
    }
    return NodeView(connection=ConnectionId(connection), role=role, **{**values, **fields})


def waiting(name: str = "r", **fields) -> WaitingRequest:
    values = {
        "arrival_s": 0.0,
        "deadline_s": None,
        "prompt_tokens": 500,
        "generated_tokens": 0,
        "prompt_blocks": 16,
        "total_blocks": 20,
        "allow_degraded": False,
        "avoid": frozenset(),
    }
    return WaitingRequest(request_id=RequestId(name), **{**values, **fields})


def pipelines_of(nodes):
    """Each decode node alone."""
    return [(Stage(connection=n.connection, layers=Layers(0, 4)),) for n in nodes if n.role == "decode"]


def plan(requests, nodes, now_s=0.0):
    placements = DualPool().plan(now_s, requests, nodes, pipelines_of(nodes))
    return [(p.request_id, p.path, p.prefill, *connections_of(p.pipeline)) for p in placements]


PREFILL, DECODE = node(1, "prefill"), node(2)


def test_an_idle_cluster_of_equals_sends_kv():
    assert plan([waiting()], [PREFILL, DECODE]) == [("r", "remote", 1, 2)]


def test_a_link_slower_than_reading_keeps_the_prompt_local():
    fat = node(1, "prefill", kv_bytes_per_token=1_000_000)
    assert plan([waiting()], [fat, DECODE]) == [("r", "local", 2, 2)]


def test_the_same_host_is_not_held_up_by_the_network():
    fat = node(1, "prefill", kv_bytes_per_token=1_000_000, host_id="h2")
    assert plan([waiting()], [fat, DECODE]) == [("r", "remote", 1, 2)]


def test_a_long_queue_at_the_prefill_node_makes_local_reading_worth_it():
    busy = node(1, "prefill", prefill_tokens=4000)
    assert plan([waiting()], [busy, DECODE]) == [("r", "local", 2, 2)]


def test_running_answers_speak_against_reading_beside_them():
    busy = node(1, "prefill", prefill_tokens=4000)
    assert plan([waiting()], [busy, node(2, running=8, can_prefill=True)]) == []


def test_without_any_half_precision_engine_only_degraded_and_only_if_allowed():
    decode = node(2, can_prefill=False)
    assert plan([waiting()], [decode]) == []
    assert plan([waiting(allow_degraded=True)], [decode]) == [("r", "degraded", 2, 2)]


def test_suspects_get_nothing_and_are_waited_for_before_degrading():
    decode, late = node(2, can_prefill=False), node(1, "prefill", suspect=True)
    assert plan([waiting(allow_degraded=True)], [late, decode]) == []
    assert plan([waiting()], [late, DECODE]) == [("r", "local", 2, 2)]


def test_nodes_that_failed_it_are_used_last():
    request = waiting(avoid=frozenset({ConnectionId(2)}))
    assert plan([request], [PREFILL, DECODE, node(3)]) == [("r", "remote", 1, 3)]
    assert plan([request], [PREFILL, DECODE]) == [("r", "remote", 1, 2)]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_links_that_failed_are_used_last(policy):
    nodes = [node(1, "prefill", avoid=frozenset({ConnectionId(2)})), node(2, can_prefill=False, free_blocks=200)]

    def receiver(nodes):
        (placement,) = POLICIES[policy]().plan(0.0, [waiting()], nodes, pipelines_of(nodes))
        return placement.prefill, *connections_of(placement.pipeline)

    assert receiver(nodes) == (1, 2)
    assert receiver([*nodes, node(3, can_prefill=False)]) == (1, 3)
    assert receiver([*nodes, node(4, "prefill", prefill_tokens=3000)]) == (4, 2)


def test_a_link_that_failed_is_tried_when_waiting_for_others_would_take_longer():
    cut_off, decode = node(1, "prefill", avoid=frozenset({ConnectionId(2)})), node(2, can_prefill=False)

    def reader(queue_tokens):
        return plan([waiting()], [cut_off, decode, node(4, "prefill", prefill_tokens=queue_tokens)])

    assert reader(3000) == [("r", "remote", 4, 2)]
    assert reader(8000) == []
    assert reader(12_000) == [("r", "remote", 1, 2)]


def test_least_slack_first_and_takeovers_before_all():
    small = [node(1, "prefill", free_sequences=1), node(2, can_prefill=False)]
    urgent, late, resumed = waiting("urgent", deadline_s=1.0), waiting("late"), waiting("resumed", generated_tokens=3)
    assert plan([late, urgent], small)[0][0] == "urgent"
    assert plan([late, urgent, resumed], small)[0][0] == "resumed"


def test_a_big_request_is_overtaken_until_it_has_no_slack():
    nodes = [PREFILL, node(2, free_blocks=30, can_prefill=False)]
    big, small = waiting("big", total_blocks=60), waiting("small", arrival_s=0.1)
    assert [placed[0] for placed in plan([big, small], nodes, now_s=0.2)] == ["small"]
    assert plan([big, small], nodes, now_s=60.0) == []


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(data=st.data())
def test_plans_fit_and_place_nobody_twice(policy, data):
    nodes = [
        node(
            number,
            data.draw(st.sampled_from(("prefill", "decode"))),
            free_blocks=data.draw(st.integers(0, 60)),
            free_sequences=data.draw(st.integers(0, 3)),
            can_prefill=data.draw(st.booleans()),
            suspect=data.draw(st.booleans()),
            prefill_tokens_per_s=data.draw(st.sampled_from((0.0, 100.0, 5000.0))),
        )
        for number in range(data.draw(st.integers(0, 4)))
    ]
    requests = [
        waiting(
            f"r{number}",
            arrival_s=data.draw(st.floats(0, 10)),
            prompt_tokens=data.draw(st.integers(1, 3000)),
            prompt_blocks=(prompt_blocks := data.draw(st.integers(1, 40))),
            total_blocks=prompt_blocks + data.draw(st.integers(0, 20)),
            allow_degraded=data.draw(st.booleans()),
        )
        for number in range(data.draw(st.integers(0, 6)))
    ]
    cut = (Layers(0, 2), Layers(2, 2))
    members = [n.connection for n in nodes if n.role == "decode"]
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(members), st.sampled_from(members)))) if members else []
    staged = [tuple(Stage(connection=c, layers=ls) for c, ls in zip(pair, cut, strict=True)) for pair in pairs]
    placements = POLICIES[policy]().plan(10.0, requests, nodes, [*pipelines_of(nodes), *staged])
    by_id = {request.request_id: request for request in requests}
    assert len({p.request_id for p in placements}) == len(placements)
    for view in nodes:
        here = [p for p in placements if view.connection in (p.prefill, *connections_of(p.pipeline))]
        blocks = sum(
            by_id[p.request_id].total_blocks
            if view.connection in connections_of(p.pipeline)
            else by_id[p.request_id].prompt_blocks
            for p in here
        )
        assert blocks <= view.free_blocks
        assert len(here) <= (0 if view.suspect else view.free_sequences)
        for p in here:
            assert p.prefill != view.connection or view.can_prefill or p.path == "degraded"


def test_sending_is_hidden_behind_reading_but_for_the_last_chunk():
    cost = CostModel()
    request = waiting(prompt_tokens=1280)
    decode = Decoders(pipeline=pipelines_of([DECODE])[0], nodes=(DECODE,))
    fast_link = cost.remote_s(request, PREFILL, decode)
    assert fast_link == pytest.approx(1.28 + cost.send_s(PREFILL, decode, 128))
    fat = node(1, "prefill", kv_bytes_per_token=1_000_000)
    assert cost.remote_s(request, fat, decode) == pytest.approx(0.128 + cost.send_s(fat, decode, 1280))


def test_distserve_lets_nobody_overtake():
    nodes = [PREFILL, node(2, free_blocks=30)]
    policy = POLICIES["distserve"]()
    pipelines = pipelines_of(nodes)
    too_big = [waiting("big", total_blocks=60), waiting("small", arrival_s=0.1)]
    assert policy.plan(0.0, too_big, nodes, pipelines) == []
    both = [waiting("later", arrival_s=0.1, total_blocks=10), waiting("first")]
    placed = policy.plan(0.0, both, nodes, pipelines)
    assert [placement.request_id for placement in placed] == ["first", "later"]
