"""Clusters and workloads to simulate."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.values import (
    EngineProfile,
    Generation,
    NodeId,
    NodeProfile,
    RequestId,
    RequestSpec,
    Role,
    Sampling,
)

BUNDLE, CONTRACT = "simulated-bundle", "simulated-contract"
LAYERS = 4


class TraceError(ValueError):
    """A trace file cannot be read; the message says where."""


def simulated_config(**bounds: float) -> CoreConfig:
    """For nodes made by `simulated_profile`."""
    return CoreConfig(
        bundle_sha256=BUNDLE,
        kv_contract_sha256=CONTRACT,
        num_layers=LAYERS,
        block_tokens=32,
        **bounds,  # type: ignore[arg-type]
    )


def simulated_profile(
    name: str, role: Role, *, device_class: str, kv_blocks: int, kv_bytes_per_token: int, half_engine: bool = True
) -> NodeProfile:
    """A node of one role; a decode node has the half-precision engine as well where `half_engine`."""
    phases: list[Role] = [role]
    if role == "decode" and half_engine:
        phases.append("prefill")
    return NodeProfile(
        node_id=NodeId(name),
        pid=1,
        role=role,
        device_class=device_class,
        bundle_sha256=BUNDLE,
        kv_contract_sha256=CONTRACT,
        engines=tuple(_engine(phase) for phase in phases),
        kv_blocks=kv_blocks,
        exchange_address=name,
        host_id=name,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def _engine(phase: Role) -> EngineProfile:
    return EngineProfile(
        name=f"{phase}-sim",
        phase=phase,
        first_layer=0,
        num_layers=LAYERS,
        precision="toy",
        max_sequences=64,
        max_seq_len=8192,
    )


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One line of a workload."""

    arrival_s: float
    prompt_tokens: int
    max_tokens: int


def poisson(rng: random.Random, rate: float, count: int, prompt_tokens: int, max_tokens: int) -> Iterator[Arrival]:
    """`count` arrivals at `rate` per second."""
    time_s = 0.0
    for _ in range(count):
        time_s += rng.expovariate(rate)
        yield Arrival(arrival_s=time_s, prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def read_trace(path: Path) -> list[Arrival]:
    """One JSON object per line with the fields of Arrival. Raises TraceError."""
    arrivals = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            arrivals.append(msgspec.json.decode(line, type=Arrival))
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}, line {number}: {error}") from error
    return arrivals


def requests(rng: random.Random, arrivals: Iterable[Arrival]) -> Iterator[tuple[float, RequestSpec]]:
    """Arrival times and requests with random prompts."""
    for number, arrival in enumerate(arrivals):
        spec = RequestSpec(
            request_id=RequestId(f"r{number}"),
            prompt=tuple(rng.randrange(1 << 15) for _ in range(arrival.prompt_tokens)),
            generation=Generation(max_tokens=arrival.max_tokens, sampling=Sampling(seed=number)),
        )
        yield arrival.arrival_s, spec
