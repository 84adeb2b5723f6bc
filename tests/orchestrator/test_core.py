"""Single decisions of the core, told as stories."""

from dataclasses import replace

import pytest

from edgellm.orchestrator.core.commands import (
    AcceptRequest,
    DropNode,
    EmitToken,
    FinishRequest,
    RefuseNode,
    RejectRequest,
    ReleaseAttempt,
    StartDecode,
    StartPrefill,
)
from edgellm.orchestrator.core.config import CoreConfigError
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    HeartbeatReceived,
    KvSent,
    NodeJoined,
    NodeLost,
    PrefillDone,
    RequestSubmitted,
    Tick,
    TokenGenerated,
)
from edgellm.orchestrator.core.values import (
    ConnectionId,
    Generation,
    KvTransfer,
    NodeLoad,
    RequestId,
    RequestSpec,
    SampledToken,
)
from tests.orchestrator.profiles import simulated_config, simulated_profile
from tests.orchestrator.stories import CoreStory, the

P0, P1, D0, D1 = (ConnectionId(number) for number in range(1, 5))
NAMES = {P0: "prefill0", P1: "prefill1", D0: "decode0", D1: "decode1"}


class Story(CoreStory):
    """Of one stage, without copies."""

    def __init__(self, *connections: ConnectionId, kv_blocks: int = 64, half_engine: bool = True, **bounds):
        super().__init__(simulated_config(**{"hot_copies": False, **bounds}))
        for connection in connections:
            name = NAMES[connection]
            profile = simulated_profile(
                name,
                name[:-1],
                device_class="cpu-local",
                kv_blocks=kv_blocks,
                kv_bytes_per_token=64,
                half_engine=half_engine,
            )
            self.happens(NodeJoined(connection=connection, profile=profile))

    def submit(self, name: str = "r", prompt_tokens: int = 10, max_tokens: int = 5, **fields):
        spec = RequestSpec(
            request_id=RequestId(name),
            prompt=tuple(range(prompt_tokens)),
            generation=Generation(max_tokens=max_tokens),
            **fields,
        )
        return self.happens(RequestSubmitted(spec=spec))

    def decoding(self) -> StartDecode:
        """Submit a request and bring it to its decode node."""
        start = the(StartPrefill, self.submit())
        token = SampledToken(index=0, token_id=7)
        done = PrefillDone(connection=start.connection, attempt=start.attempt, first_token=token, prefill_ms=1.0)
        return the(StartDecode, self.happens(done))


def token(start, index: int, finish=None) -> TokenGenerated:
    sampled = SampledToken(index=index, token_id=index, finish=finish)
    return TokenGenerated(connection=start.connection, attempt=start.attempt, token=sampled)


def test_a_request_goes_through():
    story = Story(P0, D0)
    start = the(StartPrefill, story.submit())
    assert (start.connection, [target.node_id for target in start.targets]) == (P0, ["decode0"])
    first = SampledToken(index=0, token_id=7)
    commands = story.happens(PrefillDone(connection=P0, attempt=start.attempt, first_token=first, prefill_ms=3.0))
    assert the(EmitToken, commands).token == first
    decode = the(StartDecode, commands)
    assert (decode.connection, decode.generated) == (D0, (7,))
    story.happens(KvSent(connection=P0, attempt=start.attempt, transfer=KvTransfer(transport="shm", bytes=9)))
    assert start.attempt in story.core.state.nodes.get(P0).leases, "copies may still be on their way"
    story.happens(AttemptReleased(connection=P0, attempt=start.attempt))
    assert not story.core.state.nodes.get(P0).leases
    for index in (1, 2, 3):
        story.happens(token(decode, index))
    finish = the(FinishRequest, story.happens(token(decode, 4, finish="length")))
    assert (finish.reason, finish.stats.generated_tokens, finish.stats.kv.bytes) == ("length", 5, 9)
    assert not any(node.leases for node in story.core.state.nodes)


