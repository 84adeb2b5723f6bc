"""The native CPU engine beside its peers, on the same weights and cores, in one run that also measures the machine.

`--peers` compares with every program that can be installed here, each in an environment that is set up when it is
first needed; without it only with transformers. Nothing is compared while others use the processors. Every result is
kept when it is there, so the table can be measured in parts, and a run that was cut short be taken up again.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.console import Console

from bench import busy, chart
from bench.comparison import OURS_BY_PHASE, Compared, Comparison
from bench.engine_report import OursRow, PeerRow, behind, ours_rows, peer_rows, targets
from bench.installed_code import Conditions, conditions, kernels_sha256
from bench.loading import Loader
from bench.machine_limits import MachineLimits, last_level_cache_mib
from bench.pairs import DECODE_1, DECODE_8, PREFILL_512, SCENARIOS, Scenario
from bench.peers.contenders import PEERS, TRANSFORMERS, VARIANTS, Contender, model_path
from bench.peers.environments import Environments, UnavailableError
from bench.peers.models import MODELS, Model, ModelStore
from bench.report import Report, machine
from bench.result_store import ResultStore, Wanted, write_whole
from bench.turns import Turns

OUT: Final = Path(__file__).parent / "out"
QUICK_MODELS: Final = ("smollm2",)
QUICK_SCENARIOS: Final = (DECODE_1, DECODE_8, PREFILL_512)
QUICK_PEERS: Final = frozenset({"llama.cpp Q4_0", "OpenVINO GenAI INT4", "OpenVINO GenAI FP16"})
USUAL_THREADS: Final = len(os.sched_getaffinity(0))
BY_NAME: Final = {peer.name: peer for peer in PEERS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(f'"{name}"' for name in BY_NAME)
    parser.add_argument(
        "--peers", nargs="*", choices=BY_NAME, metavar="NAME", help=f"all, or some of {names}; default: transformers"
    )
    parser.add_argument("--quick", action="store_true", help="one model, the strongest peers: a ratio within 3 minutes")
    parser.add_argument("--prepare", action="store_true", help="only install peers and convert models")
    parser.add_argument("--resume", action="store_true", help="measure only what has no result of this version yet")
    parser.add_argument("--report", action="store_true", help="measure nothing: the table of what was measured before")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: smollm2; with --peers all")
    parser.add_argument("--rounds", type=int, default=5, help="per figure, after one that does not count (%(default)s)")
    parser.add_argument("--threads", type=int, default=USUAL_THREADS, help="default: %(default)s")
    parser.add_argument("--normal-priority", action="store_true", help="do not ask for the SCHED_RR scheduler")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """ValueError if others use the machine, there is no compiler, or a model is missing."""
    say = Console(stderr=True, log_path=False).log
    if options.prepare:
        return Report(name="engine", machine=machine(), results=[], targets=[], notes=_prepare(options, say))
    store = ResultStore(folder=OUT / folder_name(options))
    now = conditions(threads=options.threads, real_time=not options.normal_priority)
    missing = [] if options.report else _measure(options, store, now, say)
    report, results = _report(options, store, now, missing)
    written = [str(_json_path(store))]
    if chart.draw(chart.panels(ours_rows(results), results), _json_path(store).with_suffix(".svg")):
        written.append(str(_json_path(store).with_suffix(".svg")))
    else:
        print("bench engine: no chart; matplotlib is not installed (pip install 'edgellm[bench]')", file=sys.stderr)
    return report.with_note(f"written: {', '.join(written)}")


def folder_name(options: argparse.Namespace) -> str:
    """Of results: those that are not taken in the usual way take the place of none that are."""
    parts = ["engine"]
    if options.threads != USUAL_THREADS:
        parts.append(f"{options.threads}-threads")
    if options.normal_priority:
        parts.append("normal-priority")
    if options.even_if_busy:
        parts.append("though-busy")
    return "-".join(parts)


def _measure(options: argparse.Namespace, store: ResultStore, now: Conditions, say: Callable[[str], None]) -> list[str]:
    """Keep every result, and write the report so far, once it is there; a sentence for each that is not there."""
    busy.refuse_if_busy(options.even_if_busy)
    comparison, missing = _comparison(options, now, say), list[str]()
    cells = [cell for cell in _cells(options) if not (options.resume and store.is_current(cell, now))]
    for model in _models(options):
        try:
            for result in comparison.run(model, _by_peer([cell for cell in cells if cell.model == model])):
                if isinstance(result, str):
                    missing.append(f"not compared: {result}")
                elif (kept := store.write(result)) is not None:
                    missing.append(kept)
                _report(options, store, now, missing)
        except UnavailableError as error:
            raise ValueError(f"our own engine does not run on {model.name}: {error}") from error
    return missing


def _comparison(options: argparse.Namespace, now: Conditions, say: Callable[[str], None]) -> Comparison:
    real_time = not options.normal_priority
    return Comparison(
        loader=Loader.telling(say, threads=options.threads, real_time=real_time),
        turns=Turns(
            limits=MachineLimits(options.threads),
            rounds=options.rounds,
            real_time=real_time,
            even_if_busy=options.even_if_busy,
        ),
        conditions=now,
    )


def _report(
    options: argparse.Namespace, store: ResultStore, now: Conditions, missing: Sequence[str]
) -> tuple[Report, list[Compared]]:
    """Of the selected cells, written; and the results that it is made of."""
    gathered = store.gather(_cells(options), now, kernels_sha256())
    ours = ours_rows(gathered.results)
    rows: list[OursRow | PeerRow] = [*ours, *peer_rows(gathered.results)]
    report = Report(
        name="engine",
        machine=machine() | {"l3_mib": last_level_cache_mib()} | _conditions(options, now, gathered.results),
        results=[asdict(row) for row in rows],
        targets=[] if options.even_if_busy else targets(ours, gathered.results),
        notes=[*missing, *gathered.notes, *behind(gathered.results)],
    )
    write_whole(_json_path(store), report.as_json().encode())
    return report, gathered.results


def _json_path(store: ResultStore) -> Path:
    return store.folder.with_suffix(".json")


def _cells(options: argparse.Namespace) -> list[Wanted]:
    scenarios = QUICK_SCENARIOS if options.quick else SCENARIOS
    return [
        Wanted(model=model, peer=peer, scenario=scenario)
        for model in _models(options)
        for peer in _peers(options)
        for scenario in scenarios
        if scenario.phase in peer.phases
    ]


def _by_peer(cells: Sequence[Wanted]) -> list[tuple[Contender, list[Scenario]]]:
    peers = dict.fromkeys(cell.peer for cell in cells)
    return [(peer, [cell.scenario for cell in cells if cell.peer == peer]) for peer in peers]


def _models(options: argparse.Namespace) -> list[Model]:
    names = options.models or (QUICK_MODELS if options.quick or options.peers is None else MODELS)
    return [MODELS[name] for name in names]


def _peers(options: argparse.Namespace) -> Sequence[Contender]:
    if options.peers is None:
        return (TRANSFORMERS,)
    if options.peers:
        return [BY_NAME[name] for name in options.peers]
    return [peer for peer in PEERS if not options.quick or peer.name in QUICK_PEERS]


def _prepare(options: argparse.Namespace, say: Callable[[str], None]) -> list[str]:
    """A sentence for each form of each model: there, or why not."""
    environments, store, notes = Environments(say), ModelStore(say), list[str]()
    for model in _models(options):
        for contender in (*OURS_BY_PHASE.values(), *VARIANTS.values(), *_peers(options)):
            try:
                prepared = environments.prepare(contender.environment)
                model_path(store, contender, model, prepared)
                notes.append(f"{contender.name} on {model.name}: ready")
            except UnavailableError as error:
                notes.append(f"{contender.name} on {model.name}: {error}")
    return notes


def _conditions(options: argparse.Namespace, now: Conditions, results: Sequence[Compared]) -> dict[str, object]:
    schedulers = sorted({result.scheduler for result in results})
    return {
        "threads": now.threads,
        "backend": now.backend_version,
        "scheduler": ", ".join(schedulers),
        "measured_although_busy": options.even_if_busy,
    }
