"""Workloads to simulate: when requests come, and how long they are."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec


class TraceError(ValueError):
    """A trace file cannot be read; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request."""

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
