"""The core under any order of events, from nodes that may say anything at any time."""

from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from edgellm.orchestrator.core.commands import (
    AcceptRequest,
    DropNode,
    EmitToken,
    FinishRequest,
    HoldCopies,
    ProtectAttempt,
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
    AttemptResumed,
    CopyLost,
    HeartbeatReceived,
    KvCopied,
    KvSent,
    NodeJoined,
    NodeLost,
    PipelineBroken,
    PrefillDone,
    RequestEnded,
    RequestsRecovered,
    RequestSubmitted,
    Tick,
    TokenGenerated,
)
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    EngineProfile,
    Generation,
    HeldKv,
    KvTransfer,
    Layers,
    NodeId,
    NodeLoad,
    RecoveredRequest,
    RequestId,
    RequestSpec,
    SampledToken,
)
from edgellm.orchestrator.policies.dual_pool import DualPool
from tests.orchestrator.profiles import simulated_config, simulated_profile

LONG_AGO = 1000.0
NAMES = ("prefill0", "prefill1", "decode0", "decode1", "spare0")
KINDS = ("engine", "transfer", "capacity", "request", "stale")
WHOLE, HALVES = (Layers(0, 4),), (Layers(0, 2), Layers(2, 2))


class Holdings:
    """What nodes hold, if they do what they are told and everything they send arrives: the most there can be."""

    def __init__(self):
        self.by_node: dict[NodeId, set[tuple[AttemptId, Layers]]] = {}

    def hold(self, name, attempt, layers):
        self.by_node.setdefault(name, set()).add((attempt, layers))

    def rename(self, name, before, after):
        held = self.by_node.setdefault(name, set())
        for attempt, layers in list(held):
            if attempt == before:
                held.add((after, layers))

    def release(self, name, released):
        kept = {(a, ls) for a, ls in self.by_node.get(name, set()) if a.request_id != released.request_id}
        newer = {(a, ls) for a, ls in self.by_node.get(name, set()) - kept if a.epoch > released.epoch}
        self.by_node[name] = kept | newer


