"""Handshaken connections to the nodes that take KV."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias
from weakref import WeakValueDictionary

import grpc.aio

from edgellm.engines.kv import KvContract
from edgellm.runtime.kv.sessions import session_name
from edgellm.runtime.kv.types import KvTarget, NodeId
from edgellm.runtime.rpc import kv_pb2, kv_pb2_grpc
from edgellm.runtime.transports.base import Outgoing
from edgellm.runtime.transports.grpc import GrpcOutgoing
from edgellm.runtime.transports.shm import ShmOutgoing

MAX_MESSAGE_BYTES: Final = 64 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
)
"""Of both ends. A connection that does not come about within 2 s is given up; gRPC names that time so. One on which
nothing comes back is broken within 2.5 s, as pings are sent once a second at most: where packets vanish, be it
in one direction only, nobody else would tell. The last two options allow the pings."""
_SPEED_WEIGHT: Final = 0.3
"""Of the newest transfer in the moving average of a link's speed."""

_Key: TypeAlias = tuple[NodeId, str]
_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class KvLink:
    """One node, as this one reaches it."""

    channel: grpc.aio.Channel
    outgoing: Outgoing
    session: str
    """Names the handshake in a Push stream's metadata."""
    codecs: tuple[str, ...]
    chunk_bytes: int
    bytes_per_s: float | None = None
    """Moving average over transfers; None until measured."""
    users: int = 0
    broken: bool = False

    @property
    def stub(self) -> "kv_pb2_grpc.KvExchangeAsyncStub":
        return kv_pb2_grpc.KvExchangeStub(self.channel)

    def observe(self, sent_bytes: int, seconds: float) -> None:
        """Take a finished transfer into the moving average."""
        if seconds > 0:
            speed = sent_bytes / seconds
            old = speed if self.bytes_per_s is None else self.bytes_per_s
            self.bytes_per_s = old + _SPEED_WEIGHT * (speed - old)


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """What this node offers to receivers."""

    node_id: NodeId
    host_id: str
    ring_bytes: int = 32 << 20
    """Shared memory per receiver on the same host; pages are taken when first used."""
    allow_shm: bool = True


class KvLinks:
    """One link per receiver, made when first needed and again after it broke, or after its node came back elsewhere."""

    def __init__(self, config: LinkConfig, contract: KvContract) -> None:
        self._config = config
        self._contract = contract
        self._links: dict[_Key, KvLink] = {}
        self._connecting: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def use(self, target: KvTarget) -> AsyncIterator[KvLink]:
        """A link for one transfer. If gRPC fails under it, later transfers shake hands again.

        Raises grpc.aio.AioRpcError where the node is not reached or refuses.
        """
        key = (target.node_id, target.address)
        async with self._connecting.setdefault(key, asyncio.Lock()):
            link = self._links.get(key) or await self._connect(target)
            self._links[key] = link
        link.users += 1
        try:
            await self._retire_others(key)
            yield link
        except grpc.aio.AioRpcError:
            link.broken = True
            raise
        finally:
            link.users -= 1
            await self._retire(key, link)

    async def close(self) -> None:
        """Close links that are not in use."""
        for key, link in list(self._links.items()):
            link.broken = True
            await self._retire(key, link)

    async def _retire_others(self, key: _Key) -> None:
        """The node has another address now: its process was restarted."""
        for other, link in list(self._links.items()):
            if other != key and other[0] == key[0]:
                link.broken = True
                await self._retire(other, link)

    async def _retire(self, key: _Key, link: KvLink) -> None:
        if link.broken and self._links.get(key) is link:
            del self._links[key]
        if link.broken and link.users == 0:
            link.outgoing.close()
            await link.channel.close(None)

    async def _connect(self, target: KvTarget) -> KvLink:
        channel = grpc.aio.insecure_channel(target.address, options=CHANNEL_OPTIONS)
        ring = None
        if self._config.allow_shm and target.host_id == self._config.host_id:
            ring = ShmOutgoing(self._config.ring_bytes)
        try:
            return await self._shake_hands(target, channel, ring)
        except BaseException:
            if ring is not None:
                ring.close()
            await channel.close(None)
            raise

    async def _shake_hands(self, target: KvTarget, channel: grpc.aio.Channel, ring: ShmOutgoing | None) -> KvLink:
        hello = kv_pb2.KvHello(
            node_id=self._config.node_id,
            host_id=self._config.host_id,
            kv_contract_sha256=self._contract.sha256,
            transports=["grpc"] if ring is None else ["shm", "grpc"],
            shm_name="" if ring is None else ring.ring_name,
            shm_bytes=0 if ring is None else ring.size,
        )
        welcome = await kv_pb2_grpc.KvExchangeStub(channel).Handshake(hello)
        outgoing: Outgoing = GrpcOutgoing()
        if ring is not None:
            if welcome.transport == ring.name:
                outgoing = ring
            else:
                ring.close()
        _log.info("kv link up receiver=%s transport=%s", target.node_id, outgoing.name)
        return KvLink(
            channel=channel,
            outgoing=outgoing,
            session=session_name(hello.node_id, hello.shm_name),
            codecs=tuple(welcome.codecs),
            chunk_bytes=welcome.chunk_bytes,
        )