def test_the_death_of_a_decode_node_replays_what_the_client_has():
    story = Story(P0, D0, D1)
    decode = story.decoding()
    story.happens(token(decode, 1))
    commands = story.happens(NodeLost(connection=decode.connection, reason="gone"))
    assert the(ReleaseAttempt, commands).connection == P0
    start = the(StartPrefill, commands)
    assert start.generated == (7, 1)
    assert start.attempt.epoch > decode.attempt.epoch
    assert story.happens(token(decode, 2)) == []
    again = the(
        StartDecode,
        story.happens(PrefillDone(connection=P0, attempt=start.attempt, first_token=None, prefill_ms=1.0)),
    )
    assert (again.connection, again.generated) == ({D0: D1, D1: D0}[decode.connection], (7, 1))


def test_the_death_of_a_prefill_node_matters_only_until_its_kv_has_arrived():
    story = Story(P0, P1, D0)
    decode = story.decoding()
    source = story.core.state.requests[RequestId("r")].phase.kv_source
    story.happens(token(decode, 1))
    assert story.happens(NodeLost(connection=source, reason="gone")) == []

    story = Story(P0, P1, D0)
    decode = story.decoding()
    source = story.core.state.requests[RequestId("r")].phase.kv_source
    commands = story.happens(NodeLost(connection=source, reason="gone"))
    assert the(ReleaseAttempt, commands).connection == D0
    assert the(StartPrefill, commands).generated == (7,)


def test_a_reset_stream_is_death_at_once_and_silence_is_death_in_time():
    story = Story(P0, D0, dead_after_s=2.0)
    assert story.passes(0.4, P0) == []
    assert [node.state for node in story.core.state.nodes] == ["ready", "suspect"]
    assert the(DropNode, story.passes(2.0, P0)).connection == D0
    story.happens(NodeLost(connection=P0, reason="reset"))
    assert [node.state for node in story.core.state.nodes] == ["dead", "dead"]


def test_a_suspect_gets_no_new_work_until_it_beats_again():
    story = Story(P0, D0)
    story.passes(0.5, P0)
    assert not [c for c in story.submit() if isinstance(c, StartPrefill)]
    commands = story.happens(HeartbeatReceived(connection=D0, load=NodeLoad()))
    assert the(StartPrefill, commands).connection == P0


def test_nodes_are_not_blamed_when_time_stood_still_here():
    story = Story(P0, D0)
    story.passes(0.2, P0, D0)
    story.now_s += 60.0
    assert story.happens(Tick()) == []
    assert [node.state for node in story.core.state.nodes] == ["ready", "ready"]
    assert len([c for c in story.passes(6.0) if isinstance(c, DropNode)]) == 2


def test_what_can_never_fit_is_refused_with_the_arithmetic():
    story = Story(P0, D0, kv_blocks=8)
    rejection = the(RejectRequest, story.submit(prompt_tokens=200, max_tokens=100))
    assert rejection.kind == "impossible"
    assert "200 prompt tokens + 100 to generate need 10 KV blocks" in rejection.message
    assert "the largest decode node has 8 (256 tokens)" in rejection.message


def test_a_full_queue_rejects_with_a_hint():
    story = Story(max_waiting=2)
    for name in "ab":
        story.submit(name)
    rejection = the(RejectRequest, story.submit("c", prompt_tokens=1000))
    assert (rejection.kind, rejection.retry_after_ms >= 100) == ("overloaded", True)


def test_a_hint_stays_within_a_minute_however_slow_a_node_says_it_is():
    story = Story(P0, D0, max_waiting=2)
    load = NodeLoad(prefill_tokens_per_s=5e-324)
    story.happens(HeartbeatReceived(connection=P0, load=load))
    for name in "abcdefgh":
        story.submit(name, prompt_tokens=1000)
    rejection = the(RejectRequest, story.submit("i", prompt_tokens=1000))
    assert (rejection.kind, rejection.retry_after_ms) == ("overloaded", 60_000)


