"""The edgellm-sim command: run a workload, look for seeds that break an invariant, or tell a scenario's story."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import msgspec
from rich.progress import track

from edgellm.jetson.profiles import PROFILES
from edgellm.orchestrator.arguments import integer_from, positive
from edgellm.orchestrator.policies import POLICIES
from edgellm.orchestrator.sim.fuzz import ScenarioError, draw_scenario, read_scenario, run_scenario, shrink, tell
from edgellm.orchestrator.sim.run import RunConfig, simulate
from edgellm.orchestrator.sim.story import Story
from edgellm.orchestrator.sim.workload import TraceError


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (TraceError, ScenarioError) as error:
        print(f"edgellm-sim: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm-sim", description="Simulate an EdgeLLM cluster.")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="dual_pool")
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="percentiles of TTFT and TPOT, and throughput, of a workload")
    run.add_argument("--trace", type=Path, help="JSON lines of {arrival_s, prompt_tokens, max_tokens}")
    run.add_argument("--rate", type=positive, default=RunConfig.rate, help="requests per second (%(default)s)")
    numbers = ("count", "prompt_tokens", "max_tokens", "prefill_nodes", "decode_nodes", "decode_stages")
    for name in (*numbers, "kv_blocks", "seed"):
        smallest = 0 if name == "seed" else 1
        run.add_argument(
            _option(name), type=integer_from(smallest), default=getattr(RunConfig, name), help="(%(default)s)"
        )
    for name in ("prefill_class", "decode_class"):
        run.add_argument(
            _option(name), choices=sorted(PROFILES), default=getattr(RunConfig, name), help="(%(default)s)"
        )
    run.add_argument("--no-hot-copies", dest="hot_copies", action="store_false", help="keep no copies of KV")
    run.add_argument("--json", action="store_true")
    run.set_defaults(run=_run)

    fuzz = commands.add_parser("fuzz", help="random faults; a seed that breaks an invariant tells its story")
    fuzz.add_argument("--seeds", type=integer_from(1), default=200, help="how many (%(default)s)")
    fuzz.add_argument("--first-seed", type=integer_from(0), default=0, help="(%(default)s)")
    fuzz.add_argument("--jobs", type=integer_from(1), default=os.cpu_count() or 1, help="processes (%(default)s)")
    fuzz.set_defaults(run=_fuzz)

    replay = commands.add_parser("replay", help="the story of one scenario, as `fuzz` printed it")
    replay.add_argument("scenario", type=Path, help="JSON file")
    replay.set_defaults(run=_replay)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(args: argparse.Namespace) -> int:
    config = RunConfig(**{field.name: getattr(args, field.name) for field in fields(RunConfig)})
    report = simulate(config)
    if args.json:
        print(msgspec.json.encode(report).decode())
        return 0
    print(f"{report.requests} requests, {report.failed} failed, {report.tokens_per_s:.1f} tokens/s, {report.paths}")
    for name, values in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms)):
        print(f"{name} ms  " + "  ".join(f"{key} {value:.1f}" for key, value in values.items()))
    return 0


def _fuzz(args: argparse.Namespace) -> int:
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for story in track(_stories(seeds, args.policy, args.jobs), "fuzzing", total=len(seeds), transient=True):
        if story is not None:
            print(story)
            return 1
    print(f"{len(seeds)} seeds from {args.first_seed}: every invariant held")
    return 0


def _stories(seeds: range, policy: str, jobs: int) -> Iterator[str | None]:
    """In processes that all order sets alike, so that a seed is one story."""
    os.environ["PYTHONHASHSEED"] = "0"
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        yield from pool.map(partial(story_of, policy), seeds, chunksize=5)
    finally:
        pool.shutdown(cancel_futures=True)


def story_of(policy: str, seed: int) -> str | None:
    """What broke, in the smallest scenario that still breaks; None where nothing did."""
    failure = run_scenario(draw_scenario(seed), POLICIES[policy], Story(wanted=False))
    return None if failure is None else tell(shrink(failure, POLICIES[policy]), POLICIES[policy])


def _replay(args: argparse.Namespace) -> int:
    scenario, story = read_scenario(args.scenario), Story(wanted=True)
    failure = run_scenario(scenario, POLICIES[args.policy], story)
    print("\n".join(story.lines))
    print("every invariant held" if failure is None else failure.error)
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
