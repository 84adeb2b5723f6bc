"""Telemetry from made-up boards: trees with the files that Jetson Linux has."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from edgellm.jetson.profiles import GIB
from edgellm.jetson.telemetry import Identity, Telemetry, device_class, read_identity, read_telemetry

ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3\n# second line\n",
    "proc/meminfo": "MemTotal:  7802860 kB\nMemFree:  500000 kB\nMemAvailable:  4000000 kB\nHugePages_Total: 0\n",
    "sys/devices/platform/bus@0/17000000.gpu/load": "735\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/devfreq/other/cur_freq": "1\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48250\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51000\n",
    "sys/class/hwmon/hwmon0/name": "pwmfan\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "2400\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr2_input": "900\n",
}


def make_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_board_is_read(tmp_path: Path) -> None:
    assert read_telemetry(make_tree(tmp_path, ORIN_NANO)) == Telemetry(
        gpu_load=0.735,
        gpu_clock_mhz=624.75,
        gpu_max_clock_mhz=1020.0,
        temperatures_c={"cpu-thermal": 48.25, "gpu-thermal": 51.0},
        power_w=pytest.approx(12.0),
        memory_total_bytes=7802860 * 1024,
        memory_available_bytes=4000000 * 1024,
    )
    identity = read_identity(tmp_path)
    assert identity.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert identity.l4t_release == "# R36 (release), REVISION: 4.3"


def test_the_other_place_of_the_load(tmp_path: Path) -> None:
    files = {"sys/devices/platform/gpu.0/load": "1000\n"}
    assert read_telemetry(make_tree(tmp_path, files)).gpu_load == 1.0


def test_what_a_machine_lacks_is_none(tmp_path: Path) -> None:
    assert read_telemetry(tmp_path) == Telemetry(
        gpu_load=None,
        gpu_clock_mhz=None,
        gpu_max_clock_mhz=None,
        temperatures_c={},
        power_w=None,
        memory_total_bytes=None,
        memory_available_bytes=None,
    )
    assert read_identity(tmp_path) == Identity(model=None, l4t_release=None)


def test_a_sensor_that_answers_nonsense_is_left_out(tmp_path: Path) -> None:
    files = ORIN_NANO | {
        "sys/devices/platform/bus@0/17000000.gpu/load": "N/A\n",
        "sys/class/thermal/thermal_zone0/temp": "\n",
        "sys/class/hwmon/hwmon1/curr1_input": "?\n",
    }
    telemetry = read_telemetry(make_tree(tmp_path, files))
    assert telemetry.gpu_load is None
    assert telemetry.temperatures_c == {"gpu-thermal": 51.0}
    assert telemetry.power_w is None


def test_this_machine_has_memory() -> None:
    telemetry = read_telemetry()
    assert telemetry.memory_total_bytes is not None
    assert telemetry.memory_available_bytes is not None
    assert 0 < telemetry.memory_available_bytes <= telemetry.memory_total_bytes


@pytest.mark.parametrize(
    ("model", "memory_gib", "expected"),
    [
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "orin-nx-16gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.4, "orin-nx-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7.4, "orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3.4, "orin-nano-4gb"),
        ("Raspberry Pi 5 Model B", 7.4, None),
        (None, 64.0, None),
    ],
)
def test_a_board_knows_its_class(model: str | None, memory_gib: float, expected: str | None) -> None:
    identity = Identity(model=model, l4t_release=None)
    assert device_class(identity, int(memory_gib * GIB)) == expected
