"""The native CPU engine beside itself: outlier channels against none, INT8 KV against half, long context against short.

Both of a pair are loaded, and run by turns with a reading of the memory before each round. Weights are rounded to
nearest, so these are figures of speed alone.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Console

from bench import busy
from bench.engine_report import embedding_bytes
from bench.loading import Loaded, Loader
from bench.machine_limits import MachineLimits
from bench.pairs import DECODE_1, MAX_STEPS, Pairing, Scenario, bytes_per_step
from bench.peers.contenders import OURS, VARIANTS
from bench.peers.environments import UnavailableError
from bench.peers.models import MODELS, Model
from bench.report import Report, Target, machine
from bench.turns import Side, Turns, side, warm_up

LONG: Final = Scenario(phase="decode", batch=1, context=8192 - MAX_STEPS)
SHORT: Final = Scenario(phase="decode", batch=1, context=32)
OUTLIER_COST_TARGET: Final = 0.08
INT8_KV_TARGET: Final = 1.6
KV_BANDWIDTH_TARGET: Final = 0.75


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine in one scenario beside the same with one thing changed."""

    model: str
    what: str
    scenario: str
    tokens_per_s: float
    beside: str
    beside_tokens_per_s: float
    times: float
    """How many times faster than what it is beside: the median of rounds."""
    of_bandwidth: float
    """Packed weights and KV that a step reads, over the bandwidth read in the same round."""
    kv_gb_per_s: float | None = None
    """Of the KV that the long context has and the short one has not, in the time that it takes longer."""
    kv_of_bandwidth: float | None = None
    """The same over the bandwidth read in the same round."""
    read_gb_per_s: float
    others: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="per figure, after one that does not count (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--normal-priority", action="store_true", help="do not ask for the SCHED_RR scheduler")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """ValueError if others use the machine, there is no compiler, or a model is missing."""
    busy.refuse_if_busy(options.even_if_busy)
    real_time = not options.normal_priority
    say = Console(stderr=True, log_path=False).log
    turns = Turns(
        limits=MachineLimits(options.threads),
        rounds=options.rounds,
        real_time=real_time,
        even_if_busy=options.even_if_busy,
    )
    loader = Loader.telling(say, threads=options.threads, real_time=real_time)
    found = [result for name in options.models for result in _measure(MODELS[name], loader, turns)]
    rows = [result for result in found if isinstance(result, Row)]
    return Report(
        name="variants",
        machine=machine() | {"threads": options.threads, "measured_although_busy": options.even_if_busy},
        results=[asdict(row) for row in rows],
        targets=[] if options.even_if_busy else [one for row in rows if (one := target(row)) is not None],
        notes=[result for result in found if isinstance(result, str)],
    )


def _measure(model: Model, loader: Loader, turns: Turns) -> Iterator[Row | str]:
    """A row for each pair, or a sentence on why there is none."""
    try:
        with loader.loaded(OURS["int4"], model) as ours:
            with loader.loaded(VARIANTS["no outliers"], model) as plain:
                yield _beside(model, DECODE_1, ours, plain, turns)
            with loader.loaded(VARIANTS["int8 KV"], model) as small:
                yield _beside(model, LONG, small, ours, turns)
                yield _long_beside_short(model, small, turns)
            yield _long_beside_short(model, ours, turns)
    except UnavailableError as error:
        raise ValueError(f"our own engine does not run on {model.name}: {error}") from error


def _beside(model: Model, scenario: Scenario, ours: Loaded, other: Loaded, turns: Turns) -> Row | str:
    steps = warm_up(scenario, ours, other)
    rounds, reason = turns.take(side(ours, scenario, steps), side(other, scenario, steps))
    if not rounds:
        return f"not measured: {ours.contender.name} on {model.name}, {scenario.name}: {reason}"
    return row(model, ours, other.contender.name, Pairing(scenario=scenario, steps=steps, rounds=rounds))


def _long_beside_short(model: Model, ours: Loaded, turns: Turns) -> Row | str:
    """The same engine; only the KV that is read differs."""
    steps = warm_up(LONG, ours)
    ours.run(SHORT, steps)
    short = Side(pid=ours.process.pid, run=lambda: ours.run(SHORT, steps))
    rounds, reason = turns.take(side(ours, LONG, steps), short)
    if not rounds:
        return f"not measured: KV of {ours.contender.name} on {model.name}: {reason}"
    return kv_row(model, ours, Pairing(scenario=LONG, steps=steps, rounds=rounds))


def kv_row(model: Model, ours: Loaded, pairing: Pairing) -> Row | str:
    """Of a long context beside a short one."""
    if not pairing.takes_longer:
        return (
            f"not measured: KV of {ours.contender.name} on {model.name}: {LONG.name} took no longer than {SHORT.name}"
        )
    return row(model, ours, SHORT.name, pairing, (LONG.context - SHORT.context) * kv_bytes_per_token(model, ours))


def _step_bytes(model: Model, ours: Loaded, pairing: Pairing) -> float:
    weight_bytes = ours.weight_bytes - embedding_bytes(model)
    return bytes_per_step(pairing.scenario, weight_bytes, kv_bytes_per_token(model, ours), pairing.steps)


def kv_bytes_per_token(model: Model, ours: Loaded) -> int:
    """As this engine stores it: INT8 has a half-precision scale per vector of a head."""
    if ours.contender != VARIANTS["int8 KV"]:
        return model.kv_bytes_per_token
    return model.kv_bytes_per_token // 2 + 4 * model.num_layers * model.kv_heads


def row(model: Model, ours: Loaded, beside: str, pairing: Pairing, kv_bytes: int | None = None) -> Row:
    """kv_bytes: what each step of ours reads more than what it is beside."""
    return Row(
        model=model.name,
        what=ours.contender.name,
        scenario=pairing.scenario.name,
        tokens_per_s=pairing.ours_tokens_per_s,
        beside=beside,
        beside_tokens_per_s=pairing.peer_tokens_per_s,
        times=pairing.ratio,
        of_bandwidth=pairing.of_bandwidth(_step_bytes(model, ours, pairing)),
        kv_gb_per_s=None if kv_bytes is None else pairing.extra_gb_per_s(kv_bytes),
        kv_of_bandwidth=None if kv_bytes is None else pairing.extra_of_bandwidth(kv_bytes),
        read_gb_per_s=pairing.read_gb_per_s,
        others=pairing.others_share,
    )


def target(row: Row) -> Target | None:
    """What was promised of a row, by what it is beside. INT8 KV is to be faster, not to reach the bandwidth."""
    if row.kv_of_bandwidth is not None:
        if row.what == VARIANTS["int8 KV"].name:
            return None
        name, value, wanted = "of the bandwidth reading KV", row.kv_of_bandwidth, KV_BANDWIDTH_TARGET
        return Target(name=f"{row.model}, {row.what}, {name}", value=value, target=wanted, met=value >= wanted)
    if row.beside == VARIANTS["no outliers"].name:
        value = 1 - row.times
        name = f"{row.model}, cost of outlier channels at most"
        return Target(name=name, value=value, target=OUTLIER_COST_TARGET, met=value <= OUTLIER_COST_TARGET)
    name = f"{row.model}, INT8 KV at {LONG.context}, times half KV"
    return Target(name=name, value=row.times, target=INT8_KV_TARGET, met=row.times >= INT8_KV_TARGET)
