"""Two engines in two processes on the same cores, one reading prompts and one decoding: what each keeps of its speed.

In every round each runs alone first. Then decoding goes on, run after run, while a prompt is read: the prompt's time,
and the runs of decoding that lie within it, are held against the times alone. Both with as many threads as there are
cores, at normal priority, as two nodes of one machine are.
"""

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Console

from bench import busy
from bench.busy import BUSY_SHARE
from bench.loading import Loaded, Loader
from bench.pairs import DECODE_1, DECODE_8, PREFILL_512, PREFILL_2048, Scenario
from bench.peers.contenders import OURS
from bench.peers.environments import UnavailableError
from bench.peers.models import MODELS, Model
from bench.report import Report, Target, machine

SHARE_TARGET: Final = 0.45
RUNS_WITHIN: Final = 6
"""Of decoding, in the time of one prompt alone."""
_LARGE_PARAMETERS: Final = 500_000_000
"""From which on the short prompt is long enough."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of decoding; `seconds` as the driver counted them."""

    start_s: float
    end_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds of one prompt and of one decoding run; `others`: share of the processors that others used."""

    prefill_alone_s: float
    prefill_beside_s: float
    decode_alone_s: float
    decode_beside_s: float
    others: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians of rounds; each `kept` is the share of the speed alone that is left beside the other."""

    model: str
    prefill: str
    decode: str
    prefill_alone_tokens_per_s: float
    prefill_kept: float
    decode_alone_tokens_per_s: float
    decode_kept: float
    others: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "1.1b"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="per figure, after one that does not count (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """ValueError if others use the machine now, or a model is missing."""
    busy.refuse_if_busy(options.even_if_busy)
    say = Console(stderr=True, log_path=False).log
    loader = Loader.telling(say, threads=options.threads, real_time=False)
    found = [
        result
        for name in options.models
        for result in _measure(MODELS[name], loader, options.rounds, even_if_busy=options.even_if_busy)
    ]
    rows = [result for result in found if isinstance(result, Row)]
    return Report(
        name="sharing",
        machine=machine() | {"threads": options.threads, "measured_although_busy": options.even_if_busy},
        results=[asdict(row) for row in rows],
        targets=[] if options.even_if_busy else [target for row in rows for target in targets(row)],
        notes=[result for result in found if isinstance(result, str)],
    )


def _measure(model: Model, loader: Loader, rounds: int, *, even_if_busy: bool) -> Iterator[Row | str]:
    """A row for each pair, or a sentence on why there is none."""
    prefill = PREFILL_512 if model.linear_parameters > _LARGE_PARAMETERS else PREFILL_2048
    try:
        with loader.loaded(OURS["half"], model) as reader, loader.loaded(OURS["int4"], model) as writer:
            for decode in (DECODE_1, DECODE_8):
                loader.say(f"{model.name}: {prefill.name} beside {decode.name}")
                steps = _steps(reader, prefill, writer, decode)
                taken = (_round(reader, prefill, writer, decode, steps) for _ in range(2 * rounds))
                kept = list(itertools.islice((r for r in taken if even_if_busy or r.others <= BUSY_SHARE), rounds))
                if len(kept) == rounds:
                    yield row(model, prefill, decode, steps, kept)
                else:
                    pair = f"{model.name}, {prefill.name} beside {decode.name}"
                    yield f"not measured: {pair}: others used more than {BUSY_SHARE:.0%} in too many rounds"
    except UnavailableError as error:
        raise ValueError(f"our own engine does not run on {model.name}: {error}") from error


def _steps(reader: Loaded, prefill: Scenario, writer: Loaded, decode: Scenario) -> int:
    """Of a decoding run: so many that several fit into the time of a prompt. After one run that does not count."""
    reader.run(prefill, 1)
    writer.run(decode, 1)
    return max(1, round(reader.run(prefill, 1) / RUNS_WITHIN / writer.run(decode, 1)))


def _round(reader: Loaded, prefill: Scenario, writer: Loaded, decode: Scenario, steps: int) -> Round:
    pids = [reader.process.pid, writer.process.pid]
    before = busy.read_times(pids)
    prefill_alone_s = reader.run(prefill, 1)
    decode_alone_s = statistics.median(writer.run(decode, steps) for _ in range(RUNS_WITHIN))
    prefill_beside_s, decode_beside_s = _together(reader, prefill, writer, decode, steps)
    shares = busy.shares(before, busy.read_times(pids), busy.core_count())
    return Round(
        prefill_alone_s=prefill_alone_s,
        prefill_beside_s=prefill_beside_s,
        decode_alone_s=decode_alone_s,
        decode_beside_s=decode_beside_s,
        others=shares.others + shares.stolen,
    )


def _together(reader: Loaded, prefill: Scenario, writer: Loaded, decode: Scenario, steps: int) -> tuple[float, float]:
    """Seconds of the prompt, and the median of the decoding runs within its time."""
    began, stop = threading.Event(), threading.Event()

    def keep_decoding() -> list[Run]:
        runs = []
        while not stop.is_set():
            start_s = time.perf_counter()
            began.set()
            seconds = writer.run(decode, steps)
            runs.append(Run(start_s=start_s, end_s=time.perf_counter(), seconds=seconds))
        return runs

    with ThreadPoolExecutor(1) as threads:
        decoding = threads.submit(keep_decoding)
        try:
            began.wait()
            start_s = time.perf_counter()
            prefill_s = reader.run(prefill, 1)
            end_s = time.perf_counter()
        finally:
            stop.set()
        return prefill_s, statistics.median(within(decoding.result(), start_s, end_s))


def within(runs: Sequence[Run], start_s: float, end_s: float) -> list[float]:
    """Seconds of those runs that lie in this time; of the one that shares most of it with this time if none does."""
    inside = [run.seconds for run in runs if start_s <= run.start_s and run.end_s <= end_s]
    if inside:
        return inside
    return [max(runs, key=lambda run: min(run.end_s, end_s) - max(run.start_s, start_s)).seconds]


def row(model: Model, prefill: Scenario, decode: Scenario, steps: int, rounds: Sequence[Round]) -> Row:
    """Shares are medians of the shares of each round."""
    return Row(
        model=model.name,
        prefill=prefill.name,
        decode=decode.name,
        prefill_alone_tokens_per_s=prefill.tokens(1) / statistics.median(r.prefill_alone_s for r in rounds),
        prefill_kept=statistics.median(r.prefill_alone_s / r.prefill_beside_s for r in rounds),
        decode_alone_tokens_per_s=decode.tokens(steps) / statistics.median(r.decode_alone_s for r in rounds),
        decode_kept=statistics.median(r.decode_alone_s / r.decode_beside_s for r in rounds),
        others=max(r.others for r in rounds),
    )


def targets(row: Row) -> list[Target]:
    """One for each of the two."""
    pair = f"{row.model}, {row.prefill} beside {row.decode}"
    kept = {"prefill": row.prefill_kept, "decode": row.decode_kept}
    return [
        Target(
            name=f"{pair}: share of its speed that {name} keeps",
            value=share,
            target=SHARE_TARGET,
            met=share >= SHARE_TARGET,
        )
        for name, share in kept.items()
    ]
