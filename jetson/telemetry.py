"""What a device is doing: load, clocks, temperature, power and memory.

Written for the boards from NVIDIA's documentation and tested on made-up trees; not run on a board. NVML initialises
on Orin and then answers NotSupported, so boards are read from sysfs; NVML serves discrete GPUs only, and only after
a real query succeeded. Whatever a machine does not have is None, never zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_GPU_LOADS: Final = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
)
_BOARD_RAIL: Final = "VDD_IN"
"""Power of the whole module."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the machine says it is."""

    model: str | None
    """Such as `NVIDIA Jetson Orin Nano Engineering Reference Developer Kit`."""
    l4t_release: str | None
    """First line of /etc/nv_tegra_release: the Jetson Linux release."""


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """One reading."""

    gpu_load: float | None
    """0 to 1."""
    gpu_clock_mhz: float | None
    gpu_max_clock_mhz: float | None
    temperatures_c: dict[str, float]
    """By thermal zone, such as `gpu-thermal`."""
    power_w: float | None
    """Of the whole board, or of a discrete GPU."""
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    """As the kernel estimates it; on a board it counts what the GPU took, which no process's RSS does."""


def read_telemetry(root: Path = Path("/")) -> Telemetry:
    """Read the board whose file system starts at `root`."""
    memory = _meminfo(root)
    return Telemetry(
        gpu_load=_gpu_load(root),
        gpu_clock_mhz=_gpu_clock_mhz(root, "cur_freq"),
        gpu_max_clock_mhz=_gpu_clock_mhz(root, "max_freq"),
        temperatures_c=dict(_temperatures(root)),
        power_w=_board_power_w(root),
        memory_total_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
    )


def read_identity(root: Path = Path("/")) -> Identity:
    """Read what board this is."""
    release = _text(root / "etc/nv_tegra_release")
    return Identity(
        model=_text(root / "proc/device-tree/model"),
        l4t_release=release.splitlines()[0] if release else None,
    )


def device_class(identity: Identity, memory_total_bytes: int | None) -> str | None:
    """The profile of a board, or None for a machine that is none. Modules of one name differ in memory."""
    model = identity.model or ""
    large_bytes = 10 << 30 if "Orin NX" in model else 6 << 30
    large = (memory_total_bytes or 0) > large_bytes
    if "Orin NX" in model:
        return "orin-nx-16gb" if large else "orin-nx-8gb"
    if "Orin Nano" in model:
        return "orin-nano-8gb" if large else "orin-nano-4gb"
    return None


def _gpu_load(root: Path) -> float | None:
    per_mille = (_number(root / path) for path in _GPU_LOADS)
    return next((load / 1000 for load in per_mille if load is not None), None)


def _gpu_clock_mhz(root: Path, which: str) -> float | None:
    hertz = (_number(path) for path in sorted(root.glob(f"sys/class/devfreq/*gpu*/{which}")))
    return next((value / 1e6 for value in hertz if value is not None), None)


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        name, millidegrees = _text(zone / "type"), _number(zone / "temp")
        if name is not None and millidegrees is not None:
            yield name, millidegrees / 1000


def _board_power_w(root: Path) -> float | None:
    """Voltage times current of the board's input rail, as its INA3221 monitor reports them."""
    for monitor in sorted(root.glob("sys/class/hwmon/hwmon*")):
        if _text(monitor / "name") != "ina3221":
            continue
        for label in sorted(monitor.glob("in*_label")):
            channel = label.name.removeprefix("in").removesuffix("_label")
            millivolts, milliamperes = (
                _number(monitor / f"in{channel}_input"),
                _number(monitor / f"curr{channel}_input"),
            )
            if _text(label) == _BOARD_RAIL and millivolts is not None and milliamperes is not None:
                return millivolts * milliamperes * 1e-6
    return None


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in (_text(root / "proc/meminfo") or "").splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) * 1024 for fields in lines if len(fields) == 3 and fields[2] == "kB"}


def _text(path: Path) -> str | None:
    """A small kernel file, without the newline or NUL at its end; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\0\n ")
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