def test_a_deadline_that_cannot_be_met_is_refused_before_anything_is_spent():
    story = Story(P0, D0)
    assert the(StartPrefill, story.submit("a", prompt_tokens=500, deadline_s=0.1))
    story.happens(HeartbeatReceived(connection=P0, load=NodeLoad(prefill_tokens_per_s=1000.0)))
    rejection = the(RejectRequest, story.submit("b", prompt_tokens=500, deadline_s=0.1))
    assert rejection.kind == "overloaded"
    assert "takes 500 ms at 1000 tokens/s, and the deadline is in 100 ms" in rejection.message
    assert the(StartPrefill, story.submit("c", prompt_tokens=50, deadline_s=0.1))


def test_only_prompts_with_an_earlier_deadline_are_ahead():
    story = Story(P0, D0, kv_blocks=1024, half_engine=False, max_waiting=10)
    story.submit("reading", prompt_tokens=4096)
    story.happens(HeartbeatReceived(connection=P0, load=NodeLoad(prefill_tokens_per_s=1000.0)))
    story.submit("patient", prompt_tokens=1900)
    story.submit("later", prompt_tokens=1900, deadline_s=9.0)
    assert the(AcceptRequest, story.submit("urgent", prompt_tokens=500, deadline_s=1.0))
    assert {request.spec.request_id for request in story.core.state.waiting()} == {"patient", "later", "urgent"}
    rejection = the(RejectRequest, story.submit("late", prompt_tokens=1000, deadline_s=1.1))
    assert "500 prompt tokens wait ahead of 1000, which takes 1500 ms" in rejection.message


def test_a_node_id_is_in_use_by_one_process_of_one_host():
    story = Story(P0)
    profile = story.core.state.nodes.get(P0).profile
    again = replace(profile, host_id="other container")
    refused = the(RefuseNode, story.happens(NodeJoined(connection=P1, profile=again)))
    assert "node id prefill0 is in use" in refused.reason
    assert not story.core.state.nodes.get(P1)


def test_a_failing_node_is_avoided_and_attempts_are_bounded():
    story = Story(P0, P1, D0, max_attempts=3)
    start = the(StartPrefill, story.submit())
    used = []
    for _ in range(3):
        used.append(start.connection)
        failed = AttemptFailed(connection=start.connection, attempt=start.attempt, kind="engine", message="broken")
        commands = story.happens(failed) + story.passes(0.5, P0, P1, D0)
        starts = [command for command in commands if isinstance(command, StartPrefill)]
        start = starts[0] if starts else start
    assert used[0] != used[1]
    finish = the(FinishRequest, commands)
    assert (finish.reason, finish.message) == ("error", "gave up after 3 attempts: broken")


def test_a_request_that_is_wrong_is_not_tried_again():
    story = Story(P0, D0)
    start = the(StartPrefill, story.submit())
    failed = AttemptFailed(connection=P0, attempt=start.attempt, kind="request", message="bad token")
    finish = the(FinishRequest, story.happens(failed))
    assert (finish.reason, finish.message) == ("error", "bad token")


def test_a_release_that_nobody_answers_is_the_end_of_the_node():
    story = Story(P0, D0, release_timeout_s=3.0)
    story.submit(deadline_s=1.0)
    commands = story.passes(5.0, P0, D0)
    assert the(FinishRequest, commands).reason == "deadline"
    assert {command.connection for command in commands if isinstance(command, DropNode)} == {P0, D0}


def test_waiting_in_vain_ends_with_the_reason():
    story = Story(P0, placement_timeout_s=1.0)
    story.submit()
    assert "no decode node is ready" in the(FinishRequest, story.passes(1.5, P0)).message


def test_bounds_that_make_no_sense_are_refused():
    with pytest.raises(CoreConfigError, match="suspect_after_s"):
        simulated_config(suspect_after_s=9.0)
