"""The edgellm-profile command: what devices there are, what this one is doing, and Nsight runs on it."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from edgellm.jetson.discrete_gpu import read_discrete_gpu
from edgellm.jetson.profiles import GIB, PROFILES
from edgellm.jetson.scripts.nsight import Profiling, profile_command, shell_lines, stats_command, tegrastats_command
from edgellm.jetson.scripts.run import ProfilingError, run_profiling
from edgellm.jetson.telemetry import device_class, read_identity, read_telemetry


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, that of the profiler, or 1 where something is missing."""
    parsed = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        status: int = parsed.run(parsed)
    except ProfilingError as error:
        print(f"edgellm-profile: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm-profile", description="Look at devices.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    devices = commands.add_parser("devices", help="the device classes that cluster.toml can name")
    devices.set_defaults(run=_devices)
    now = commands.add_parser("now", help="load, clocks, temperature, power and memory of this machine")
    now.add_argument("--json", action="store_true", help="print one JSON object")
    now.set_defaults(run=_now)
    for tool, name in (("nsys", "Nsight Systems"), ("ncu", "Nsight Compute")):
        _add_tool(commands.add_parser(tool, help=f"run a command under {name}"), tool)
    return parser


def _add_tool(parser: argparse.ArgumentParser, tool: str) -> None:
    parser.add_argument("--output", type=Path, default=Path("profile"), help="report, without suffix")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    if tool == "nsys":
        parser.add_argument("--gpu-metrics", action="store_true", help="sample counters; not on every integrated GPU")
    else:
        parser.add_argument("--kernels", default=Profiling.kernels, help="default: %(default)s")
        parser.add_argument("--launches", type=int, default=Profiling.launches, help="default: %(default)s")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, such as: -- edgellm-node ...")
    parser.set_defaults(run=_profile, tool=tool)


def _devices(_parsed: argparse.Namespace) -> int:
    table = Table(caption="data sheets, not our measurements; MHz, TFLOP/s and GB/s by power mode")
    for heading in ("class", "memory GiB", "modes W", "GPU MHz", "FP16 TFLOP/s", "GB/s", "link GB/s"):
        table.add_column(heading, no_wrap=heading == "class")
    for profile in PROFILES.values():
        table.add_row(
            profile.device_class,
            f"{profile.memory_bytes / GIB:g}",
            " / ".join(str(mode.watts) for mode in profile.modes if mode.watts),
            " / ".join(str(mode.gpu_clock_mhz) for mode in profile.modes if mode.gpu_clock_mhz),
            " / ".join(f"{mode.half_tflops:.1f}" for mode in profile.modes),
            " / ".join(f"{mode.memory_bandwidth_gb_s:g}" for mode in profile.modes),
            f"{profile.link_gb_s:.3g}",
        )
    Console().print(table)
    return 0


def _now(parsed: argparse.Namespace) -> int:
    identity, telemetry, gpu = read_identity(), read_telemetry(), read_discrete_gpu()
    reading = {
        "device_class": device_class(identity, telemetry.memory_total_bytes),
        "identity": dataclasses.asdict(identity),
        "telemetry": dataclasses.asdict(telemetry),
        "discrete_gpu": None if gpu is None else dataclasses.asdict(gpu),
    }
    encoded = msgspec.json.encode(reading)
    print((encoded if parsed.json else msgspec.json.format(encoded, indent=2)).decode())
    return 0


def _profile(parsed: argparse.Namespace) -> int:
    chosen = {field.name for field in dataclasses.fields(Profiling)} & vars(parsed).keys()
    profiling = Profiling(**{name: getattr(parsed, name) for name in chosen - {"command"}}, command=(*parsed.command,))
    if not parsed.dry_run:
        return run_profiling(profiling)
    after = [stats_command(profiling.output)] if profiling.tool == "nsys" else []
    print(shell_lines([tegrastats_command(profiling), profile_command(profiling), *after]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
