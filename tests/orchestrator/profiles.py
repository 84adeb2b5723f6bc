"""Configurations and nodes that nobody runs, for tests of the core alone."""

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.values import EngineProfile, NodeId, NodeProfile, Role

BUNDLE, CONTRACT = "simulated-bundle", "simulated-contract"
LAYERS = 4


def simulated_config(**bounds: float) -> CoreConfig:
    """For nodes made by `simulated_profile`."""
    return CoreConfig(
        bundle_sha256=BUNDLE,
        kv_contract_sha256=CONTRACT,
        num_layers=LAYERS,
        block_tokens=32,
        **bounds,  # type: ignore[arg-type]
    )


def simulated_profile(
    name: str, role: Role, *, device_class: str, kv_blocks: int, kv_bytes_per_token: int, half_engine: bool = True
) -> NodeProfile:
    """A node of one role; a decode node has the half-precision engine as well where `half_engine`."""
    phases: list[Role] = [role]
    if role == "decode" and half_engine:
        phases.append("prefill")
    return NodeProfile(
        node_id=NodeId(name),
        pid=1,
        role=role,
        device_class=device_class,
        bundle_sha256=BUNDLE,
        kv_contract_sha256=CONTRACT,
        engines=tuple(_engine(phase) for phase in phases),
        kv_blocks=kv_blocks,
        exchange_address=name,
        host_id=name,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def _engine(phase: Role) -> EngineProfile:
    return EngineProfile(
        name=f"{phase}-sim",
        phase=phase,
        first_layer=0,
        num_layers=LAYERS,
        precision="toy",
        max_sequences=64,
        max_seq_len=8192,
    )
