"""Links that failed are avoided for a while, where there is another way."""

from dataclasses import replace

import pytest

from edgellm.orchestrator.core.commands import ProtectAttempt, StartPrefill
from edgellm.orchestrator.core.events import AttemptFailed, CopyLost, PipelineBroken, PrefillDone, Tick
from edgellm.orchestrator.core.links import Links
from edgellm.orchestrator.core.pipelines import Carrier, Stage, connections_of, form_pipelines
from edgellm.orchestrator.core.takeover import Copy, plan_takeover
from edgellm.orchestrator.core.values import ConnectionId, NodeId, RequestId, SampledToken
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.clients import Ask
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.faults import Fault, schedule_fault
from edgellm.orchestrator.sim.machines import NodePlan, toy_bundle
from edgellm.orchestrator.sim.network import LinkModel
from edgellm.orchestrator.sim.story import Story
from edgellm.orchestrator.sim.world import simulated_world
from tests.orchestrator.profiles import simulated_config
from tests.orchestrator.stories import BACK, CUT, D0, D1, D2, D3, FRONT, NAMES, PREFILL, SPARE, Cluster, all_of, the


def two_pipelines():
    return Cluster(PREFILL, D0, D1, D2, D3, hot_copies=False)


def ask(cluster, name):
    cluster.name = RequestId(name)
    return cluster.submit()


def receivers(start):
    return [target.node_id for target in start.targets]


def kv_does_not_arrive(cluster, start, peer):
    """Returns how the prompt is read again."""
    failed = AttemptFailed(
        connection=start.connection, attempt=start.attempt, kind="transfer", message="silence", peer=NodeId(peer)
    )
    return the(StartPrefill, cluster.happens(failed) + waits(cluster, 0.2))


def waits(cluster, seconds):
    return cluster.passes(seconds, *(node.connection for node in cluster.core.state.nodes.alive()))


def avoided(cluster, source):
    return cluster.core.state.links.avoided_from(cluster.now_s, source)


def test_only_the_first_request_pays_for_a_link_that_failed():
    cluster = two_pipelines()
    first = ask(cluster, "first")
    assert receivers(first) == ["d0", "d1"]
    kv_does_not_arrive(cluster, first, "d0")
    for name in ("second", "third", "fourth"):
        start = ask(cluster, name)
        assert (start.connection, receivers(start)) == (PREFILL, ["d2", "d3"])
        cluster.read(start)


def test_a_link_that_failed_is_tried_again_and_then_avoided_for_twice_as_long():
    cluster = two_pipelines()
    kv_does_not_arrive(cluster, ask(cluster, "first"), "d0")
    assert receivers(ask(cluster, "second")) == ["d2", "d3"]
    waits(cluster, 5.0)
    third = ask(cluster, "third")
    assert receivers(third) == ["d0", "d1"]
    kv_does_not_arrive(cluster, third, "d0")
    waits(cluster, 6.0)
    assert avoided(cluster, PREFILL) == {D0}
    waits(cluster, 5.0)
    assert avoided(cluster, PREFILL) == set()


def test_a_failure_that_is_reported_by_all_requests_on_the_link_counts_once():
    cluster = two_pipelines()
    starts = [ask(cluster, name) for name in ("first", "second", "third")]
    for start in starts:
        if "d0" in receivers(start):
            kv_does_not_arrive(cluster, start, "d0")
    assert len([start for start in starts if "d0" in receivers(start)]) == 2
    assert cluster.core.state.links.avoided_until_s(PREFILL, D0) == pytest.approx(5.0)


def test_where_there_is_no_other_way_a_link_that_failed_is_used():
    stages = [replace(one, carries=frozenset({one.home})) for one in carriers(D0, D1)]
    assert formed(stages, {(D0, D1)}) == [(D0, D1)]


def test_a_receiver_that_waits_in_vain_blames_no_link():
    """The sender itself tells, unless it gave up only because another of its links failed."""
    cluster = two_pipelines()
    start = ask(cluster, "first")
    first = SampledToken(index=0, token_id=100)
    cluster.happens(PrefillDone(connection=PREFILL, attempt=start.attempt, first_token=first, prefill_ms=1.0))
    cluster.happens(AttemptFailed(connection=D1, attempt=start.attempt, kind="transfer", message="its sender has gone"))
    assert cluster.core.state.links.ends == set()


def test_kv_that_arrives_makes_good_what_was_before():
    cluster = two_pipelines()
    start = ask(cluster, "first")
    for target in (D0, D2):
        cluster.core.state.link_failed(PREFILL, target)
    cluster.read(start)
    assert avoided(cluster, PREFILL) == {D2}


