"""Telemetry of a discrete NVIDIA GPU through NVML, where the package nvidia-ml-py and a driver are installed."""

import importlib

from edgellm.jetson.telemetry import Telemetry


def read_discrete_gpu(index: int = 0) -> Telemetry | None:
    """A reading of GPU `index`; None without NVML or such a GPU, or where NVML cannot answer, as on Jetson."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        return Telemetry(
            gpu_load=pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            gpu_clock_mhz=float(pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
            gpu_max_clock_mhz=float(pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
            temperatures_c={"gpu": float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU))},
            power_w=pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            memory_total_bytes=int(memory.total),
            memory_available_bytes=int(memory.free),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
