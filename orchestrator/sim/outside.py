"""Stands in for the world outside of a process: clocks, ids, memory, and gRPC, while it is entered."""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc.aio

from edgellm.orchestrator.sim.channels import SimulatedChannel
from edgellm.orchestrator.sim.loop import SimulatedLoop, current_process
from edgellm.orchestrator.sim.network import LinkModel, Network, Scale
from edgellm.orchestrator.sim.rpc import Listener
from edgellm.orchestrator.sim.servers import SimulatedServer
from edgellm.runtime import server as node_server

EPOCH_UNIX_S = 1_800_000_000.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Outside:
    """Time and the network."""

    loop: SimulatedLoop
    network: Network


@contextmanager
def simulated_outside(seed: int, link: LinkModel, scale: Scale) -> Iterator[Outside]:
    """The program is not changed to be simulated: what it asks the operating system and gRPC for is answered here."""
    loop = SimulatedLoop()  # type: ignore[abstract]  # what no process asks for is not there
    network = Network(loop, random.Random(seed), link, scale)
    listeners: dict[int, Listener] = {}
    resident = vars(node_server)["memory"]()

    def channel(target: str, options: object = None, **_: Any) -> SimulatedChannel:
        return SimulatedChannel(network, listeners, target)

    def server(*_: Any, interceptors: Sequence[Any] = (), **__: Any) -> SimulatedServer:
        return SimulatedServer(loop, network, listeners, interceptors)

    def pid() -> int:
        return current_process().pid

    def host() -> str:
        return current_process().name

    async def dial_on_this_host(*_: Any) -> None:
        """Each process has a host of its own: what nodes of one host tell each other goes over the network."""
        raise ConnectionRefusedError

    async def listen_on_this_host(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(close=lambda: None)

    def unix_s() -> float:
        return EPOCH_UNIX_S + loop.time() + current_process().wall_clock_jump_s

    answers: tuple[tuple[Any, str, object], ...] = (
        (time, "monotonic", loop.time),
        (time, "time", unix_s),
        (os, "getpid", pid),
        (node_server, "host_id", host),
        (node_server, "memory", lambda: resident),
        (loop, "create_unix_connection", dial_on_this_host),
        (loop, "create_unix_server", listen_on_this_host),
        (grpc.aio, "insecure_channel", channel),
        (grpc.aio, "server", server),
    )
    real = [(module, name, getattr(module, name)) for module, name, _ in answers]
    try:
        for module, name, answer in answers:
            setattr(module, name, answer)
        yield Outside(loop=loop, network=network)
    finally:
        for module, name, answer in real:
            setattr(module, name, answer)
