"""The receiving end of the KV exchange, without its I/O: reserve, verify, re-assemble, acknowledge."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgellm.engines.kv import BlockId, KvPoolExhaustedError
from edgellm.runtime.kv.chunks import KvRange
from edgellm.runtime.kv.codecs import CodecError, decode
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.planes import scatter
from edgellm.runtime.kv.types import Attempt


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Blocks are reserved, or were by another sender of the same attempt."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The chunk is in the pool; `complete` if that was all that was missing."""

    complete: bool


@dataclass(frozen=True, kw_only=True)
class Stale:
    """An older epoch, or released meanwhile."""


@dataclass(frozen=True, kw_only=True)
class NoCapacity:
    message: str


@dataclass(frozen=True, kw_only=True)
class Corrupt:
    message: str


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """An encoded chunk, fetched from wherever it travelled."""

    attempt: Attempt
    where: KvRange
    codec: str
    checksum: int
    """zlib.crc32 of `payload`."""
    payload: bytes


@dataclass(kw_only=True, eq=False)
class InboxCounters:
    """Since the start of this node."""

    chunks: int = 0
    bytes: int = 0
    stale: int = 0
    corrupt: int = 0
    duplicate: int = 0


@dataclass(kw_only=True, eq=False)
class _Arriving:
    prompt_tokens: int
    blocks: list[BlockId]
    missing: npt.NDArray[np.bool_]
    """[layers, kv_heads, blocks of the prompt]."""
    senders: int = 1


@dataclass(kw_only=True, eq=False)
class KvInbox:
    """Prompts whose KV is arriving. Chunks of one attempt may come in any order, from several senders, and twice."""

    ledger: BlockLedger
    admit: Callable[[Attempt], bool]
    """Whether the attempt is not stale; makes older epochs of its request stale."""
    on_complete: Callable[[Attempt], None]
    """The last missing piece was installed. The blocks stay with the attempt."""
    on_lost: Callable[[Attempt], None]
    """The last sender has gone before the KV was complete; called once, after the attempt was forgotten here."""
    counters: InboxCounters = field(default_factory=InboxCounters)
    _arriving: dict[Attempt, _Arriving] = field(default_factory=dict)

    def open(self, attempt: Attempt, *, prompt_tokens: int, capacity_tokens: int) -> Opened | Stale | NoCapacity:
        """Reserve blocks for the whole request. Every successful open is matched by one `close`."""
        if not self.admit(attempt):
            self.counters.stale += 1
            return Stale()
        if arriving := self._arriving.get(attempt):
            arriving.senders += 1
            return Opened()
        if attempt in self.ledger or not 0 < prompt_tokens <= capacity_tokens:
            return NoCapacity(message=f"{attempt}: {prompt_tokens} of {capacity_tokens} tokens, or KV is here already")
        try:
            blocks = self.ledger.reserve(attempt, capacity_tokens)
        except KvPoolExhaustedError as error:
            return NoCapacity(message=str(error))
        pool = self.ledger.pool
        shape = (len(pool.layers), pool.contract.kv_heads, pool.contract.blocks_for(prompt_tokens))
        self._arriving[attempt] = _Arriving(
            prompt_tokens=prompt_tokens, blocks=blocks, missing=np.ones(shape, np.bool_)
        )
        return Opened()

    def install(self, chunk: Chunk) -> Installed | Stale | Corrupt:
        """Verify a chunk and put what is new of it into the pool."""
        arriving = self._arriving.get(chunk.attempt)
        if arriving is None:
            self.counters.stale += 1
            return Stale()
        problem = self._problem(arriving, chunk)
        if problem is not None:
            self.counters.corrupt += 1
            return Corrupt(message=problem)
        missing = self._missing_of(arriving, chunk.where)
        if not missing.any():
            self.counters.duplicate += 1
            return Installed(complete=not arriving.missing.any())
        return self._install(arriving, chunk, missing)

    def close(self, attempt: Attempt) -> None:
        """One of the attempt's senders has gone."""
        arriving = self._arriving.get(attempt)
        if arriving is None:
            return
        arriving.senders -= 1
        if arriving.senders == 0:
            del self._arriving[attempt]
            if arriving.missing.any():
                self.on_lost(attempt)

    def forget(self, attempt: Attempt) -> None:
        """Stop receiving; who asks frees the blocks."""
        self._arriving.pop(attempt, None)

    def is_arriving(self, attempt: Attempt) -> bool:
        """Whether some of the attempt's KV is still to come."""
        arriving = self._arriving.get(attempt)
        return arriving is not None and bool(arriving.missing.any())

    def _problem(self, arriving: _Arriving, chunk: Chunk) -> str | None:
        pool, where = self.ledger.pool, chunk.where
        inside = (
            _within(where.layers, pool.layers)
            and _within(where.heads, range(pool.contract.kv_heads))
            and _within(where.tokens, range(arriving.prompt_tokens))
        )
        if not inside:
            return f"{where} is not inside layers {pool.layers}, {arriving.prompt_tokens} tokens"
        block_tokens = pool.contract.block_tokens
        ends_whole = where.tokens.stop % block_tokens == 0 or where.tokens.stop == arriving.prompt_tokens
        if where.tokens.start % block_tokens or not ends_whole:
            return f"{where} does not consist of whole blocks of {block_tokens} tokens"
        if zlib.crc32(chunk.payload) != chunk.checksum:
            return f"checksum of {where} is wrong"
        return None

    def _missing_of(self, arriving: _Arriving, where: KvRange) -> npt.NDArray[np.bool_]:
        """View of `missing` that the range covers."""
        first = self.ledger.pool.layers.start
        blocks = where.blocks(self.ledger.pool.contract)
        return arriving.missing[
            where.layers.start - first : where.layers.stop - first,
            where.heads.start : where.heads.stop,
            blocks.start : blocks.stop,
        ]

    def _install(self, arriving: _Arriving, chunk: Chunk, missing: npt.NDArray[np.bool_]) -> Installed | Corrupt:
        try:
            planes = decode(chunk.codec, self.ledger.pool.contract, chunk.where, chunk.payload)
        except CodecError as error:
            self.counters.corrupt += 1
            return Corrupt(message=str(error))
        scatter(self.ledger.pool, arriving.blocks, chunk.where, planes)
        missing[...] = False
        self.counters.chunks += 1
        self.counters.bytes += len(chunk.payload)
        complete = not arriving.missing.any()
        if complete:
            self.on_complete(chunk.attempt)
        return Installed(complete=complete)


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start < inner.stop <= outer.stop
