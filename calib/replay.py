"""Known tokens through an engine, on KV blocks that are given back afterwards."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch, Engine
from edgellm.engines.kv import BlockId, KvPool
from edgellm.engines.weights import FloatArray


@contextlib.contextmanager
def kv_blocks(engine: Engine, tokens: int, *, windows: int = 1) -> Iterator[list[BlockId]]:
    """Blocks for sequences of `tokens` tokens, as many for each, freed at the end."""
    blocks = engine.kv.allocate(windows * engine.kv.contract.blocks_for(tokens))
    try:
        yield blocks
    finally:
        engine.kv.free(blocks)


def copy_kv(source: KvPool, source_blocks: Sequence[BlockId], target: KvPool, target_blocks: Sequence[BlockId]) -> None:
    """Copy whole blocks of all layers; the pools may be one."""
    for layer in source.layers:
        target.write(target_blocks, layer, source.read(source_blocks, layer))


def run_tokens(
    engine: Engine,
    blocks: Sequence[BlockId],
    tokens: npt.NDArray[np.int64],
    first_position: int,
    *,
    logits_from: int = 0,
) -> FloatArray:
    """Logits [len(tokens) - logits_from, vocab_size] after each token from `tokens[logits_from]` on.

    The tokens follow `first_position` tokens whose KV is in `blocks`; they run in chunks of the engine's `max_rows`.
    """
    rows = engine.spec.limits.max_rows
    return np.concatenate(
        [
            _run_chunk(engine, blocks, tokens[start : start + rows], first_position + start, logits_from - start)
            for start in range(0, len(tokens), rows)
        ]
    )


def _run_chunk(
    engine: Engine, blocks: Sequence[BlockId], tokens: npt.NDArray[np.int64], first_position: int, logits_from: int
) -> FloatArray:
    output = engine.forward(
        Batch(
            tokens=tokens.astype(np.int32),
            hidden=None,
            row_starts=np.array([0, len(tokens)], np.int32),
            first_positions=np.array([first_position], np.int32),
            block_tables=np.array([blocks], np.int32),
            logit_rows=np.arange(max(0, logits_from), len(tokens), dtype=np.int32),
        )
    )
    if output.logits is None:
        raise ValueError(f"engine {engine.spec.name} is not a whole model: it makes no logits")
    return output.logits.copy()
