"""The core under any order of events, from nodes that may say anything at any time."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

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
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    HeartbeatReceived,
    KvSent,
    NodeJoined,
    NodeLost,
    PrefillDone,
    RequestEnded,
    RequestSubmitted,
    Tick,
    TokenGenerated,
)
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    Generation,
    KvTransfer,
    NodeLoad,
    RequestId,
    RequestSpec,
    SampledToken,
)
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.cluster import simulated_config, simulated_profile

LONG_AGO = 1000.0


class AnyOrder(RuleBasedStateMachine):
    connections = Bundle("connections")

    def __init__(self):
        super().__init__()
        self.core = Core(simulated_config(max_attempts=3), DualPool())
        self.now_s = 0.0
        self.last_connection = 0
        self.tokens: Counter[RequestId] = Counter()
        self.open: set[RequestId] = set()
        self.attempts: list[tuple[ConnectionId, AttemptId]] = [(ConnectionId(0), AttemptId(request_id="r", epoch=0))]
        self.dead: set[ConnectionId] = set()

    def handle(self, event):
        for command in self.core.handle(self.now_s, event):
            self.check(command)

    def check(self, command):
        match command:
            case AcceptRequest(request_id=request_id):
                assert request_id not in self.open
                self.open.add(request_id)
                self.tokens[request_id] = 0
            case RejectRequest(request_id=request_id, kind=kind):
                assert kind != "duplicate" or request_id in self.open
            case EmitToken(request_id=request_id, token=token):
                assert request_id in self.open
                assert token.index == self.tokens[request_id]
                self.tokens[request_id] += 1
            case FinishRequest(request_id=request_id, stats=stats):
                assert stats.generated_tokens == self.tokens[request_id]
                self.open.remove(request_id)
            case StartPrefill() | StartDecode() | ReleaseAttempt():
                assert command.connection not in self.dead
                self.attempts.append((command.connection, command.attempt))
            case DropNode(connection=connection) | RefuseNode(connection=connection):
                self.dead.add(connection)

    @rule(
        target=connections, number=st.integers(0, 1), role=st.sampled_from(("prefill", "decode")), pid=st.integers(1, 2)
    )
    def join(self, number, role, pid):
        self.last_connection += 1
        profile = simulated_profile(
            f"{role}{number}", role, device_class="cpu-local", kv_blocks=8, kv_bytes_per_token=64
        )
        connection = ConnectionId(self.last_connection)
        self.handle(NodeJoined(connection=connection, profile=profile))
        return connection

    @rule(connection=connections)
    def lose(self, connection):
        self.dead.add(connection)
        self.handle(NodeLost(connection=connection, reason="test"))

    @rule(connection=connections, speed=st.floats(0, 1e5))
    def beat(self, connection, speed):
        self.handle(HeartbeatReceived(connection=connection, load=NodeLoad(prefill_tokens_per_s=speed)))

    @rule(number=st.integers(0, 5), prompt=st.integers(1, 120), most=st.integers(1, 150), degraded=st.booleans())
    def submit(self, number, prompt, most, degraded):
        spec = RequestSpec(
            request_id=RequestId(f"r{number}"),
            prompt=tuple(range(prompt)),
            generation=Generation(max_tokens=most),
            deadline_s=self.now_s + 5 if number == 0 else None,
            allow_degraded_prefill=degraded,
        )
        self.handle(RequestSubmitted(spec=spec))

    @rule(number=st.integers(0, 5), reason=st.sampled_from(("cancelled", "stop")))
    def end(self, number, reason):
        self.handle(RequestEnded(request_id=RequestId(f"r{number}"), reason=reason))

    @rule(seconds=st.sampled_from((0.01, 0.2, 3.0, 130.0)))
    def wait(self, seconds):
        self.now_s += seconds
        self.handle(Tick())

    @rule(data=st.data(), with_token=st.booleans(), finish=st.sampled_from((None, None, "stop")))
    def prefill_done(self, data, with_token, finish):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        token = SampledToken(index=0, token_id=1, finish=finish) if with_token else None
        self.handle(PrefillDone(connection=connection, attempt=attempt, first_token=token, prefill_ms=1.0))

    @rule(
        data=st.data(), ahead=st.sampled_from((0, 0, 0, -1, 1)), finish=st.sampled_from((None, None, "stop", "length"))
    )
    def token(self, data, ahead, finish):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        index = max(0, self.tokens[attempt.request_id] + ahead)
        token = SampledToken(index=index, token_id=1, finish=finish)
        self.handle(TokenGenerated(connection=connection, attempt=attempt, token=token))

    @rule(data=st.data())
    def kv_sent(self, data):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(KvSent(connection=connection, attempt=attempt, transfer=KvTransfer()))

    @rule(data=st.data(), kind=st.sampled_from(("engine", "transfer", "capacity", "request")))
    def fail(self, data, kind):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(AttemptFailed(connection=connection, attempt=attempt, kind=kind, message="test"))

    @rule(data=st.data())
    def released(self, data):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(AttemptReleased(connection=connection, attempt=attempt))

    @invariant()
    def books_add_up(self):
        self.core.check_integrity()
        assert set(self.core.state.requests) == self.open

    def teardown(self):
        """Whatever happened: when nothing more is heard, every request still ends."""
        for _ in range(10):
            self.now_s += LONG_AGO
            self.handle(Tick())
        assert not self.open


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