def test_a_node_that_comes_back_is_not_held_to_what_was_before():
    cluster = two_pipelines()
    cluster.core.state.link_failed(PREFILL, D0)
    cluster.core.state.link_failed(D2, PREFILL)
    cluster.dies(D0)
    assert cluster.core.state.links.ends == {D2, PREFILL}
    cluster.join(ConnectionId(7), "d0", pid=2)
    assert receivers(ask(cluster, "first")) == ["d0", "d1"]


def copy_lost(cluster, connection, kind):
    lost = CopyLost(
        connection=connection, attempt=cluster.attempt, holder=NodeId("spare"), layers=FRONT, kind=kind, message="test"
    )
    return cluster.happens(lost)


def test_a_holder_that_copies_do_not_reach_is_the_last_choice():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=6, copied=0)
    copy_lost(cluster, D0, "transfer")
    assert avoided(cluster, D0) == {SPARE}
    start = ask(cluster, "next")
    assert [(t.node_id, t.layers) for t in start.targets if t.backup and t.layers == FRONT] == [("d1", FRONT)]


@pytest.mark.parametrize(("connection", "kind"), [(D0, "stale"), (D0, "capacity"), (SPARE, "transfer")])
def test_a_copy_that_a_holder_was_reached_for_or_tells_of_itself_blames_no_link(connection, kind):
    """The sender itself tells, unless it gave up only because another of its links failed."""
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=6, copied=0)
    copy_lost(cluster, connection, kind)
    assert cluster.core.state.links.ends == set()
    assert all(copy.layers != FRONT for copy in cluster.request.copies)


def test_the_link_of_a_copy_that_is_not_made_in_time_is_avoided_until_one_grows():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=6, copied=0)
    protects = all_of(ProtectAttempt, waits(cluster, 21.5))
    assert avoided(cluster, PREFILL) == {SPARE}
    assert {copy.target.node_id for protect in protects for copy in protect.copies} == {"d0", "d1"}
    ask(cluster, "next")
    assert {copy.holder for copy in cluster.request.copies} == {D0, D1}
    cluster.core.state.link_failed(PREFILL, D0)
    cluster.copy(40)
    assert avoided(cluster, PREFILL) == {SPARE}


def test_a_copy_has_its_time_from_the_end_of_the_prompt_on():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    start = cluster.submit()
    waits(cluster, 30.0)
    first = SampledToken(index=0, token_id=100)
    cluster.happens(PrefillDone(connection=PREFILL, attempt=start.attempt, first_token=first, prefill_ms=1.0))
    waits(cluster, 19.0)
    assert cluster.core.state.links.ends == set()
    waits(cluster, 1.5)
    assert avoided(cluster, PREFILL) == {SPARE}


def test_a_link_that_a_pipeline_broke_at_is_avoided_for_longer_each_time():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    for name, pause_s in (("first", 5.0), ("second", 10.0)):
        cluster.name = RequestId(name)
        cluster.decode(tokens=1, copied=40)
        assert cluster.pipeline() == (D0, D1)
        breaks(cluster, D0, "d1")
        waits(cluster, pause_s - 0.5)
        assert cluster.core.state.nodes.get(D1).state == "ready"
        assert pipelines(cluster) == [(D0, SPARE)]
        waits(cluster, 0.5)
        assert pipelines(cluster) == [(D0, D1)]


def test_a_link_that_works_again_is_used_at_once():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.core.state.link_failed(D0, D1)
    assert pipelines(cluster) == [(D0, SPARE)]
    cluster.core.state.links.worked(D0, D1)
    assert pipelines(cluster) == [(D0, D1)]


def breaks(cluster, source, peer):
    cluster.happens(PipelineBroken(connection=source, peer=NodeId(peer), attempts=(cluster.attempt,)))
    waits(cluster, 0.2)


def pipelines(cluster):
    cluster.happens(Tick())
    return [connections_of(pipeline) for pipeline in cluster.core.state.pipelines()]


def test_a_node_that_reaches_no_other_takes_none_of_them_out():
    cluster = two_pipelines()
    for name, peer, left in (("first", "d1", [(D0, D3), (D2, D1)]), ("second", "d3", [(D2, D1)])):
        cluster.read(ask(cluster, name))
        assert cluster.pipeline()[0] == D0
        breaks(cluster, D0, peer)
        assert {node.state for node in cluster.core.state.nodes.alive()} == {"ready"}
        assert pipelines(cluster) == left
    waits(cluster, 60.0)
    assert pipelines(cluster) == [(D0, D1), (D2, D3)]


