"""Run a profiling command with tegrastats beside it."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from edgellm.jetson.scripts.nsight import Profiling, missing_tool, profile_command, stats_command, tegrastats_command


class ProfilingError(Exception):
    """Profiling cannot start; the message says what is missing."""


def run_profiling(profiling: Profiling) -> int:
    """Profile, then print the summary. Returns the first exit status that is not 0. Raises ProfilingError."""
    problem = missing_tool(profiling.tool, shutil.which(profiling.tool))
    if problem is not None:
        raise ProfilingError(problem)
    profiling.output.parent.mkdir(parents=True, exist_ok=True)
    with _tegrastats(profiling):
        status = subprocess.run(profile_command(profiling), check=False).returncode
    if status == 0 and profiling.tool == "nsys":
        status = subprocess.run(stats_command(profiling.output), check=False).returncode
    return status


@contextmanager
def _tegrastats(profiling: Profiling) -> Iterator[None]:
    """tegrastats while the block runs, on machines that have it."""
    if shutil.which("tegrastats") is None:
        yield
        return
    recorder = subprocess.Popen(tegrastats_command(profiling))
    try:
        yield
    finally:
        recorder.terminate()
        recorder.wait(timeout=10)
