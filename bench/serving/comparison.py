"""Each server in turn under rising rates of requests, until it no longer holds the bounds."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import busy
from bench.peers.environments import UnavailableError
from bench.report import Report, Target, machine
from bench.serving.clients import RequestError
from bench.serving.load import measure, warm_up
from bench.serving.observations import TPOT_P99_MS, TTFT_P99_MS, Step, highest_rate
from bench.serving.servers import SLOTS, Server, servers

OUT: Final = Path(__file__).parents[1] / "out"
OURS: Final = "EdgeLLM"
RATE_TARGET_PER_S: Final = 10.0
QUICK_RATES: Final = (6.0,)
QUICK_DURATION_S: Final = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `bench system --peers`."""
    parser.add_argument("--peers", action="store_true", help="compare with llama-server and vLLM at rising rates")
    parser.add_argument("--rates", type=float, nargs="+", default=(4, 6, 8, 10, 12, 16), help="default: %(default)s")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals per rate (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="with --peers: one rate, 15 seconds")
    parser.add_argument("--threads", type=int, default=busy.core_count(), help="of peers (default: %(default)s)")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """ValueError if others use the machine; ClusterStartError if ours does not start."""
    busy.refuse_if_busy(options.even_if_busy)
    say = Console(stderr=True, log_path=False).log
    rates, duration_s = (QUICK_RATES, QUICK_DURATION_S) if options.quick else (sorted(options.rates), options.duration)
    steps, notes = list[Step](), list[str]()
    for server in servers(options.bundle, options.threads, say):
        try:
            steps += _climb(server, rates, duration_s, say)
        except (UnavailableError, RequestError) as error:
            notes.append(f"not compared: {server.name}: {error}")
    report = Report(
        name="system",
        machine=machine() | {"slots": SLOTS, "seconds_per_rate": duration_s, "though_busy": options.even_if_busy},
        results=[asdict(step) | {"holds": step.holds} for step in steps],
        targets=[] if options.even_if_busy or options.quick else targets(steps),
        notes=[*notes, *_verdicts(steps), *unlike(steps), *_disturbed(steps)],
    )
    OUT.mkdir(exist_ok=True)
    (OUT / "system.json").write_text(report.as_json())
    return report.with_note(f"written: {OUT / 'system.json'}")


def _climb(server: Server, rates: Sequence[float], duration_s: float, say: Callable[[str], None]) -> Iterator[Step]:
    """Up to the first rate that it does not hold."""
    say(f"starting {server.name}")
    with server.start() as running:
        warm_up(running)
        for rate in rates:
            say(f"{server.name} ({server.weights}) at {rate:g} requests/s")
            step = measure(server.name, server.weights, running, rate, duration_s)
            yield step
            if not step.holds:
                return


def targets(steps: Sequence[Step]) -> list[Target]:
    """The rate that ours has to hold, and more than every peer."""
    ours = highest_rate(steps, OURS)
    wanted = {"requests/s held": RATE_TARGET_PER_S}
    for server in sorted({step.server for step in steps} - {OURS}):
        wanted[f"requests/s held, {server}'s"] = highest_rate(steps, server)
    return [Target(name=name, value=ours, target=rate, met=ours >= rate) for name, rate in wanted.items()]


def _verdicts(steps: Sequence[Step]) -> list[str]:
    bounds = f"TTFT p99 under {TTFT_P99_MS:g} ms and TPOT p99 under {TPOT_P99_MS:g} ms"
    names = dict.fromkeys(step.server for step in steps)
    return [f"{name}: {bounds} up to {highest_rate(steps, name):g} requests/s" for name in names]


def unlike(steps: Sequence[Step]) -> list[str]:
    """A sentence for each server whose weights have more bits than those that ours writes with."""
    wide = dict.fromkeys((step.server, step.weights) for step in steps if "int4" not in step.weights)
    return [
        f"not the same precision: {server} has {weights} weights, ours writes with int4" for server, weights in wide
    ]


def _disturbed(steps: Sequence[Step]) -> list[str]:
    return [
        f"disturbed: {step.server} at {step.rate_per_s:g} requests/s: others used {step.others:.0%} of the processors"
        for step in steps
        if step.others > busy.BUSY_SHARE
    ]
