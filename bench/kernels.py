"""Each kernel alone: GB/s of what it reads and GFLOP/s, against the machine's limits measured in the same run."""

import argparse
from dataclasses import asdict, dataclass

import torch

from bench.kernel_cases import Case, cases
from bench.machine_limits import MachineLimits, Peaks
from bench.report import Report, machine
from bench.timing import median_s
from edgellm.engines.cpu import isa as isas


@dataclass(frozen=True, kw_only=True)
class Result:
    """One kernel at one shape and number of threads; shares are of what the machine reached in the same run."""

    kernel: str
    isa: str
    threads: int
    rows: int
    context: int
    microseconds: float
    gb_per_s: float
    of_read: float
    """Of the memory read bandwidth, measured right before and after."""
    gflop_per_s: float
    of_peak: float
    """Of the peak of the machine's instruction for this product."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", nargs="+", choices=isas.available(), default=[isas.available()[0]])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8, 32, 256], help="of linears (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[512, 8192], help="of attention (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="beside 1 (default: %(default)s)")


def run(options: argparse.Namespace) -> Report:
    """There are no targets: what a kernel is for is measured by `engine`."""
    counts = sorted({1, options.threads})
    limits = {threads: MachineLimits(threads) for threads in counts}
    peaks = {threads: limits[threads].peaks() for threads in counts}
    results = [
        _result(case, isa, limits[threads], peaks[threads], options.repeats)
        for isa in options.isa
        for threads in counts
        for case in cases(isa, threads, options.rows, options.context)
    ]
    return Report(
        name="kernels",
        machine=machine() | {f"peak_{threads}_threads": asdict(peak) for threads, peak in peaks.items()},
        results=[asdict(result) for result in results],
        targets=[],
    )


def _result(case: Case, isa: str, limits: MachineLimits, peaks: Peaks, repeats: int) -> Result:
    before = limits.read_gb_per_s(limits.threads)
    seconds = median_s(case.run, repeats) / case.calls
    read = (before + limits.read_gb_per_s(limits.threads)) / 2
    gb_per_s = case.read_bytes / seconds / 1e9
    return Result(
        kernel=case.kernel,
        isa=isa,
        threads=limits.threads,
        rows=case.rows,
        context=case.context,
        microseconds=1e6 * seconds,
        gb_per_s=gb_per_s,
        of_read=gb_per_s / read,
        gflop_per_s=case.operations / seconds / 1e9,
        of_peak=case.of_peak(case.operations / seconds, peaks),
    )
