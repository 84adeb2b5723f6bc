"""A core to which stories are told, and one of two stages on two nodes."""

from dataclasses import replace

from edgellm.orchestrator.core.commands import (
    NoteNode,
    NoteRequest,
    NoteTakeover,
    StartDecode,
    StartPrefill,
)
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import (
    AttemptReleased,
    HeartbeatReceived,
    KvCopied,
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
    EngineProfile,
    Generation,
    HeldKv,
    KvTransfer,
    Layers,
    NodeLoad,
    RequestId,
    RequestSpec,
    SampledToken,
)
from edgellm.orchestrator.policies.dual_pool import DualPool
from tests.orchestrator.profiles import simulated_config, simulated_profile

FRONT, BACK = CUT = (Layers(0, 2), Layers(2, 2))
PREFILL, D0, D1, SPARE, D2, D3 = (ConnectionId(number) for number in range(1, 7))
NAMES = {PREFILL: "p", D0: "d0", D1: "d1", SPARE: "spare", D2: "d2", D3: "d3"}
PROMPT = tuple(range(40))


def engine(phase, layers, *, planned):
    return EngineProfile(
        name=f"{phase}-{layers}",
        phase=phase,
        first_layer=layers.first,
        num_layers=layers.count,
        precision="toy",
        max_sequences=8,
        max_seq_len=512,
        planned=planned,
    )


def profile(name, *, blocks=64, prefill_decodes=False, pid=1):
    """`p` reads, `d0` to `d3` were started for the stages in turn, any other is a spare; all have all engines."""
    role = "prefill" if name == "p" else "decode"
    base = simulated_profile(name, role, device_class="cpu-local", kv_blocks=blocks, kv_bytes_per_token=64)
    planned = {"d0": FRONT, "d1": BACK, "d2": FRONT, "d3": BACK}.get(name, FRONT)
    stages = [engine("decode", layers, planned=role == "decode" and layers == planned) for layers in CUT]
    half = engine("prefill", Layers(0, 4), planned=role == "prefill")
    engines = (half, *stages) if role == "decode" or prefill_decodes else (half,)
    return replace(base, engines=engines, pid=pid, spare=name.startswith("spare"))


class CoreStory:
    """A core, its time, and what it commands (without notes)."""

    def __init__(self, config):
        self.core = Core(config, DualPool())
        self.now_s = 0.0

    def happens(self, event):
        commands = self.core.handle(self.now_s, event)
        self.core.check_integrity()
        return [command for command in commands if not isinstance(command, NoteNode | NoteRequest | NoteTakeover)]

    def passes(self, seconds, *beating, load=None, step_s=0.05):
        """Ticks while these nodes send heartbeats."""
        commands = []
        for _ in range(round(seconds / step_s)):
            self.now_s += step_s
            for connection in beating:
                commands += self.happens(HeartbeatReceived(connection=connection, load=load or NodeLoad()))
            commands += self.happens(Tick())
        return commands


class Cluster(CoreStory):
    """A core of two stages, and a request, by `name`, that has been brought to decoding."""

    def __init__(self, *connections, prefill_decodes=False, **bounds):
        super().__init__(simulated_config(stages=CUT, **bounds))
        self.name = RequestId("r")
        for connection in connections:
            self.join(connection, prefill_decodes=prefill_decodes)

    def join(self, connection, name=None, held=(), highest_epoch=0, **fields):
        about = profile(name or NAMES[connection], **fields)
        return self.happens(NodeJoined(connection=connection, profile=about, held=held, highest_epoch=highest_epoch))

    @property
    def request(self):
        return self.core.state.requests[self.name]

    @property
    def attempt(self):
        return self.request.phase.attempt

    def pipeline(self):
        return tuple(stage.connection for stage in self.request.phase.pipeline)

    def submit(self, max_tokens=20):
        spec = RequestSpec(request_id=self.name, prompt=PROMPT, generation=Generation(max_tokens=max_tokens))
        return the(StartPrefill, self.happens(RequestSubmitted(spec=spec)))

    def read(self, start):
        """The prompt is read; returns the decode commands."""
        first = None if start.generated else SampledToken(index=0, token_id=100)
        done = PrefillDone(connection=start.connection, attempt=start.attempt, first_token=first, prefill_ms=1.0)
        commands = self.happens(done)
        self.happens(KvSent(connection=start.connection, attempt=start.attempt, transfer=KvTransfer()))
        if self.core.state.nodes.get(start.connection).leases[start.attempt].kind == "source":
            self.happens(AttemptReleased(connection=start.connection, attempt=start.attempt))
        return all_of(StartDecode, commands)

    def decode(self, tokens=5, copied=None):
        """Submit, read, and generate until the client has `tokens`; all copies reach position `copied`."""
        decodes = self.read(self.submit())
        self.generate(tokens)
        self.copy(len(PROMPT) + tokens - 3 if copied is None else copied)
        return decodes

    def generate(self, until):
        commands = []
        for index in range(len(self.request.tokens), until):
            token = SampledToken(index=index, token_id=100 + index)
            commands += self.happens(TokenGenerated(connection=self.pipeline()[-1], attempt=self.attempt, token=token))
        return commands

    def copy(self, tokens):
        for copy in self.request.copies:
            held = HeldKv(attempt=self.attempt, layers=copy.layers, tokens=tokens)
            self.happens(KvCopied(connection=copy.holder, copies=(held,)))

    def dies(self, connection):
        return self.happens(NodeLost(connection=connection, reason="reset"))

    def leased(self, connection):
        return list(self.core.state.nodes.get(connection).leases)


def all_of(kind, commands):
    return [command for command in commands if isinstance(command, kind)]


def the(kind, commands):
    found = all_of(kind, commands)
    assert len(found) == 1, commands
    return found[0]


def where(stages):
    return [(stage.node_id, stage.layers) for stage in stages]
