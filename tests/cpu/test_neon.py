"""The Arm kernels against their twins, cross-compiled and run in an emulator."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"


@pytest.mark.slow  # compiles all kernels
def test_neon_kernels_equal_their_twins(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    missing = [program for program in (COMPILER, EMULATOR, "cmake") if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user, cmake)")
    options = (*SYSTEM, "-DEDGELLM_CHECK=ON", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXE_LINKER_FLAGS=-static")
    subprocess.run([cmake, "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", tmp_path, "-j2"], check=True, capture_output=True)
    check = tmp_path / "engines/cpu/native/kernel_check"
    done = subprocess.run([EMULATOR, check], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon checked" in done.stdout
