"""Two stages on two nodes, and everything that may die under them: told as stories to the core."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.orchestrator.core.commands import (
    EmitToken,
    FinishRequest,
    HoldCopies,
    ProtectAttempt,
    ReleaseAttempt,
    StartDecode,
    StartPrefill,
    WelcomeNode,
)
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    AttemptResumed,
    CopyLost,
    HeartbeatReceived,
    NodeJoined,
    PipelineBroken,
    RequestEnded,
    RequestsRecovered,
    RequestSubmitted,
    Tick,
    TokenGenerated,
)
from edgellm.orchestrator.core.pipelines import Carrier, Stage, form_pipelines, holders_for
from edgellm.orchestrator.core.takeover import Copy, Part, plan_from_parts, plan_takeover
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    Generation,
    HeldKv,
    Layers,
    NodeId,
    NodeLoad,
    RecoveredRequest,
    RequestId,
    RequestSpec,
    SampledToken,
)
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.wire_out import command_to_proto
from edgellm.runtime.wire import command_from_proto
from tests.orchestrator.profiles import simulated_config, simulated_profile
from tests.orchestrator.stories import (
    BACK,
    CUT,
    D0,
    D1,
    D2,
    D3,
    FRONT,
    NAMES,
    PREFILL,
    PROMPT,
    SPARE,
    Cluster,
    all_of,
    the,
    where,
)


def test_a_prompt_goes_to_the_stages_and_to_the_holders_of_their_copies():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    start = cluster.submit()
    assert [(t.node_id, t.layers, t.backup) for t in start.targets] == [
        ("d0", FRONT, False),
        ("d1", BACK, False),
        ("spare", FRONT, True),
        ("spare", BACK, True),
    ]
    decodes = cluster.read(start)
    assert [decode.connection for decode in decodes] == [D0, D1]
    assert all(where(decode.stages) == [("d0", FRONT), ("d1", BACK)] for decode in decodes)
    assert [(c.source, c.target.node_id, c.from_token) for c in decodes[0].copies] == [
        ("d0", "spare", 40),
        ("d1", "spare", 40),
    ]
    assert cluster.leased(PREFILL) == []
    assert {c: cluster.core.state.nodes.get(c).used_blocks for c in (D0, D1, SPARE)} == {D0: 2, D1: 2, SPARE: 2}


def test_tokens_come_from_the_last_stage_and_their_end_frees_all_nodes():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=3)
    token = SampledToken(index=3, token_id=9)
    assert cluster.happens(TokenGenerated(connection=D0, attempt=cluster.attempt, token=token)) == []
    last = TokenGenerated(connection=D1, attempt=cluster.attempt, token=replace(token, finish="stop"))
    commands = cluster.happens(last)
    assert the(FinishRequest, commands).reason == "stop"
    assert [release.connection for release in all_of(ReleaseAttempt, commands)] == [D0, SPARE]
    assert cluster.leased(D1) == []


@pytest.mark.parametrize(("dead", "now"), [(D0, (SPARE, D1)), (D1, (D0, SPARE))])
def test_a_spare_takes_the_stage_of_a_dead_node_over_from_its_copy(dead, now):
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=5, copied=42)
    before = cluster.attempt
    commands = cluster.dies(dead)
    decodes = all_of(StartDecode, commands)
    assert not all_of(StartPrefill, commands)
    assert cluster.pipeline() == now
    assert [decode.connection for decode in decodes] == list(now)
    for decode in decodes:
        assert (decode.resume_from, decode.resume_tokens, decode.generated) == (before, 42, (100, 101, 102, 103, 104))
        assert decode.attempt.epoch > before.epoch
    stayed = next(connection for connection in now if connection != SPARE)
    assert [(copy.source, copy.holder, copy.tokens) for copy in cluster.request.copies] == [(stayed, SPARE, 42)]
    stale = SampledToken(index=5, token_id=1)
    assert cluster.happens(TokenGenerated(connection=D1, attempt=before, token=stale)) == []
    assert the(EmitToken, cluster.generate(6)).token.index == 5


def test_without_a_spare_the_survivor_carries_both_stages():
    cluster = Cluster(PREFILL, D0, D1)
    cluster.decode(tokens=4, copied=43)
    assert [(copy.source, copy.holder) for copy in cluster.request.copies] == [(D0, D1), (D1, D0)]
    decode = the(StartDecode, cluster.dies(D1))
    assert (decode.connection, where(decode.stages)) == (D0, [("d0", FRONT), ("d0", BACK)])
    assert decode.resume_tokens == 43
    assert cluster.request.copies == ()
    cluster.generate(20 - 1)
    token = SampledToken(index=19, token_id=1, finish="length")
    finish = the(FinishRequest, cluster.happens(TokenGenerated(connection=D0, attempt=cluster.attempt, token=token)))
    assert (finish.stats.generated_tokens, finish.stats.takeovers) == (20, 1)
    assert not any(node.leases for node in cluster.core.state.nodes)


def test_a_node_that_only_holds_copies_is_told_whose_they_are_now():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.join(ConnectionId(9), "spare1")
    cluster.decode(tokens=5, copied=42)
    assert [(copy.layers, copy.holder) for copy in cluster.request.copies] == [(FRONT, SPARE), (BACK, ConnectionId(9))]
    before = cluster.attempt
    commands = cluster.dies(D0)
    hold = the(HoldCopies, commands)
    assert (hold.connection, hold.resume_from, hold.resume_tokens) == (ConnectionId(9), before, 42)
    assert hold.attempt == cluster.attempt
    assert cluster.leased(ConnectionId(9)) == [cluster.attempt]


def test_both_copies_gone_means_reading_the_prompt_again_and_replaying_the_answer():
    cluster = Cluster(PREFILL, D0, D1)
    cluster.decode(tokens=4)
    cluster.dies(D1)
    assert not all_of(StartPrefill, cluster.dies(D0))
    start = the(StartPrefill, cluster.join(ConnectionId(7), "d0", pid=2))
    assert start.generated == (100, 101, 102, 103)
    again = the(StartDecode, cluster.read(start))
    assert (again.generated, again.resume_from) == (start.generated, None)


def test_a_copy_that_does_not_reach_the_end_of_the_prompt_restores_nothing():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4, copied=39)
    start = the(StartPrefill, cluster.dies(D1))
    assert start.generated == (100, 101, 102, 103)
    assert [(t.node_id, t.backup) for t in start.targets if not t.backup] == [("d0", False), ("spare", False)]


def choose_between_copies_and_reading(spare_step_ms, prefill_tokens_per_s):
    """Two requests are on d0 and d1, their copies on the spare; d1 dies, and new requests would go to d0 and d3."""
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    for name in ("r", "s"):
        cluster.name = RequestId(name)
        cluster.decode(tokens=4)
    cluster.join(D2)
    cluster.join(D3)
    steps_ms = {PREFILL: 0.0, D0: 10.0, D1: 10.0, D2: 10.0, D3: 10.0, SPARE: spare_step_ms}
    for connection, step_ms in steps_ms.items():
        speed = prefill_tokens_per_s if connection == PREFILL else 0.0
        load = NodeLoad(decode_step_ms=step_ms, prefill_tokens_per_s=speed)
        cluster.happens(HeartbeatReceived(connection=connection, load=load))
    restored = all_of(StartDecode, cluster.dies(D1))
    return [attempt.request_id for attempt in dict.fromkeys(decode.attempt for decode in restored)]


def test_copies_are_used_unless_they_are_on_a_far_slower_device():
    assert choose_between_copies_and_reading(spare_step_ms=25.0, prefill_tokens_per_s=1e4) == ["r", "s"]
    assert choose_between_copies_and_reading(spare_step_ms=40.0, prefill_tokens_per_s=1e4) == []


def test_prompts_that_were_just_queued_again_are_read_before():
    assert choose_between_copies_and_reading(spare_step_ms=40.0, prefill_tokens_per_s=100.0) == ["s"]


def test_a_second_death_before_the_first_replay_counts_only_what_survived_the_first():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=8, copied=42)
    cluster.dies(D1)
    assert cluster.request.kv_tokens == 42
    decode = the(StartDecode, cluster.dies(D0))
    assert (decode.connection, decode.resume_tokens) == (SPARE, 42)
    assert cluster.pipeline() == (SPARE, SPARE)


def test_a_double_fault_that_takes_the_restored_stage_begins_again():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=8)
    cluster.dies(D1)
    start = the(StartPrefill, cluster.dies(SPARE))
    assert len(start.generated) == 8
    assert [t.node_id for t in start.targets] == ["d0", "d0"]


def test_the_death_of_the_holder_costs_only_protection_and_is_made_good():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    assert cluster.dies(SPARE) == []
    assert cluster.request.copies == ()
    protects = all_of(ProtectAttempt, cluster.passes(0.1, PREFILL, D0, D1))
    made = {(p.connection, c.target.node_id, c.from_token) for p in protects for c in p.copies}
    assert made == {(D0, "d1", 0), (D1, "d0", 0)}
    cluster.copy(43)
    assert the(StartDecode, cluster.dies(D0)).resume_tokens == 43


def test_after_a_takeover_the_lost_copy_is_made_again_once_the_answer_goes_on():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    cluster.dies(D1)
    assert not all_of(ProtectAttempt, cluster.passes(0.2, PREFILL, D0, SPARE))
    cluster.generate(5)
    protect = the(ProtectAttempt, cluster.passes(0.1, PREFILL, D0, SPARE))
    assert (protect.connection, [(c.target.node_id, c.target.layers) for c in protect.copies]) == (
        SPARE,
        [("d0", BACK)],
    )


def test_a_copy_that_stopped_growing_still_serves_and_is_continued():
    cluster = Cluster(PREFILL, D0, D1)
    cluster.decode(tokens=6, copied=41)
    lost = CopyLost(
        connection=D0, attempt=cluster.attempt, holder=NodeId("d1"), layers=FRONT, kind="transfer", message="slow"
    )
    cluster.happens(lost)
    assert [(copy.layers, copy.live) for copy in cluster.request.copies] == [(BACK, True), (FRONT, False)]
    protect = the(ProtectAttempt, cluster.passes(1.2, PREFILL, D0, D1))
    assert [(c.target.node_id, c.from_token) for c in protect.copies] == [("d1", 41)]


def test_a_copy_that_never_came_about_is_let_go_of():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=6, copied=0)
    for layers in CUT:
        lost = CopyLost(
            connection=D0,
            attempt=cluster.attempt,
            holder=NodeId("spare"),
            layers=layers,
            kind="capacity",
            message="full",
        )
        commands = cluster.happens(lost)
    assert the(ReleaseAttempt, commands).connection == SPARE
    protects = all_of(ProtectAttempt, cluster.passes(1.2, PREFILL, D0, D1, SPARE))
    assert {c.target.node_id for p in protects for c in p.copies} == {"d0", "d1"}


def test_copies_leave_room_for_the_requests_of_the_holder_itself():
    for max_tokens, has_copies in ((80, True), (100, False)):  # 4 and 5 of 8 blocks
        core = Core(simulated_config(), DualPool())
        for connection, name in NAMES.items():
            role = "prefill" if name == "p" else "decode"
            about = simulated_profile(name, role, device_class="cpu-local", kv_blocks=8, kv_bytes_per_token=64)
            core.handle(0.0, NodeJoined(connection=connection, profile=about))
        spec = RequestSpec(request_id=RequestId("r"), prompt=PROMPT, generation=Generation(max_tokens=max_tokens))
        start = the(StartPrefill, core.handle(0.0, RequestSubmitted(spec=spec)))
        assert any(target.backup for target in start.targets) == has_copies


def test_when_every_decode_node_is_dead_the_prefill_device_decodes():
    cluster = Cluster(PREFILL, D0, D1, prefill_decodes=True)
    cluster.decode(tokens=4)
    cluster.dies(D0)
    start = the(StartPrefill, cluster.dies(D1))
    assert (start.connection, start.targets) == (PREFILL, ())
    decode = the(StartDecode, cluster.read(start))
    assert (decode.connection, where(decode.stages)) == (PREFILL, [("p", FRONT), ("p", BACK)])
    assert decode.generated == (100, 101, 102, 103)


def test_the_prefill_device_takes_over_from_copies_where_nobody_else_could_hold_them():
    cluster = Cluster(PREFILL, D0, prefill_decodes=True)
    start = cluster.submit()
    assert [(t.node_id, t.backup) for t in start.targets] == [("d0", False), ("d0", False), ("p", True), ("p", True)]
    cluster.read(start)
    assert cluster.leased(PREFILL) == [start.attempt]
    cluster.generate(4)
    cluster.copy(42)
    decode = the(StartDecode, cluster.dies(D0))
    assert (decode.connection, decode.resume_tokens) == (PREFILL, 42)


def test_the_prefill_node_may_die_before_during_and_after_a_prompt():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    before = cluster.submit()
    start = the(StartPrefill, cluster.dies(PREFILL))
    assert start.attempt.epoch > before.attempt.epoch
    assert start.connection == D0
    assert [(t.node_id, t.backup) for t in start.targets][:2] == [("d0", False), ("d1", False)]
    cluster.read(start)
    cluster.generate(3)
    assert cluster.pipeline() == (D0, D1)

    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=3)
    assert cluster.dies(PREFILL) == []


def test_a_holder_that_lacks_what_it_should_have_makes_the_prompt_be_read_again():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    cluster.dies(D1)
    failed = AttemptFailed(connection=SPARE, attempt=cluster.attempt, kind="transfer", message="it has no copy")
    commands = cluster.happens(failed) + cluster.passes(0.2, PREFILL, D0, SPARE)
    assert the(StartPrefill, commands).generated == (100, 101, 102, 103)


def test_a_broken_pipeline_waits_a_moment_for_the_death_that_explains_it():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    assert cluster.happens(PipelineBroken(connection=D0, peer=NodeId("d1"), attempts=(cluster.attempt,))) == []
    assert cluster.core.state.nodes.get(D1).state == "suspect"
    cluster.now_s += 0.02
    assert [d.connection for d in all_of(StartDecode, cluster.dies(D1))] == [D0, SPARE]
    assert cluster.request.stats(cluster.now_s).takeovers == 1


def test_a_broken_pipeline_of_what_has_ended_makes_nobody_suspect():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    ended = replace(cluster.attempt, epoch=cluster.attempt.epoch - 1)
    cluster.happens(PipelineBroken(connection=D0, peer=NodeId("d1"), attempts=(ended,)))
    assert cluster.core.state.nodes.get(D1).state == "ready"


def test_a_node_out_of_reach_of_its_peer_is_gone_round():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4, copied=42)
    before = cluster.attempt
    cluster.happens(PipelineBroken(connection=D0, peer=NodeId("d1"), attempts=(before,)))
    commands = cluster.passes(0.2, PREFILL, D0, D1, SPARE)
    assert [d.connection for d in all_of(StartDecode, commands)] == [D0, SPARE]
    assert ReleaseAttempt(connection=D1, attempt=before) in commands
    assert cluster.core.state.nodes.get(D1).state == "ready"


def test_without_copies_a_broken_link_is_tried_again_once_and_then_gone_round():
    cluster = Cluster(PREFILL, D0, D1, hot_copies=False)
    cluster.decode(tokens=4)
    cluster.happens(PipelineBroken(connection=D0, peer=NodeId("d1"), attempts=(cluster.attempt,)))
    decodes = all_of(StartDecode, cluster.passes(0.2, PREFILL, D0, D1))
    assert [(d.connection, d.resume_tokens) for d in decodes] == [(D0, 43), (D1, 43)]
    cluster.happens(PipelineBroken(connection=D0, peer=NodeId("d1"), attempts=(cluster.attempt,)))
    start = the(StartPrefill, cluster.passes(0.3, PREFILL, D0, D1))
    assert {target.node_id for target in start.targets} <= {"d0"}
    assert start.generated == (100, 101, 102, 103)


def test_after_a_failed_transfer_a_way_without_that_link_is_taken():
    """Neither end can tell which of the two is at fault: the reader is avoided as well as the receiver."""
    cluster = Cluster(PREFILL, D0, D1)
    start = cluster.submit()
    failed = AttemptFailed(
        connection=PREFILL, attempt=start.attempt, kind="transfer", message="no progress", peer=NodeId("d0")
    )
    commands = cluster.happens(failed) + cluster.passes(0.2, PREFILL, D0, D1)
    again = the(StartPrefill, commands)
    assert again.connection == D0
    assert {target.node_id for target in again.targets} == {"d0", "d1"}


def test_a_node_throttled_to_a_third_is_drained_and_comes_back():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    steps = 0

    def beats(seconds, step_ms):
        nonlocal steps
        commands = []
        for _ in range(round(seconds / 0.1)):
            steps += 1
            busy = NodeLoad(steps=steps, running=1, decode_step_ms=10.0)
            slow = NodeLoad(steps=steps, running=1, decode_step_ms=step_ms * (1.1 if steps % 2 else 0.9))
            cluster.now_s += 0.1
            for connection, load in ((PREFILL, NodeLoad()), (SPARE, NodeLoad()), (D0, busy), (D1, slow)):
                commands += cluster.happens(HeartbeatReceived(connection=connection, load=load))
            commands += cluster.happens(Tick())
        return commands

    assert not all_of(StartDecode, beats(5.0, 10.0) + beats(0.5, 30.0) + beats(1.0, 10.0))
    assert cluster.core.state.nodes.get(D1).state == "ready"
    assert [d.connection for d in all_of(StartDecode, beats(1.5, 30.0))] == [D0, SPARE]
    assert cluster.core.state.nodes.get(D1).state == "draining"
    assert cluster.request.stats(cluster.now_s).takeovers == 1
    beats(1.5, 10.0)
    assert cluster.core.state.nodes.get(D1).state == "ready"


def test_recovery_is_told_in_parts_that_add_up():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    cluster.passes(0.1, PREFILL, D0, D1, SPARE)
    cluster.now_s += 0.03
    cluster.dies(D1)
    for seconds, connection in ((0.004, SPARE), (0.003, D0)):
        cluster.now_s += seconds
        cluster.happens(AttemptResumed(connection=connection, attempt=cluster.attempt))
    cluster.now_s += 0.013
    cluster.generate(5)
    recovery = cluster.request.stats(cluster.now_s).recovery
    assert (recovery.detect_ms, recovery.fence_ms) == (pytest.approx(30), 0.0)
    assert recovery.restore_ms == pytest.approx(7)
    assert recovery.first_token_ms == pytest.approx(13)
    assert recovery.total_ms == pytest.approx(50)


def test_a_stopped_node_is_dead_in_time_and_its_stage_is_taken_over():
    cluster = Cluster(PREFILL, D0, D1, SPARE, dead_after_s=0.5)
    cluster.decode(tokens=4)
    cluster.passes(0.2, PREFILL, D0, D1, SPARE)
    commands = cluster.passes(0.6, PREFILL, D0, SPARE)
    assert [d.connection for d in all_of(StartDecode, commands)] == [D0, SPARE]
    cluster.generate(5)
    assert 500 <= cluster.request.stats(cluster.now_s).recovery.detect_ms <= 600


def test_a_node_that_comes_back_has_to_let_go_of_what_went_on_without_it():
    cluster = Cluster(PREFILL, D0, D1, SPARE)
    cluster.decode(tokens=4)
    before = cluster.attempt
    cluster.dies(D1)
    held = (HeldKv(attempt=before, layers=BACK, tokens=43),)
    commands = cluster.join(ConnectionId(8), "d1", held=held)
    assert all_of(ReleaseAttempt, commands) == [ReleaseAttempt(connection=ConnectionId(8), attempt=before)]
    cluster.happens(AttemptReleased(connection=ConnectionId(8), attempt=before))
    assert cluster.pipeline() == (D0, SPARE)
    assert cluster.leased(ConnectionId(8)) == []


# The orchestrator dies


def recovered(tokens=5, epoch=3):
    """A cluster whose orchestrator has just started again, with one request in its journal, and its attempt."""
    spec = RequestSpec(request_id=RequestId("r"), prompt=PROMPT, generation=Generation(max_tokens=20))
    cluster = Cluster(first_epoch=100)
    from_journal = RecoveredRequest(spec=spec, tokens=tuple(range(100, 100 + tokens)), nodes=frozenset({"d0", "d1"}))
    cluster.happens(RequestsRecovered(requests=(from_journal,)))
    return cluster, attempt_of("r", epoch)


def attempt_of(request_id, epoch):
    return AttemptId(request_id=RequestId(request_id), epoch=epoch)


def test_epochs_lie_above_all_that_nodes_have_heard_of_whatever_the_clock_says():
    cluster, _ = recovered()
    cluster.join(PREFILL)
    cluster.join(D0, highest_epoch=7000)
    cluster.join(D1, highest_epoch=500)
    cluster.passes(2.0, PREFILL, D0, D1)
    assert cluster.request.epoch > 7000


def test_nodes_are_told_from_which_epoch_on_attempts_are_this_orchestrators():
    def welcome(node, **about):
        [command] = [one for one in cluster.join(node, **about) if isinstance(one, WelcomeNode)]
        welcome = command_from_proto(command_to_proto(command, heartbeat_interval_s=0.1))
        return welcome.incarnation, welcome.first_epoch

    cluster, _ = recovered()
    assert welcome(PREFILL) == (1, 101)
    assert welcome(D0, highest_epoch=7000) == (1, 7001)
    assert welcome(D1) == (1, 7001)
    cluster.passes(2.0, PREFILL, D0, D1)
    assert cluster.request.epoch == 7001
    assert welcome(SPARE, highest_epoch=8000) == (1, 7001)


def test_after_a_restart_a_request_goes_on_where_its_nodes_are():
    cluster, before = recovered()
    cluster.join(PREFILL)
    assert not all_of(StartDecode, cluster.join(D0, held=(HeldKv(attempt=before, layers=FRONT, tokens=46),)))
    decodes = all_of(StartDecode, cluster.join(D1, held=(HeldKv(attempt=before, layers=BACK, tokens=44),)))
    assert [decode.connection for decode in decodes] == [D0, D1]
    assert {(decode.resume_from, decode.resume_tokens) for decode in decodes} == {(before, 44)}
    assert decodes[0].attempt.epoch > 100
    assert the(EmitToken, cluster.generate(6)).token.index == 5
    assert cluster.request.stats(cluster.now_s).takeovers == 1


def test_after_a_restart_copies_stand_in_for_a_node_that_does_not_come_back():
    cluster, before = recovered()
    cluster.join(PREFILL)
    cluster.join(D0, held=(HeldKv(attempt=before, layers=FRONT, tokens=46),))
    parts = tuple(HeldKv(attempt=before, layers=layers, tokens=42) for layers in CUT)
    cluster.join(SPARE, held=parts)
    decodes = all_of(StartDecode, cluster.passes(1.6, PREFILL, D0, SPARE))
    assert [(decode.connection, decode.resume_tokens) for decode in decodes] == [(D0, 42), (SPARE, 42)]
    assert [(copy.layers, copy.holder, copy.tokens) for copy in cluster.request.copies] == [(FRONT, SPARE, 42)]


def test_after_a_restart_with_nothing_held_the_prompt_is_read_again():
    cluster, before = recovered()
    cluster.join(PREFILL)
    cluster.join(D0, held=(HeldKv(attempt=before, layers=FRONT, tokens=46),))
    commands = cluster.join(D1)
    assert ReleaseAttempt(connection=D0, attempt=before) in commands
    assert the(StartPrefill, commands).generated == (100, 101, 102, 103, 104)


def test_what_a_node_was_told_to_release_is_not_gone_on_from():
    """It joined before the journal was read, so nobody seemed to wait for what it held."""
    before = attempt_of("r", 3)
    cluster = Cluster(PREFILL, first_epoch=100)
    parts = tuple(HeldKv(attempt=before, layers=layers, tokens=44) for layers in CUT)
    assert the(ReleaseAttempt, cluster.join(D0, held=parts)).attempt == before
    spec = RequestSpec(request_id=RequestId("r"), prompt=PROMPT, generation=Generation(max_tokens=20))
    from_journal = RecoveredRequest(spec=spec, tokens=(100, 101), nodes=frozenset({"d0"}))
    cluster.happens(RequestsRecovered(requests=(from_journal,)))
    assert not all_of(StartDecode, cluster.join(D1))


def test_a_recovering_node_whose_stream_was_cut_is_asked_for_nothing_that_it_has_to_release():
    cluster, before = recovered()
    held = tuple(HeldKv(attempt=before, layers=layers, tokens=46) for layers in CUT)
    cluster.join(PREFILL)
    cluster.join(D0, held=held)
    cluster.dies(D0)
    assert the(ReleaseAttempt, cluster.join(ConnectionId(7), "d0", held=held)).attempt == before
    assert not all_of(StartDecode, cluster.join(D1))


def test_an_attempt_newer_than_the_journal_knows_is_gone_on_from():
    cluster, old = recovered()
    newer = replace(old, epoch=4)
    cluster.join(PREFILL)
    parts = (HeldKv(attempt=old, layers=FRONT, tokens=46), HeldKv(attempt=newer, layers=FRONT, tokens=44))
    cluster.join(D0, held=parts)
    commands = cluster.join(D1, held=(HeldKv(attempt=newer, layers=BACK, tokens=44),))
    assert {decode.resume_from for decode in all_of(StartDecode, commands)} == {newer}
    assert ReleaseAttempt(connection=D0, attempt=old) in commands


def test_what_the_journal_knows_nothing_of_is_released_at_once():
    cluster = Cluster(PREFILL)
    unknown = attempt_of("other", 7)
    commands = cluster.join(D0, held=(HeldKv(attempt=unknown, layers=FRONT, tokens=46),))
    assert the(ReleaseAttempt, commands).attempt == unknown


def test_a_recovering_request_can_be_cancelled_and_frees_what_is_held():
    cluster, before = recovered()
    cluster.join(D0, held=(HeldKv(attempt=before, layers=FRONT, tokens=46),))
    commands = cluster.happens(RequestEnded(request_id=RequestId("r"), reason="cancelled"))
    assert the(ReleaseAttempt, commands).attempt == before
    assert the(FinishRequest, commands).stats.generated_tokens == 5


# Pure functions


def carrier(number, home=None, *, role="decode", draining=False, carries=CUT):
    return Carrier(
        connection=ConnectionId(number),
        node_id=NodeId(f"n{number}"),
        role=role,
        home=home,
        carries=frozenset(carries),
        draining=draining,
    )


def formed(*carriers):
    return [tuple(stage.connection for stage in pipeline) for pipeline in form_pipelines(carriers, CUT)]


def test_pipelines_are_formed_from_whoever_is_there():
    assert formed(carrier(1, FRONT), carrier(2, BACK), carrier(3, FRONT), carrier(4, BACK)) == [(1, 2), (3, 4)]
    assert formed(carrier(1, FRONT), carrier(2, BACK), carrier(3, FRONT), carrier(4)) == [(1, 2)]
    assert formed(carrier(1, FRONT), carrier(3)) == [(1, 3)]
    assert formed(carrier(1, FRONT)) == [(1, 1)]
    assert formed(carrier(2, BACK), carrier(3, role="prefill")) == [(2, 2)]
    assert formed(carrier(3, role="prefill")) == [(3, 3)]
    assert formed(carrier(3, role="prefill", carries=())) == []
    assert formed(carrier(1, FRONT, carries=[FRONT])) == []
    assert formed(carrier(1, FRONT), carrier(2, BACK, draining=True), carrier(3)) == [(1, 3)]
    assert formed(carrier(1, FRONT, draining=True), carrier(3, role="prefill")) == [(1, 1)]


def test_spares_hold_copies_before_neighbours_before_prefill_nodes():
    nodes = [carrier(1, FRONT), carrier(2, BACK), carrier(3), carrier(4), carrier(5, role="prefill")]

    def holders(number, layers):
        return list(holders_for(Stage(connection=ConnectionId(number), layers=layers), nodes, CUT))

    assert holders(1, FRONT) == [3, 4, 2, 5]
    assert holders(2, BACK) == [4, 3, 1, 5]


@given(st.data())
def test_a_takeover_keeps_every_stage_and_never_counts_more_than_is_held(data):
    nodes = st.integers(1, 4).map(ConnectionId)
    pipeline = tuple(Stage(connection=data.draw(nodes), layers=layers) for layers in CUT)
    copies = tuple(
        Copy(
            layers=stage.layers,
            source=stage.connection,
            reader=PREFILL,
            holder=holder,
            tokens=data.draw(st.integers(0, 60)),
        )
        for stage in pipeline
        for holder in data.draw(st.lists(nodes.filter(lambda n, s=stage: n != s.connection), unique=True, max_size=2))
    )
    lost = data.draw(st.sets(nodes))
    plan = plan_takeover(pipeline, copies, lost, kv_tokens=50, prompt_tokens=40)
    usable = [copy for copy in copies if copy.holder not in lost and copy.tokens >= 40]
    lost_stages = [stage for stage in pipeline if stage.connection in lost]
    if any(all(copy.layers != stage.layers for copy in usable) for stage in lost_stages):
        assert plan is None
        return
    assert [stage.layers for stage in plan.pipeline] == [*CUT]
    assert 40 <= plan.tokens <= 50
    for before, after in zip(pipeline, plan.pipeline, strict=True):
        assert after.connection not in lost
        has = [c.tokens for c in usable if (c.layers, c.holder) == (after.layers, after.connection)]
        assert after == before or max(has) >= plan.tokens
    for copy in plan.copies:
        assert copy.tokens <= plan.tokens
        assert copy.holder not in lost
        assert Stage(connection=copy.source, layers=copy.layers) in plan.pipeline


def test_what_nodes_bring_along_goes_to_who_has_most_of_it():
    def part(number, layers, tokens, home=None):
        return Part(connection=ConnectionId(number), layers=layers, tokens=tokens, home=home)

    whole = Layers(0, 4)
    plan = plan_from_parts(CUT, [part(1, FRONT, 50, FRONT), part(3, whole, 48)], kv_tokens=47, prompt_tokens=40)
    assert [stage.connection for stage in plan.pipeline] == [1, 3]
    assert plan.tokens == 47
    assert plan_from_parts(CUT, [part(1, FRONT, 50)], kv_tokens=47, prompt_tokens=40) is None
    assert plan_from_parts(CUT, [part(1, whole, 39)], kv_tokens=47, prompt_tokens=40) is None
