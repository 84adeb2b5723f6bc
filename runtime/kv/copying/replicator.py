"""Every copy that this node keeps on other nodes."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.queue import CopyConfig, CopyKey
from edgellm.runtime.kv.copying.stream import CopyStream, CopyStreamError
from edgellm.runtime.kv.links import KvLinks
from edgellm.runtime.kv.transfer import TransferError
from edgellm.runtime.kv.types import Attempt, KvCopy, KvTarget, NodeId

_Peer: TypeAlias = tuple[NodeId, str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyHooks:
    """Who is told how a copy ended; not called for one that was stopped."""

    on_lost: Callable[[Attempt, range, TransferError], None]
    """Attempt, layers, and why; its peer is the holder."""
    on_crash: Callable[[BaseException], None]
    """Given what nobody expected."""


class Replicator:
    """One stream per holder, opened with its first copy; owns the streams' tasks until `close`.

    Rows are read beside running steps: positions below `holdings.reach` are not written again.
    """

    def __init__(self, *, holdings: Holdings, links: KvLinks, config: CopyConfig, hooks: CopyHooks) -> None:
        self._holdings = holdings
        self._links = links
        self._config = config
        self._hooks = hooks
        self._streams: dict[_Peer, CopyStream] = {}
        self._copies: dict[Attempt, dict[CopyKey, CopyStream]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent_bytes = 0
        """By streams that have ended."""

    @property
    def running(self) -> int:
        """Copies being kept."""
        return sum(len(copies) for copies in self._copies.values())

    @property
    def lag_tokens(self) -> int:
        """Of the copy furthest behind."""
        return max((stream.queue.lag for stream in self._streams.values()), default=0)

    @property
    def sent_bytes(self) -> int:
        """Since the start of this node."""
        return self._sent_bytes + sum(stream.sent_bytes for stream in self._streams.values())

    def start(self, attempt: Attempt, copies: Sequence[KvCopy]) -> None:
        """Keep these copies from now on, in place of those of the same layers. The attempt holds blocks."""
        kept = self._copies.setdefault(attempt, {})
        blocks = self._holdings.blocks(attempt)
        for copy in copies:
            key = CopyKey(attempt=attempt, layers=copy.target.layers)
            for other in [one for one in kept if _overlap(one.layers, key.layers)]:
                kept.pop(other).stop(other)
            stream = kept[key] = self._stream(copy.target)
            computed = self._holdings.reach(attempt, key.layers)
            stream.start(key, blocks, first_token=copy.from_token, computed=computed)

    def advance(self, attempt: Attempt, layers: range, computed: int) -> None:
        """This node has the first `computed` positions of these layers. No effect where they are not copied."""
        for key, stream in self._copies.get(attempt, {}).items():
            if layers.start <= key.layers.start and key.layers.stop <= layers.stop:
                stream.advance(key, computed)

    def stop(self, attempt: Attempt) -> None:
        """From now on the attempt's blocks are not read."""
        for key, stream in self._copies.pop(attempt, {}).items():
            stream.stop(key)

    async def close(self) -> None:
        """End all streams; copies end without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _stream(self, target: KvTarget) -> CopyStream:
        peer = (target.node_id, target.address)
        stream = self._streams.get(peer)
        if stream is not None and not stream.closing:
            return stream

        stream = CopyStream(target, pool=self._holdings.pool, config=self._config, on_ended=self._lost)
        self._streams[peer] = stream
        task = asyncio.create_task(self._run(peer, stream))
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return stream

    async def _run(self, peer: _Peer, stream: CopyStream) -> None:
        reason = "the stream has ended"
        try:
            await stream.run(self._links)
        except CopyStreamError as error:
            reason = str(error)
            _log.warning("copies lost holder=%s copies=%d reason=%s", peer[0], len(stream.queue), reason)
        finally:
            self._sent_bytes += stream.sent_bytes
            if self._streams.get(peer) is stream:
                del self._streams[peer]
        for key in stream.queue.keys:
            self._lost(key, TransferError("transfer", peer[0], reason))

    def _lost(self, key: CopyKey, error: TransferError) -> None:
        kept = self._copies.get(key.attempt, {})
        if kept.pop(key, None) is not None:
            self._hooks.on_lost(key.attempt, key.layers, error)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._hooks.on_crash(error)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