class AnyOrder(RuleBasedStateMachine):
    connections = Bundle("connections")
    cut = WHOLE

    def __init__(self):
        super().__init__()
        self.core = Core(simulated_config(max_attempts=3, stages=self.cut), DualPool())
        self.now_s = 0.0
        self.last_connection = 0
        self.tokens: Counter[RequestId] = Counter()
        self.open: set[RequestId] = set()
        self.prompts: dict[RequestId, int] = {}
        self.attempts: list[tuple[ConnectionId, AttemptId]] = [(ConnectionId(0), AttemptId(request_id="r", epoch=0))]
        self.dead: set[ConnectionId] = set()
        self.names: dict[ConnectionId, NodeId] = {}
        self.holdings = Holdings()

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
            case StartPrefill() | StartDecode() | HoldCopies() | ProtectAttempt() | ReleaseAttempt():
                assert command.connection not in self.dead
                self.attempts.append((command.connection, command.attempt))
                self.check_kv(self.names[command.connection], command)
            case DropNode(connection=connection) | RefuseNode(connection=connection):
                self.dead.add(connection)

    def check_kv(self, name, command):
        """Nobody is told to go on from what he cannot have."""
        match command:
            case StartPrefill(targets=targets, attempt=attempt):
                for target in targets:
                    self.holdings.hold(target.node_id, attempt, target.layers)
                if not targets:
                    for layers in self.cut:
                        self.holdings.hold(name, attempt, layers)
            case StartDecode():
                self.check_decode(name, command)
            case HoldCopies(resume_from=before, attempt=after):
                self.holdings.rename(name, before, after)
            case ProtectAttempt(attempt=attempt, copies=copies):
                for copy in copies:
                    assert (attempt, copy.target.layers) in self.holdings.by_node[copy.source]
                    self.holdings.hold(copy.target.node_id, attempt, copy.target.layers)
            case ReleaseAttempt(attempt=attempt):
                self.holdings.release(name, attempt)

    def check_decode(self, name, command):
        prompt_tokens, known = len(command.prompt), len(command.generated)
        assert [stage.layers for stage in command.stages] == [*self.cut]
        if command.resume_from is not None:
            assert prompt_tokens <= command.resume_tokens <= prompt_tokens + known - 1
            self.holdings.rename(name, command.resume_from, command.attempt)
        for stage in command.stages:
            if stage.node_id == name:
                assert (command.attempt, stage.layers) in self.holdings.by_node[name]
        for copy in command.copies:
            assert copy.source != copy.target.node_id
            self.holdings.hold(copy.target.node_id, command.attempt, copy.target.layers)

    def any_layers(self, data):
        return data.draw(st.sampled_from((*self.cut, WHOLE[0])))

    @rule(target=connections, name=st.sampled_from(NAMES), pid=st.integers(1, 2), data=st.data())
    def join(self, name, pid, data):
        self.last_connection += 1
        connection = ConnectionId(self.last_connection)
        self.names[connection] = NodeId(name)
        before, self.holdings.by_node[name] = self.holdings.by_node.get(name, set()), set()
        held = []
        if data.draw(st.booleans()):
            _, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
            held = [HeldKv(attempt=attempt, layers=self.any_layers(data), tokens=data.draw(st.integers(0, 200)))]
            for layers in self.cut:
                if layers in held[0].layers:
                    self.holdings.hold(name, attempt, layers)
        self.handle(NodeJoined(connection=connection, profile=self.profile(name, pid), held=tuple(held)))
        if connection in self.dead:
            self.holdings.by_node[name] = before
        return connection

    def profile(self, name, pid):
        role = "prefill" if name.startswith("prefill") else "decode"
        base = simulated_profile(name, role, device_class="cpu-local", kv_blocks=8, kv_bytes_per_token=64)
        planned = self.cut[int(name[-1]) % len(self.cut)]
        stages = [
            EngineProfile(
                name=f"decode-{layers}",
                phase="decode",
                first_layer=layers.first,
                num_layers=layers.count,
                precision="toy",
                max_sequences=8,
                max_seq_len=8192,
                planned=role == "decode" and layers == planned,
            )
            for layers in self.cut
        ]
        half = [engine for engine in base.engines if engine.phase == "prefill"]
        return replace(base, engines=(*half, *stages), pid=pid, spare=name.startswith("spare"))

    @rule(number=st.integers(0, 5), prompt=st.integers(1, 100), known=st.integers(0, 9))
    def recover(self, number, prompt, known):
        """An earlier orchestrator's journal; only the first event could be one in earnest, the core does not mind."""
        request_id = RequestId(f"r{number}")
        if request_id in self.open:
            return
        spec = RequestSpec(
            request_id=request_id, prompt=tuple(range(prompt)), generation=Generation(max_tokens=10 + known)
        )
        self.open.add(request_id)
        self.tokens[request_id] = known
        nodes = frozenset({NodeId("decode0")}) if known % 2 else frozenset()
        recovered = RecoveredRequest(spec=spec, tokens=tuple(range(known)), nodes=nodes)
        self.handle(RequestsRecovered(requests=(recovered,)))

    @rule(connection=connections, data=st.data(), tokens=st.integers(0, 200))
    def copied(self, connection, data, tokens):
        _, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        copy = HeldKv(attempt=attempt, layers=self.any_layers(data), tokens=tokens)
        self.handle(KvCopied(connection=connection, copies=(copy,)))

    @rule(connection=connections, data=st.data(), holder=st.sampled_from(NAMES), kind=st.sampled_from(KINDS))
    def copy_lost(self, connection, data, holder, kind):
        _, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        layers = self.any_layers(data)
        self.handle(
            CopyLost(
                connection=connection,
                attempt=attempt,
                holder=NodeId(holder),
                layers=layers,
                kind=kind,
                message="test",
            )
        )

    @rule(connection=connections, data=st.data(), peer=st.sampled_from(NAMES))
    def broken(self, connection, data, peer):
        _, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(PipelineBroken(connection=connection, peer=NodeId(peer), attempts=(attempt,)))

    @rule(data=st.data())
    def goes_well(self, data):
        """What an attempt is most likely to see next, so that some come far: random events alone seldom decode."""
        for request in list(self.core.state.requests.values()):
            phase = request.phase
            match type(phase).__name__:
                case "Prefilling":
                    token = None if request.tokens else SampledToken(index=0, token_id=1)
                    self.handle(
                        PrefillDone(connection=phase.prefill, attempt=phase.attempt, first_token=token, prefill_ms=1.0)
                    )
                case "Decoding":
                    for copy in request.copies:
                        tokens = len(request.spec.prompt) + data.draw(st.integers(-1, len(request.tokens)))
                        held = HeldKv(attempt=phase.attempt, layers=copy.layers, tokens=tokens)
                        self.handle(KvCopied(connection=copy.holder, copies=(held,)))
                    if self.core.state.requests.get(request.id) is request and request.phase is phase:
                        token = SampledToken(index=len(request.tokens), token_id=1)
                        last = phase.pipeline[-1].connection
                        self.handle(TokenGenerated(connection=last, attempt=phase.attempt, token=token))

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

    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def fail(self, data, kind):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(AttemptFailed(connection=connection, attempt=attempt, kind=kind, message="test"))

    @rule(data=st.data())
    def released(self, data):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(AttemptReleased(connection=connection, attempt=attempt))

    @rule(data=st.data())
    def resumed(self, data):
        connection, attempt = data.draw(st.sampled_from(self.attempts[-6:]))
        self.handle(AttemptResumed(connection=connection, attempt=attempt))

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


class AnyOrderInStages(AnyOrder):
    cut = HALVES


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestAnyOrderInStages = AnyOrderInStages.TestCase
TestAnyOrderInStages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
