"""A TCP proxy that misbehaves on demand."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from edgellm.runtime.stages.local import socket_name

Connecting = Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]

Way = Literal["up", "down"]
"""Up is from those who dial to the listener."""


@dataclass
class Proxy:
    """Between those who dial `address` and whoever listens behind it. Any thread may call its methods."""

    target: str
    loop: asyncio.AbstractEventLoop
    address: str = ""
    delay_s: float = 0.0
    """Of every piece, both ways."""
    damage: tuple[bytes, int] | None = None
    """Invert the byte after this pattern, so many times; an empty pattern is found before the first byte of a piece."""
    damaged_way: Way = "up"
    forwarded_bytes: int = 0
    took_steps_locally: bool = False
    _open: dict[Way, asyncio.Event] = field(default_factory=dict)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._open = {"up": asyncio.Event(), "down": asyncio.Event()}
        for way in self._open.values():
            way.set()

    def block(self, *ways: Way) -> None:
        """Keep what is sent these ways, on new connections too, until `heal`: TCP loses nothing."""
        for way in ways:
            self._open[way].clear()

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        self.loop.call_soon_threadsafe(self._abort)

    def heal(self) -> None:
        """Behave again."""
        self.delay_s, self.damage = 0.0, None
        for way in self._open.values():
            self.loop.call_soon_threadsafe(way.set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        await self._serve(reader, writer, asyncio.open_connection(host, int(port)))

    async def serve_steps(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Of the stage exchange, on one host."""
        self.took_steps_locally = True
        await self._serve(reader, writer, asyncio.open_unix_connection(socket_name(self.target)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, there: Connecting) -> None:
        try:
            there_reader, there_writer = await there
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass("up", reader, there_writer))
                group.create_task(self._pass("down", there_reader, writer))
        except* OSError:
            pass
        finally:
            for one in (writer, there_writer):
                one.transport.abort()
            self._writers -= {writer, there_writer}

    async def _pass(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(self.delay_s)
            await self._open[way].wait()
            if way == self.damaged_way:
                data = self._damaged(data)
            self.forwarded_bytes += len(data)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    def _damaged(self, data: bytes) -> bytes:
        if self.damage is None:
            return data
        pattern, times = self.damage
        index = data.find(pattern) + len(pattern)
        if times == 0 or index < len(pattern) or index == len(data):
            return data
        self.damage = pattern, times - 1
        return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]

    def _abort(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()


@asynccontextmanager
async def proxied(target: str, *, steps_locally: bool = False) -> AsyncIterator[Proxy]:
    """A proxy before `target`, host:port.

    steps_locally: who dials it finds the stage exchange as that of a node on this host; else there is none but gRPC's.
    """
    proxy = Proxy(target, asyncio.get_running_loop())
    servers = [await asyncio.start_server(proxy.serve, "127.0.0.1", 0)]
    proxy.address = "{}:{}".format(*servers[0].sockets[0].getsockname())
    if steps_locally:
        servers.append(await asyncio.start_unix_server(proxy.serve_steps, socket_name(proxy.address)))
    try:
        yield proxy
    finally:
        for server in servers:
            server.close()
        proxy.heal()
        proxy.cut()
        for server in servers:
            await server.wait_closed()
