"""A workload on a modelled cluster, without faults."""

import random
from dataclasses import dataclass
from pathlib import Path

from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.sim.cluster import (
    Arrival,
    poisson,
    read_trace,
    requests,
    simulated_config,
    simulated_profile,
)
from edgellm.orchestrator.sim.device import ModelCost, device_model, link_model
from edgellm.orchestrator.sim.report import Report, report
from edgellm.orchestrator.sim.world import World

LONGEST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A cluster of TinyLlama-sized models and what is asked of it."""

    trace: Path | None = None
    """Instead of Poisson arrivals."""
    rate: float = 2.0
    """Requests per second."""
    count: int = 200
    prompt_tokens: int = 512
    max_tokens: int = 128
    prefill_nodes: int = 1
    decode_nodes: int = 2
    prefill_class: str = "orin-nx-16gb"
    decode_class: str = "orin-nano-8gb"
    kv_blocks: int = 2048
    seed: int = 0


def simulate(config: RunConfig, policy: Policy) -> Report:
    """Raises TraceError for a bad trace, KeyError for an unknown device class."""
    rng = random.Random(config.seed)
    world = World(Core(simulated_config(), policy), rng, link_model(config.decode_class), check=False)
    cost = ModelCost()
    pools = (
        ("prefill", config.prefill_nodes, config.prefill_class),
        ("decode", config.decode_nodes, config.decode_class),
    )
    for role, count, device_class in pools:
        for number in range(count):
            profile = simulated_profile(
                f"{role}{number}",
                "prefill" if role == "prefill" else "decode",
                device_class=device_class,
                kv_blocks=config.kv_blocks,
                kv_bytes_per_token=cost.kv_bytes_per_token,
            )
            world.add_node(profile, device_model(device_class, cost))
    for arrival_s, spec in requests(rng, _arrivals(config, rng)):
        world.submit_at(arrival_s, spec)
    world.run(LONGEST_S)
    return report(list(world.clients.requests.values()), world.timeline.now_s)


def _arrivals(config: RunConfig, rng: random.Random) -> list[Arrival]:
    if config.trace is not None:
        return read_trace(config.trace)
    return list(poisson(rng, config.rate, config.count, config.prompt_tokens, config.max_tokens))
