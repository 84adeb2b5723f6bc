"""The engine boundary: everything above it speaks in batches and blocks, everything below it in kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.kv import KvPool
from edgellm.engines.spec import EngineSpec

SumOverRanks: TypeAlias = Callable[[npt.NDArray[np.float32]], None]
"""Adds x float32 [rows, width], a view with any strides, up over the tensor-parallel ranks: in place, and in rank order
for each element, so that a row's sum does not depend on the rest of the step. All ranks call it equally often with
equal shapes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Ragged rows of several sequences, phase-free: prompt chunks, single decode steps and catch-up alike.

    Sequence s owns rows `row_starts[s] : row_starts[s + 1]`, at positions `first_positions[s]` and up, and keeps its
    KV in `block_tables[s]` (padded with -1; position p lives in slot p % 32 of block p // 32).
    """

    tokens: npt.NDArray[np.int32] | None
    """[rows], on a first stage."""
    hidden: npt.NDArray[np.float32] | None
    """[rows, hidden_size], on a later stage."""
    row_starts: npt.NDArray[np.int32]
    """[sequences + 1], ascending from 0 to rows."""
    first_positions: npt.NDArray[np.int32]
    """[sequences]."""
    block_tables: npt.NDArray[np.int32]
    """[sequences, max_blocks_of_any]."""
    logit_rows: npt.NDArray[np.int32]
    """[selected], row indices whose logits are wanted; ignored before the last stage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """Result of a step; both are views into engine memory, valid until the next `forward`."""

    logits: npt.NDArray[np.float32] | None
    """[selected, vocab_size] on a last stage."""
    hidden: npt.NDArray[np.float32] | None
    """[rows, hidden_size] on an earlier stage."""


class Engine(Protocol):
    """One compiled engine, loaded. Not thread-safe: one `forward` at a time, from any thread."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def kv(self) -> KvPool: ...

    def forward(self, batch: Batch) -> Output:
        """Run one step. The GIL is released. A row's result does not depend on the rest of the batch, on how its
        prompt was cut into chunks, or on the number of threads: equal inputs give equal bits.

        Raises ValueError, and computes nothing, if the batch exceeds `spec.limits`, names a token outside the
        vocabulary, or a block outside the pool.
        """
        ...

    def close(self) -> None:
        """Release memory and threads; the engine is unusable afterwards."""
        ...