def carriers(*nodes):
    homes = {D0: FRONT, D1: BACK, D2: FRONT, D3: BACK}
    return [
        Carrier(
            connection=one,
            node_id=NodeId(NAMES[one]),
            role="decode",
            home=homes.get(one),
            carries=frozenset(CUT),
        )
        for one in nodes
    ]


def formed(carriers, avoid):
    return [connections_of(pipeline) for pipeline in form_pipelines(carriers, CUT, avoid)]


@pytest.mark.parametrize(
    ("nodes", "avoid", "expected"),
    [
        ((D0, D1, D2, D3), set(), [(D0, D1), (D2, D3)]),
        ((D0, D1, D2, D3), {(D1, D0)}, [(D0, D1), (D2, D3)]),
        ((D0, D1, D2, D3), {(D0, D1)}, [(D0, D3), (D2, D1)]),
        ((D0, D1, D2, D3), {(D2, D3)}, [(D0, D3), (D2, D1)]),
        ((D0, D1, D2, D3), {(D0, D1), (D2, D1)}, [(D0, D3)]),
        ((D0, D1, SPARE), {(D0, D1)}, [(D0, SPARE)]),
        ((D0, D1), {(D0, D1)}, [(D0,)]),
    ],
)
def test_pipelines_are_formed_round_links_that_failed(nodes, avoid, expected):
    assert formed(carriers(*nodes), avoid) == expected


def test_a_takeover_prefers_a_holder_within_reach_to_a_longer_copy():
    pipeline = (Stage(connection=D0, layers=FRONT), Stage(connection=D1, layers=BACK))
    copies = [
        Copy(layers=BACK, source=D1, reader=D1, holder=holder, tokens=tokens) for holder, tokens in ((D2, 45), (D3, 50))
    ]

    def holder(avoid):
        plan = plan_takeover(pipeline, copies, {D1}, kv_tokens=50, prompt_tokens=40, avoid=avoid)
        return plan.pipeline[1].connection

    assert holder({(D3, D0)}) == D3
    assert holder({(D0, D3)}) == D2
    assert holder({(D0, D3), (D0, D2)}) == D3


@pytest.mark.parametrize(("tokens", "forgotten"), [(2, False), (3, True)])
def test_stages_reach_each_other_when_a_token_has_come_back(tokens, forgotten):
    """The reader gives the first one, and the second may come from the last stage before it was told to the first."""
    cluster = Cluster(PREFILL, D0, D1, hot_copies=False)
    cluster.read(cluster.submit())
    cluster.core.state.link_failed(D0, D1)
    cluster.generate(tokens)
    assert (cluster.core.state.links.ends == set()) == forgotten


def test_pauses_are_bounded():
    links, now_s = Links(simulated_config(link_pause_s=5.0, longest_link_pause_s=60.0)), 0.0
    pauses = [links.failed(now_s, D0, D1) for _ in range(6)]
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    links.worked(D0, D1)
    assert links.failed(now_s, D0, D1) == 5.0


def answer_times(folder, faults):
    """Seconds that requests take, one after the other, on two decode nodes that read no prompts."""
    device = DeviceModel(read_token_s=0.0005, step_s=0.02, row_s=0.001)
    nodes = (("p0", "prefill-tp0of1"), ("d0", "decode-pp0of1"), ("d1", "decode-pp0of1"))
    asks = [Ask(name=f"r{n}", at_s=at_s, prompt_tokens=100, max_tokens=4) for n, at_s in enumerate((0.5, 12, 13, 14))]
    link = LinkModel(latency_s=0.001, bytes_per_s=2e6)
    bounds = {"hot_copies": False}
    with simulated_world(
        toy_bundle(folder, 2), DualPool, bounds, seed=1, link=link, story=Story(wanted=False)
    ) as world:
        for name, engine in nodes:
            world.add_node(NodePlan(name=name, engine=engine, device=device, kv_blocks=64, half=False))
        for one in asks:
            world.add_client(one)
        for fault in faults:
            schedule_fault(world, fault)
        world.run(60.0)
        return [client.finished.timing.total_ms / 1e3 for client in world.clients]


def test_a_link_that_is_blocked_one_way_costs_one_request_its_wait_and_not_the_next_ones(tmp_path):
    blocked = Fault(kind="one way", victim="p0", other="d0", start_s=0.4, duration_s=30.0)
    usual_s = max(answer_times(tmp_path / "calm", []))
    first_s, *next_s = answer_times(tmp_path / "blocked", [blocked])
    assert first_s > 9.0
    assert max(next_s) <= 1.5 * usual_s
