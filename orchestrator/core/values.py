"""The values that events, commands and policies are made of. All frozen; nothing here knows about the wire."""

from dataclasses import dataclass
from typing import Literal, NewType, TypeAlias

NodeId = NewType("NodeId", str)
RequestId = NewType("RequestId", str)
ConnectionId = NewType("ConnectionId", int)
"""One process of a node, from its hello to its loss: a node that comes back has another connection."""

Role: TypeAlias = Literal["prefill", "decode"]
NodeState: TypeAlias = Literal["ready", "suspect", "draining", "dead"]
"""`draining`: alive, but far slower than usual: gets nothing new, and what it has is moved."""
PrefillPath: TypeAlias = Literal["remote", "local", "degraded"]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline", "error"]
FailureKind: TypeAlias = Literal["engine", "transfer", "capacity", "request", "stale"]
"""`transfer`: what was sent did not arrive. `stale`: it did, where the attempt is not any more, or not yet."""


@dataclass(frozen=True, kw_only=True)
class AttemptId:
    """One attempt at one request. Epochs rise over the whole cluster, so that a reused request id is safe as well."""

    request_id: RequestId
    epoch: int


@dataclass(frozen=True, order=True)
class Layers:
    """A range of a model's layers."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """The layer after the last."""
        return self.first + self.count

    def __contains__(self, other: "Layers") -> bool:
        return self.first <= other.first and other.end <= self.end

    def __str__(self) -> str:
        return f"{self.first}-{self.end - 1}"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Resolved sampling values; `temperature` 0 is greedy, `top_k` 0 is off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an answer is generated."""

    max_tokens: int
    sampling: Sampling = Sampling()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """What a client asked for, after tokenisation and validation."""

    request_id: RequestId
    prompt: tuple[int, ...]
    generation: Generation
    deadline_s: float | None = None
    """On the clock of `handle`."""
    allow_degraded_prefill: bool = False


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """Token number `index` of an answer; `finish` is set where it ends the request."""

    index: int
    token_id: int
    logprob: float | None = None
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineProfile:
    """One engine a node has loaded. `phase` prefill is half precision."""

    name: str
    phase: Role
    first_layer: int
    num_layers: int
    precision: str
    max_sequences: int
    max_seq_len: int
    planned: bool = False
    """The engine this node was started for; the others are there in case a device dies."""

    @property
    def layers(self) -> Layers:
        return Layers(self.first_layer, self.num_layers)


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """What a node said of itself in its hello."""

    node_id: NodeId
    pid: int
    role: Role
    device_class: str
    bundle_sha256: str
    kv_contract_sha256: str
    engines: tuple[EngineProfile, ...]
    kv_blocks: int
    exchange_address: str
    host_id: str
    kv_bytes_per_token: int
    spare: bool = False
    """A decode node that takes no requests of its own: it holds copies, and takes over."""


@dataclass(frozen=True, kw_only=True)
class HeldKv:
    """KV on a node: the first `tokens` positions of a range of layers."""

    attempt: AttemptId
    layers: Layers
    tokens: int


@dataclass(frozen=True, kw_only=True)
class NodeLoad:
    """One heartbeat. The averages are 0 until measured."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    rss_bytes: int = 0
    rss_shared_bytes: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KvTransfer:
    """How a prompt's KV travelled; `transport` is empty where nothing was sent."""

    transport: str = ""
    codec: str = ""
    chunks: int = 0
    bytes: int = 0
    hidden_ms: float = 0.0
    exposed_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class KvTarget:
    """A node that KV is sent to, and the layers it wants."""

    node_id: NodeId
    address: str
    host_id: str
    layers: Layers
    backup: bool = False
    """Holds a copy: whatever happens to it costs protection, never the request."""


@dataclass(frozen=True, kw_only=True)
class StageAddress:
    """One part of a pipeline as its nodes see it: who carries these layers, and where."""

    node_id: NodeId
    address: str
    host_id: str
    layers: Layers


@dataclass(frozen=True, kw_only=True)
class KvCopy:
    """`source` keeps a copy of its KV of `target.layers` on `target`, from position `from_token` on."""

    source: NodeId
    target: KvTarget
    from_token: int


@dataclass(frozen=True, kw_only=True)
class RecoveredRequest:
    """A request that was under way when an earlier orchestrator ended, as its journal has it."""

    spec: RequestSpec
    tokens: tuple[int, ...]
    nodes: frozenset[NodeId] = frozenset()
    """Those that carried its stages, as far as the journal knows: once they are back, nobody else is waited for."""


@dataclass(frozen=True, kw_only=True)
class RecoveryStats:
    """Pauses caused by failing devices, summed over a request; milliseconds."""

    total_ms: float = 0.0
    detect_ms: float = 0.0
    """From the last sign of life to the decision that the device is lost."""
    fence_ms: float = 0.0
    """From the decision to the commands; where there is no place to go on, the time until there is one."""
    restore_ms: float = 0.0
    """Until KV is where it is needed: the prompt was read again, or every node of the pipeline has taken over its."""
    first_token_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RequestStats:
    """What is told about a request at its end; times in milliseconds on the clock of `handle`."""

    prompt_tokens: int
    generated_tokens: int
    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    tpot_ms: float
    """Mean over the tokens after the first."""
    total_ms: float
    prefill_path: PrefillPath | None
    kv: KvTransfer
    takeovers: int
    """How often a device failed under it and its work was taken up elsewhere."""
    recovery: RecoveryStats
