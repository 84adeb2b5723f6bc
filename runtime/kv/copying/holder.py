"""The end that keeps copies for others, without its I/O: verify, reserve, install, and say what was not taken."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from edgellm.engines.kv import KvPoolExhaustedError
from edgellm.runtime.kv.codecs import CodecError
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.rows import Span, wire_row_bytes, write_spans
from edgellm.runtime.kv.types import Attempt

Admission: TypeAlias = Literal["admitted", "stale", "early"]
RefusalReason: TypeAlias = Literal["stale", "early", "corrupt", "no capacity"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Rows of one attempt, as announced."""

    attempt: Attempt
    layers: range
    tokens: range
    capacity_tokens: int
    codec: str
    length: int
    """Bytes of the message's payload, after those of the entries before."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An entry that was not taken."""

    index: int
    reason: RefusalReason
    message: str


@dataclass(kw_only=True, eq=False)
class CopyCounters:
    """Since the start of this node."""

    messages: int = 0
    tokens: int = 0
    bytes: int = 0
    refused: int = 0


class _RefusedError(Exception):
    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason


@dataclass(frozen=True, kw_only=True, eq=False)
class _Accepted:
    entry: Entry
    span: Span
    offset: int
    """Of its bytes in the payload."""


@dataclass(kw_only=True, eq=False)
class CopyHolder:
    """Rows come in any order, from several nodes, and twice. A refused entry leaves nothing behind."""

    holdings: Holdings
    admit: Callable[[Attempt], Admission]
    """`early`: an older attempt of the request is here, which may become this one."""
    counters: CopyCounters = field(default_factory=CopyCounters)

    def install(self, entries: Sequence[Entry], payload: bytes, checksum: int) -> list[Refused]:
        """Put the rows of a message into the pool; `checksum` is zlib.crc32 of the payload."""
        if zlib.crc32(payload) != checksum or sum(entry.length for entry in entries) != len(payload):
            return self.refuse_all(entries, "checksum or length of the message is wrong")
        accepted: list[_Accepted] = []
        refused: list[Refused] = []
        offset = 0
        for index, entry in enumerate(entries):
            try:
                accepted.append(_Accepted(entry=entry, span=self._room_for(entry), offset=offset))
            except _RefusedError as error:
                refused.append(Refused(index=index, reason=error.reason, message=str(error)))
            offset += entry.length
        self._write(accepted, payload)
        self.counters.messages += 1
        self.counters.bytes += len(payload)
        self.counters.refused += len(refused)
        return refused

    def refuse_all(self, entries: Sequence[Entry], message: str) -> list[Refused]:
        """Nothing of the message can be read."""
        self.counters.refused += len(entries)
        return [Refused(index=index, reason="corrupt", message=message) for index in range(len(entries))]

    def _room_for(self, entry: Entry) -> Span:
        self._check_shape(entry)
        admission = self.admit(entry.attempt)
        if admission != "admitted":
            raise _RefusedError(admission, f"{entry.attempt} is {admission} here")
        if self.holdings.computes(entry.attempt, entry.layers):
            raise _RefusedError("stale", f"this node computes some of {entry.layers} of {entry.attempt} itself")
        try:
            blocks = self.holdings.reserve(entry.attempt, entry.capacity_tokens)
        except KvPoolExhaustedError as error:
            raise _RefusedError("no capacity", str(error)) from error
        room_tokens = len(blocks) * self.holdings.pool.contract.block_tokens
        if entry.tokens.stop > room_tokens:
            raise _RefusedError("no capacity", f"{entry.attempt} has room for {room_tokens} tokens here")
        return Span(blocks=blocks, tokens=entry.tokens)

    def _check_shape(self, entry: Entry) -> None:
        pool, layers, tokens = self.holdings.pool, entry.layers, entry.tokens
        inside = pool.layers.start <= layers.start < layers.stop <= pool.layers.stop
        if not inside or not 0 <= tokens.start < tokens.stop <= entry.capacity_tokens:
            raise _RefusedError("corrupt", f"{layers}, {tokens} are outside of {pool.layers}, {entry.capacity_tokens}")
        try:
            expected = len(tokens) * len(layers) * wire_row_bytes(entry.codec, pool.contract)
        except CodecError as error:
            raise _RefusedError("corrupt", str(error)) from error
        if entry.length != expected:
            raise _RefusedError("corrupt", f"{entry.length} bytes arrived for {layers}, {tokens}; {expected} expected")

    def _write(self, accepted: Sequence[_Accepted], payload: bytes) -> None:
        """Entries of the same shape together; they count as held when their bytes are in the pool."""
        alike = defaultdict(list)
        for one in accepted:
            alike[one.entry.layers, one.entry.codec].append(one)
        for (layers, codec), ones in alike.items():
            shape = (-1, len(layers), wire_row_bytes(codec, self.holdings.pool.contract))
            rows = np.frombuffer(_bytes_of(ones, payload), np.uint8).reshape(shape)
            write_spans(self.holdings.pool, layers, [one.span for one in ones], rows, codec)
        for one in accepted:
            self.holdings.add(one.entry.attempt, one.entry.layers, one.entry.tokens, "copy")
            self.counters.tokens += len(one.entry.tokens)


def _bytes_of(accepted: Sequence[_Accepted], payload: bytes) -> bytes:
    """Their part of the payload, which mostly is all of it."""
    if sum(one.entry.length for one in accepted) == len(payload):
        return payload
    return b"".join(payload[one.offset : one.offset + one.entry.length] for one in accepted)
