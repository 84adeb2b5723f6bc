"""What each class of device can do: numbers for planning, from data sheets and published measurements.

None of the boards' numbers was measured by us. Peak FP16 is SMs x 2048 x clock, dense. The efficiencies of 0.6 turn
peaks into predictions; with them the planner comes within 6 % of the four published INT4-AWQ figures of TensorRT
Edge-LLM (Qwen3-1.7B decodes 60.4 tokens/s on an NX 16GB and 37.4 on a Nano 8GB, a 2B model prefills 2,836 and 1,532
tokens/s), taking the NX at 40 W and the Nano at 15 W; which modes were published is not known.
"""

from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30
GIGABIT_ETHERNET_GB_S: Final = 0.94 / 8
"""Payload of 1 GbE, bytes."""
LOOPBACK_GB_S: Final = 1.6
"""gRPC streams of 1 MiB messages between two processes of one host, from Python."""


@dataclass(frozen=True, kw_only=True)
class PowerMode:
    """Clocks of one power mode."""

    watts: int
    gpu_clock_mhz: int
    half_tflops: float
    """Peak FP16, dense, 10^12 operations per second."""
    memory_bandwidth_gb_s: float
    """Peak, 10^9 bytes per second."""


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One class of device."""

    device_class: str
    description: str
    memory_bytes: int
    """Shared by CPU and GPU."""
    reserved_bytes: int
    """For the operating system and the node process; not available to weights and KV."""
    modes: tuple[PowerMode, ...]
    """In ascending order; the first is how the device comes, and what planning uses unless told otherwise."""
    link_gb_s: float
    """To the other devices, 10^9 bytes per second of payload."""
    link_latency_ms: float
    compute_efficiency: float
    """Share of peak FP16 that prompt processing reaches."""
    bandwidth_efficiency: float
    """Share of peak bandwidth that decoding at batch 1 reaches."""

    @property
    def usable_bytes(self) -> int:
        """Memory for weights, KV and activations."""
        return self.memory_bytes - self.reserved_bytes


def _orin(device_class: str, description: str, memory_gib: int, *modes: PowerMode) -> DeviceProfile:
    return DeviceProfile(
        device_class=device_class,
        description=description,
        memory_bytes=memory_gib * GIB,
        reserved_bytes=3 * GIB // 2,
        modes=modes,
        link_gb_s=GIGABIT_ETHERNET_GB_S,
        link_latency_ms=0.4,
        compute_efficiency=0.6,
        bandwidth_efficiency=0.6,
    )


def _mode(watts: int, gpu_clock_mhz: int, multiprocessors: int, memory_bandwidth_gb_s: float) -> PowerMode:
    return PowerMode(
        watts=watts,
        gpu_clock_mhz=gpu_clock_mhz,
        half_tflops=multiprocessors * 2048 * gpu_clock_mhz * 1e-6,
        memory_bandwidth_gb_s=memory_bandwidth_gb_s,
    )


CPU_LOCAL: Final = DeviceProfile(
    device_class="cpu-local",
    description="the machine at hand, two cores with 16-bit multipliers, native CPU engine",
    memory_bytes=4 * GIB,
    reserved_bytes=GIB // 2,
    modes=(PowerMode(watts=0, gpu_clock_mhz=0, half_tflops=1.0, memory_bandwidth_gb_s=40.0),),
    link_gb_s=LOOPBACK_GB_S,
    link_latency_ms=0.4,
    compute_efficiency=0.5,
    bandwidth_efficiency=0.7,
)
"""A fixed budget, not what is free at the moment, so that a build does not depend on what else is running."""


def _discrete(device_class: str, description: str, memory_gib: int, mode: PowerMode) -> DeviceProfile:
    """One card in an ordinary machine; the processor's memory is not counted."""
    return DeviceProfile(
        device_class=device_class,
        description=description,
        memory_bytes=memory_gib * GIB,
        reserved_bytes=GIB,
        modes=(mode,),
        link_gb_s=GIGABIT_ETHERNET_GB_S,
        link_latency_ms=0.4,
        compute_efficiency=0.6,
        bandwidth_efficiency=0.6,
    )


PROFILES: Final = {
    profile.device_class: profile
    for profile in (
        CPU_LOCAL,
        _orin(
            "orin-nx-16gb",
            "Jetson Orin NX 16GB, Ampere sm_87, 8 SM",
            16,
            _mode(25, 918, 8, 102.0),
            _mode(40, 1173, 8, 102.0),
        ),
        _orin(
            "orin-nx-8gb",
            "Jetson Orin NX 8GB, Ampere sm_87, 8 SM",
            8,
            _mode(20, 765, 8, 102.0),
            _mode(40, 1173, 8, 102.0),
        ),
        _orin(
            "orin-nano-8gb",
            "Jetson Orin Nano 8GB, Ampere sm_87, 8 SM",
            8,
            _mode(15, 625, 8, 68.0),
            _mode(25, 1020, 8, 102.0),
        ),
        _orin(
            "orin-nano-4gb",
            "Jetson Orin Nano 4GB, Ampere sm_87, 4 SM",
            4,
            _mode(10, 625, 4, 34.0),
            _mode(25, 1020, 4, 51.0),
        ),
        _discrete(
            "sm86",
            "an Ampere card such as the GeForce RTX 3060 12GB",
            12,
            PowerMode(watts=170, gpu_clock_mhz=1777, half_tflops=25.4, memory_bandwidth_gb_s=360.0),
        ),
        _discrete(
            "sm89",
            "an Ada card such as the GeForce RTX 4060",
            8,
            PowerMode(watts=115, gpu_clock_mhz=2460, half_tflops=30.2, memory_bandwidth_gb_s=272.0),
        ),
    )
}
