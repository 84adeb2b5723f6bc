"""The simulated network: it delays, holds up, loses, doubles, swaps and damages messages, and breaks connections."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

from edgellm.orchestrator.sim.loop import KERNEL, Process, SimulatedLoop

FIRST_PORT: Final = 40_000
_HEADER_BYTES: Final = 64
_SMALL_BYTES: Final = 4096
"""Messages up to this size share a link with larger ones, but do not wait behind them."""
_KV_METHODS: Final = "/edgellm.v1.KvExchange/"
_STAGE_METHODS: Final = "/edgellm.v1.StageExchange/"
_DAMAGED_STAGE_SHARE: Final = 0.1
"""So much rarer is damage between stages than to KV: each time breaks the stream, where KV only comes again."""

Mishap: TypeAlias = Literal["drop", "duplicate", "reorder", "corrupt"]


@dataclass(frozen=True, kw_only=True)
class LinkModel:
    """The first byte after `latency_s`, then `bytes_per_s`, which all that a process sends shares."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, payload_bytes: float) -> float:
        return self.latency_s + payload_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Scale:
    """By how much the modelled model's payloads are larger than the toy model's."""

    kv: float = 1.0
    hidden: float = 1.0

    def of(self, method: str) -> float:
        """For the messages of an RPC method."""
        if method.startswith(_KV_METHODS):
            return self.kv
        return self.hidden if method.startswith(_STAGE_METHODS) else 1.0


@dataclass(kw_only=True, eq=False)
class Lane:
    """One direction of one stream, which keeps the order."""

    source: str
    target: str
    last_s: float = 0.0


class Connection(Protocol):
    """Something that the network can break."""

    client: Process
    server: Process | None
    """None until it got there."""

    def client_reset(self) -> None:
        """The client finds that the server is gone."""

    def server_reset(self) -> None:
        """The server finds that the client is gone."""


@dataclass(kw_only=True)
class Trouble:
    """What is wrong with the network at the moment, by names of processes."""

    blocked: set[tuple[str, str]] = field(default_factory=set)
    """(from, to): what is sent arrives when this is over, as over TCP."""
    extra_delay_s: dict[str, float] = field(default_factory=dict)
    bandwidth_share: dict[str, float] = field(default_factory=dict)
    mishaps: dict[str, tuple[Mishap, float]] = field(default_factory=dict)
    """What happens to messages that the process sends, and how often."""


class Network:
    """Between processes that all live at one address, each with a port of its own, also after it was restarted.

    What is carried arrives by no process's doing: the messages of a paused one pile up in its buffers.
    """

    def __init__(self, loop: SimulatedLoop, rng: random.Random, link: LinkModel, scale: Scale) -> None:
        self.loop = loop
        self.link = link
        self.scale = scale
        self.trouble = Trouble()
        self.connections: dict[Connection, None] = {}
        self._rng = rng
        self._ports: dict[str, int] = {}
        self._held_up: defaultdict[tuple[str, str], list[Callable[[], None]]] = defaultdict(list)
        self._sending_until_s: defaultdict[str, float] = defaultdict(float)
        self._closed = False

    def port_of(self, name: str) -> int:
        """Where a process of this name listens."""
        return self._ports.setdefault(name, FIRST_PORT + len(self._ports))

    def name_at(self, port: int) -> str:
        return next((name for name, known in self._ports.items() if known == port), f"port {port}")

    def mishap(self, source: str, method: str) -> Mishap | None:
        """What happens to the next message from there, which is one of this RPC method."""
        mishap, chance = self.trouble.mishaps.get(source, (None, 0.0))
        if mishap == "corrupt" and method.startswith(_STAGE_METHODS):
            chance *= _DAMAGED_STAGE_SHARE
        return mishap if mishap is not None and self._rng.random() < chance else None

    def send(self, lane: Lane, payload_bytes: float, deliver: Callable[[], None], *, overtakes: bool = False) -> float:
        """`deliver` is called when the message is there. Returns the time at which it has left the sender.

        One that `overtakes` is taken out of the order of its lane.
        """
        now_s = self.loop.time()
        if self._closed:
            return now_s
        speed = self.link.bytes_per_s * self.trouble.bandwidth_share.get(lane.source, 1.0)
        left_s = now_s + (payload_bytes + _HEADER_BYTES) / speed
        if payload_bytes > _SMALL_BYTES:
            left_s = max(left_s, self._sending_until_s[lane.source] + payload_bytes / speed)
            self._sending_until_s[lane.source] = left_s
        delay_s = self.link.latency_s * self._rng.uniform(0.5, 2.0) * (5.0 if overtakes else 1.0)
        arrival_s = left_s + delay_s + self.trouble.extra_delay_s.get(lane.source, 0.0)
        if not overtakes:
            arrival_s = lane.last_s = max(lane.last_s, arrival_s)
        self.loop.call_at(arrival_s, self._arrive, lane, deliver, context=KERNEL)
        return left_s

    def heal(self, source: str, target: str) -> None:
        """What was held up between the two arrives now."""
        self.trouble.blocked.discard((source, target))
        for deliver in self._held_up.pop((source, target), []):
            self.loop.call_soon(deliver, context=KERNEL)

    def cut(self, one: str, other: str) -> None:
        """Break every connection between two processes; what is under way is lost."""
        for connection in list(self.connections):
            if connection.server is not None and {connection.client.name, connection.server.name} == {one, other}:
                del self.connections[connection]
                connection.client_reset()
                connection.server_reset()

    def process_died(self, process: Process) -> None:
        """Its kernel resets all its connections; what it had sent before still arrives."""
        for connection in list(self.connections):
            client, server = connection.client, connection.server
            if client is process:
                del self.connections[connection]
                self._reset(process.name, server.name if server is not None else "", connection.server_reset)
            elif server is process:
                del self.connections[connection]
                self._reset(process.name, client.name, connection.client_reset)

    def close(self) -> None:
        """From now on nothing is carried."""
        self._closed = True

    def _reset(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        after_all_else_s = max(self.loop.time(), self._sending_until_s[source]) + 2 * self.link.latency_s
        self.send(Lane(source=source, target=target, last_s=after_all_else_s), 0, deliver)

    def _arrive(self, lane: Lane, deliver: Callable[[], None]) -> None:
        key = (lane.source, lane.target)
        if key in self.trouble.blocked:
            self._held_up[key].append(lambda: self._arrive(lane, deliver))
        elif not self._closed:
            deliver()
