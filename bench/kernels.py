"""Each kernel alone on one thread: microseconds of a call, and how many weights or values per second that is."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from bench.report import Report, machine
from bench.timing import median_s, read_bandwidth_gb_s
from edgellm.engines.cpu import isa as isas
from edgellm.engines.cpu import pack
from edgellm.engines.cpu._native import Executor

COLUMNS, CHANNELS, GROUP = 3072, 576, 64
"""Of the linears: SmolLM2-135M's gate and up."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One linear at one number of rows."""

    isa: str
    form: str
    rows: int
    microseconds: float
    weight_gb_per_s: float
    gflop_per_s: float


@dataclass(frozen=True, kw_only=True)
class Form:
    """Bytes per weight, and how the input is stored."""

    name: str
    input_form: str
    weight_bytes: float
    input_bytes: int


FORMS = (
    Form(name="half", input_form="half", weight_bytes=2, input_bytes=4),
    Form(name="int8", input_form="int8", weight_bytes=1, input_bytes=1),
    Form(name="int8x16", input_form="int16", weight_bytes=1, input_bytes=2),
    Form(name="int4", input_form="int8", weight_bytes=0.5, input_bytes=1),
    Form(name="int4_float", input_form="float", weight_bytes=0.5, input_bytes=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 128], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="default: %(default)s")


def run(options: argparse.Namespace) -> Report:
    """There are no targets: what a kernel is for is measured by `engine`."""
    results = list(_results(options.rows, options.repeats))
    return Report(
        name="kernels",
        machine=machine() | {"read_gb_per_s": round(read_bandwidth_gb_s(), 2)},
        results=[asdict(result) for result in results],
        targets=[],
    )


def _results(row_counts: list[int], repeats: int) -> Iterator[Result]:
    for isa in isas.available():
        for form in FORMS:
            for rows in row_counts:
                seconds = median_s(_linear(isa, form, rows), repeats)
                yield Result(
                    isa=isa,
                    form=form.name,
                    rows=rows,
                    microseconds=1e6 * seconds,
                    weight_gb_per_s=COLUMNS * CHANNELS * form.weight_bytes / seconds / 1e9,
                    gflop_per_s=2 * rows * COLUMNS * CHANNELS / seconds / 1e9,
                )


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """An executor of one linear, called."""

    executor: Executor
    rows: int

    def __call__(self) -> None:
        self.executor.run(
            tokens=np.zeros(self.rows, np.int32),
            hidden=None,
            row_starts=np.array([0, self.rows], np.int32),
            first_positions=np.zeros(1, np.int32),
            block_tables=np.zeros((1, pack.round_up(self.rows, 32) // 32), np.int32),
            logit_rows=np.zeros(0, np.int32),
        )


def _linear(isa: str, form: Form, rows: int) -> _Linear:
    """Zeros as weights and input: the time of a product does not depend on its values."""
    row_bytes = pack.round_up(form.input_bytes * CHANNELS + 4 * (CHANNELS // GROUP) + 4, 64)
    weight_bytes = int(COLUMNS * CHANNELS * form.weight_bytes)
    scales_at = weight_bytes
    executor = Executor(
        isa=isa,
        threads=1,
        max_rows=rows,
        max_sequences=1,
        arena=np.zeros(rows * (row_bytes + 4 * COLUMNS), np.uint8),
        weights=np.zeros(weight_bytes + 4 * COLUMNS + 2 * COLUMNS * CHANNELS // GROUP, np.uint8),
        pool=np.zeros(64, np.uint8),
        num_blocks=1,
        block_bytes=64,
        kv_heads=1,
        head_dim=4,
        group=1,
    )
    sums_at = form.input_bytes * CHANNELS
    scale_at = sums_at + 4 * (CHANNELS // GROUP)
    executor.linear(
        form=form.name,
        x=(0, row_bytes, sums_at, scale_at, scale_at),
        out=(rows * row_bytes, COLUMNS),
        weight=0,
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
    return _Linear(executor=executor, rows=rows)
