"""The edgellm-sim command: run a workload, or look for seeds that break an invariant."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import msgspec
from rich.progress import track

from edgellm.jetson.profiles import PROFILES
from edgellm.orchestrator.arguments import integer_from, positive
from edgellm.orchestrator.policies import POLICIES
from edgellm.orchestrator.sim.cluster import TraceError
from edgellm.orchestrator.sim.fuzz import draw_scenario, run_scenario, shrink, tell
from edgellm.orchestrator.sim.run import RunConfig, simulate


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except TraceError as error:
        print(f"edgellm-sim: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm-sim", description="Simulate an EdgeLLM cluster.")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="dual_pool")
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="percentiles of TTFT and TPOT, and throughput, of a workload")
    run.add_argument("--trace", type=Path, help="JSON lines of {arrival_s, prompt_tokens, max_tokens}")
    run.add_argument("--rate", type=positive, default=RunConfig.rate, help="requests per second (%(default)s)")
    for name in ("count", "prompt_tokens", "max_tokens", "prefill_nodes", "decode_nodes", "kv_blocks", "seed"):
        smallest = 0 if name == "seed" else 1
        run.add_argument(
            _option(name), type=integer_from(smallest), default=getattr(RunConfig, name), help="(%(default)s)"
        )
    for name in ("prefill_class", "decode_class"):
        run.add_argument(
            _option(name), choices=sorted(PROFILES), default=getattr(RunConfig, name), help="(%(default)s)"
        )
    run.add_argument("--json", action="store_true")
    run.set_defaults(run=_run)

    fuzz = commands.add_parser("fuzz", help="random faults; a seed that breaks an invariant tells its story")
    fuzz.add_argument("--seeds", type=integer_from(1), default=200, help="how many (%(default)s)")
    fuzz.add_argument("--first-seed", type=integer_from(0), default=0, help="(%(default)s)")
    fuzz.set_defaults(run=_fuzz)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _run(args: argparse.Namespace) -> int:
    config = RunConfig(**{field.name: getattr(args, field.name) for field in fields(RunConfig)})
    report = simulate(config, POLICIES[args.policy]())
    if args.json:
        print(msgspec.json.encode(report).decode())
        return 0
    print(f"{report.requests} requests, {report.failed} failed, {report.tokens_per_s:.1f} tokens/s, {report.paths}")
    for name, values in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms)):
        print(f"{name} ms  " + "  ".join(f"{key} {value:.1f}" for key, value in values.items()))
    return 0


def _fuzz(args: argparse.Namespace) -> int:
    policy = POLICIES[args.policy]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed in track(seeds, description="fuzzing", transient=True):
        _, failure = run_scenario(draw_scenario(seed), policy())
        if failure is not None:
            print(tell(shrink(failure, policy)))
            return 1
    print(f"{len(seeds)} seeds from {args.first_seed}: every invariant held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
