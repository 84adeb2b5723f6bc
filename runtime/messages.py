"""What the orchestrator tells a node and what it answers, as closed unions of frozen values."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.runtime.batching.decode import TokenGenerated
from edgellm.runtime.generation import Generation, SampledToken
from edgellm.runtime.kv.types import Attempt, HeldKv, KvCopy, KvTarget, NodeId, Stage, TransferStats


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The orchestrator accepted this node."""

    incarnation: int
    heartbeat_interval_s: float
    first_epoch: int
    """Attempts below are of orchestrators before this one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
    """Read a prompt; with targets, send its KV there while reading. What a target on this node is to have, stays."""

    attempt: Attempt
    prompt: npt.NDArray[np.int32]
    generated: npt.NDArray[np.int32]
    """Known tokens; if there are any, none is sampled."""
    generation: Generation
    targets: tuple[KvTarget, ...]
    degraded: bool
    transfer_timeout_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Decode:
    """Continue an answer on the KV of its prompt, which is here or still arriving."""

    attempt: Attempt
    prompt: npt.NDArray[np.int32]
    generated: npt.NDArray[np.int32]
    generation: Generation
    kv_timeout_s: float
    stages: tuple[Stage, ...] = ()
    """The pipeline in order; the first batches, the last samples. Empty: this node alone."""
    copies: tuple[KvCopy, ...] = ()
    """To be kept from now on, by whom they name."""
    resume_from: Attempt | None = None
    """KV that is here under this older attempt is this attempt's from now on."""
    resume_tokens: int = 0
    """With `resume_from`: positions of it that count as computed, at least the prompt."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Copies that are here under `resume_from` belong to `attempt` now, cut to `resume_tokens` positions."""

    attempt: Attempt
    resume_from: Attempt
    resume_tokens: int


@dataclass(frozen=True, kw_only=True)
class Protect:
    """Keep these copies from now on, in place of those kept of the same layers."""

    attempt: Attempt
    copies: tuple[KvCopy, ...]


@dataclass(frozen=True, kw_only=True)
class Release:
    """Forget the request up to and including this epoch."""

    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Finish nothing, free everything, exit."""


Command: TypeAlias = Welcome | Prefill | Decode | Hold | Protect | Release | Shutdown


@dataclass(frozen=True, kw_only=True)
class PrefillDone:
    attempt: Attempt
    first_token: SampledToken | None
    logprobs: bool
    """Whether the client asked for them."""
    prefill_ms: float
    """From the first chunk's start to the last chunk's end."""


@dataclass(frozen=True, kw_only=True)
class KvSent:
    attempt: Attempt
    stats: TransferStats


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The outcome of one decode iteration."""

    tokens: tuple[TokenGenerated, ...]
    with_logprob: frozenset[Attempt]


FailureKind: TypeAlias = Literal["engine", "transfer", "capacity", "request", "stale"]


@dataclass(frozen=True, kw_only=True)
class RequestFailed:
    attempt: Attempt
    kind: FailureKind
    message: str
    peer: NodeId | None = None
    """For `transfer`, the node at the other end."""


@dataclass(frozen=True, kw_only=True)
class Released:
    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """KV of the older attempt is this attempt's, and it goes on here."""

    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class PipelineBroken:
    """The next stage cannot be reached. Nothing was dropped: the attempts wait for a release, or a resuming Decode."""

    peer: NodeId
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, kw_only=True)
class KvCopied:
    """How far copies reach that this node holds for others."""

    copies: tuple[HeldKv, ...]


@dataclass(frozen=True, kw_only=True)
class CopyLost:
    """This node stopped keeping a copy of these layers up to date."""

    attempt: Attempt
    holder: NodeId
    first_layer: int
    num_layers: int
    kind: FailureKind
    message: str


Event: TypeAlias = (
    PrefillDone | KvSent | Tokens | RequestFailed | Released | Resumed | PipelineBroken | KvCopied | CopyLost
)
