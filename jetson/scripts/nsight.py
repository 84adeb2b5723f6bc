"""Nsight command lines for a node on a device: what to trace, and how. Written for the boards, not run on one."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

Tool: TypeAlias = Literal["nsys", "ncu"]
REPORT: Final = "cuda_gpu_kern_sum"
"""Time by kernel."""


@dataclass(frozen=True, kw_only=True)
class Profiling:
    """One profiling run of a command."""

    tool: Tool
    command: tuple[str, ...]
    output: Path
    """Report, without suffix."""
    kernels: str = "regex:.*(attention|gemm|dequant).*"
    """For ncu: which kernels. Replaying every kernel of a model does not fit the memory of an 8 GB board."""
    launches: int = 20
    """For ncu: of how many launches of them."""
    gpu_metrics: bool = False
    """For nsys: sample the GPU's counters as well; integrated GPUs may not have them."""
    interval_ms: int = 100
    """For tegrastats, which runs beside."""


def profile_command(profiling: Profiling) -> tuple[str, ...]:
    """The command that profiles."""
    return _nsys(profiling) if profiling.tool == "nsys" else _ncu(profiling)


def stats_command(output: Path) -> tuple[str, ...]:
    """Summarise an nsys report."""
    return ("nsys", "stats", "--report", REPORT, f"{output}.nsys-rep")


def tegrastats_command(profiling: Profiling) -> tuple[str, ...]:
    """Record clocks, power and memory of the board beside the profile."""
    return ("tegrastats", "--interval", str(profiling.interval_ms), "--logfile", f"{profiling.output}.tegrastats")


def _nsys(profiling: Profiling) -> tuple[str, ...]:
    metrics = ("--gpu-metrics-devices=all",) if profiling.gpu_metrics else ()
    return (
        "nsys",
        "profile",
        "--trace=cuda,osrt",
        "--cuda-graph-trace=node",
        "--force-overwrite=true",
        *metrics,
        f"--output={profiling.output}",
        *profiling.command,
    )


def _ncu(profiling: Profiling) -> tuple[str, ...]:
    """The counters belong to root on Jetson, hence sudo; `-E` keeps the environment the command needs."""
    return (
        "sudo",
        "-E",
        "ncu",
        "--target-processes=all",
        "--set=full",
        f"--kernel-name={profiling.kernels}",
        f"--launch-count={profiling.launches}",
        "--force-overwrite",
        f"--export={profiling.output}",
        *profiling.command,
    )


def missing_tool(tool: Tool, found: str | None) -> str | None:
    """What to tell a person whose machine lacks the tool; None if `found` is where it is."""
    if found is not None:
        return None
    name = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}[tool]
    return f"{tool} is not on the PATH: install {name} (part of JetPack and of the CUDA toolkit), or use --dry-run"


def shell_lines(commands: Sequence[Sequence[str]]) -> str:
    """Commands as a person would type them, one a line."""
    return "\n".join(shlex.join(command) for command in commands)
