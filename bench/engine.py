"""The native CPU engine beside its peers, on the same weights and cores, in one run that also measures the machine.

`--peers` compares with every program that can be installed here, each in an environment that is set up when it is
first needed; without it only with transformers. Nothing is compared while others use the processors.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import busy, chart
from bench.comparison import OURS_BY_PHASE, Compared, Comparison, Settings
from bench.engine_report import OursRow, PeerRow, behind, ours_rows, peer_rows, targets
from bench.machine_limits import MachineLimits, last_level_cache_mib
from bench.pairs import DECODE_1, DECODE_8, PREFILL_512, SCENARIOS, Scenario
from bench.peers.contenders import PEERS, TRANSFORMERS, Contender, model_path
from bench.peers.environments import Environments, UnavailableError
from bench.peers.models import MODELS, Model, ModelStore
from bench.real_time import real_time
from bench.report import Report, machine

OUT: Final = Path(__file__).parent / "out"
QUICK_MODELS: Final = ("smollm2",)
QUICK_SCENARIOS: Final = (DECODE_1, DECODE_8, PREFILL_512)
QUICK_PEERS: Final = frozenset({"llama.cpp Q4_0", "OpenVINO GenAI INT4", "OpenVINO GenAI FP16"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", action="store_true", help="compare with all peers, not with transformers alone")
    parser.add_argument("--quick", action="store_true", help="one model, the strongest peers: a ratio within 3 minutes")
    parser.add_argument("--prepare", action="store_true", help="only install peers and convert models")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: smollm2; with --peers all")
    parser.add_argument("--rounds", type=int, default=5, help="per figure, after one that does not count (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--normal-priority", action="store_true", help="do not ask for the SCHED_RR scheduler")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """ValueError if others use the machine, there is no compiler, or a model is missing."""
    say = Console(stderr=True, log_path=False).log
    environments, store, models = Environments(say), ModelStore(say), _models(options)
    if options.prepare:
        return Report(
            name="engine",
            machine=machine(),
            results=[],
            targets=[],
            notes=_prepare(environments, store, models, _peers(options)),
        )
    busy.refuse_if_busy(options.even_if_busy)
    limits = MachineLimits(options.threads)
    comparison = Comparison(_settings(options), environments, store, limits, say)
    results = list(_compare(comparison, models, options))
    compared = [result for result in results if isinstance(result, Compared)]
    missing = [f"not compared: {result}" for result in results if isinstance(result, str)]
    with real_time(wanted=not options.normal_priority):
        peaks = limits.peaks()
    ours = ours_rows(compared, peaks)
    rows: list[OursRow | PeerRow] = [*ours, *peer_rows(compared)]
    report = Report(
        name="engine",
        machine=machine() | {"l3_mib": last_level_cache_mib()} | _conditions(options, compared) | asdict(peaks),
        results=[asdict(row) for row in rows],
        targets=[] if options.even_if_busy else targets(ours, compared),
        notes=[*missing, *behind(compared)],
    )
    return _written(report, ours, compared)


def _compare(comparison: Comparison, models: Sequence[Model], options: argparse.Namespace) -> Iterator[Compared | str]:
    for model in models:
        try:
            yield from comparison.run(model, _peers(options), _scenarios(options))
        except UnavailableError as error:
            raise ValueError(f"our own engine does not run on {model.name}: {error}") from error


def _models(options: argparse.Namespace) -> list[Model]:
    names = options.models or (QUICK_MODELS if options.quick or not options.peers else MODELS)
    return [MODELS[name] for name in names]


def _peers(options: argparse.Namespace) -> Sequence[Contender]:
    if not options.peers:
        return (TRANSFORMERS,)
    return [peer for peer in PEERS if not options.quick or peer.name in QUICK_PEERS]


def _scenarios(options: argparse.Namespace) -> Sequence[Scenario]:
    return QUICK_SCENARIOS if options.quick else SCENARIOS


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        threads=options.threads,
        rounds=options.rounds,
        real_time=not options.normal_priority,
        even_if_busy=options.even_if_busy,
    )


def _prepare(
    environments: Environments, store: ModelStore, models: Sequence[Model], peers: Sequence[Contender]
) -> list[str]:
    """A sentence for each form of each model: there, or why not."""
    notes = []
    for model in models:
        for contender in (*OURS_BY_PHASE.values(), *peers):
            try:
                prepared = environments.prepare(contender.environment)
                model_path(store, contender, model, prepared)
                notes.append(f"{contender.name} on {model.name}: ready")
            except UnavailableError as error:
                notes.append(f"{contender.name} on {model.name}: {error}")
    return notes


def _conditions(options: argparse.Namespace, compared: Sequence[Compared]) -> dict[str, object]:
    schedulers = sorted({result.scheduler for result in compared})
    return {
        "threads": options.threads,
        "rounds": options.rounds,
        "scheduler": ", ".join(schedulers),
        "measured_although_busy": options.even_if_busy,
    }


def _written(report: Report, ours: Sequence[OursRow], compared: Sequence[Compared]) -> Report:
    """The same report with notes on where it was written."""
    OUT.mkdir(exist_ok=True)
    written = [str(OUT / "engine.json")]
    (OUT / "engine.json").write_text(report.as_json())
    if chart.draw(chart.panels(ours, compared), OUT / "engine.svg"):
        written.append(str(OUT / "engine.svg"))
    else:
        print("bench engine: no chart; matplotlib is not installed (pip install 'edgellm[bench]')", file=sys.stderr)
    return report.with_note(f"written: {', '.join(written)}")
