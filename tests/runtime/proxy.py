"""A TCP proxy that misbehaves on demand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Between those who dial `address` and whoever listens behind it."""

    target: str
    address: str = ""
    delay_s: float = 0.0
    """Of every piece, both ways."""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """While clear, nothing comes back to those who dial; what they send still arrives."""
    damage: tuple[bytes, int] | None = None
    """Invert the byte after this pattern, so many times, on its way to the listener."""
    forwarded_bytes: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            there_reader, there_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, there_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, there_writer, self._damaged))
                group.create_task(self._pass(there_reader, writer, self._held_back))
        except* OSError:
            pass
        finally:
            for one in (writer, there_writer):
                one.transport.abort()
            self._writers -= {writer, there_writer}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change) -> None:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(self.delay_s)
            data = await change(data)
            self.forwarded_bytes += len(data)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def _held_back(self, data: bytes) -> bytes:
        await self.is_open.wait()
        return data

    async def _damaged(self, data: bytes) -> bytes:
        if self.damage is None:
            return data
        pattern, times = self.damage
        index = data.find(pattern) + len(pattern)
        if times == 0 or index < len(pattern) or index == len(data):
            return data
        self.damage = pattern, times - 1
        return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy before `target`, host:port."""
    proxy = Proxy(target)
    proxy.is_open.set()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        await server.wait_closed()
