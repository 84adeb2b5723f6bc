"""edgellm-profile: its tables, its JSON, and Nsight command lines."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.jetson.profile_cli import main
from edgellm.jetson.profiles import PROFILES


def test_devices_lists_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PROFILES)


def test_now_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["now", "--json"]) == 0
    reading = json.loads(capsys.readouterr().out)
    assert reading.keys() == {"device_class", "identity", "telemetry", "discrete_gpu"}
    assert reading["telemetry"]["memory_total_bytes"] > 0


def test_nsys_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["nsys", "--dry-run", "--gpu-metrics", "--output", "out/a b", "--", "edgellm-node", "--bundle", "x"]) == 0
    )
    recorder, profiler, summary = capsys.readouterr().out.splitlines()
    assert recorder == "tegrastats --interval 100 --logfile 'out/a b.tegrastats'"
    assert profiler.startswith("nsys profile --trace=cuda,osrt --cuda-graph-trace=node --force-overwrite=true")
    assert profiler.endswith("--gpu-metrics-devices=all '--output=out/a b' edgellm-node --bundle x")
    assert summary == "nsys stats --report cuda_gpu_kern_sum 'out/a b.nsys-rep'"


def test_ncu_dry_run_has_a_kernel_filter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ncu", "--dry-run", "--kernels", "regex:gemm", "--launches", "3", "--", "edgellm-node"]) == 0
    printed = capsys.readouterr().out
    assert "sudo -E ncu" in printed
    assert "--kernel-name=regex:gemm --launch-count=3" in printed


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_missing_tool_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([tool, "--", "true"]) == 1
    assert f"{tool} is not on the PATH" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["nsys"], ["ncu", "--launches", "many", "--", "true"]])
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def write_tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(("status", "summaries"), [(0, 1), (3, 0)])
def test_nsys_runs_with_tegrastats_beside(tmp_path: Path, status: int, summaries: int) -> None:
    """With programs of those names that write down how they were called."""
    log = tmp_path / "log"
    write_tool(tmp_path / "nsys", f"echo nsys $1 >> {log}; [ $1 = stats ] || exit {status}")
    write_tool(tmp_path / "tegrastats", f"echo tegrastats >> {log}; exec sleep 60")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "edgellm.jetson.profile_cli",
            "nsys",
            "--output",
            tmp_path / "new" / "out",
            "--",
            "true",
        ],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
        timeout=60,
    )
    assert done.returncode == status
    lines = log.read_text().splitlines()
    assert lines.count("nsys profile") == 1
    assert lines.count("nsys stats") == summaries
