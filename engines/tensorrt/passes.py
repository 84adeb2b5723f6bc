"""A ragged batch as padded passes over neighbouring slots. Pure.

A decode network takes one row of each slot, so a sequence with several rows (catching up after a takeover, or a prompt
read by the decode engine) needs as many passes; always over all slots, so that the shape never changes. A prefill
network takes a chunk of each of some slots that lie side by side; sequences share a pass where padding them to the
longest costs no more than their rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edgellm.engines.tensorrt.interface import Bounds


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Consecutive rows of one sequence of the batch."""

    slot: int
    first_position: int
    first_row: int
    """In the batch."""
    count: int
    wanted: tuple[int, ...]
    """Rows of the batch among these whose logits are wanted, ascending."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One run of the network, over slots `first_slot` to `first_slot + batch - 1`."""

    first_slot: int
    batch: int
    chunk: int
    pieces: tuple[Rows, ...]
    """At most one per slot, none longer than the chunk."""


def plan_passes(sequences: Sequence[Rows], *, num_slots: int, bounds: Bounds) -> Iterator[Pass]:
    """Every row once, each sequence's in order. `sequences` lie in different slots."""
    left = sorted(sequences, key=lambda rows: rows.slot)
    while left:
        planned = _decode_pass(left, num_slots) if bounds.is_decode else _prefill_pass(left, bounds)
        yield planned
        done = {piece.slot: piece.count for piece in planned.pieces}
        left = [rest for rows in left if (rest := _after(rows, done.get(rows.slot, 0))).count]


def _decode_pass(left: Sequence[Rows], num_slots: int) -> Pass:
    return Pass(first_slot=0, batch=num_slots, chunk=1, pieces=tuple(_first(rows, 1) for rows in left))


def _prefill_pass(left: Sequence[Rows], bounds: Bounds) -> Pass:
    pieces: list[Rows] = []
    for rows in left:
        if pieces and (rows.slot != pieces[-1].slot + 1 or len(pieces) == bounds.max_batch):
            break
        selectable = bounds.max_selected - sum(len(piece.wanted) for piece in pieces)
        piece = _limit_wanted(_first(rows, bounds.max_chunk), selectable)
        if pieces and (piece.count == 0 or _padded([*pieces, piece]) > 2 * sum(p.count for p in [*pieces, piece])):
            break
        pieces.append(piece)
    chunk = max(piece.count for piece in pieces)
    return Pass(first_slot=pieces[0].slot, batch=len(pieces), chunk=chunk, pieces=tuple(pieces))


def _padded(pieces: Sequence[Rows]) -> int:
    return len(pieces) * max(piece.count for piece in pieces)


def _limit_wanted(rows: Rows, selectable: int) -> Rows:
    """The first of the rows, with no more wanted ones than can be selected."""
    if len(rows.wanted) <= selectable:
        return rows
    return _first(rows, rows.wanted[selectable] - rows.first_row)


def _first(rows: Rows, count: int) -> Rows:
    count = min(count, rows.count)
    wanted = tuple(row for row in rows.wanted if row < rows.first_row + count)
    return replace(rows, count=count, wanted=wanted)


def _after(rows: Rows, count: int) -> Rows:
    return replace(
        rows,
        first_position=rows.first_position + count,
        first_row=rows.first_row + count,
        count=rows.count - count,
        wanted=tuple(row for row in rows.wanted if row >= rows.first_row + count),
    )
