"""What the orchestrator tells a node and what it answers, as closed unions of frozen values."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.runtime.batching.decode import TokenGenerated
from edgellm.runtime.generation import Generation, SampledToken
from edgellm.runtime.kv.types import Attempt, KvTarget, NodeId, TransferStats


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The orchestrator accepted this node."""

    incarnation: int
    heartbeat_interval_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
    """Read a prompt; with targets, send its KV there while reading."""

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


@dataclass(frozen=True, kw_only=True)
class Release:
    """Forget the request up to and including this epoch."""

    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class Shutdown:
    """Finish nothing, free everything, exit."""


Command: TypeAlias = Welcome | Prefill | Decode | Release | Shutdown


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


FailureKind: TypeAlias = Literal["engine", "transfer", "capacity", "request"]


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


Event: TypeAlias = PrefillDone | KvSent | Tokens | RequestFailed | Released
