"""A workload on a modelled cluster, without faults."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.policies import POLICIES
from edgellm.orchestrator.policies.cost import CostModel
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.clients import Ask
from edgellm.orchestrator.sim.device import DeviceModel, ModelCost, device_model, link_model
from edgellm.orchestrator.sim.machines import NodePlan, toy_bundle
from edgellm.orchestrator.sim.network import LinkModel, Scale
from edgellm.orchestrator.sim.report import Report, report
from edgellm.orchestrator.sim.story import Story
from edgellm.orchestrator.sim.toy import HIDDEN_SIZE, toy_contract
from edgellm.orchestrator.sim.workload import Arrival, poisson, read_trace
from edgellm.orchestrator.sim.world import World, simulated_world

LONGEST_S: Final = 3600.0
_WARM_UP_S: Final = 1.0
"""Nodes have joined by then."""


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
    decode_stages: int = 1
    """Into which the model is cut; as many decode nodes carry it together."""
    prefill_class: str = "orin-nx-16gb"
    decode_class: str = "orin-nano-8gb"
    kv_blocks: int = 2048
    """Of all layers, as far as a device's memory goes: of its stage's layers it holds as many more."""
    hot_copies: bool = True
    policy: str = "dual_pool"
    seed: int = 0


def simulate(config: RunConfig) -> Report:
    """Raises TraceError for a bad trace, KeyError for an unknown device class or policy."""
    rng, cost, real = random.Random(config.seed), ModelCost(), link_model(config.decode_class)
    arrivals = _arrivals(config, rng)
    with TemporaryDirectory() as folder:
        stages = config.decode_stages
        bundle = toy_bundle(Path(folder), num_layers=stages, num_stages=stages)
        kv_scale = cost.kv_bytes_per_token / toy_contract(stages).bytes_per_token
        scale = Scale(kv=kv_scale, hidden=cost.hidden_size / HIDDEN_SIZE)
        policy = _policy(config.policy, real, scale)
        story = Story(wanted=False)
        with simulated_world(
            bundle,
            policy,
            {"hot_copies": config.hot_copies},
            seed=config.seed,
            link=real,
            story=story,
            scale=scale,
            check=False,
        ) as world:
            _fill(world, config, cost, arrivals)
            world.run(LONGEST_S)
            return report([client.finished for client in world.clients], world.loop.time() - _WARM_UP_S)


def _fill(world: World, config: RunConfig, cost: ModelCost, arrivals: list[Arrival]) -> None:
    stages, prefill, decode = config.decode_stages, config.prefill_class, config.decode_class
    for number in range(config.prefill_nodes):
        _add_node(world, f"prefill{number}", "prefill-tp0of1", device_model(prefill, cost), config.kv_blocks)
    for number in range(config.decode_nodes):
        engine = f"decode-pp{number % stages}of{stages}"
        _add_node(world, f"decode{number}", engine, device_model(decode, cost), config.kv_blocks * stages)
    for number, arrival in enumerate(arrivals):
        world.add_client(
            Ask(
                name=f"r{number}",
                at_s=_WARM_UP_S + arrival.arrival_s,
                prompt_tokens=arrival.prompt_tokens,
                max_tokens=arrival.max_tokens,
            )
        )


def _add_node(world: World, name: str, engine: str, device: DeviceModel, kv_blocks: int) -> None:
    world.add_node(NodePlan(name=name, engine=engine, device=device, kv_blocks=kv_blocks))


def _policy(name: str, link: LinkModel, scale: Scale) -> Callable[[], Policy]:
    """The policy as it is, but told of the simulated link in the toy model's bytes."""
    speed = link.bytes_per_s / scale.kv
    cost = CostModel(same_host_bytes_per_s=speed, network_bytes_per_s=speed, network_latency_s=link.latency_s)
    return (lambda: DualPool(cost=cost)) if name == DualPool.name else POLICIES[name]


def _arrivals(config: RunConfig, rng: random.Random) -> list[Arrival]:
    if config.trace is not None:
        return read_trace(config.trace)
    return list(poisson(rng, config.rate, config.count, config.prompt_tokens, config.max_tokens))
