"""How long a step takes on a device, and KV on a link."""

from dataclasses import dataclass

from edgellm.engines.spec import Phase
from edgellm.jetson.profiles import PROFILES
from edgellm.orchestrator.sim.network import LinkModel


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model costs per token; the defaults are TinyLlama 1.1B."""

    parameters: float = 1.1e9
    int4_bytes: float = 0.64e9
    """Weights a decode step reads."""
    kv_bytes_per_token: int = 45_056
    hidden_size: int = 2048


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """Linear step times of a whole model: reading is bound by arithmetic, decoding by memory."""

    read_token_s: float
    """Half precision, per prompt token."""
    step_s: float
    """A decode step of one sequence."""
    row_s: float
    """Each further row of a decode step."""
    overhead_s: float = 0.0005
    """Of every step, also one of few layers."""

    def seconds(self, phase: Phase, rows: int, share: float) -> float:
        """A step of `rows` rows through this share of the layers."""
        whole_s = self.read_token_s * rows if phase == "prefill" else self.step_s + self.row_s * (rows - 1)
        return self.overhead_s + share * whole_s


def device_model(device_class: str, cost: ModelCost) -> DeviceModel:
    """From a device profile: peak figures times its efficiencies. Raises KeyError for an unknown class."""
    profile = PROFILES[device_class]
    mode = profile.modes[0]
    flops = 1e12 * mode.half_tflops * profile.compute_efficiency
    bandwidth = 1e9 * mode.memory_bandwidth_gb_s * profile.bandwidth_efficiency
    return DeviceModel(
        read_token_s=2 * cost.parameters / flops,
        step_s=cost.int4_bytes / bandwidth,
        row_s=2 * cost.parameters / flops,
    )


def link_model(device_class: str) -> LinkModel:
    profile = PROFILES[device_class]
    return LinkModel(latency_s=profile.link_latency_ms / 1e3, bytes_per_s=1e9 * profile.link_gb_s)
