"""The systemd units start commands that exist, with options they take, on addresses that other boards reach."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.jetson import profiles

DEPLOY = Path(profiles.__file__).parent / "deploy"
MODULES = {"edgellm-node": "edgellm.runtime.cli", "edgellm-serve": "edgellm.orchestrator.serve"}
ENVIRONMENT = {"${EDGELLM_ORCHESTRATOR}": "127.0.0.1:1", "${EDGELLM_BUNDLE}": "no-bundle", "%i": "e", "%H": "board"}


def command(unit: str) -> list[str]:
    """What systemd would run, without the folder of the program."""
    found = re.search(r"^ExecStart=/opt/edgellm/bin/(.*)$", (DEPLOY / unit).read_text(), re.MULTILINE)
    assert found is not None
    line = found[1]
    for name, value in ENVIRONMENT.items():
        line = line.replace(name, value)
    return shlex.split(line)


@pytest.mark.parametrize("unit", ["edgellm-node@.service", "edgellm-serve.service"])
def test_units_start_programs_that_other_boards_reach(unit: str, tmp_path: Path) -> None:
    program, *options = command(unit)
    port = "0" if program == "edgellm-node" else "50051"
    assert options[options.index("--listen") + 1] == f"0.0.0.0:{port}", "several nodes of one board need a port each"
    done = subprocess.run(
        [sys.executable, "-m", MODULES[program], *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "no-bundle" in done.stderr.splitlines()[-1]
