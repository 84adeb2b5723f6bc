"""Executors of one kernel each, over memory that no cache holds, and what a call of them reads and computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from bench.machine_limits import Peaks
from edgellm.engines.cpu import pack
from edgellm.engines.cpu._native import Executor
from edgellm.engines.kv import BLOCK_TOKENS, KvContract

COLUMNS, CHANNELS, GROUP = 5632, 2048, 128
"""Of the linears: the gate of a 1.1B Llama."""
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64
"""Of attention: the same model's."""
READ_BYTES: Final = 128 << 20
"""What the calls of one run read together, so that weights and KV come from memory."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. `run()` calls it `calls` times, each on other weights or another layer's KV."""

    kernel: str
    rows: int
    context: int
    """Tokens that attention sees; 0 for a linear."""
    run: Callable[[], object]
    calls: int
    read_bytes: float
    """Weights or KV that a call reads."""
    operations: float
    """Multiplications and additions of a call."""
    peak: Literal["fp32", "bf16", "int8"]
    """What bounds its arithmetic."""

    def of_peak(self, operations_per_s: float, peaks: Peaks) -> float:
        return operations_per_s / 1e9 / getattr(peaks, self.peak)


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """Bytes per weight, and how the input is stored."""

    name: str
    weight_bytes: float
    input_bytes: int
    peak: Literal["fp32", "bf16", "int8"]


LINEAR_FORMS: Final = (
    LinearForm(name="half", weight_bytes=2, input_bytes=4, peak="bf16"),
    LinearForm(name="int8", weight_bytes=1, input_bytes=1, peak="int8"),
    LinearForm(name="int8x16", weight_bytes=1, input_bytes=2, peak="int8"),
    LinearForm(name="int4", weight_bytes=0.5, input_bytes=1, peak="int8"),
    LinearForm(name="int4_float", weight_bytes=0.5, input_bytes=4, peak="fp32"),
)


def linear_case(isa: str, threads: int, form: LinearForm, rows: int) -> Case:
    """The time of a product does not depend on its values."""
    weight_bytes = int(COLUMNS * CHANNELS * form.weight_bytes)
    calls = max(1, READ_BYTES // weight_bytes)
    sums_at = form.input_bytes * CHANNELS
    scale_at = sums_at + 4 * (CHANNELS // GROUP)
    row_bytes = pack.round_up(scale_at + 4, 64)
    scales_at = calls * weight_bytes
    executor = _executor(
        isa=isa,
        threads=threads,
        rows=rows,
        arena_bytes=rows * (row_bytes + 4 * COLUMNS),
        weight_bytes=scales_at + 4 * COLUMNS + 2 * COLUMNS * CHANNELS // GROUP,
    )
    for call in range(calls):
        executor.linear(
            form=form.name,
            x=(0, row_bytes, sums_at, scale_at, scale_at),
            out=(rows * row_bytes, COLUMNS),
            weight=call * weight_bytes,
            group_scale=scales_at + 4 * COLUMNS,
            column_scale=scales_at,
            outlier_weight=None,
            bias=None,
            padded_channels=CHANNELS,
            group_size=GROUP,
            padded_outliers=0,
            columns=COLUMNS,
            residual=None,
        )
    return Case(
        kernel=form.name,
        rows=rows,
        context=0,
        run=_step(executor, rows, 0),
        calls=calls,
        read_bytes=weight_bytes,
        operations=2.0 * rows * COLUMNS * CHANNELS,
        peak=form.peak,
    )


def attention_case(isa: str, threads: int, dtype: Literal["fp16", "int8"], rows: int, context: int) -> Case:
    """The last `rows` of a sequence of `context` tokens."""
    contract = KvContract(num_layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype)
    blocks = contract.blocks_for(context)
    read_bytes = context * contract.block_bytes // BLOCK_TOKENS
    calls = max(1, READ_BYTES // read_bytes) if rows == 1 else 1
    width = HEADS * HEAD_DIM
    executor = _executor(
        isa=isa,
        threads=threads,
        rows=rows,
        arena_bytes=8 * rows * width,
        contract=contract,
        blocks=blocks,
        layers=calls,
    )
    for layer in range(calls):
        executor.attend(
            dtype=dtype, layer=layer, q=(0, width), out=(4 * rows * width, width), num_heads=HEADS, scale=HEAD_DIM**-0.5
        )
    seen = rows * (context - rows) + rows * (rows + 1) / 2
    return Case(
        kernel=f"attend_{dtype}",
        rows=rows,
        context=context,
        run=_step(executor, rows, context - rows),
        calls=calls,
        read_bytes=read_bytes,
        operations=4.0 * width * seen,
        peak="bf16" if isa == "amx" else "fp32",
    )


def cases(isa: str, threads: int, row_counts: list[int], contexts: list[int]) -> Iterator[Case]:
    """One after the other: each frees its memory before the next takes some."""
    for form in LINEAR_FORMS:
        for rows in row_counts:
            yield linear_case(isa, threads, form, rows)
    for dtype in ("fp16", "int8"):
        for context in contexts:
            yield attention_case(isa, threads, dtype, 1, context)
        yield attention_case(isa, threads, dtype, 512, max(contexts))


def _executor(
    *,
    isa: str,
    threads: int,
    rows: int,
    arena_bytes: int,
    weight_bytes: int = 64,
    contract: KvContract | None = None,
    blocks: int = 1,
    layers: int = 1,
) -> Executor:
    contract = contract or KvContract(num_layers=1, kv_heads=1, head_dim=4)
    return Executor(
        isa=isa,
        threads=threads,
        max_rows=rows,
        max_sequences=1,
        arena=_touched(arena_bytes),
        weights=_touched(weight_bytes),
        pool=_touched(layers * blocks * contract.block_bytes),
        num_blocks=blocks,
        block_bytes=contract.block_bytes,
        kv_heads=contract.kv_heads,
        head_dim=contract.head_dim,
        group=HEADS // KV_HEADS,
    )


def _touched(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Memory that is really there: pages of zeros that nobody wrote are all the same page, and in the cache.

    The bytes are an ordinary number in every format; very small ones would take other ways through the processor.
    """
    return np.full(size, 0x3C, np.uint8)


def _step(executor: Executor, rows: int, first_position: int) -> Callable[[], object]:
    table = np.arange(-(-(first_position + rows) // BLOCK_TOKENS), dtype=np.int32)[None]
    return lambda: executor.run(
        tokens=np.zeros(rows, np.int32),
        hidden=None,
        row_starts=np.array([0, rows], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=table,
        logit_rows=np.zeros(0, np.int32),
    )
