"""What every backend checks of a batch before it computes, and the positions that a batch implies."""

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch
from edgellm.engines.kv import KvPool
from edgellm.engines.spec import EngineSpec


def row_counts(batch: Batch) -> npt.NDArray[np.int32]:
    """[sequences]: the rows of each sequence. `np.diff` takes several times as long for a few."""
    counts: npt.NDArray[np.int32] = batch.row_starts[1:] - batch.row_starts[:-1]
    return counts


def row_positions(batch: Batch) -> npt.NDArray[np.int32]:
    """[rows]: the position of each row in its own sequence."""
    counts = row_counts(batch)
    offsets = np.arange(batch.row_starts[-1], dtype=np.int32) - np.repeat(batch.row_starts[:-1], counts)
    positions: npt.NDArray[np.int32] = np.repeat(batch.first_positions, counts) + offsets
    return positions


def check_batch(batch: Batch, spec: EngineSpec, pool: KvPool) -> None:
    """Raise ValueError, naming the value and its bound, if the engine must not run this batch."""
    _check_rows(batch, spec)
    _check_sequences(batch, spec)
    _check_tokens(batch, spec)
    _check_blocks(batch, pool)


def _check_rows(batch: Batch, spec: EngineSpec) -> None:
    starts = batch.row_starts
    if len(starts) < 2 or starts[0] != 0 or (row_counts(batch) <= 0).any():
        raise ValueError(f"row_starts {starts.tolist()} must ascend from 0, with at least one row per sequence")
    if starts[-1] > spec.limits.max_rows:
        raise ValueError(f"{starts[-1]} rows in one step; this engine takes at most {spec.limits.max_rows}")
    given = [len(rows) for rows in (batch.tokens, batch.hidden) if rows is not None]
    if given != [starts[-1]]:
        raise ValueError(f"row_starts name {starts[-1]} rows, tokens or hidden have {given}; exactly one must be given")
    if (batch.logit_rows < 0).any() or (batch.logit_rows >= starts[-1]).any():
        raise ValueError(f"logit_rows {batch.logit_rows.tolist()} outside of the {starts[-1]} rows")


def _check_sequences(batch: Batch, spec: EngineSpec) -> None:
    sequences = len(batch.row_starts) - 1
    if sequences > spec.limits.max_sequences:
        raise ValueError(f"{sequences} sequences in one step; this engine takes at most {spec.limits.max_sequences}")
    if len(batch.first_positions) != sequences or len(batch.block_tables) != sequences:
        raise ValueError(f"first_positions and block_tables must each have one entry per sequence, {sequences}")
    if (batch.first_positions < 0).any():
        raise ValueError(f"first position {batch.first_positions.min()} is negative")
    longest = int((batch.first_positions + row_counts(batch)).max())
    if longest > spec.limits.max_seq_len:
        raise ValueError(f"a sequence of {longest} tokens; this engine takes at most {spec.limits.max_seq_len}")


def _check_tokens(batch: Batch, spec: EngineSpec) -> None:
    if batch.tokens is None:
        return
    wrong = batch.tokens[(batch.tokens < 0) | (batch.tokens >= spec.vocab_size)]
    if wrong.size:
        raise ValueError(f"token id {wrong[0]} is outside of the vocabulary of {spec.vocab_size}")


def _check_blocks(batch: Batch, pool: KvPool) -> None:
    """Only the blocks that the sequence's tokens lie in are looked at; the rest of a table row is padding."""
    lengths = batch.first_positions + row_counts(batch)
    needed = -(-lengths // pool.contract.block_tokens)
    columns = batch.block_tables.shape[1]
    if needed.max() > columns:
        sequence = int(needed.argmax())
        raise ValueError(f"sequence {sequence} has {lengths[sequence]} tokens but only {columns} blocks")
    is_outside = (batch.block_tables < 0) | (batch.block_tables >= pool.num_blocks)
    is_outside &= np.arange(columns) < needed[:, None]
    if is_outside.any():
        sequence, column = np.argwhere(is_outside)[0]
        block = batch.block_tables[sequence, column]
        raise ValueError(f"sequence {sequence} names block {block}; the pool has {pool.num_blocks}")
