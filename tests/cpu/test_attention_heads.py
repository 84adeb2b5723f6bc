"""Attention with any number of KV heads, queries per head and rows: few vectors take other ways than many."""

import numpy as np
import pytest

from edgellm.engines.cpu._native import Executor
from edgellm.engines.kv import KvContract

POSITION = 290
ROWS = 20
"""More than a tile of vectors, whatever the group."""


def random_cache(contract, blocks):
    rng = np.random.default_rng(1)
    size = blocks * contract.block_bytes
    if contract.dtype == "fp16":
        return rng.standard_normal(size // 2).astype(np.float16).view(np.uint8)
    cache = rng.integers(0, 256, (blocks, contract.block_bytes)).astype(np.uint8)
    scales = cache[:, 2 * contract.values_per_block :]
    scales[:] = rng.uniform(0.001, 0.02, (blocks, scales.shape[1] // 2)).astype(np.float16).view(np.uint8)
    return cache.ravel()


def attended(isa, contract, group, queries, position):
    """Attention [rows, heads * head_dim] of the queries of rows from `position` on, by two threads."""
    rows, width = queries.shape
    blocks = contract.blocks_for(POSITION + ROWS)
    arena = np.zeros(8 * rows * width, np.uint8)
    arena[: 4 * rows * width].view(np.float32)[:] = queries.ravel()
    executor = Executor(
        isa=isa,
        threads=2,
        max_rows=rows,
        max_sequences=1,
        arena=arena,
        weights=np.zeros(64, np.uint8),
        pool=random_cache(contract, blocks),
        num_blocks=blocks,
        block_bytes=contract.block_bytes,
        kv_heads=contract.kv_heads,
        head_dim=contract.head_dim,
        group=group,
    )
    q, out = (0, width), (4 * rows * width, width)
    executor.attend(dtype=contract.dtype, layer=0, q=q, out=out, num_heads=contract.kv_heads * group, scale=0.2)
    executor.run(
        tokens=np.zeros(rows, np.int32),
        hidden=None,
        row_starts=np.array([0, rows], np.int32),
        first_positions=np.array([position], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[::-1][None].copy(),
        logit_rows=np.zeros(0, np.int32),
    )
    return arena[4 * rows * width :].view(np.float32).reshape(rows, width)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (12, 1), (17, 1), (3, 2), (3, 3), (5, 8), (9, 7), (2, 16)])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 128])
def test_few_rows_have_the_bits_of_many(isa, dtype, kv_heads, group, head_dim):
    contract = KvContract(num_layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    queries = np.random.default_rng(2).standard_normal((ROWS, kv_heads * group * head_dim)).astype(np.float32)
    expected = attended("reference", contract, group, queries, POSITION)
    together = attended(isa, contract, group, queries, POSITION)
    assert np.abs(together - expected).max() < (0.02 if isa == "amx" else 1e-4) * np.abs(expected).max()
    for first, rows in ((0, 1), (7, 2), (3, 4), (ROWS - 1, 1)):
        few = attended(isa, contract, group, queries[first : first + rows], POSITION + first)
        assert few.tobytes() == together[first : first + rows].tobytes()
