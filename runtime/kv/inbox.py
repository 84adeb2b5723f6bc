"""The receiving end of the KV exchange, without its I/O: reserve, verify, re-assemble, acknowledge."""

import zlib
from collections import Counter
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
    """The chunk is in the pool; `complete` if its part of the prompt is."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPart:
    """Some layers of a prompt's KV: what this node carries, or what it holds for another."""

    layers: range
    tokens: int
    """All of the prompt."""
    backup: bool
    senders: int = 1
    """How many bring it, each some of the heads."""


@dataclass(kw_only=True, eq=False)
class _Arriving:
    """One attempt, until somebody forgets it: what comes twice is told from what is new."""

    prompt_tokens: int
    blocks: list[BlockId]
    missing: npt.NDArray[np.bool_]
    """[layers of the pool, kv_heads, blocks of the prompt]."""
    first_layer: int
    """Of the pool."""
    senders: Counter[PromptPart] = field(default_factory=Counter)
    gone: Counter[PromptPart] = field(default_factory=Counter)
    complete: set[PromptPart] = field(default_factory=set)

    def rows(self, layers: range) -> npt.NDArray[np.bool_]:
        """View of `missing` for some layers."""
        return self.missing[layers.start - self.first_layer : layers.stop - self.first_layer]

    def newly_complete(self) -> list[PromptPart]:
        """Parts of which the last piece was installed; each is named once."""
        new = [part for part in self.senders if part not in self.complete and not self.rows(part.layers).any()]
        self.complete.update(new)
        return new


@dataclass(kw_only=True, eq=False)
class KvInbox:
    """Prompts whose KV is arriving. Chunks of one attempt may come in any order, from several senders, and twice."""

    ledger: BlockLedger
    admit: Callable[[Attempt], bool]
    """Whether the attempt is not stale; makes older epochs of its request stale."""
    on_complete: Callable[[Attempt, PromptPart], None]
    """The last missing piece of a part was installed. The blocks stay with the attempt."""
    on_lost: Callable[[Attempt, PromptPart], None]
    """The last sender of a part has gone before it was complete. Unless that is a backup, the attempt was forgotten."""
    counters: InboxCounters = field(default_factory=InboxCounters)
    _arriving: dict[Attempt, _Arriving] = field(default_factory=dict)

    def open(self, attempt: Attempt, part: PromptPart, *, capacity_tokens: int) -> Opened | Stale | NoCapacity:
        """Reserve blocks for the whole request, once. Every successful open of a part is matched by one `close`."""
        if not self.admit(attempt):
            self.counters.stale += 1
            return Stale()
        pool = self.ledger.pool
        if not _within(part.layers, pool.layers) or not 0 < part.tokens <= capacity_tokens:
            return NoCapacity(message=f"{part} is not inside of {pool.layers}, {capacity_tokens} tokens")
        try:
            arriving = self._arriving.get(attempt) or self._begin(attempt, part.tokens, capacity_tokens)
        except KvPoolExhaustedError as error:
            return NoCapacity(message=str(error))
        if part.tokens != arriving.prompt_tokens:
            return NoCapacity(message=f"{attempt} has {arriving.prompt_tokens} prompt tokens, not {part.tokens}")
        arriving.senders[part] += 1
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
        if missing.any():
            return self._install(arriving, chunk, missing)
        self.counters.duplicate += 1
        return self._installed(arriving, chunk)

    def close(self, attempt: Attempt, part: PromptPart) -> None:
        """One of a part's senders has gone."""
        arriving = self._arriving.get(attempt)
        if arriving is None or not arriving.senders[part]:
            return
        arriving.senders[part] -= 1
        arriving.gone[part] += 1
        is_over = not arriving.senders[part] and arriving.gone[part] >= part.senders
        if is_over and arriving.rows(part.layers).any():
            if not part.backup:
                del self._arriving[attempt]
            self.on_lost(attempt, part)

    def forget(self, attempt: Attempt) -> None:
        """Stop receiving; who asks frees the blocks."""
        self._arriving.pop(attempt, None)

    def _begin(self, attempt: Attempt, prompt_tokens: int, capacity_tokens: int) -> _Arriving:
        """Raises KvPoolExhaustedError."""
        pool = self.ledger.pool
        is_reserved = attempt in self.ledger
        blocks = self.ledger.blocks(attempt) if is_reserved else self.ledger.reserve(attempt, capacity_tokens)
        shape = (len(pool.layers), pool.contract.kv_heads, pool.contract.blocks_for(prompt_tokens))
        arriving = _Arriving(
            prompt_tokens=prompt_tokens,
            blocks=blocks,
            missing=np.ones(shape, np.bool_),
            first_layer=pool.layers.start,
        )
        self._arriving[attempt] = arriving
        return arriving

    def _problem(self, arriving: _Arriving, chunk: Chunk) -> str | None:
        pool, where = self.ledger.pool, chunk.where
        inside = (
            any(_within(where.layers, part.layers) for part in arriving.senders)
            and _within(where.heads, range(pool.contract.kv_heads))
            and _within(where.tokens, range(arriving.prompt_tokens))
        )
        if not inside:
            return f"{where} is not inside of what was announced, {arriving.prompt_tokens} tokens"
        block_tokens = pool.contract.block_tokens
        ends_whole = where.tokens.stop % block_tokens == 0 or where.tokens.stop == arriving.prompt_tokens
        if where.tokens.start % block_tokens or not ends_whole:
            return f"{where} does not consist of whole blocks of {block_tokens} tokens"
        if zlib.crc32(chunk.payload) != chunk.checksum:
            return f"checksum of {where} is wrong"
        return None

    def _missing_of(self, arriving: _Arriving, where: KvRange) -> npt.NDArray[np.bool_]:
        """View of `missing` that the range covers."""
        blocks = where.blocks(self.ledger.pool.contract)
        return arriving.rows(where.layers)[:, where.heads.start : where.heads.stop, blocks.start : blocks.stop]

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
        for part in arriving.newly_complete():
            self.on_complete(chunk.attempt, part)
        return self._installed(arriving, chunk)

    def _installed(self, arriving: _Arriving, chunk: Chunk) -> Installed:
        """Complete if that was the last of the part that the chunk belongs to."""
        parts = [part for part in arriving.senders if _within(chunk.where.layers, part.layers)]
        return Installed(complete=all(part in arriving.complete for part in parts))


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start < inner.stop <= outer.stop
