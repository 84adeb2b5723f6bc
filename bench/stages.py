"""Two pipeline stages on this machine beside one stage on the same cores: tokens per second of the same requests.

Beside it what a step costs in each stage and between them, which is what bounds the share that two stages reach.

Both clusters are up, each a prefill node and its decode nodes as processes, and take turns; the other one idles. The
two bundles have to be built alike but for their cluster file.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import busy
from bench.clusters import BundleCluster, Steady, median_ratio, median_tokens_per_s, random_prompts, write_by_turns
from bench.node_metrics import StepTimes
from bench.report import Report, Target, machine
from edgellm.engines.bundle import BUNDLE_FILE
from edgellm.orchestrator.bundle import ServedBundle, open_bundle

MAX_TOKENS: Final = 512
"""Of an answer: more than any client gets before all of them have had enough."""
SHARE_TARGET: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians of rounds."""

    stages: int
    engines: str
    requests: int
    context: int
    tokens_per_s: float
    of_one_stage: float
    """Tokens per second over those of one stage in the same round."""
    stage_0_ms: float | None
    """A step of its engine; like the next two a median over rounds, of what the nodes say themselves."""
    stage_1_ms: float | None
    hop_ms: float | None
    """From sending a step to stage 1 to its result, less stage 1's own step: the network, and waiting for its turn."""
    others: float
    """Share of the processors that others used, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--two", type=Path, required=True, help="bundle of two decode stages")
    parser.add_argument("--one", type=Path, required=True, help="bundle of one decode stage, built alike")
    parser.add_argument("--rounds", type=int, default=5, help="of each, after one that does not count (%(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="running at once (%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each (%(default)s)")
    parser.add_argument("--even-if-busy", action="store_true", help="measure all the same; nothing is held to targets")


def run(options: argparse.Namespace) -> Report:
    """Raises ClusterStartError, and ValueError if a request fails, others use the machine or the bundles differ."""
    busy.refuse_if_busy(options.even_if_busy)
    two, one = open_bundle(options.two), open_bundle(options.one)
    check_alike(two, one)
    served = [BundleCluster(bundle=bundle, number=number) for number, bundle in enumerate((two, one))]
    prompts = random_prompts(options.requests, options.context)
    runs = write_by_turns(served, prompts, MAX_TOKENS, options.rounds)
    rows = [_row(cluster, taken, runs[-1], options) for cluster, taken in zip(served, runs, strict=True)]
    return Report(
        name="stages",
        machine=machine() | {"rounds": options.rounds, "measured_although_busy": options.even_if_busy},
        results=[asdict(row) for row in rows],
        targets=[target(rows[0])] if all(row.others <= busy.BUSY_SHARE for row in rows) else [],
        notes=[
            f"disturbed, so not held to a target: others used up to {row.others:.0%} of the processors"
            for row in rows
            if row.others > busy.BUSY_SHARE
        ],
    )


def check_alike(two: ServedBundle, one: ServedBundle) -> None:
    """ValueError if the bundles have not two stages and one, or are not of one model, recipe and KV."""
    counts = [len(_decode_engines(bundle)) for bundle in (two, one)]
    if counts != [2, 1]:
        raise ValueError(f"{two.folder} has {counts[0]} decode stages and {one.folder} {counts[1]}; needed are 2 and 1")
    for part in ("model", "kv", "provenance"):
        if _contents(two)[part] != _contents(one)[part]:
            raise ValueError(f"{two.folder} and {one.folder} differ in {part}; build both alike but for --cluster")


def _decode_engines(bundle: ServedBundle) -> list[str]:
    return [placement.engine for placement in bundle.index.plan.placements if placement.role == "decode"]


def _contents(bundle: ServedBundle) -> dict[str, object]:
    return dict(json.loads((bundle.folder / BUNDLE_FILE).read_bytes()))


def _row(served: BundleCluster, runs: Sequence[Steady], one: Sequence[Steady], options: argparse.Namespace) -> Row:
    engines = _decode_engines(served.bundle)
    places = [number for number, node in enumerate(served.nodes) if node.engine in engines]
    step_ms = [median_of([run.step_times[place].step_ms for run in runs]) for place in places]
    return Row(
        stages=len(engines),
        engines=", ".join(engines),
        requests=options.requests,
        context=options.context,
        tokens_per_s=median_tokens_per_s(runs),
        of_one_stage=median_ratio(runs, one),
        stage_0_ms=step_ms[0],
        stage_1_ms=step_ms[1] if len(places) > 1 else None,
        hop_ms=median_of([hop_ms([run.step_times[place] for place in places]) for run in runs]),
        others=max(run.others for run in runs),
    )


def hop_ms(stages: Sequence[StepTimes]) -> float | None:
    """stages: of one round. None of a single stage."""
    if len(stages) < 2 or stages[0].round_trip_ms is None or stages[1].step_ms is None:
        return None
    return stages[0].round_trip_ms - stages[1].step_ms


def median_of(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    return statistics.median(found) if (found := [value for value in values if value is not None]) else None


def target(row: Row) -> Target:
    """Of the row of two stages."""
    share = row.of_one_stage
    name = f"two stages' share of one stage's tokens per second, {row.requests} requests"
    return Target(name=name, value=share, target=SHARE_TARGET, met=share >= SHARE_TARGET)
